"""What the searches for scales have in common."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

from ltx2.quant.codes.arithmetic import Arithmetic, Values
from ltx2.runtime.files.tensors import Array

TINY = 1e-30  # errors of groups that are larger are counted in units of the group, which neither overflow nor vanish


class Fit(NamedTuple):
    """Scales and biases of groups, float32 but exactly as stored, and the errors of the codes they give."""

    scale: Values
    bias: Values
    error: Values

    def best(self, xp: Any) -> "Fit":
        """Of several fits, stacked along axis 0, the one with the smallest error per group, or the first such."""
        place = xp.argmin(xp.where(xp.isnan(self.error), xp.inf, self.error), axis=0, keepdims=True)
        return Fit(*(xp.take_along_axis(part, place, axis=0)[0] for part in self))

    def better_of(self, other: "Fit", xp: Any) -> "Fit":
        """Per group the fit with the smaller error; one that is not a number never replaces another."""
        better = other.error < self.error
        return Fit(*(xp.where(better, theirs, ours) for ours, theirs in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Search(ABC):
    """The groups of a block (group size, groups). `weights`, a block like it or none, says how much each value's error
    counts."""

    on: Arithmetic
    values: Values
    weights: tuple[Values, ...]

    @abstractmethod
    def best(self) -> Fit:
        """The best fit found. Its error is NaN where there is none."""

    @abstractmethod
    def codes(self, fit: Fit) -> Values:
        """The codes (group size, groups), uint32."""

    @abstractmethod
    def stored(self, scale: Array, bias: Array) -> tuple[Array, ...]:
        """A fit's scales, and its biases where the mode has them, as they are stored (groups,)."""

    @abstractmethod
    def change(self, fit: Fit) -> Values:
        """What the codes lose of the values, in units of the scale (group size, groups)."""

    def rest(self, fit: Fit) -> Values:
        """What the codes lose of the values (group size, groups)."""
        return fit.scale * self.change(fit)

    def drift(self, fit: Fit, means: Values) -> Values:
        """What the groups' products with `means` (group size, groups) lose (groups,)."""
        return fit.scale * self.on.group_sums(self.change(fit) * means)


def squared(values: Values) -> Values:
    """A ratio's square, as errors are."""
    return values * values
