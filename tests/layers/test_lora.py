"""LoRA factors beside weights: the same as a weight that they are added to, whatever form that is stored in."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import ltx2
from ltx2.runtime.layers.linear import Linear, LinearLayer, Packed
from ltx2.runtime.layers.lora import attach
from ltx2.runtime.layers.matmul import PRODUCTS, sums
from ltx2.runtime.layers.packed import choose_products
from ltx2.runtime.layers.rotation import rotated
from ltx2.runtime.memory.streaming import block_of, streamed
from ltx2.runtime.model.forms import Form
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.model.loras import Lora, LoraSet, LoraUse
from ltx2.runtime.networks.load import build_component, load_network, parameter_shapes
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.sampling.latents import Grid, Scales, audio_positions, video_positions
from ltx2.runtime.streams import Streams
from tests.support.calls import inputs
from tests.support.loras import Factors, random_factors, write_lora
from tests.support.parity import relative_l2

Figure = Callable[..., None]
OUTPUTS, INPUTS, STRENGTH = 96, 128, 0.7
FEW, MANY = 10, 80  # tokens: it takes fewer operations to add to the product, and to add to the weight
PATH = "transformer_blocks.0.attn1.to_q"
FORMS = [
    Form(8, 64), Form(4, 64), Form(3, 32), Form(2, 32), Form(4, 32, rotation=64), Form(4, 32, "mxfp4"),
    Form(8, 64, rotation=64, hadamard="regular"), Form(8, 32, "mxfp8"), Form(4, 16, "nvfp4"),
]  # fmt: skip


def packed(form: Form, scale_shape: tuple[int, ...] | None) -> tuple[Packed, np.ndarray]:
    """A layer of random codes, and the weight that it multiplies with, float32."""
    weight = mx.random.normal((OUTPUTS, INPUTS), key=mx.random.key(1)) * INPUTS**-0.5
    sizes = (form.group_size, form.bits, form.mode)
    turn = (form.rotation, form.hadamard)
    codes, scales, *biases = mx.quantize(rotated(weight, *turn) if form.rotation else weight, *sizes)
    layer = Packed(INPUTS, OUTPUTS, form)
    layer.weight, layer.scales = codes, scales
    if biases:
        layer.biases = biases[0]
    values = mx.dequantize(codes, scales, biases[0] if biases else None, *sizes)
    values = values.astype(mx.float32)
    if form.rotation:
        values = rotated(values, *turn)
    if scale_shape is not None:
        layer.weight_scale = mx.random.uniform(0.5, 2, scale_shape, key=mx.random.key(2))
        values = values * (layer.weight_scale[..., None] if scale_shape else layer.weight_scale)
    return layer, np.array(values)


def changed(layer: LinearLayer, weight: np.ndarray, path: Path, limit: float) -> None:
    """With a LoRA the layer multiplies with the sum; detached, with its weight again, to the bit."""
    layer.bias = mx.random.normal((OUTPUTS,), key=mx.random.key(3))
    factors = random_factors({PATH: (OUTPUTS, INPUTS)})
    changes = LoraSet(((LoraUse(path, (STRENGTH,)), Lora.open(write_lora(path, factors))),)).at(1)
    down, up = factors[PATH]
    for rows in (FEW, MANY):
        x = mx.random.normal((2, rows // 2, INPUTS), key=mx.random.key(4))
        before, bias = np.array(layer(x)), np.array(layer.bias)
        assert attach(layer, changes, PATH) == 1
        expected = np.array(x) @ (weight + STRENGTH * up @ down).T + bias
        own = relative_l2(before, np.array(x) @ weight.T + bias)
        assert relative_l2(np.array(layer(x)), expected) < max(limit, 2 * own)
        attach(layer, {})
        np.testing.assert_array_equal(np.array(layer(x)), before)


def test_the_faster_of_two_ways() -> None:
    """A picture's tokens have factors added to the weight first, a sound's few have them beside it."""
    assert [sums(rows, OUTPUTS, INPUTS) for rows in (FEW, MANY)] == [False, True]
    for shape in ((4096, 4096), (16384, 4096)):
        assert [sums(rows, *shape) for rows in (126, 1536, 6144)] == [False, True, True]


def test_beside_a_plain_weight(tmp_path: Path) -> None:
    layer = Linear(INPUTS, OUTPUTS)
    changed(layer, np.array(layer.weight), tmp_path / "a.safetensors", 1e-6)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_beside_packed_weights(tmp_path: Path, form: Form, product: str) -> None:
    layer, weight = packed(form, None)
    choose_products(layer, product)
    changed(layer, weight, tmp_path / "a.safetensors", 1e-5)


@pytest.mark.parametrize("shape", [(), (OUTPUTS,)])
@pytest.mark.parametrize("form", [Form(8, 32, "mxfp8"), Form(4, 16, "nvfp4")], ids=str)
def test_beside_published_codes(tmp_path: Path, form: Form, shape: tuple[int, ...]) -> None:
    """FP8 and NVFP4, whose product is multiplied by a scale."""
    layer, weight = packed(form, shape)
    changed(layer, weight, tmp_path / "a.safetensors", 1e-5)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_in_16_bits(tmp_path: Path, dtype: mx.Dtype) -> None:
    """Factors are in the layer's dtype, and so is the output."""
    layer, factors = Linear(INPUTS, OUTPUTS), random_factors({PATH: (OUTPUTS, INPUTS)})
    layer.set_dtype(dtype)
    path = write_lora(tmp_path / "a.safetensors", factors)
    attach(layer, LoraSet(((LoraUse(path), Lora.open(path)),)).at(1), PATH)
    x = mx.random.normal((3, INPUTS), dtype, key=mx.random.key(4))
    y, (down, up) = layer(x), factors[PATH]
    weight, bias, x32 = (np.array(values.astype(mx.float32)) for values in (layer.weight, layer.bias, x))
    assert y.dtype == dtype and layer.factors is not None and layer.factors.up.dtype == dtype
    assert relative_l2(np.array(y.astype(mx.float32)), x32 @ (weight + up @ down).T + bias) < 1e-2


