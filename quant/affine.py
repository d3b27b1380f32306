"""The search for scales and biases: value ~ scale * code + bias.

Two things differ from mx.quantize, at no cost in a model's size or speed: codes are computed against scale and bias
*as stored* (rounded to the tensor's dtype), and both are searched for the smallest squared error, from a few ranges
and by least squares from the best of them. At 8 bits the ranges differ by parts of a step: they draw lots, and the
luckiest rounding of a group is a tenth better than the first."""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from ltx2.quant.blocks import ROUND, compiled_on_gpu, group_sums
from ltx2.quant.search import TINY, Fit, Search, squares

Ranges = tuple[tuple[float, float], ...]

# Ranges tried, as the kept fractions of the (lower, upper) half of a group's range; found greedily over the layers of
# bench/layers.py. More of them gain less than 0.5 %.
RANGES: Mapping[int, Ranges] = {
    2: ((0.65, 0.65), (0.5, 0.75), (0.75, 0.55), (0.8, 0.45), (0.7, 0.75)),
    3: ((0.85, 0.85), (0.95, 0.8), (0.8, 0.95), (0.85, 0.9), (0.95, 0.95)),
    4: ((0.97, 0.97), (0.91, 1.0), (1.0, 0.94), (0.94, 0.97), (1.0, 0.91)),
    5: ((0.98, 0.98), (0.96, 1.01), (1.01, 0.98), (0.98, 1.0), (1.0, 1.0)),
    6: ((0.995, 1.0), (1.005, 0.99), (0.985, 1.005), (1.0, 0.995), (0.995, 1.015)),
    8: ((0.999, 1.005), (1.005, 1.001), (0.9965, 1.002), (1.001, 0.995), (1.005, 1.005),
        (1.002, 1.005), (0.995, 0.9965), (1.0035, 0.995)),
}  # fmt: skip

# Tried as well where values count differently: the largest of a group may be one that hardly counts.
WEIGHTED_RANGES: Mapping[int, Ranges] = {
    2: ((0.45, 0.6), (0.3, 0.8), (0.9, 0.3)),
    3: ((0.7, 0.8), (0.65, 0.95), (0.95, 0.65)),
    4: ((0.84, 0.97), (1.0, 0.84), (0.88, 0.88)),
    5: ((0.94, 0.98), (0.98, 0.94), (0.91, 1.0)),
    6: ((0.98, 1.0), (1.0, 0.97), (0.98, 0.98)),
    8: ((0.995, 0.995), (1.0, 0.993), (0.99, 1.005)),
}
REFITS: Mapping[int, int] = {2: 3, 3: 2, 4: 2, 5: 1, 6: 1, 8: 0}  # more gain less than 0.2 %


@dataclass(frozen=True)
class AffineSearch(Search):
    """The groups of a block, to be stored with `bits` and with scales of `dtype`."""

    bits: int
    dtype: mx.Dtype

    @property
    def top(self) -> float:
        """The largest code."""
        return float(2**self.bits - 1)

    def best(self) -> Fit:
        low, high = self.values.min(axis=0), self.values.max(axis=0)
        half = (high - low) / 2
        center = (low + half) + 0.0  # never -0, which a minimum may or may not return
        unit = mx.where(half > TINY, half, 1.0)
        ranges = RANGES[self.bits] + (WEIGHTED_RANGES[self.bits] if self.weights else ())
        lower, upper = mx.split(mx.array(ranges), 2, axis=1)  # (ranges, 1)
        scale, bias = self._stored((lower + upper) * half / self.top, center - lower * half)
        fit = self._refitted(Fit(scale, bias, self._errors(scale, bias) * _squared(scale / unit)).best(), unit)
        return fit._replace(error=fit.error * _squared(unit))

    def _stored(self, scale: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
        """Scale and bias as they are stored; the scale of a constant group is 1."""
        scale, bias = (a.astype(self.dtype).astype(mx.float32) for a in (scale, bias))
        return mx.where(scale > 0, scale, 1.0), bias

    def _errors(self, scale: mx.array, bias: mx.array) -> mx.array:
        """Summed squares, in units of the scale, for several scales and biases (fits, groups)."""
        values, *weights = (a[:, None] for a in (self.values, *self.weights))
        return group_sums(_errors(values, scale, bias, self.top, *weights))

    def _refitted(self, best: Fit, unit: mx.array) -> Fit:
        """Least squares: the scale and bias that suit the codes best, the codes that suit those, and so on. Errors in
        `unit`s, which do not overflow."""
        fit = best
        for _ in range(REFITS[self.bits]):
            scale, bias = self._stored(*self._least_squares(fit))
            fit = Fit(scale, bias, self._errors(scale, bias)[0] * _squared(scale / unit))
            best = best.better_of(fit)
        return best

    def _least_squares(self, fit: Fit) -> tuple[mx.array, mx.array]:
        """With codes q and remainders r, a value is scale * (q + r) + bias: fit r by a line in q."""
        terms = _moments(self.values, fit.scale, fit.bias, self.top, *self.weights)
        r, q, qr, qq = (group_sums(term) for term in terms)
        count = group_sums(self.weights[0]) if self.weights else float(len(self.values))
        mean_q, mean_r = q / count, r / count
        spread = qq - q * mean_q
        slope = mx.where(spread > 0, (qr - r * mean_q) / spread, 0.0)
        scale, _ = self._stored(fit.scale + fit.scale * slope, fit.bias)
        return scale, fit.bias + (fit.scale * mean_r + (fit.scale - scale) * mean_q)

    def codes(self, fit: Fit) -> mx.array:
        return _codes(self.values, fit.scale, fit.bias, self.top)

    def stored(self, fit: Fit) -> tuple[mx.array, ...]:
        return fit.scale.astype(self.dtype), fit.bias.astype(self.dtype)


def _squared(values: mx.array) -> mx.array:
    return values * values


def _steps(values: mx.array, scale: mx.array, bias: mx.array, top: float) -> tuple[mx.array, mx.array]:
    """Values in units of the scale, and the nearest codes."""
    steps = (values - bias) / scale
    return steps, (mx.clip(steps, 0.0, top) + ROUND) - ROUND


@compiled_on_gpu
def _errors(values: mx.array, scale: mx.array, bias: mx.array, top: float, *weights: mx.array) -> mx.array:
    steps, codes = _steps(values, scale, bias, top)
    return squares(steps - codes, *weights)


@compiled_on_gpu
def _moments(
    values: mx.array, scale: mx.array, bias: mx.array, top: float, *weights: mx.array
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    steps, q = _steps(values, scale, bias, top)
    r = steps - q
    r, wq = (r * weights[0], q * weights[0]) if weights else (r, q)
    return r, wq, q * r, q * wq


@compiled_on_gpu
def _codes(values: mx.array, scale: mx.array, bias: mx.array, top: float) -> mx.array:
    return _steps(values, scale, bias, top)[1].astype(mx.uint32)
