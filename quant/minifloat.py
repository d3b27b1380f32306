"""The search for block scales of FP4 and FP8 codes: value ~ scale * code, scales of few bits themselves.

Codes are E2M1 (0 to 6) or E4M3 (0 to 448). Scales are powers of two (E8M0), or E4M3, times one multiplier per tensor
that brings them into the middle of E4M3's range: without it, most block scales of a trained network are subnormal and
hardly differ. The few scales near the one that fits the largest value are all tried."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import frexp
from typing import NamedTuple

import mlx.core as mx

from ltx2.convert.steps import Storage
from ltx2.quant.blocks import compiled_on_gpu, group_sums
from ltx2.quant.kinds import kind_of
from ltx2.quant.search import TINY, Fit, Search, squares

EXPONENT = 0x7F800000  # of a float32
LARGEST_SCALE = 448.0  # of E4M3, whose normal numbers begin at 2**-6
AIM = 128.0  # the largest block of a tensor gets a scale of one to two times this


class Grid(NamedTuple):
    """The values of a code: `top` is the largest; between 2**low and it there are 2**mantissa values per octave, below
    they are evenly spaced."""

    top: float
    mantissa: int
    low: int


E2M1, E4M3 = Grid(6.0, 1, 0), Grid(448.0, 3, -6)

# Scales tried around the one that just fits: of E8M0 in powers of two, of E4M3 in its steps (4 and 5 are half as much
# again: the largest value comes to 4, below which the grid is finer than between 4 and 6).
OFFSETS: Mapping[str, tuple[int, ...]] = {"mxfp4": (0, 1), "mxfp8": (0, 1), "nvfp4": (0, 1, -1, 4, 5)}
# Tried as well where values count differently: the largest of a group may be one that hardly counts.
WEIGHTED_OFFSETS: Mapping[str, tuple[int, ...]] = {"mxfp4": (-1,), "mxfp8": (), "nvfp4": (2, -2, 3, 6)}


def output_multiplier(largest: float) -> float:
    """The multiplier, a power of two, for a tensor whose largest absolute value is given."""
    _, exponent = frexp(largest / (E2M1.top * AIM))
    return 2.0 ** max(exponent - 1, -100) if largest else 1.0



@dataclass(frozen=True)
class MinifloatSearch(Search):
    """The groups of a block, divided by the tensor's multiplier."""

    storage: Storage

    @property
    def grid(self) -> Grid:
        """The values that a code may have."""
        return E4M3 if self.storage.bits == 8 else E2M1

    def best(self) -> Fit:
        largest = mx.abs(self.values).max(axis=0)
        unit = mx.where(largest > TINY, largest, 1.0)
        scale = self._scales(largest)
        values, *weights = (a[:, None] for a in (self.values, *self.weights))
        ratio = scale / unit  # errors in units do not overflow
        errors = group_sums(_errors(values, scale, *self.grid, *weights)) * (ratio * ratio)
        fit = Fit(scale, mx.zeros_like(scale), errors).best()
        limit = LARGEST_SCALE * self.grid.top if kind_of(self.storage).multiplied else mx.inf
        return fit._replace(error=mx.where(largest <= limit, fit.error * (unit * unit), mx.nan))

    def _scales(self, largest: mx.array) -> mx.array:
        """The scales to try (offsets, groups), around the one that brings the largest value to the top of the grid."""
        mode = self.storage.mode
        offsets = mx.array(OFFSETS[mode] + (WEIGHTED_OFFSETS[mode] if self.weights else ()))[:, None]
        if kind_of(self.storage).multiplied:
            codes = mx.to_fp8(largest / self.grid.top).astype(mx.int32) + offsets
            return mx.from_fp8(mx.clip(codes, 1, 126).astype(mx.uint8), mx.float32)
        exponents = (_bits(largest) >> 23).astype(mx.int32) - (frexp(self.grid.top)[1] - 1) + offsets
        return (mx.clip(exponents, 1, 254).astype(mx.uint32) << 23).view(mx.float32)

    def codes(self, fit: Fit) -> mx.array:
        return (_fp8_codes if self.storage.bits == 8 else _fp4_codes)(self.values, fit.scale, *self.grid)

    def stored(self, fit: Fit) -> tuple[mx.array, ...]:
        multiplied = kind_of(self.storage).multiplied
        return (mx.to_fp8(fit.scale) if multiplied else (_bits(fit.scale) >> 23).astype(mx.uint8),)


def _bits(values: mx.array) -> mx.array:
    return values.view(mx.uint32)


def _nearest(values: mx.array, scale: mx.array, top: float, mantissa: int, low: int) -> tuple[mx.array, mx.array]:
    """Absolute values in units of the scale, and the nearest values of the grid, half to even."""
    steps = mx.abs(values) / scale
    sizes = mx.minimum(steps, top)
    octave = mx.maximum((_bits(sizes) & EXPONENT).view(mx.float32), 2.0**low)
    coarse = octave * float(3 << (22 - mantissa))  # so large that adding it leaves just `mantissa` bits
    return steps, (sizes + coarse) - coarse


@compiled_on_gpu
def _errors(
    values: mx.array, scale: mx.array, top: float, mantissa: int, low: int, *weights: mx.array
) -> mx.array:
    steps, nearest = _nearest(values, scale, top, mantissa, low)
    return squares(steps - nearest, *weights)


@compiled_on_gpu
def _fp4_codes(values: mx.array, scale: mx.array, top: float, mantissa: int, low: int) -> mx.array:
    """0, 0.5, 1, 1.5, 2, 3, 4, 6 are codes 0 to 7; bit 3 is the sign, never that of a zero."""
    _, sizes = _nearest(values, scale, top, mantissa, low)
    codes = mx.minimum(mx.minimum(sizes * 2.0, sizes + 2.0), sizes * 0.5 + 4.0)
    return mx.where((values < 0) & (sizes > 0), codes + 8.0, codes).astype(mx.uint32)


@compiled_on_gpu
def _fp8_codes(values: mx.array, scale: mx.array, top: float, mantissa: int, low: int) -> mx.array:
    _, sizes = _nearest(values, scale, top, mantissa, low)
    return mx.to_fp8(mx.where((values < 0) & (sizes > 0), -sizes, sizes)).astype(mx.uint32)
