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
        """(1, n) -> (1, n, dim)"""
        x = sinusoidal_embedding(timesteps).astype(self.linear_1.bias.dtype)
        return self.linear_2(nn.silu(self.linear_1(x)))


class AdaLayerNormSingle(nn.Module):
    """One modulation network shared by all blocks: `rows` vectors of width `dim` per noise level."""

    def __init__(self, dim: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.emb = nn.Module()
        self.emb.timestep_embedder = TimestepEmbedder(dim)
        self.linear = Linear(dim, rows * dim)

    def __call__(self, timesteps: mx.array) -> tuple[mx.array, mx.array]:
        """timesteps (1, n) -> modulation (1, n, rows, dim), embedded timestep (1, n, dim)."""
        embedded = self.emb.timestep_embedder(timesteps)
        modulation = self.linear(nn.silu(embedded))
        return modulation.reshape(*timesteps.shape, self.rows, -1), embedded


class Rows:
    """A block's table added to the modulation of one call: a vector of width `dim` per row and noise level."""

    def __init__(self, table: mx.array, modulation: mx.array) -> None:
        """table (rows, dim) in float32, modulation (1, n, rows, dim) of n noise levels."""
        rows, scales = _added(table, modulation)
        self._rows, self._scales = (mx.split(values, table.shape[0], axis=2) for values in (rows, scales))

    def __getitem__(self, row: int) -> mx.array:
        """(1, n, dim)"""
        return self._rows[row].squeeze(2)

    def scale(self, row: int) -> mx.array:
        """1 + row, (1, n, dim)"""
        return self._scales[row].squeeze(2)


@mx.compile
def _added(table: mx.array, modulation: mx.array) -> tuple[mx.array, mx.array]:
    """table (rows, dim) + modulation (1, n, rows, dim), and 1 more than that: summed in float32 and cast back to the
    stream's dtype, since a float32 table must not promote a bf16 stream."""
    total = (table + modulation.astype(mx.float32)).astype(modulation.dtype)
    return total, 1 + total


def rms_modulate(x: mx.array, scale: mx.array, shift: mx.array, eps: float, index: mx.array | None = None) -> mx.array:
    """rms(x) * scale + shift: x is (1, tokens, dim), scale and shift (1, n, dim), index (1, tokens, 1) into the n noise
    levels where there are several."""
    if index is None:  # one vector for all tokens: the norm kernel applies it
        return mx.fast.rms_norm(x, scale.reshape(-1), eps) + shift
    return scale_shift(mx.fast.rms_norm(x, None, eps), scale, shift, index)


def scale_shift(x: mx.array, scale: mx.array, shift: mx.array, index: mx.array | None = None) -> mx.array:
    """x * scale + shift, shapes as in `rms_modulate`."""
    if index is None:
        return _scale_shift(x, scale, shift)
    return _scale_shift_by_token(x, _vectors(scale), _vectors(shift), index)


def gated_add(x: mx.array, update: mx.array, gate: mx.array, index: mx.array | None = None) -> mx.array:
    """x + update * gate, shapes as in `rms_modulate`."""
    if index is None:
        return _gated_add(x, update, gate)
    return _gated_add_by_token(x, update, _vectors(gate), index)


@mx.compile
def _scale_shift(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    return x * scale + shift


@mx.compile
def _gated_add(x: mx.array, update: mx.array, gate: mx.array) -> mx.array:
    return x + update * gate


@mx.compile
def _scale_shift_by_token(x: mx.array, scales: list[mx.array], shifts: list[mx.array], index: mx.array) -> mx.array:
    return x * _chosen(scales, index) + _chosen(shifts, index)


@mx.compile
def _gated_add_by_token(x: mx.array, update: mx.array, gates: list[mx.array], index: mx.array) -> mx.array:
    return x + update * _chosen(gates, index)


def _vectors(values: mx.array) -> list[mx.array]:
    """(1, n, dim) -> n of (1, 1, dim)"""
    return list(mx.split(values, values.shape[1], axis=1))


def _chosen(vectors: list[mx.array], index: mx.array) -> mx.array:
    """Every token's own one of a few vectors (1, 1, dim), as the stream (1, tokens, dim); in a fused kernel this takes
    no memory, gathered it would take as much as the stream."""
    first, *others = vectors
    for number, vector in enumerate(others, start=1):
        first = mx.where(index == number, vector, first)
    return first
