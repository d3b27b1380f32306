"""Calls of a transformer and of a text encoder in tests."""

from collections.abc import Iterator

import mlx.core as mx

from ltx2.runtime.layers.rope import Positions
from ltx2.runtime.networks.text.gemma import TextEncoder
from ltx2.runtime.networks.transformer.inputs import Levels, StreamInput
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.streams import Streams


def inputs(
    network: Transformer,
    tokens: Streams[mx.array],
    contexts: Streams[mx.array],
    positions: Streams[Positions],
    levels: float | Streams[Levels],
) -> Streams[StreamInput]:
    """What a transformer is called with: tokens (1, tokens, channels), contexts (1, text tokens, width), positions
    (axes, tokens). One noise level is that of all tokens, and each stream's sigma."""
    if isinstance(levels, float):
        level = Levels(mx.array([levels]), sigma=levels)
        levels = Streams(level, level)
    prepared = network.project(contexts).zip(network.ropes(positions))
    return tokens.zip(levels).map(lambda given, pair: StreamInput(*given, *pair), prepared)


def states_of(encoder: TextEncoder, ids: mx.array, mask: mx.array, release: bool = False) -> Iterator[mx.array]:
    """The hidden states of one batch, (batch, T', dim) each; ids and mask are (batch, T)."""
    return (state for (state,) in encoder.states_of([(ids, mask)], release=release))
