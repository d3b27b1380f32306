"""Linear layers of a network that are called through a function of ours: to see their inputs, or to change their
outputs; and a denoiser whose calls are seen. A module stays what it is, with its parameters under their names."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from ltx2.runtime.layers.linear import LinearLayer
from ltx2.runtime.layers.rope import Positions
from ltx2.runtime.networks.transformer.inputs import NOTHING, KeptText, Levels, Ropes, Skips, StreamInput
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.streams import Streams

# path in the network (the layer's name in the model folder), the layer, its input -> its output
Call = Callable[[str, LinearLayer, mx.array], mx.array]
Seen = Callable[[str, LinearLayer, mx.array], None]
T = TypeVar("T")


def intercept(network: nn.Module, call: Call) -> None:
    """From now on every linear layer's output is `call(path, layer, x)`, where `layer.multiply(x)` is what it would be
    without. Packed layers count; embeddings do not. Of two calls for one network the last one is in force."""
    for path, layer in network.named_modules():
        if isinstance(layer, LinearLayer):
            layer.around = partial(call, path)


def watch(network: nn.Module, seen: Seen) -> None:
    """From now on `seen(path, layer, x)` is called before every linear layer; see `intercept`.

    `x` is what the layer is given, lazy as MLX's arrays are: who keeps a sum of it must evaluate that sum there and
    then, or every input stays in memory until it does.
    """

    def call(path: str, layer: LinearLayer, x: mx.array) -> mx.array:
        seen(path, layer, x)
        return layer.multiply(x)

    intercept(network, call)


@dataclass(frozen=True)
class Stream:
    """What one stream of a denoiser was given: tokens and noise levels, text (1, text tokens, width), positions (axes,
    tokens)."""

    tokens: mx.array
    levels: Levels
    text: mx.array
    positions: Positions


Called = Callable[[Streams[Stream]], None]


def given(transformer: Transformer, call: Streams[Stream]) -> Streams[StreamInput]:
    """What the transformer is called with, to be given the same again."""
    text = transformer.project(call.map(lambda stream: stream.text))
    ropes = transformer.ropes(call.map(lambda stream: stream.positions))
    prepared = text.zip(ropes)
    return call.map(lambda stream, pair: StreamInput(stream.tokens, stream.levels, *pair), prepared)


def watch_calls(transformer: Transformer, called: Called) -> None:
    """From now on `called` is told what the transformer is given before each of its calls. Several may be told."""
    if not isinstance(transformer, _WatchedTransformer):
        transformer.__class__ = _WatchedTransformer
        transformer._called, transformer._made = [], {}
    transformer._called.append(called)


class _WatchedTransformer(Transformer):
    _called: list[Called]
    _made: dict[int, tuple[Any, Any]]  # identity of what was made -> that, and of what

    def ropes(self, positions: Streams[Positions]) -> Streams[Ropes]:
        return self._remembered(super().ropes(positions), positions)

    def project(self, contexts: Streams[mx.array]) -> Streams[mx.array]:
        return self._remembered(super().project(contexts), contexts)

    def _remembered(self, made: Streams[T], of: Streams[Any]) -> Streams[T]:
        self._made |= {id(pair[0]): pair for pair in made.zip(of).values()}
        return made

    def __call__(self, inputs: Streams[StreamInput], skips: Skips = NOTHING) -> Streams[mx.array]:
        def seen(stream: StreamInput) -> Stream:
            projected = stream.text.tokens if isinstance(stream.text, KeptText) else stream.text
            text, positions = (self._made[id(made)][1] for made in (projected, stream.ropes))
            return Stream(stream.tokens, stream.levels, text, positions)

        for called in self._called:
            called(inputs.map(seen))
        return super().__call__(inputs, skips)
