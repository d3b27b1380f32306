"""Sizes for many things at once: as little loss as a budget of bytes allows."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Option:
    """One of the sizes that a thing can have. Losses of different things add up."""

    bits: int
    bytes: int
    loss: float


def allocate(options: Mapping[Name, Sequence[Option]], budget: int) -> dict[Name, Option] | None:
    """One option for each thing; None where even the smallest do not fit.

    Every thing starts at its smallest option. What buys most loss per byte is bought first, until the next one does
    not fit: the best there is but for the bytes that are left then, less than one thing's step. More bytes never make
    the loss larger. (Only options on the lower convex hull of bytes and loss are used: whoever buys one has bought
    those before it, for each has a better price than the next.) Things of one price are served in their order.
    """
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
    """Those that are worth their bytes, smallest first: each has less loss than the one before, and buys it at a worse
    price than that one did."""
    found: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bytes, option.loss)):
        if found and option.loss >= found[-1].loss:
            continue
        while len(found) > 1 and _price(found[-2], found[-1]) <= _price(found[-1], option):
            found.pop()
        found.append(option)
    return found


def _price(smaller: Option, larger: Option) -> float:
    """Loss that is saved per byte."""
    return (smaller.loss - larger.loss) / (larger.bytes - smaller.bytes)
