"""What the transformer is called with: each stream's tokens, noise levels, text and positions, and what a call leaves
out."""

from dataclasses import dataclass, field

import mlx.core as mx

from ltx2.runtime.layers.rope import Rope
from ltx2.runtime.streams import Streams


@dataclass(frozen=True)
class Levels:
    """Noise levels of one stream's tokens: few distinct ones, so that modulation is computed for these alone."""

    values: mx.array  # (n,) float32: the distinct levels, 1 is pure noise
    index: mx.array | None = None  # (tokens,) int32 into `values`; None: all tokens have values[0]
    sigma: float | mx.array = 0.0  # towards the text and in the other stream's gate; 0 for a stream that is kept


@dataclass(frozen=True)
class Ropes:
    """Rotary tables of one stream's tokens."""

    own: Rope  # of self-attention
    cross: Rope  # of cross-attention between the streams: time only


@dataclass(frozen=True)
class StreamInput:
    """One stream at one call."""

    tokens: mx.array  # (1, tokens, channels)
    levels: Levels
    text: mx.array  # (1, text tokens, dim), from `project`
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


NOTHING = Skips()
