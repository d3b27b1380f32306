"""Watching linear layers: every one is seen with its input, nothing else changes."""

import weakref
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ltx2.runtime.generate.observe import intercept, watch
from ltx2.runtime.layers.attention import FeedForward
from ltx2.runtime.layers.linear import Linear, Packed
from ltx2.runtime.model.forms import Form
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_network, parameter_shapes
from ltx2.runtime.networks.text.gemma import TextEncoder
from tests.support.calls import states_of


class Two(nn.Module):
    """A plain and a packed layer, and an embedding, one inside a list."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 64)
        self.plain = [Linear(64, 32)]
        self.packed = Packed(32, 8, Form(8, 32))
        self.packed.bias = mx.ones(8)
        self.packed.weight = mx.random.randint(0, 1 << 30, (8, 8), key=mx.random.key(0)).astype(mx.uint32)
        self.packed.scales = mx.full((8, 1), 0.01)

    def __call__(self, ids: mx.array) -> mx.array:
        return self.packed(self.plain[0](self.embed(ids)))


def test_every_linear_layer_is_seen_with_its_input() -> None:
    network, ids, seen = Two(), mx.array([0, 3, 1]), {}
    before, shapes = np.array(network(ids)), parameter_shapes(network)
    watch(network, lambda path, layer, x: seen.update({path: (np.array(x), np.array(layer.multiply(x)))}))
    after = np.array(network(ids))
    np.testing.assert_array_equal(after, before)
    assert parameter_shapes(network) == shapes
    assert list(seen) == ["plain.0", "packed"]
    np.testing.assert_array_equal(seen["plain.0"][0], np.array(network.embed(ids)))
    np.testing.assert_array_equal(seen["packed"][0], seen["plain.0"][1])
    np.testing.assert_array_equal(seen["packed"][1], before)


def test_a_watched_layer_is_what_it_was() -> None:
    network = Two()
    watch(network, lambda path, layer, x: None)
    assert isinstance(network.plain[0], Linear) and isinstance(network.packed, Packed)
    weight = mx.random.normal((32, 64))
    network.update({"plain": [{"weight": weight}]})
    x = mx.random.normal((1, 64))
    expected = x @ weight.T + network.plain[0].bias
    np.testing.assert_allclose(np.array(network.plain[0](x)), np.array(expected), rtol=1e-5, atol=1e-5)


def test_outputs_can_be_changed_and_the_last_word_counts() -> None:
    network, x = FeedForward(32), mx.random.normal((1, 3, 32))
    before = network(x)
    watch(network, lambda path, layer, x: None)
    intercept(network, lambda path, layer, x: layer.multiply(x) * (2 if path == "proj_out" else 1))
    np.testing.assert_array_equal(np.array(network(x)), np.array(2 * before))


def test_weights_are_released_layer_by_layer(demo_f32: Path) -> None:
    encoder = load_network(ModelFolder.open(demo_f32), "text_encoder", TextEncoder)
    watch(encoder, lambda path, layer, x: None)
    first = weakref.ref(encoder.model.layers[0].mlp.up_proj)
    states = states_of(encoder, mx.array([[1, 2, 3]]), mx.array([[1, 1, 1]]), release=True)
    next(states)
    assert first() is not None
    next(states)
    assert first() is None  # without waiting for the garbage collector
