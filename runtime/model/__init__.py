"""A model folder as data: layout, configurations, how weights are stored. No MLX."""
