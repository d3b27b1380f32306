"""Noise levels: fixed lists, or LTX-2's schedule, which is shifted by the number of tokens."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BASE_TOKENS, MAX_TOKENS = 1024, 4096
BASE_SHIFT, MAX_SHIFT = 0.95, 2.05
TERMINAL = 0.1  # the last level above 0


@dataclass(frozen=True)
class Schedule:
    """How a stage comes to its noise levels: `fixed` ones, or so many `steps` shifted by `tokens`, None standing for
    the stage's own number of tokens."""

    fixed: tuple[float, ...] = ()
    steps: int = 0
    tokens: int | None = MAX_TOKENS

    @classmethod
    def from_dict(cls, data: Sequence[float] | Mapping[str, Any]) -> "Schedule":
        """A list of levels, or {"steps": …, "tokens": a number or "own"}, as a preset has it."""
        if isinstance(data, Mapping):
            tokens = data["tokens"]
            return cls((), int(data.get("steps", 0)), None if tokens == "own" else int(tokens))
        return cls(tuple(data))

    def sigmas(self, tokens: int) -> tuple[float, ...]:
        """The levels of a stage of so many tokens, the last one 0."""
        return self.fixed or shifted(self.steps, self.tokens or tokens)


def shifted(steps: int, tokens: int) -> tuple[float, ...]:
    """LTX-2's schedule: a linear one, shifted the more the more tokens there are, and stretched so that it ends at
    TERMINAL before 0 (MODEL.md §3.1)."""
    slope = (MAX_SHIFT - BASE_SHIFT) / (MAX_TOKENS - BASE_TOKENS)
    shift = math.exp(tokens * slope + BASE_SHIFT - BASE_TOKENS * slope)
    levels = [shift / (shift + 1 / (1 - i / steps) - 1) for i in range(steps)]
    stretch = (1 - TERMINAL) / (1 - levels[-1]) if steps > 1 else 1.0
    return (*(1 - (1 - level) * stretch for level in levels), 0.0)
