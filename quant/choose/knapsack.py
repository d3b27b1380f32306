"""Choosing sizes of many things within a budget of bytes, with the least loss."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Option:
    """A possible size of a thing. Losses of different things add up."""

    bits: int
    bytes: int
    loss: float


def allocate(options: Mapping[Name, Sequence[Option]], budget: int) -> dict[Name, Option] | None:
    """One option for each thing; None if even the smallest do not fit.

    Every thing starts with its smallest option. The step that saves most loss per byte is taken first, until the next
    one does not fit: this is optimal except for the bytes left then, fewer than one step's. A larger budget never gives
    a larger loss. (Only options on the lower convex hull of bytes and loss are used, so every step of a thing saves
    more per byte than its next.) Equal steps are taken in the order of things."""
    hulls = {name: hull(choices) for name, choices in options.items()}
    chosen = {name: line[0] for name, line in hulls.items()}
    left = budget - sum(option.bytes for option in chosen.values())
    if left < 0:
        return None
    steps = [(name, *step) for name, line in hulls.items() for step in pairwise(line)]
    for name, now, larger in sorted(steps, key=lambda step: -_price(*step[1:])):
        left -= larger.bytes - now.bytes
        if left < 0:
            break
        chosen[name] = larger
    return chosen


def hull(options: Sequence[Option]) -> list[Option]:
    """The options worth their bytes, smallest first: each loses less than the one before, and saves less per byte."""
    found: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bytes, option.loss)):
        if found and option.loss >= found[-1].loss:
            continue
        while len(found) > 1 and _price(found[-2], found[-1]) <= _price(found[-1], option):
            found.pop()
        found.append(option)
    return found


def _price(smaller: Option, larger: Option) -> float:
    """Loss saved per byte."""
    return (smaller.loss - larger.loss) / (larger.bytes - smaller.bytes)
