"""Tensor files, folders, configurations, media."""
