"""The matrices that rotate weights, block by block of their columns, before rounding.

A block's matrix is a Kronecker power of a 4 x 4 matrix, orthogonal and symmetric, so it is its own inverse. Its size is
a power of four: its entries, all of one absolute value, are powers of two, which every float type has exactly, and its
products with codes are exact in float32.

Sylvester's first column is constant, so it collects the inputs' common part in one value. In a regular matrix all
columns have the same sum (ConvRot, arXiv:2512.03673; the order is that of ComfyUI's `convrot`)."""

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ltx2.runtime.files.tensors import Array

SYLVESTER, REGULAR = "sylvester", "regular"
BASES = {
    SYLVESTER: ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1)),
    REGULAR: ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1)),
}
ROTATIONS = (16, 64, 256)  # sizes of blocks


@cache
def hadamard(size: int, kind: str = SYLVESTER) -> "Array":
    """The matrix (size, size) of a block, float32."""
    import numpy as np  # here: help knows the names of rotations, and is instant

    base: Array = np.array(BASES[kind], np.float32) / 2
    matrix = base
    while len(matrix) < size:
        matrix = np.kron(matrix, base)
    return matrix


def rotated_rows(values: "Array", size: int, kind: str = SYLVESTER) -> "Array":
    """float32 values (..., width) with every block of `size` rotated; rotating them again gives back the values."""
    return (values.reshape(-1, size) @ hadamard(size, kind)).reshape(values.shape)
