"""The search for block scales of FP4 and FP8 codes: value ~ scale * code, scales of few bits themselves.

Codes are E2M1 (0 to 6) or E4M3 (0 to 448). Scales are powers of two (E8M0), or E4M3, times one multiplier per tensor
that brings them into the middle of E4M3's range: without it, most block scales of a trained network are subnormal and
hardly differ. The search tries the few scales near the one that fits the largest value."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import frexp, inf, nan

import numpy as np

from ltx2.quant.codes.arithmetic import E2M1, E4M3, EXPONENT, Grid, Values
from ltx2.quant.codes.search import TINY, Fit, Search, squared
from ltx2.runtime.files.tensors import Array
from ltx2.runtime.model.forms import Form

AIM = 128.0  # the largest block of a tensor gets a scale of one to two times this

# Scales to try around the one that just fits: of E8M0 in powers of two, of E4M3 in its steps (4 and 5 are half as much
# again: the largest value becomes 4, below which the grid is finer than between 4 and 6).
OFFSETS: Mapping[str, tuple[int, ...]] = {"mxfp4": (0, 1), "mxfp8": (0, 1), "nvfp4": (0, 1, -1, 4, 5)}
# Also tried where values have weights: the largest of a group may hardly count.
WEIGHTED_OFFSETS: Mapping[str, tuple[int, ...]] = {"mxfp4": (-1,), "mxfp8": (), "nvfp4": (2, -2, 3, 6)}


def output_multiplier(largest: float) -> float:
    """The multiplier, a power of two, for a tensor whose largest absolute value is given."""
    _, exponent = frexp(largest / (E2M1.top * AIM))
    return 2.0 ** max(exponent - 1, -100) if largest else 1.0


@dataclass(frozen=True)
class MinifloatSearch(Search):
    """The groups of a block, divided by the tensor's multiplier."""

    form: Form

    @property
    def grid(self) -> Grid:
        """The values that a code may have."""
        return E4M3 if self.form.bits == 8 else E2M1

    def best(self) -> Fit:
        xp = self.on.xp
        largest = xp.maximum(self.values.max(axis=0), -self.values.min(axis=0)) + 0.0  # never -0
        unit = xp.where(largest > TINY, largest, 1.0)
        scale = self._scales(largest)
        errors = self.on.grid_errors(self.values, scale, self.grid, *self.weights) * squared(scale / unit)
        fit = Fit(scale, xp.zeros_like(scale), errors).best(xp)
        limit = E4M3.top * self.grid.top if self.form.multiplied else inf
        return fit._replace(error=xp.where(largest <= limit, fit.error * squared(unit), nan))

    def _scales(self, largest: Values) -> Values:
        """The scales to try (offsets, groups), around the one that brings the `largest` value (groups,) to the top of
        the grid."""
        mode, xp = self.form.mode, self.on.xp
        offsets = OFFSETS[mode] + (WEIGHTED_OFFSETS[mode] if self.weights else ())
        beside = xp.array(offsets, dtype=xp.int32)[:, None]
        if self.form.multiplied:
            return self._e4m3(xp.clip(self._e4m3_code(largest / self.grid.top) + beside, 1, 126))
        exponents = self.on.cast(self.on.view(largest, "uint32") >> 23, "int32") - (frexp(self.grid.top)[1] - 1)
        return self.on.view(self.on.cast(xp.clip(exponents + beside, 1, 254), "uint32") << 23, "float32")

    def _e4m3_code(self, values: Values) -> Values:
        """The codes of the nearest numbers of E4M3 to positive values of any shape, int32."""
        xp, sizes = self.on.xp, self.on.xp.minimum(values, E4M3.top)
        octave = self.on.view(self.on.view(sizes, "uint32") & EXPONENT, "float32")
        coarse = xp.maximum(octave, 2.0**E4M3.low) * E4M3.coarse
        nearest = (sizes + coarse) - coarse
        normal = self.on.cast(self.on.view(nearest, "uint32") >> E4M3.shift, "int32") - E4M3.bias
        return xp.where(nearest < 2.0**E4M3.low, self.on.cast(nearest * (1 / E4M3.step), "int32"), normal)

    def _e4m3(self, codes: Values) -> Values:
        """The numbers that codes (int32, any shape) stand for."""
        normal = self.on.view(self.on.cast(codes + E4M3.bias, "uint32") << E4M3.shift, "float32")
        return self.on.xp.where(codes < 1 << E4M3.mantissa, self.on.cast(codes, "float32") * E4M3.step, normal)

    def change(self, fit: Fit) -> Values:
        return self.on.grid_rest(self.values, fit.scale, self.grid)

    def codes(self, fit: Fit) -> Values:
        return self.on.grid_codes(self.values, fit.scale, self.grid)

    def stored(self, scale: Array, bias: Array) -> tuple[Array, ...]:
        bits = scale.view(np.uint32)
        if not self.form.multiplied:
            return ((bits >> 23).astype(np.uint8),)
        normal = (bits >> E4M3.shift).astype(np.int32) - E4M3.bias
        return (np.where(scale < 2.0**E4M3.low, scale / np.float32(E4M3.step), normal).astype(np.uint8),)
