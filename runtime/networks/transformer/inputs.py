"""What the transformer is called with: each stream's tokens, noise levels, text and positions, and what a call leaves
out."""

from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx

from ltx2.runtime.layers.attention import Keys
from ltx2.runtime.layers.rope import Positions, Rope
from ltx2.runtime.streams import Streams


@dataclass(frozen=True)
class Levels:
    """Noise levels of one stream's tokens: few distinct ones, so that modulation is computed for these alone."""

    values: mx.array  # (n,) float32: the distinct levels, 1 is pure noise
    index: mx.array | None = None  # (tokens,) int32 into `values`; None: all tokens have values[0]
    sigma: float = 0.0  # towards the text and in the other stream's gate; 0 for a stream that is kept


@dataclass(frozen=True)
class Ropes:
    """Rotary tables of one stream's tokens."""

    own: Rope  # of self-attention
    cross: Rope  # of cross-attention between the streams: time only
    positions: Positions  # (axes, tokens) of the tokens


class Text:
    """A stream's text as the blocks attend to it: `tokens` (1, text tokens, dim), and the `context` (1, text tokens,
    width) that they are projected from.

    A text that is `kept` also keeps every block's keys and values for later calls, as long as those would make the
    same: for ever where no noise level modulates the text, else over the calls of one noise level (the passes of a
    guided step). It must not outlive the weights. Each block keeps 2 * text tokens * dim values."""

    def __init__(self, tokens: mx.array, context: mx.array, kept: bool = False) -> None:
        self.tokens, self.context, self.kept = tokens, context, kept
        self._level: float | None = None
        self._keys: dict[int, Keys] = {}

    def at(self, level: float | None) -> "Text":
        """The text for a call at the noise level that modulates it; None: none does."""
        if level != self._level:
            self._keys.clear()
            self._level = level
        return self

    def keys(self, block: int, make: Callable[[mx.array], Keys]) -> Keys:
        """A block's keys and values; `make` makes missing ones of the tokens."""
        if not self.kept:
            return make(self.tokens)
        if block not in self._keys:
            self._keys[block] = make(self.tokens)
        return self._keys[block]


@dataclass(frozen=True)
class StreamInput:
    """One stream's input of one call."""

    tokens: mx.array  # (1, tokens, channels)
    levels: Levels
    text: Text  # from `project`
    ropes: Ropes
    marked: mx.array | None = None  # (1, tokens, 1), 1 where the token is one single frame
    attention: mx.array | None = None  # (1, 1, tokens, tokens) or broadcastable, added to self-attention's scores


@dataclass(frozen=True)
class Skips:
    """What a call leaves out, as guidance asks for it."""

    # Blocks whose self-attention passes its values through.
    values: Streams[frozenset[int]] = field(default_factory=Streams)
    exchange: bool = False  # cross-attention between the streams, in all blocks
    # Streams that no block updates; the other one still attends to their tokens.
    idle: Streams[bool] = field(default_factory=Streams)

    @property
    def nothing(self) -> bool:
        """Whether the call leaves nothing out."""
        return not (self.exchange or any(self.values.values()) or any(self.idle.values()))


NOTHING = Skips()
