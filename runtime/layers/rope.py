"""Rotary position embedding over real-valued coordinates (seconds, pixels), in the split layout of the published
checkpoints. Frequencies are generated in float64 and angles kept in float32: the largest frequency is 15,708 rad,
where a 16-bit table destroys the positions."""

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

Positions = np.ndarray[Any, np.dtype[np.float32]]


class Rope(NamedTuple):
    """Rotation tables, float32, both (1, tokens, heads, head_dim / 2)."""

    cos: mx.array
    sin: mx.array


def rope_tables(
    positions: Positions, max_positions: tuple[float, ...], dim: int, heads: int, theta: float = 10000.0
) -> Rope:
    """Tables for tokens at `positions` (axes, tokens), for an attention of inner width `dim`.

    Each axis has n = dim // (2 * axes) frequencies theta^(j/(n-1)) * pi/2, applied to 2 * position / max - 1;
    angles run frequency-major, axis-minor, behind front padding that does not rotate (MODEL.md 2.4).
    """
    axes, tokens = positions.shape
    count = dim // (2 * axes)
    frequencies = (theta ** np.linspace(0.0, 1.0, count, dtype=np.float64) * (np.pi / 2)).astype(np.float32)
    cos, sin = [], []
    for axis in range(axes):
        # Few distinct coordinates per axis: evaluate those, then spread them over the tokens.
        values, token_value = np.unique(positions[axis], return_inverse=True)
        fraction = values.astype(np.float32) / np.float32(max_positions[axis])
        angles = frequencies * (2 * fraction - 1)[:, None]
        index = mx.array(token_value.reshape(-1).astype(np.int32))
        cos.append(mx.array(np.cos(angles))[index])
        sin.append(mx.array(np.sin(angles))[index])
    pad = dim // 2 - axes * count
    shape = (1, tokens, heads, dim // heads // 2)
    return Rope(_interleave(cos, pad, 1.0).reshape(shape), _interleave(sin, pad, 0.0).reshape(shape))


def _interleave(per_axis: list[mx.array], pad: int, fill: float) -> mx.array:
    """(tokens, n) per axis -> (tokens, pad + axes * n), frequency-major."""
    tokens = per_axis[0].shape[0]
    flat = mx.stack(per_axis, axis=-1).reshape(tokens, -1)
    return mx.pad(flat, [(0, 0), (pad, 0)], constant_values=fill)


@mx.compile
def _rotate(first: mx.array, second: mx.array, cos: mx.array, sin: mx.array, sign: mx.array) -> mx.array:
    """Both of each pair, broadcast over `sign`, which is -1 where the first is written and 1 where the second is."""
    own, other = mx.where(sign < 0, first, second), mx.where(sign < 0, second, first)
    return (own.astype(mx.float32) * cos + other.astype(mx.float32) * (sin * sign)).astype(first.dtype)


def apply_rope(x: mx.array, rope: Rope) -> mx.array:
    """Rotate the two halves of every head of `x` (batch, tokens, heads, head_dim) in float32; keeps x's dtype."""
    halves = x.reshape(*x.shape[:3], 2, -1)
    sign = mx.array([[-1.0], [1.0]])
    # Views, so that one fused kernel writes the result without a concatenation. None of them is reversed: a kernel
    # counts in 64 bits where a stride is negative.
    first, second = halves[..., :1, :], halves[..., 1:, :]
    return _rotate(first, second, rope.cos[..., None, :], rope.sin[..., None, :], sign).reshape(x.shape)


def rotate_pairs(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotate pairs of neighbouring values of `x` (..., dim) in float32, by tables that broadcast to (..., dim / 2);
    keeps x's dtype."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    sign = mx.array([-1.0, 1.0])
    return _rotate(pairs[..., :1], pairs[..., 1:], cos[..., None], sin[..., None], sign).reshape(x.shape)
