"""Rotated inputs: a linear layer's weights are easier to round when no few of them are large, and a layer does not
change when its inputs and its weights are rotated alike: x W^T = (x Q) (W Q)^T.

Q is block-diagonal, of normalised Hadamard matrices in Sylvester's order. Their size is a power of four, so that their
entries, of one absolute value, are powers of two, which every float type has exactly: what is rounded at run time are
the products' sums alone. (QuaRot, arXiv:2404.00456, rotates by one matrix as wide as the layer.)"""

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np


@cache
def hadamard(size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The symmetric, orthogonal matrix of a block."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(np.sqrt(size))


def rotated(x: mx.array, size: int) -> mx.array:
    """x (..., width) with every block of `size` values rotated; width is a multiple of it. In x's dtype."""
    blocks = x.reshape(*x.shape[:-1], -1, size) @ _matrix(size, x.dtype)
    return blocks.reshape(x.shape)


@cache
def _matrix(size: int, dtype: mx.Dtype) -> mx.array:
    return mx.array(hadamard(size), dtype)
