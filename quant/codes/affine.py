"""The search for scales and biases: value ~ scale * code + bias.

Two things differ from mx.quantize, at no cost in a model's size or speed: codes are computed against scale and bias
*as stored* (rounded to the tensor's dtype), and a search finds the scale and bias with the smallest squared error: it
tries a few ranges, then refines the best by least squares. At 8 bits the ranges differ by parts of a step: rounding is
chance there, and the best of several tries is 5 % better than the first."""

from collections.abc import Mapping
from dataclasses import dataclass

from ltx2.convert.tensors.steps import from_float32
from ltx2.quant.codes.arithmetic import Values
from ltx2.quant.codes.search import TINY, Fit, Search, squared
from ltx2.runtime.files.tensors import Array

Ranges = tuple[tuple[float, float], ...]

# Ranges to try, as kept fractions of the (lower, upper) half of a group's range. Chosen greedily by their error on
# other draws of the weights in tests/support/layers.py. At 4 bits, three more gain less than 0.5 %.
RANGES: Mapping[int, Ranges] = {
    2: ((0.65, 0.65), (0.5, 0.75), (0.75, 0.55), (0.8, 0.45), (0.7, 0.75)),
    3: ((0.85, 0.85), (0.95, 0.8), (0.8, 0.95), (0.85, 0.9), (0.95, 0.95)),
    4: ((0.97, 0.97), (0.91, 1.0), (1.0, 0.94), (0.94, 0.97), (1.0, 0.91)),
    5: ((0.98, 0.98), (0.96, 1.01), (1.01, 0.98), (0.98, 1.0), (1.0, 1.0)),
    6: ((0.995, 1.0), (1.005, 0.99), (0.985, 1.005), (1.0, 0.995), (0.995, 1.015)),
    8: ((0.999, 1.005), (1.005, 1.001), (0.9965, 1.002), (1.001, 0.995), (1.005, 1.005),
        (1.002, 1.005), (0.995, 0.9965), (1.0035, 0.995)),
}  # fmt: skip

# Also tried where values have weights: the largest of a group may hardly count.
WEIGHTED_RANGES: Mapping[int, Ranges] = {
    2: ((0.45, 0.6), (0.3, 0.8), (0.9, 0.3)),
    3: ((0.7, 0.8), (0.65, 0.95), (0.95, 0.65)),
    4: ((0.84, 0.97), (1.0, 0.84), (0.88, 0.88)),
    5: ((0.94, 0.98), (0.98, 0.94), (0.91, 1.0)),
    6: ((0.98, 1.0), (1.0, 0.97), (0.98, 0.98)),
    8: ((0.995, 0.995), (1.0, 0.993), (0.99, 1.005)),
}
REFITS: Mapping[int, int] = {2: 3, 3: 2, 4: 2, 5: 1, 6: 1, 8: 0}  # from 3 bits on, one more gains less than 0.3 %


@dataclass(frozen=True)
class AffineSearch(Search):
    """The groups of a block, to be stored with `bits` and with scales of `dtype`."""

    bits: int
    dtype: str

    @property
    def top(self) -> float:
        """The largest code."""
        return float(2**self.bits - 1)

    def best(self) -> Fit:
        xp = self.on.xp
        low, high = self.values.min(axis=0), self.values.max(axis=0)
        half = (high - low) / 2
        center = (low + half) + 0.0  # never -0, which a minimum may or may not return
        unit = xp.where(half > TINY, half, 1.0)
        ranges = RANGES[self.bits] + (WEIGHTED_RANGES[self.bits] if self.weights else ())
        lower, upper = xp.split(xp.array(ranges, dtype=xp.float32), 2, axis=1)  # (ranges, 1)
        scale, bias = self._rounded((lower + upper) * half / self.top, center - lower * half)
        fit = self._refitted(Fit(scale, bias, self._errors(scale, bias) * squared(scale / unit)).best(xp), unit)
        return fit._replace(error=fit.error * squared(unit))

    def _rounded(self, scale: Values, bias: Values) -> tuple[Values, Values]:
        """Scale and bias (..., groups) as stored; the scale of a constant group is 1."""
        scale, bias = (self.on.rounded(values, self.dtype) for values in (scale, bias))
        return self.on.xp.where(scale > 0, scale, 1.0), bias

    def _errors(self, scale: Values, bias: Values) -> Values:
        """Summed squares of the error in units of the scale, for scales and biases (fits, groups)."""
        return self.on.affine_errors(self.values, scale, bias, self.top, *self.weights)

    def _refitted(self, best: Fit, unit: Values) -> Fit:
        """Least squares in turns: the best scale and bias for the codes, then the best codes for these. Errors are
        counted in `unit` (groups,), so that they do not overflow."""
        fit = best
        for _ in range(REFITS[self.bits]):
            scale, bias = self._rounded(*self._least_squares(fit))
            fit = Fit(scale, bias, self._errors(scale[None], bias[None])[0] * squared(scale / unit))
            best = best.better_of(fit, self.on.xp)
        return best

    def _least_squares(self, fit: Fit) -> tuple[Values, Values]:
        """Scale and bias (groups,): a value is scale * (q + r) + bias with codes q and remainders r, so r is fitted by
        a line in q."""
        r, q, qr, qq = self.on.affine_moments(self.values, fit.scale, fit.bias, self.top, *self.weights)
        count = self.on.group_sums(self.weights[0]) if self.weights else float(len(self.values))
        mean_q, mean_r = q / count, r / count
        spread = qq - q * mean_q
        slope = self.on.xp.where(spread > 0, (qr - r * mean_q) / spread, 0.0)
        scale, _ = self._rounded(fit.scale + fit.scale * slope, fit.bias)
        return scale, fit.bias + (fit.scale * mean_r + (fit.scale - scale) * mean_q)

    def change(self, fit: Fit) -> Values:
        return self.on.affine_rest(self.values, fit.scale, fit.bias, self.top)

    def codes(self, fit: Fit) -> Values:
        return self.on.affine_codes(self.values, fit.scale, fit.bias, self.top)

    def stored(self, scale: Array, bias: Array) -> tuple[Array, ...]:
        return from_float32(scale, self.dtype), from_float32(bias, self.dtype)
