"""The ways to multiply with packed weights give the same product, and the choice among them is measured and kept."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

import ltx2.runtime.layers.matmul as products
import ltx2.runtime.layers.packed as quantized
from ltx2.runtime.layers.linear import Packed
from ltx2.runtime.layers.matmul import PRODUCTS, Choice, Codes, choose
from ltx2.runtime.layers.packed import choose_products
from ltx2.runtime.model.forms import Form
from tests.support.parity import relative_l2

FORMS = [Form(bits, 64) for bits in (2, 3, 4, 5, 6, 8)]
FORMS += [Form(4, 32), Form(8, 128), Form(4, 32, "mxfp4"), Form(8, 32, "mxfp8"), Form(4, 16, "nvfp4")]


def codes_of(form: Form) -> tuple[Codes, mx.array]:
    """A packed weight, and the values it stands for."""
    weight = mx.random.normal((96, 256), key=mx.random.key(1))
    parts = mx.quantize(weight, form.group_size, form.bits, form.mode)
    codes = Codes(parts[0], parts[1], parts[2] if len(parts) > 2 else None, form)
    return codes, mx.dequantize(*codes[:3], form.group_size, form.bits, form.mode, dtype=mx.float32)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_every_product_is_that_of_the_unpacked_weight(form: Form, name: str) -> None:
    codes, weight = codes_of(form)
    x = mx.random.normal((2, 5, 256), key=mx.random.key(2))
    assert relative_l2(PRODUCTS[name](x, codes, None), x @ weight.T) < 1e-6
    bias = mx.random.normal((96,), key=mx.random.key(5))
    assert relative_l2(PRODUCTS[name](x, codes, bias), x @ weight.T + bias) < 1e-6


@pytest.mark.parametrize("name", PRODUCTS)
def test_codes_published_as_fp8_have_no_scales(name: str) -> None:
    weight = mx.random.normal((64, 128), key=mx.random.key(3)) * 20
    words = mx.to_fp8(weight).view(mx.uint32)
    codes = Codes(words, mx.full((64, 4), 127, mx.uint8), None, Form(8, 32, "mxfp8"), plain=True)
    x = mx.random.normal((3, 128), key=mx.random.key(4))
    want = x @ mx.from_fp8(words.view(mx.uint8), dtype=mx.float32).T
    assert relative_l2(PRODUCTS[name](x, codes, None), want) < 1e-6


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_unpacked_weights_have_the_dtype_of_the_stream(dtype: mx.Dtype) -> None:
    codes, _ = codes_of(Form(4, 64))
    x = mx.ones((1, 256), dtype)
    assert {PRODUCTS[name](x, codes, None).dtype for name in ("dequantized", "widened")} == {dtype}


def test_the_nearest_measured_number_of_rows_decides() -> None:
    choice = Choice(((128, "packed"), (1024, "widened"), (4096, "dequantized")))
    found = {rows: choice.product(rows).__name__ for rows in (1, 300, 700, 1536, 6144)}
    assert found == {1: "packed", 300: "packed", 700: "widened", 1536: "widened", 6144: "dequantized"}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[dict[str, float]], list[int]]:
    """A machine whose products take the given seconds; returns the list of what was measured."""

    def machine(times: dict[str, float]) -> list[int]:
        measured: list[int] = []

        def measure(form: Form, dtype: mx.Dtype, rows: int) -> dict[str, float]:
            measured.append(rows)
            return times

        monkeypatch.setattr(products, "_times", measure)
        monkeypatch.setattr(products, "_on_cpu", lambda: False)
        monkeypatch.setattr(Path, "home", lambda: tmp_path)
        return measured

    return machine


Machine = Callable[[dict[str, float]], list[int]]


def test_the_fastest_is_measured_once(gpu: Machine, tmp_path: Path) -> None:
    measured = gpu({"packed": 3.0, "dequantized": 1.0, "widened": 2.0})
    first, again = (choose(Form(4, 64), mx.bfloat16, "auto") for _ in range(2))
    assert {name for _, name in first.by_rows} == {"dequantized"}
    assert again == first
    assert measured == list(products.ROWS)
    choose(Form(8, 64), mx.bfloat16, "auto")
    assert len(measured) == 2 * len(products.ROWS)
    assert len(json.loads((tmp_path / products.FILE).read_text())) == 2


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": {"128": {"packed": "x"}}}'])
def test_a_damaged_file_is_measured_again(gpu: Machine, tmp_path: Path, text: str) -> None:
    measured = gpu({"packed": 1.0, "dequantized": 2.0, "widened": 2.0})
    (tmp_path / products.FILE).parent.mkdir(parents=True)
    (tmp_path / products.FILE).write_text(text)
    assert choose(Form(4, 64), mx.bfloat16, "auto").product(1).__name__ == "packed"
    assert measured == list(products.ROWS)


def test_a_home_that_cannot_be_written_only_costs_time(gpu: Machine, tmp_path: Path) -> None:
    measured = gpu({"packed": 1.0, "dequantized": 2.0, "widened": 2.0})
    (tmp_path / ".cache").write_text("in the way")
    for _ in range(2):
        choose(Form(4, 64), mx.bfloat16, "auto")
    assert len(measured) == 2 * len(products.ROWS)


def test_times_are_those_of_every_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SIDE", 256)
    times = products._times(Form(4, 64), mx.float32, 1)
    assert times.keys() == PRODUCTS.keys()
    assert all(math.isfinite(seconds) for seconds in times.values()), "all were measured"


def test_the_wanted_product_is_used_by_every_layer() -> None:
    layer = Packed(256, 96, Form(4, 64))
    chosen = choose_products(layer, "widened")
    assert layer.choice == Choice(((1, "widened"),)) == chosen["affine-4-64"]
    assert "choice" not in layer.parameters()


def test_a_weight_as_large_as_a_network_is_never_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "UNPACKABLE", 256 * 96 - 1)
    layer = Packed(256, 96, Form(4, 64))
    choose_products(layer, "widened")
    assert layer.choice == Choice()
