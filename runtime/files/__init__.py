"""Bytes on disk: paths, JSON, tensor files and ranges of them. No MLX, no model."""
