"""Speed of the functions that most of the time is spent in: `make bench`, not part of the tests. On the machine's own
device, in what it computes fast: bf16 on a GPU, float32 and smaller sizes on a CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from pytest_benchmark.fixture import BenchmarkFixture

from ltx2.bench.random.model import random_folder
from ltx2.bench.random.values import RandomValues
from ltx2.convert.output.pieces import bytes_of
from ltx2.convert.tensors.codes import Fp8, Scale
from ltx2.convert.tensors.steps import Spec
from ltx2.quant.codes.pack import pack
from ltx2.runtime.files.tensors import open_tensorfile, write_tensorfile
from ltx2.runtime.layers.attention import Attention, gelu_tanh
from ltx2.runtime.layers.linear import Packed
from ltx2.runtime.layers.packed import choose_products
from ltx2.runtime.layers.rope import Rope, apply_rope, rope_tables
from ltx2.runtime.model.forms import Form, Quantization
from ltx2.runtime.networks.audio.vocoder import ResBlock as VocoderResBlock
from ltx2.runtime.networks.audio.vocoder import Upsample
from ltx2.runtime.networks.transformer.block import StreamContext, TransformerBlock
from ltx2.runtime.networks.transformer.config import StreamConfig, TransformerConfig
from ltx2.runtime.networks.transformer.inputs import Ropes, Text
from ltx2.runtime.networks.transformer.modulation import gated_add, rms_modulate
from ltx2.runtime.networks.video_vae.layers import Border
from ltx2.runtime.networks.video_vae.layers import ResBlock as VideoResBlock
from ltx2.runtime.streams import Streams

pytestmark = pytest.mark.speed

ON_GPU = mx.default_device() != mx.Device(mx.cpu)
DTYPE = mx.bfloat16 if ON_GPU else mx.float32
HEADS, HEAD_DIM, TEXT = (32, 128, 1024) if ON_GPU else (8, 64, 128)
DIM, TOKENS, SOUND = HEADS * HEAD_DIM, 1536 if ON_GPU else 384, 126  # stage 1 of 121 frames of 512x768
EPS = 1e-6
MEGABYTES = 64
Time = Callable[..., None]


@pytest.fixture
def measure(benchmark: BenchmarkFixture) -> Time:
    """`measure(function, *arrays, flops=..., values=...)`: time until its result is there; what one call counts is kept
    beside the time."""

    def run(function: Callable[..., Any], *arguments: Any, **counted: float) -> None:
        benchmark.extra_info.update(counted, device=str(mx.device_info().get("device_name")), dtype=str(DTYPE))
        mx.eval([a for a in arguments if isinstance(a, mx.array)], function(*arguments))
        benchmark(lambda: mx.eval(function(*arguments)))

    return run


def normal(*shape: int) -> mx.array:
    return mx.random.normal(shape, dtype=DTYPE, key=mx.random.key(len(shape)))


def ready(network: nn.Module) -> nn.Module:
    """In the dtype that is measured."""
    network.update(tree_map(lambda value: value.astype(DTYPE), network.parameters()))
    mx.eval(network.parameters())
    return network


def tables(tokens: int, dim: int = DIM) -> Rope:
    return rope_tables(np.arange(tokens, dtype=np.float32)[None], (float(tokens),), dim, HEADS)


def test_rope(measure: Time) -> None:
    rope = tables(TOKENS)
    measure(lambda x: apply_rope(x, rope), normal(1, TOKENS, HEADS, HEAD_DIM), values=TOKENS * DIM)


def test_modulation(measure: Time) -> None:
    """A normalised, scaled and shifted stream, added back through its gate: for one noise level, as in every step."""
    x, rows = normal(1, TOKENS, DIM), [normal(1, 1, DIM) for _ in range(3)]
    measure(lambda x, scale, shift, gate: gated_add(x, rms_modulate(x, scale, shift, EPS), gate), x, *rows)


def test_modulation_of_two_levels(measure: Time) -> None:
    """The same where some tokens are given, in half of the tokens here."""
    x, rows, index = normal(1, TOKENS, DIM), [normal(1, 2, DIM) for _ in range(3)], mx.arange(TOKENS)[None, :, None] % 2

    def modulated(x: mx.array, scale: mx.array, shift: mx.array, gate: mx.array) -> mx.array:
        return gated_add(x, rms_modulate(x, scale, shift, EPS, index), gate, index)

    measure(modulated, x, *rows)


def test_gelu(measure: Time) -> None:
    measure(gelu_tanh, normal(1, TOKENS, 4 * DIM), values=4 * TOKENS * DIM)


def test_attention(measure: Time) -> None:
    attention, rope = ready(Attention(DIM, DIM, HEADS, HEAD_DIM, EPS)), tables(TOKENS)
    flops = 8 * TOKENS * DIM * DIM + 4 * TOKENS * TOKENS * DIM
    measure(lambda x: attention(x, rope=rope), normal(1, TOKENS, DIM), flops=flops)


def test_block(measure: Time) -> None:
    """Both streams of one transformer block."""
    small = {"num_layers": 1, "num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "cross_attention_dim": DIM}
    small |= {"audio_num_attention_heads": HEADS, "audio_attention_head_dim": HEAD_DIM // 2}
    settings = random_folder("ltx-2-distilled").config("transformer") | small | {"audio_cross_attention_dim": DIM // 2}
    config = TransformerConfig.from_dict(settings)
    block = ready(TransformerBlock(config))
    x, y = normal(1, TOKENS, DIM), normal(1, SOUND, DIM // 2)

    def context(stream: StreamConfig, tokens: int) -> StreamContext:
        modulation, cross, gate = (normal(1, 1, rows, stream.dim) for rows in (config.modulation_rows, 4, 1))
        ropes = Ropes(tables(tokens, stream.dim), tables(tokens, DIM // 2), np.zeros((1, tokens), np.float32))
        level = normal(1, 1, stream.dim)
        text = normal(1, TEXT, stream.dim)
        return StreamContext(stream, Text(text, text), ropes, modulation, level, cross, cross_gate=gate)

    contexts = Streams(context(config.video, TOKENS), context(config.audio, SOUND))
    measure(lambda x, y: tuple(block(Streams(x, y), contexts).values()), x, y)


FORMS = [Form(4, 64), Form(8, 64), Form(8, 32, "mxfp8"), Form(4, 16, "nvfp4")]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_quantized_linear(measure: Time, form: Form) -> None:
    """In the way that is the fastest on this machine."""
    layer, values = Packed(DIM, DIM, form), RandomValues(Quantization(form))
    layer.weight = values.tensor("a.weight", "U32", (DIM, DIM * form.bits // 32))
    dtype = ("BF16" if ON_GPU else "F32") if form.biased else "U8"
    for part in ("scales", "biases") if form.biased else ("scales",):
        setattr(layer, part, values.tensor(f"a.{part}", dtype, (DIM, DIM // form.group_size)))
    mx.eval(layer.parameters())
    choose_products(layer, "auto")
    measure(layer, normal(1, TOKENS, DIM), flops=2 * TOKENS * DIM * DIM)


@pytest.mark.parametrize("bits", [4, 8])
def test_packing(benchmark: BenchmarkFixture, bits: int) -> None:
    rows = np.random.default_rng(0).standard_normal((1024 if ON_GPU else 128, 4096), np.float32)
    benchmark.extra_info["values"] = rows.size
    benchmark(pack, rows, Form(bits, 64))


def test_video_res_block(measure: Time) -> None:
    """At the decoder's widest, for one second."""
    size = (1, 4, 16, 24, 1024) if ON_GPU else (1, 2, 8, 8, 256)
    block = ready(VideoResBlock(size[-1], Border(causal=False, reflect=True)))
    measure(block, normal(*size), flops=2 * 54 * size[-1] * int(np.prod(size)))