def test_several_on_one_layer_add_up(tmp_path: Path) -> None:
    """Of any ranks, each with its own strength and scale (alpha / rank)."""
    layer = Linear(INPUTS, OUTPUTS)
    one, other = (random_factors({PATH: (OUTPUTS, INPUTS)}, rank, rank) for rank in (2, 5))
    paths = write_lora(tmp_path / "1.safetensors", one, alpha=1.0), write_lora(tmp_path / "2.safetensors", other)
    uses = LoraUse(paths[0], (0.5, -2.0)), LoraUse(paths[1], (1.0, 0.25))
    loras = LoraSet(tuple((use, Lora.open(use.path)) for use in uses))
    x = mx.random.normal((3, INPUTS), key=mx.random.key(4))
    for stage, strengths in ((1, (0.5, 1.0)), (2, (-2.0, 0.25)), (3, (-2.0, 0.25))):
        attach(layer, loras.at(stage), PATH)
        deltas = [f[PATH][1] @ f[PATH][0] for f in (one, other)]
        weight = np.array(layer.weight) + strengths[0] / 2 * deltas[0] + strengths[1] * deltas[1]
        assert relative_l2(np.array(layer(x)), np.array(x) @ weight.T + np.array(layer.bias)) < 1e-5
        assert loras.sizes(stage) == {PATH: 7 * (OUTPUTS + INPUTS)} and loras.largest(stage) == OUTPUTS * INPUTS


@pytest.fixture(scope="module")
def lora(demo_f32: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Factors]:
    """Of every linear layer of the demo model's transformer."""
    shapes = parameter_shapes(build_component(ModelFolder.open(demo_f32), "transformer", {}))
    weights = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if len(shape) == 2}
    factors = random_factors({path: shape for path, shape in weights.items() if "table" not in path})
    return write_lora(tmp_path_factory.mktemp("lora") / "every.safetensors", factors), factors


