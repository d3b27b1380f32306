"""What the searches for scales have in common."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

from ltx2.quant.codes.arithmetic import Arithmetic, Values
from ltx2.runtime.files.tensors import Array

TINY = 1e-30  # errors of larger groups are counted in units of the group, so that they neither overflow nor vanish


class Fit(NamedTuple):
    """Scales and biases of groups, float32 with the stored values, and the errors of their codes; (groups,), or of
    several fits (fits, groups)."""

    scale: Values
    bias: Values
    error: Values

    def best(self, xp: Any) -> "Fit":
        """The fit with the smallest error per group, the first of equals."""
        place = xp.argmin(xp.where(xp.isnan(self.error), xp.inf, self.error), axis=0, keepdims=True)
        return Fit(*(xp.take_along_axis(part, place, axis=0)[0] for part in self))

    def better_of(self, other: "Fit", xp: Any) -> "Fit":
        """The fit with the smaller error per group; a NaN never replaces another."""
        better = other.error < self.error
        return Fit(*(xp.where(better, theirs, ours) for ours, theirs in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Search(ABC):
    """The groups of a block (group size, groups). `weights`, of that shape or none, are those of the values' errors."""

    on: Arithmetic
    values: Values
    weights: tuple[Values, ...]

    @abstractmethod
    def best(self) -> Fit:
        """The best fit found, (groups,); its error is NaN where there is none."""

    @abstractmethod
    def codes(self, fit: Fit) -> Values:
        """The codes (group size, groups), uint32."""

    @abstractmethod
    def stored(self, scale: Array, bias: Array) -> tuple[Array, ...]:
        """A fit's scales, and its biases if the mode has them, as stored (groups,)."""

    @abstractmethod
    def change(self, fit: Fit) -> Values:
        """The values less what their codes stand for, in units of the scale (group size, groups)."""

    def rest(self, fit: Fit) -> Values:
        """The values less what their codes stand for (group size, groups)."""
        return fit.scale * self.change(fit)

    def drift(self, fit: Fit, means: Values) -> Values:
        """The groups' products of that with `means` (group size, groups), summed up (groups,)."""
        return fit.scale * self.on.group_sums(self.change(fit) * means)


def squared(values: Values) -> Values:
    """The square of a ratio of any shape, as errors are squares."""
    return values * values
