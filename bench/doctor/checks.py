"""The kernels that the runtime uses, on small inputs that include known faults (more than 32,768 rows), and the results
of NumPy in float32. Inputs are exact in 16-bit floats too, so only the kernels' arithmetic differs."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ltx2.bench.doctor import reference
from ltx2.runtime.files.tensors import Array
from ltx2.runtime.layers.matmul import PRODUCTS, Codes
from ltx2.runtime.layers.neighbourhood import Keys, Neighbourhood
from ltx2.runtime.layers.packed import UNIT
from ltx2.runtime.layers.rope import Rope, apply_rope
from ltx2.runtime.layers.rotation import rotated
from ltx2.runtime.model.forms import MODES, Form
from ltx2.runtime.model.hadamard import BASES, ROTATIONS

ROWS = 33_280
WIDTH, OUTPUTS = 128, 64
Inputs = Mapping[str, Array]
Compute = Callable[[Mapping[str, mx.array]], mx.array]


@dataclass(frozen=True)
class Check:
    """One kernel: its inputs, its computation, and the expected result. `group` is a title for people. `wide`: the
    runtime uses it in float32 whatever the weights. `slack`: a right result may be so many times as far off as of other
    kernels."""

    group: str
    name: str
    inputs: Callable[[], Inputs]
    compute: Compute
    expected: Callable[[Inputs], Array]
    wide: bool = False
    slack: float = 1.0


def checks() -> Iterator[Check]:
    """All checks; inputs are made when a check runs."""
    yield from _products()
    yield from _attention()
    yield from _convolutions()
    yield from _elementwise()


@cache
def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    """Normal values of this shape, float32 that bfloat16 holds exactly."""
    values = scale * np.random.default_rng([seed, *shape]).standard_normal(shape)
    return _rounded(values.astype(np.float32))


def _rounded(values: Array) -> Array:
    """float32 of any shape, cut to bfloat16's bits."""
    return np.array((values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))


def _products() -> Iterator[Check]:
    def plain() -> Inputs:
        return {"x": draw(ROWS, WIDTH), "weight": draw(OUTPUTS, WIDTH, scale=WIDTH**-0.5), "bias": draw(OUTPUTS)}

    def product(given: Mapping[str, mx.array]) -> mx.array:
        return mx.addmm(given["bias"], given["x"], given["weight"].T)

    yield Check("matrix products", "addmm", plain, product, lambda i: i["x"] @ i["weight"].T + i["bias"])
    for mode, kind in MODES.items():
        for bits in kind.bits:
            for size in kind.group_sizes:
                form = Form(bits, size, mode)
                for name in PRODUCTS:
                    compute = partial(_packed_product, form, name)
                    group = f"products with {mode} weights"
                    yield Check(group, f"{form} {name}", partial(_packed_inputs, form), compute, _packed_expected)
    form = Form(8, 32, "mxfp8")
    for name in PRODUCTS:
        compute = partial(_packed_product, form, name, plain=True)
        yield Check("products with FP8 weights", f"scaled as a whole {name}", _fp8_inputs, compute, _packed_expected)
    for way in ((size, kind) for size in ROTATIONS for kind in BASES):
        yield Check(
            "Hadamard rotation", "{} {}".format(*way), lambda: {"x": draw(ROWS, 256)},
            lambda given, way=way: rotated(given["x"], *way),  # type: ignore[misc]
            lambda inputs, way=way: reference.rotated(inputs["x"], *way),  # type: ignore[misc]
        )  # fmt: skip


def _packed_inputs(form: Form) -> Inputs:
    """x (ROWS, WIDTH) and a weight (OUTPUTS, WIDTH), packed and unpacked on the CPU in float32."""
    weight = mx.array(draw(OUTPUTS, WIDTH, scale=WIDTH**-0.5))
    sizes = (form.group_size, form.bits, form.mode)
    codes, *scales = mx.quantize(weight, *sizes, stream=mx.cpu)
    if form.biased:
        scales = [mx.array(_rounded(np.array(part))) for part in scales]
    biases = scales[1] if form.biased else None
    values = mx.dequantize(codes, scales[0], biases, *sizes, dtype=mx.float32, stream=mx.cpu)
    parts = {"scales": scales[0]} | ({"biases": scales[1]} if form.biased else {})
    found = {"codes": codes, "values": values, **parts}
    return {"x": draw(ROWS, WIDTH), **{name: np.array(value) for name, value in found.items()}}


