"""What the searches for scales have in common."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from ltx2.quant.blocks import compiled_on_gpu, group_sums

TINY = 1e-30  # errors of groups that are larger are counted in units of the group, which neither overflow nor vanish


class Fit(NamedTuple):
    """Scales and biases of groups, float32 but exactly as stored, and the errors of the codes they give."""

    scale: mx.array
    bias: mx.array
    error: mx.array

    def best(self) -> "Fit":
        """Of several fits, stacked along axis 0, the one with the smallest error per group, or the first such."""
        place = mx.argmin(mx.where(mx.isnan(self.error), mx.inf, self.error), axis=0, keepdims=True)
        return Fit(*(mx.take_along_axis(part, place, axis=0)[0] for part in self))

    def better_of(self, other: "Fit") -> "Fit":
        """Per group the fit with the smaller error; one that is not a number never replaces another."""
        better = other.error < self.error
        return Fit(*(mx.where(better, theirs, ours) for ours, theirs in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Search(ABC):
    """The groups of a block (group size, groups). `weights`, a block like it or none, says how much each value's error
    counts."""

    values: mx.array
    weights: tuple[mx.array, ...]

    @abstractmethod
    def best(self) -> Fit:
        """The best fit found. Its error is NaN where there is none."""

    @abstractmethod
    def codes(self, fit: Fit) -> mx.array:
        """The codes (group size, groups), uint32."""

    @abstractmethod
    def stored(self, fit: Fit) -> tuple[mx.array, ...]:
        """Scales, and biases where the mode has them, as they are stored (groups,)."""

    def norms(self) -> mx.array:
        """Summed squares of the groups."""
        return group_sums(squares(self.values, *self.weights))


@compiled_on_gpu
def squares(values: mx.array, *weights: mx.array) -> mx.array:
    """Squares, weighted if there are weights."""
    squared = values * values
    return squared * weights[0] if weights else squared
