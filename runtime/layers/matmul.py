"""How to multiply with packed weights: by MLX's kernel for them, or by unpacking them first and multiplying as usual.

Few rows favour the first, many the second, by up to a factor of five either way; where they cross depends on the
machine. So it is measured, once per machine and form of weights, and kept in a file."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, Protocol

import mlx.core as mx

from ltx2.runtime.errors import Ltx2Error
from ltx2.runtime.files.atomic import write_text
from ltx2.runtime.model.forms import Form

AUTO = "auto"
ROWS = (128, 1024, 4096)  # that are measured: tokens of a sound or a prompt, of a text, of a picture
SIDE = 4096  # of the weights that are measured
REPETITIONS = 5
FILE = Path(".cache") / "ltx2" / "products.json"  # under the user's home


class Factors(NamedTuple):
    """A change of a weight, as a product: up (outputs, rank) @ down (rank, inputs)."""

    down: mx.array
    up: mx.array


class Codes(NamedTuple):
    """A packed weight (outputs, inputs): MLX's codes, scales and biases. `plain`: all scales are 1."""

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    form: Form
    plain: bool = False


class Product(Protocol):
    """x (..., inputs) @ (W + factors)^T + bias"""

    __name__: str

    def __call__(
        self, x: mx.array, codes: Codes, bias: mx.array | None = None, factors: Factors | None = None
    ) -> mx.array: ...


def packed(x: mx.array, codes: Codes, bias: mx.array | None = None, factors: Factors | None = None) -> mx.array:
    """x (..., inputs) @ (W + factors)^T + bias by MLX's kernel for packed weights."""
    weight, scales, biases, form, _ = codes
    product = mx.quantized_matmul(x, weight, scales, biases, group_size=form.group_size, bits=form.bits, mode=form.mode)
    product = product if bias is None else product + bias
    return product if factors is None else _beside(product, x, factors)


def dequantized(x: mx.array, codes: Codes, bias: mx.array | None = None, factors: Factors | None = None) -> mx.array:
    """x (..., inputs) @ (W + factors)^T + bias, with W unpacked by MLX's kernel to x's dtype."""
    weight, scales, biases, form, _ = codes
    parts = (weight, scales) if biases is None else (weight, scales, biases)
    return _dequantized_linear(x, parts, bias, factors, (form.group_size, form.bits, form.mode))


def widened(x: mx.array, codes: Codes, bias: mx.array | None = None, factors: Factors | None = None) -> mx.array:
    """x (..., inputs) @ (W + factors)^T + bias, with W unpacked by one fused elementwise kernel where its form has
    one."""
    weight, scales, biases, form, plain = codes
    if plain and biases is None and form.bits == 8:
        return _fp8_linear(x, weight, bias, factors)
    if biases is None or form.bits not in (4, 8):
        return dequantized(x, codes, bias, factors)
    return (_nibble_linear if form.bits == 4 else _byte_linear)(x, weight, scales, biases, bias, factors)


THIN = 3  # an estimate; docs/performance.md has the result on one GPU


def sums(rows: int, outputs: int, inputs: int) -> bool:
    """Whether it is faster to add factors to a weight of this shape first, (W + up @ down) x, than to compute
    W x + up @ (down x), with so many rows of x. The first takes outputs * inputs operations per unit of rank, the
    second rows * (outputs + inputs), in products so thin that their operations count THIN times."""
    return outputs * inputs < THIN * rows * (outputs + inputs)


# Whole layers are compiled: in 1300 calls a step, starting every operation from Python would cost more than the work.


@mx.compile
def _dequantized_linear(
    x: mx.array,
    parts: tuple[mx.array, ...],
    bias: mx.array | None,
    factors: Factors | None,
    form: tuple[int, int, str],
) -> mx.array:
    (weight, scales, *biases), (group_size, bits, mode) = parts, form
    first = biases[0] if biases else None
    values = mx.dequantize(weight, scales, first, group_size=group_size, bits=bits, mode=mode, dtype=x.dtype)
    return _linear(x, values, bias, factors)


@mx.compile
def _fp8_linear(x: mx.array, codes: mx.array, bias: mx.array | None, factors: Factors | None) -> mx.array:
    return _linear(x, mx.from_fp8(codes.view(mx.uint8), dtype=x.dtype), bias, factors)


@mx.compile
def _byte_linear(
    x: mx.array,
    codes: mx.array,
    scales: mx.array,
    biases: mx.array,
    bias: mx.array | None,
    factors: Factors | None,
) -> mx.array:
    values = codes.view(mx.uint8).reshape(*scales.shape, -1)
    return _linear(x, _unpacked(values, scales[..., None], biases[..., None], x.dtype), bias, factors)


@mx.compile
def _nibble_linear(
    x: mx.array,
    codes: mx.array,
    scales: mx.array,
    biases: mx.array,
    bias: mx.array | None,
    factors: Factors | None,
) -> mx.array:
    words = codes.reshape(*scales.shape, -1, 1) >> mx.arange(0, 32, 4, dtype=mx.uint32)
    return _linear(x, _unpacked(words & 15, scales[..., None, None], biases[..., None, None], x.dtype), bias, factors)