def _fp8_inputs() -> Inputs:
    """x (ROWS, WIDTH) and published FP8 codes (OUTPUTS, WIDTH), whose scales are all 1."""
    codes = np.random.default_rng(0).integers(32, 64, (OUTPUTS, WIDTH), np.uint8)
    codes[:, ::2] |= np.uint8(128)
    scales = np.full((OUTPUTS, WIDTH // 32), UNIT, np.uint8)
    values = reference.fp8({"codes": codes})
    return {"x": draw(ROWS, WIDTH), "codes": codes.view(np.uint32), "values": values, "scales": scales}


def _packed_product(form: Form, name: str, given: Mapping[str, mx.array], plain: bool = False) -> mx.array:
    """(ROWS, OUTPUTS) of `_packed_inputs` by the product of this name; `plain`: all scales are 1."""
    codes = Codes(given["codes"], given["scales"], given.get("biases"), form, plain)
    return PRODUCTS[name](given["x"], codes, None)


def _packed_expected(inputs: Inputs) -> Array:
    """(ROWS, OUTPUTS) in float32."""
    return np.asarray(inputs["x"] @ inputs["values"].T, np.float32)


def _attention() -> Iterator[Check]:
    group = "attention"

    def attend(given: Mapping[str, mx.array]) -> mx.array:
        q, k, v = given["q"], given["k"], given["v"]
        scale = q.shape[-1] ** -0.5
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=given.get("mask"))

    def inputs(queries: int, keys: int, width: int, mask: str = "") -> Inputs:
        made = {"q": draw(1, 2, queries, width)}
        made |= {name: draw(1, 2, keys, width, seed=n) for n, name in enumerate("kv", start=1)}
        if mask == "added":
            made["mask"] = draw(1, 1, queries, keys, seed=3)
        if mask == "seen":
            made["mask"] = np.arange(keys)[None, None, None] <= np.arange(queries)[None, None, :, None]
        return made

    for name, sizes in (
        ("of many queries, 64 wide", (ROWS, 96, 64)),
        ("of many queries, 128 wide", (ROWS, 96, 128)),
        ("to many keys, 128 wide", (96, ROWS, 128)),
        ("with an added mask, 64 wide", (4096, 96, 64, "added")),
        ("of a language model, 256 wide", (512, 512, 256, "seen")),
    ):
        yield Check(group, name, partial(inputs, *sizes), attend, reference.attention)
    size, kernel = (6, 9, 9), (3, 5, 5)

    def clip() -> Inputs:
        return {name: draw(*size, 32, seed=n, scale=0.5) for n, name in enumerate("qkv")}

    def windows(given: Mapping[str, mx.array]) -> mx.array:
        place, made = Neighbourhood(size, kernel), []
        for start in range(0, size[0], 4):
            seen = place.frames(start, min(start + 4, size[0]))
            keys = Keys(seen.start, [given["k"][seen]], [given["v"][seen]])
            made.append(mx.concatenate(list(place.attend(given["q"][start : start + 4], keys, start, 2)), axis=1))
        return mx.concatenate(made)

    yield Check("neighbourhood attention", "3 x 5 x 5", clip, windows, partial(reference.neighbourhood, kernel, 2))


def _convolutions() -> Iterator[Check]:
    def inputs(shape: tuple[int, ...], outputs: int, kernel: tuple[int, ...], inner: int = 0) -> Inputs:
        taps = (*kernel, inner or shape[-1])
        return {"x": draw(*shape), "weight": draw(outputs, *taps, seed=1, scale=float(np.prod(taps)) ** -0.5)}

    space = partial(inputs, (1, 5, 48, 48, 64), 64, (3, 3, 3))
    volume, plane = partial(reference.convolution, padding=1), partial(reference.convolution, padding=0)
    yield Check("convolutions", "3-D", space, lambda g: mx.conv3d(g["x"], g["weight"], padding=1), volume)
    # As the video decoder has them. Macs use Winograd's method, which rounds 35 times as much (emulated: 6 %).
    extended = partial(inputs, (1, 6, 34, 34, 128), 128, (3, 3, 3))
    yield Check(
        "convolutions", "3-D, many channels", extended, lambda g: mx.conv3d(g["x"], g["weight"]), plane, slack=5
    )
    picture = partial(inputs, (2, 64, 64, 32), 32, (3, 3))
    yield Check("convolutions", "2-D", picture, lambda g: mx.conv2d(g["x"], g["weight"], padding=1), volume, wide=True)
    sound = partial(inputs, (1, 40_000, 16), 16, (7,))
    yield Check("convolutions", "1-D", sound, lambda g: mx.conv1d(g["x"], g["weight"]), plane, wide=True)
    spread = partial(reference.convolution, padding=0, dilation=5)
    yield Check(
        "convolutions", "1-D, dilated", sound, lambda g: mx.conv1d(g["x"], g["weight"], dilation=5), spread, wide=True
    )
    depth = partial(inputs, (2, 64, 64, 32), 32, (5, 5), 1)
    apart = partial(reference.convolution, padding=2, groups=32)
    yield Check(
        "convolutions", "depthwise", depth, lambda g: mx.conv2d(g["x"], g["weight"], padding=2, groups=32), apart
    )


def _elementwise() -> Iterator[Check]:
    def rows() -> Inputs:
        return {"x": draw(ROWS, 256), "weight": 1 + draw(256, seed=1, scale=0.125)}

    yield Check(
        "norms", "RMS", rows, lambda g: mx.fast.rms_norm(g["x"], g["weight"], 1e-6),
        lambda i: reference.rms_norm(i["x"]) * i["weight"],
    )  # fmt: skip
    yield Check(
        "norms", "layer", rows, lambda g: mx.fast.layer_norm(g["x"], None, None, 1e-6),
        lambda i: reference.rms_norm(i["x"] - i["x"].mean(axis=-1, keepdims=True)),
    )  # fmt: skip

    def clip() -> Inputs:
        return {"x": draw(1, 5, 24, 24, 64)}

    norm = nn.GroupNorm(32, 64, affine=False, pytorch_compatible=True)
    yield Check("norms", "groups", clip, lambda g: norm(g["x"]), partial(reference.group_norm, 32))

    def turned() -> Inputs:
        angles = np.random.default_rng(0).uniform(-3, 3, (1, ROWS, 2, 32)).astype(np.float32)
        return {"x": draw(1, ROWS, 2, 64), "angles": angles}

    def rope(given: Mapping[str, mx.array]) -> mx.array:
        angles = given["angles"].astype(mx.float32)
        return apply_rope(given["x"], Rope(mx.cos(angles), mx.sin(angles)))

    yield Check("rotary embedding", "split", turned, rope, reference.rope)

    def tokens() -> Inputs:
        return {"x": draw(1, 2, 1024, 64)}

    yield Check(
        "rotary embedding", "of a language model", tokens,
        lambda g: mx.fast.rope(g["x"], 64, traditional=False, base=10000.0, scale=1.0, offset=0),
        reference.language_rope,
    )  # fmt: skip

    def codes() -> Inputs:
        return {"codes": np.array([c for c in range(256) if c & 127 != 127], np.uint8)}  # all but NaN

    yield Check("FP8", "decoding", codes, lambda g: mx.from_fp8(g["codes"], dtype=mx.float32), reference.fp8)
    gelu = mx.compile(nn.gelu_approx)
    yield Check("compiled functions", "GELU", rows, lambda g: gelu(g["x"]), lambda i: reference.gelu(i["x"]))
