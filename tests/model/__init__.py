"""A model folder as data."""
