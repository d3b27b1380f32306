"""Rotated inputs: weights round better when no single one is much larger than the rest, and a linear layer does not
change when its inputs and its weights are rotated alike: x W^T = (x Q) (W Q)^T.

Q is block-diagonal (runtime/model/hadamard.py) and exact in 16 bits: at run time only the sums of products are rounded.
(QuaRot, arXiv:2404.00456, rotates by one matrix as wide as the layer.)"""

from functools import cache

import mlx.core as mx

from ltx2.runtime.model.hadamard import SYLVESTER, hadamard


def rotated(x: mx.array, size: int, kind: str = SYLVESTER) -> mx.array:
    """x (..., width) with every block of `size` values rotated; width is a multiple of it. In x's dtype."""
    blocks = x.reshape(*x.shape[:-1], -1, size) @ _matrix(size, kind, x.dtype)
    return blocks.reshape(x.shape)


@cache
def _matrix(size: int, kind: str, dtype: mx.Dtype) -> mx.array:
    return mx.array(hadamard(size, kind), dtype)
