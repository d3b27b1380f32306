"""Adaptive layer norm: from noise levels to the shifts, scales and gates that steer every block."""

import math

import mlx.core as mx
import mlx.nn as nn

from ltx2.runtime.layers.linear import Linear

FREQUENCIES = 256  # width of the sinusoidal embedding


def sinusoidal_embedding(timesteps: mx.array) -> mx.array:
    """(1, n) -> (1, n, 256), float32: cosines, then sines, of t * 10000^(-k/128)."""
    half = FREQUENCIES // 2
    exponents = mx.arange(half, dtype=mx.float32) * (-math.log(10000.0) / half)
    angles = timesteps.astype(mx.float32)[..., None] * mx.exp(exponents)
    return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)


class TimestepEmbedder(nn.Module):
    """Two linears with SiLU between, on the sinusoidal embedding."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = Linear(FREQUENCIES, dim)
        self.linear_2 = Linear(dim, dim)

    def __call__(self, timesteps: mx.array) -> mx.array:
        x = sinusoidal_embedding(timesteps).astype(self.linear_1.bias.dtype)
        return self.linear_2(nn.silu(self.linear_1(x)))


class _Embedding(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(dim)


class AdaLayerNormSingle(nn.Module):
    """One modulation network shared by all blocks: `rows` vectors of width `dim` per noise level."""

    def __init__(self, dim: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.emb = _Embedding(dim)
        self.linear = Linear(dim, rows * dim)

    def __call__(self, timesteps: mx.array) -> tuple[mx.array, mx.array]:
        """timesteps (1, n) -> modulation (1, n, rows, dim), embedded timestep (1, n, dim)."""
        embedded = self.emb.timestep_embedder(timesteps)
        modulation = self.linear(nn.silu(embedded))
        return modulation.reshape(*timesteps.shape, self.rows, -1), embedded


def add_table(table: mx.array, modulation: mx.array, index: mx.array | None = None) -> list[mx.array]:
    """Rows of table (rows, dim, float32) + modulation (1, n, rows, dim), summed in float32 and cast back to the
    stream's dtype (a float32 table must not promote a bf16 stream): a list of (1, n, dim). With an `index` (tokens,)
    into the n noise levels, every token's own: (1, tokens, dim)."""
    total = (table + modulation.astype(mx.float32)).astype(modulation.dtype)
    rows = (row.squeeze(2) for row in mx.split(total, table.shape[0], axis=2))
    return [row if index is None else row[:, index] for row in rows]


def rms_modulate(x: mx.array, scale: mx.array, shift: mx.array, eps: float) -> mx.array:
    """rms(x) * (1 + scale) + shift; x is (1, tokens, dim), scale and shift (1, tokens or 1, dim)."""
    if scale.shape[1] == 1:  # one vector for all tokens: the norm kernel applies it
        return mx.fast.rms_norm(x, 1 + scale.reshape(-1), eps) + shift
    return scale_shift(mx.fast.rms_norm(x, None, eps), scale, shift)


@mx.compile
def scale_shift(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    """x * (1 + scale) + shift"""
    return x * (1 + scale) + shift


@mx.compile
def gated_add(x: mx.array, update: mx.array, gate: mx.array) -> mx.array:
    """x + update * gate"""
    return x + update * gate