def velocities(network: Transformer) -> np.ndarray:
    """Of a small clip, flat."""
    config = network.config
    grid, scales = Grid(config.video.in_channels, 2, 2, 3, 8, 4), Scales(32, 8, 0.01, 4)
    text = mx.random.normal((1, 16, config.caption_channels), key=mx.random.key(0))
    positions = Streams(video_positions(grid, 25.0, scales), audio_positions(grid, scales))
    tokens = Streams(
        mx.random.normal((1, 12, config.video.in_channels), key=mx.random.key(1)),
        mx.random.normal((1, 4, config.audio.in_channels), key=mx.random.key(2)),
    )
    found = network(inputs(network, tokens, Streams(text, text), positions, 0.7))
    return np.concatenate([np.array(values.astype(mx.float32)).reshape(-1) for values in found.values()])


def _kept(streamed: Sequence[int], path: str) -> bool:
    return block_of(path) not in streamed


class TestTransformer:
    """All layers of a whole network."""

    def load(self, folder: Path) -> Transformer:
        return load_network(ModelFolder.open(folder), "transformer", Transformer)

    def changes(self, path: Path, network: Transformer, strength: float = 0.2) -> LoraSet:
        return LoraSet.open([LoraUse(path, (strength,))], parameter_shapes(network), "2.0")

    def test_equals_fused_weights(self, demo_f32: Path, lora: tuple[Path, Factors], figure: Figure) -> None:
        network, fused = self.load(demo_f32), self.load(demo_f32)
        plain = velocities(network)
        found = self.changes(lora[0], network)
        assert attach(network, found.at(1)) == len(lora[1]) == 194
        modules = dict(fused.named_modules())
        for path, change in found.uses[0][1].applied().items():
            delta = mx.array(change.rows(0, len(modules[path].weight)))
            modules[path].weight = modules[path].weight + 0.2 * delta
        ours = velocities(network)
        assert relative_l2(ours, plain) > 0.1
        error = relative_l2(ours, velocities(fused))
        figure("velocity with a LoRA beside the weights, rel L2 vs fused", error, limit=1e-5)
        attach(network, found.at(1), settles=lambda path: True)
        np.testing.assert_array_equal(velocities(network), ours, "added to the weights for good")

    def test_without_strength_nothing_changes(self, demo_f32: Path, lora: tuple[Path, Factors]) -> None:
        network = self.load(demo_f32)
        before, parameters = velocities(network), parameter_shapes(network)
        loras = self.changes(lora[0], network, 0.0)
        assert attach(network, loras.at(1)) == 0 and not loras.sizes(1)
        np.testing.assert_array_equal(velocities(network), before)
        attach(network, self.changes(lora[0], network).at(1))
        assert parameter_shapes(network) == parameters, "factors are no parameters"
        attach(network, {})
        np.testing.assert_array_equal(velocities(network), before)

    @pytest.mark.parametrize("bits", [16, 8])
    def test_streamed_blocks(self, demo_model: Path, lora: tuple[Path, Factors], bits: int, tmp_path: Path) -> None:
        """The same bits as of blocks that stay in memory, in 16 bits too, and packed."""
        folder = demo_model
        if bits < 16:
            ltx2.quantize(demo_model, folder := tmp_path / "packed", bits=bits, only=["transformer"])
        loras = self.changes(lora[0], self.load(demo_model))
        network = self.load(folder)
        attach(network, loras.at(1), settles=lambda path: True)
        expected = velocities(network)
        for blocks in ((0, 3), range(6)):
            network = self.load(folder)
            attach(network, loras.at(1), settles=partial(_kept, tuple(blocks)))
            with streamed(ModelFolder.open(folder), network, tuple(blocks)):
                np.testing.assert_array_equal(velocities(network), expected)
