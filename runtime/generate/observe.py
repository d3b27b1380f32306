"""A network's linear layers called through a function of ours: to see their inputs, or to change their outputs."""

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from ltx2.runtime.layers.linear import LinearLayer

# path in the network (the layer's name in the model folder), the layer, its input (..., inputs) -> its output
Call = Callable[[str, LinearLayer, mx.array], mx.array]
Seen = Callable[[str, LinearLayer, mx.array], None]


def intercept(network: nn.Module, call: Call) -> None:
    """From now on every linear layer's output is `call(path, layer, x)`; `layer.multiply(x)` is its own output. Packed
    layers are included, embeddings are not. A second call for a network replaces the first."""
    for path, layer in network.named_modules():
        if isinstance(layer, LinearLayer):
            layer.around = partial(call, path)


def watch(network: nn.Module, seen: Seen) -> None:
    """From now on `seen(path, layer, x)` is called before every linear layer; see `intercept`.

    `x` (..., inputs) is the layer's input, lazy as MLX's arrays are: evaluate a sum of it at once, or every input stays
    in memory until you do.
    """

    def call(path: str, layer: LinearLayer, x: mx.array) -> mx.array:
        seen(path, layer, x)
        return layer.multiply(x)

    intercept(network, call)
