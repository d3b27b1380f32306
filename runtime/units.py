"""Bytes in words: one unit for all sizes."""

from math import floor, log10

GB = 10**9


def gb(count: int) -> str:
    """Bytes in GB: one digit after the point, and below 1 GB the first two digits that say something."""
    value = count / GB
    digits = 1 if not 0 < value < 1 else 1 - floor(log10(value))
    return f"{value:.{digits}f} GB"
