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
    """From now on every linear layer's output is `call(path, layer, x)`, where `layer.multiply(x)` is what it would be
    without. Packed layers count; embeddings do not. Of two calls for one network the last one is in force."""
    for path, layer in network.named_modules():
        if isinstance(layer, LinearLayer):
            layer.around = partial(call, path)


def watch(network: nn.Module, seen: Seen) -> None:
    """From now on `seen(path, layer, x)` is called before every linear layer; see `intercept`.

    `x` (..., inputs) is what the layer is given, lazy as MLX's arrays are: who keeps a sum of it must evaluate that sum
    there and then, or every input stays in memory until it does.
    """

    def call(path: str, layer: LinearLayer, x: mx.array) -> mx.array:
        seen(path, layer, x)
        return layer.multiply(x)

    intercept(network, call)