def _unpacked(codes: mx.array, scales: mx.array, biases: mx.array, dtype: mx.Dtype) -> mx.array:
    """Codes (outputs, ...) to values (outputs, inputs), computed in float32 and rounded once."""
    values = codes.astype(mx.float32) * scales.astype(mx.float32) + biases.astype(mx.float32)
    return values.astype(dtype).reshape(codes.shape[0], -1)


def _linear(x: mx.array, weight: mx.array, bias: mx.array | None, factors: Factors | None) -> mx.array:
    """x (..., inputs) @ (weight (outputs, inputs) + factors)^T + bias"""
    if factors is not None and sums(x.size // x.shape[-1], *weight.shape):
        weight, factors = added(weight, factors), None
    y = x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)
    return y if factors is None else mx.addmm(y, x @ factors.down.T, factors.up.T)


def added(weight: mx.array, factors: Factors) -> mx.array:
    """weight (outputs, inputs) + up @ down, in the weight's dtype."""
    return mx.addmm(weight, factors.up, factors.down).astype(weight.dtype)


@mx.compile
def summed_linear(x: mx.array, weight: mx.array, bias: mx.array | None, factors: Factors) -> mx.array:
    """x (..., inputs) @ (weight + factors)^T + bias, with the very sum that `added` gives."""
    return _linear(x, added(weight, factors), bias, None)


@mx.compile
def _beside(y: mx.array, x: mx.array, factors: Factors) -> mx.array:
    """y (..., outputs) + (x (..., inputs) @ down^T) @ up^T"""
    return mx.addmm(y, x @ factors.down.T, factors.up.T)


PRODUCTS: Mapping[str, Product] = {"packed": packed, "dequantized": dequantized, "widened": widened}


@dataclass(frozen=True)
class Choice:
    """Names of products by measured number of rows (batch x tokens); the nearest number counts."""

    by_rows: tuple[tuple[int, str], ...] = ((1, "packed"),)

    @cache  # noqa: B019 (there are few choices, and few numbers of rows)
    def product(self, rows: int) -> Product:
        """The function for so many rows."""
        _, name = min(self.by_rows, key=lambda entry: abs(math.log(entry[0] / max(rows, 1))))
        return PRODUCTS[name]


def choose(form: Form, dtype: mx.Dtype, wanted: str) -> Choice:
    """The products of a form: the `wanted` one, or (`auto`) the fastest on this machine for each number of rows. A CPU,
    which is for tests, always takes the same one, for the same bits in every run: MLX's own kernel for packed weights
    is slow there, and coarse in 16 bits."""
    if wanted != AUTO:
        return Choice(((1, wanted),))
    if _on_cpu():
        return Choice(((1, "dequantized"),))
    kept, key = _read(), f"{mx.device_info().get('device_name')}, mlx {metadata.version('mlx')}, {form}, {dtype}"
    if key not in kept:
        kept[key] = {str(rows): _times(form, dtype, rows) for rows in ROWS}
        _write(kept)
    return Choice(tuple((int(rows), min(times, key=lambda name: times[name])) for rows, times in kept[key].items()))


def _on_cpu() -> bool:
    return bool(mx.default_device().type == mx.DeviceType.cpu)


Kept = dict[str, dict[str, dict[str, float]]]  # machine and form -> rows -> product -> seconds


def _times(form: Form, dtype: mx.Dtype, rows: int) -> dict[str, float]:
    """Seconds of every product, the least of several: disturbances only make a measurement slower."""
    codes, x = _example(form, dtype), mx.ones((1, rows, SIDE), dtype)
    mx.eval(x, *(part for part in codes[:3] if part is not None))
    times = dict.fromkeys(PRODUCTS, math.inf)
    for _ in range(1 + REPETITIONS):  # the first compiles
        for name, product in PRODUCTS.items():
            start = time.perf_counter()
            mx.eval(product(x, codes))
            times[name] = min(times[name], time.perf_counter() - start)
    return times


def _example(form: Form, dtype: mx.Dtype) -> Codes:
    """A packed weight (SIDE, SIDE) of any values: times do not depend on them."""
    words = mx.full((SIDE, SIDE * form.bits // 32), 0x11111111, mx.uint32)
    shape = (SIDE, SIDE // form.group_size)
    if form.biased:
        return Codes(words, mx.ones(shape, dtype), mx.zeros(shape, dtype), form)
    return Codes(words, mx.full(shape, 56, mx.uint8), None, form, plain=form.mode == "mxfp8")


def _read() -> Kept:
    try:
        kept = json.loads((Path.home() / FILE).read_text())
        return {key: {rows: _known(times) for rows, times in entry.items()} for key, entry in kept.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError):  # none yet, or another's
        return {}


def _known(times: Mapping[str, float]) -> dict[str, float]:
    return {name: float(times[name]) for name in PRODUCTS}


def _write(kept: Kept) -> None:
    """Keep the times in the file; where that fails, the next run measures again."""
    try:
        path = Path.home() / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(kept, indent=1) + "\n")
    except (OSError, RuntimeError, Ltx2Error):
        return
