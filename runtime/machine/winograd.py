"""How many frames a Mac's GPU transforms at once where MLX convolves by Winograd's method: 3x3 kernels, as products of
matrices that have a row for every tile of 6x6 results and its channels as columns (backend/metal/conv.cpp).

Few frames take little memory. But a product computes 64 rows at least and reads all transformed kernels, 64 values for
9: a frame of 16x24 positions has 12 tiles, so that one at a time takes five times the arithmetic of sixteen together.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

TILE, RESULT = 8, 6  # positions that are transformed along each side, for so many results
ROWS = 128  # that a product should have

tell: Callable[[int], None] | None = None  # tells MLX how many frames; set by ltx2/__init__.py, on Macs only


def tiles_of(height: int, width: int) -> int:
    """Tiles of a frame of so many rows and columns of results."""
    return -(-height // RESULT) * -(-width // RESULT)


def frames_at_once(height: int, width: int) -> int:
    """How many frames of so many rows and columns are transformed together: as few as fill a product."""
    return -(-ROWS // tiles_of(height, width))


@contextmanager
def transforming(height: int, width: int) -> Iterator[None]:
    """Transform so many of such frames at once in convolutions that are evaluated inside; one at a time afterwards."""
    if tell is None:
        yield
        return
    tell(frames_at_once(height, width))
    try:
        yield
    finally:
        tell(1)