def test_vocoder_stage(measure: Time) -> None:
    """An upsampling and one of the residual blocks behind it; always float32."""
    width, frames = (512, 3000) if ON_GPU else (128, 500)
    up, block = Upsample(width, width // 2, 16, 6, padding=5), VocoderResBlock(width // 2, 7, (1, 3, 5))
    mx.eval(up.parameters(), block.parameters())
    measure(lambda x: block(up(x)), normal(1, frames, width).astype(mx.float32))


def test_fp8_decoding(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 127, (4096, 4096), np.uint8)
    tensors = {"a.weight": ("F8_E4M3", codes), "a.weight_scale": ("F32", np.full((), 0.01, np.float32))}
    write_tensorfile(tmp_path / "codes.safetensors", tensors, {})
    file = open_tensorfile(tmp_path / "codes.safetensors")
    weight, scale = file.tensors["a.weight"], file.tensors["a.weight_scale"]
    fp8 = Fp8(file, weight, Scale(file, scale))
    benchmark.extra_info["values"] = codes.size
    benchmark(fp8.decoded, codes, Spec(codes.shape, "F8_E4M3"), 0, "bf16")


def test_streaming_a_tensor(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """Reading it piece by piece, from memory that keeps files."""
    values = np.zeros((MEGABYTES, 1 << 19), np.uint16)
    write_tensorfile(tmp_path / "large.safetensors", {"a": ("BF16", values)}, {})
    file = open_tensorfile(tmp_path / "large.safetensors")
    where = file.tensors["a"]
    benchmark.extra_info["bytes"] = values.nbytes
    benchmark(lambda: sum(piece.read().size for piece in bytes_of(file.reader, where.start, where.end)))
