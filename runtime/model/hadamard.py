"""The matrices that weights are rotated by, block by block of their columns, before they are rounded.

A block's matrix is a Kronecker power of one of 4 x 4, orthogonal and symmetric: it is its own inverse. Its size is a
power of four, so that its entries, of one absolute value, are powers of two, which every float type has exactly; the
products of codes with it are exact in float32.

Sylvester's first column only adds up, so that what all inputs share ends in one. The columns of a regular matrix all
add up alike (ConvRot, arXiv:2512.03673; the order is that of ComfyUI's `convrot`)."""

from functools import cache

import numpy as np

from ltx2.runtime.files.tensors import Array

SYLVESTER, REGULAR = "sylvester", "regular"
BASES = {
    SYLVESTER: ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1)),
    REGULAR: ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1)),
}
ROTATIONS = (16, 64, 256)  # sizes of blocks


@cache
def hadamard(size: int, kind: str = SYLVESTER) -> Array:
    """The matrix of a block."""
    base = np.array(BASES[kind], np.float32) / 2
    matrix = base
    while len(matrix) < size:
        matrix = np.kron(matrix, base)
    return matrix


def rotated_rows(values: Array, size: int, kind: str = SYLVESTER) -> Array:
    """float32 values (..., width) with every block of `size` rotated; once more, and they are what they were."""
    return (values.reshape(-1, size) @ hadamard(size, kind)).reshape(values.shape)
