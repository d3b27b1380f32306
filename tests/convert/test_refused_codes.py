"""Damaged files of FP8, NVFP4 and int8 codes: refused by the tensor's name, kept or decoded, and nothing is written."""

import json
from pathlib import Path

import numpy as np
import pytest

import ltx2
from ltx2.runtime.errors import CheckpointError, Ltx2Error, UnsupportedError
from tests.support import encoded
from tests.support.encoded import PREFIX, Array, Encode

LAYER = f"{PREFIX}1.attn1.to_q"
SCALE, WEIGHT, MARK = f"{LAYER}.weight_scale", f"{LAYER}.weight", f"{LAYER}.comfy_quant"
Value = tuple[str, Array] | None  # in place of the file's tensor; None: there is none
Row = tuple[str, Value, type[Ltx2Error], str]  # part of the layer, its value, the error and what it says


def floats(*shape: int, value: float = 1) -> Value:
    return "F32", np.full(shape, value, np.float32)


def codes(dtype: str, *shape: int, code: int = 0) -> Value:
    return dtype, np.full(shape, code, np.int8 if dtype == "I8" else np.uint8)


def marked(text: str | bytes) -> Value:
    return "U8", np.frombuffer(text if isinstance(text, bytes) else text.encode(), np.uint8)


def mark(**said: object) -> Value:
    return marked(json.dumps({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64} | said))


def broken(value: Value, place: tuple[int, int], code: float) -> Value:
    """With one other value at a place."""
    assert value is not None
    value[1][place] = code
    return value


FP8: list[Row] = [
    ("weight_scale", None, CheckpointError, f"FP8 tensor {WEIGHT} has no scale"),
    ("weight_scale", floats(1, value=np.nan), CheckpointError, f"tensor {SCALE} .* not a number"),
    ("weight_scale", floats(value=np.inf), CheckpointError, f"tensor {SCALE} .* not a number"),
    ("weight_scale", floats(0), CheckpointError, rf"{SCALE} is F32 \[0\]"),
    ("weight_scale", floats(64), CheckpointError, rf"{SCALE} is F32 \[64\]"),
    ("weight_scale", floats(1, 128), CheckpointError, rf"{SCALE} is F32 \[1, 128\]"),
    ("weight_scale", codes("U8", code=1), CheckpointError, f"{SCALE} is U8"),
    ("scale_weight", floats(), CheckpointError, f"{WEIGHT} has two scales"),
    ("weight", codes("F8_E4M3", 128, 128, code=0x7F), CheckpointError, f"tensor {WEIGHT} .* number"),
    ("weight", codes("F8_E4M3", 128, 128, code=0xFF), CheckpointError, f"tensor {WEIGHT} .* number"),
    ("weight", codes("F8_E5M2", 128, 128), UnsupportedError, f"{WEIGHT} holds FP8 .* E5M2"),
    ("weight", ("BF16", np.zeros((128, 128), np.uint16)), CheckpointError, f"{SCALE} scales nothing"),
    ("weight", None, CheckpointError, f"{SCALE} scales nothing"),
]
NVFP4: list[Row] = [
    ("weight_scale", broken(codes("F8_E4M3", 128, 8, code=0x30), (5, 3), 0x7F), CheckpointError,
     f"tensor {SCALE} .* not a number"),
    ("weight_scale", codes("F8_E4M3", 128, 4, code=0x30), CheckpointError, f"{SCALE} is F8_E4M3"),
    ("weight_scale", floats(128, 8), CheckpointError, f"{SCALE} is F32"),
    ("weight_scale", None, UnsupportedError, f"{WEIGHT} holds bytes that are no NVFP4"),
    ("weight_scale_2", None, UnsupportedError, f"{WEIGHT} holds bytes that are no NVFP4"),
    ("weight_scale_2", floats(value=np.nan), CheckpointError, f"{SCALE}_2 .* not a num"),
    ("weight_scale_2", floats(128), CheckpointError, f"{SCALE}_2 is F32"),
]  # fmt: skip
INT8: list[Row] = [
    ("comfy_quant", None, UnsupportedError, f"{WEIGHT} holds int8 values.*no {MARK}"),
    ("weight_scale", None, UnsupportedError, f"{WEIGHT} holds int8 values.*no {SCALE}"),
    ("weight", None, CheckpointError, f"{SCALE} scales nothing"),
    ("comfy_quant", marked("convrot"), CheckpointError, f"{MARK} cannot be read"),
    ("comfy_quant", marked(b"\xff{}"), CheckpointError, f"{MARK} cannot be read"),
    ("comfy_quant", marked("[]"), CheckpointError, f"{MARK} cannot be read: .*no"),
    ("comfy_quant", marked(" " * 5000), CheckpointError, f"{MARK} cannot be read: .*5000 bytes"),
    ("comfy_quant", mark(params=[1]), CheckpointError, f"{MARK} cannot be read"),
    ("comfy_quant", marked("{}"), UnsupportedError, f"{WEIGHT} holds int8 codes of the format None"),
    ("comfy_quant", mark(format="convrot_w4a4"), UnsupportedError, "weight holds int8 codes of the format 'convr"),
    ("comfy_quant", mark(convrot_groupsize=32), UnsupportedError, f"{WEIGHT} holds .* in blocks of 32 "),
    ("comfy_quant", mark(convrot_groupsize="64"), UnsupportedError, f"{WEIGHT} holds .* in blocks of '64'"),
    ("comfy_quant", mark(convrot_groupsize=256), CheckpointError, f"{WEIGHT} is I8 .*in blocks of 256"),
    ("weight", codes("I8", 128, 96), CheckpointError, f"{WEIGHT} is I8 .*in blocks of 64"),
    ("weight", codes("I8", 128), CheckpointError, rf"{WEIGHT} is I8 \[128\]: int8 codes are"),
    ("weight_scale", floats(64, 1), CheckpointError, rf"{SCALE} is F32 \[64, 1\]"),
    ("weight_scale", codes("U8", 128, 1), CheckpointError, f"{SCALE} is U8"),
    ("weight_scale", broken(floats(128, 1, value=0.01), (5, 0), np.nan), CheckpointError,
     f"tensor {SCALE} .* not a number"),
    ("bias", codes("I8", 128), UnsupportedError, f"{LAYER}.bias holds int8 values"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("encode", "row"),
    [(encode, row) for encode, rows in ((encoded.scaled, FP8), (encoded.four_bit, NVFP4), (encoded.signed, INT8))
     for row in rows],
)  # fmt: skip
def test_refused_by_name(tmp_path: Path, encode: Encode, row: Row) -> None:
    part, value, error, message = row
    tensors = encoded.denoiser(encoded.demo_encoded(encode))
    tensors.pop(f"{LAYER}.{part}", None)
    if value is not None:
        tensors[f"{LAYER}.{part}"] = value
    source = encoded.write(tmp_path / "distilled.safetensors", tensors)
    for dtype in (None, "bf16"):
        with pytest.raises(error, match=message):
            ltx2.convert(source, tmp_path / "model", only=["transformer"], dtype=dtype)
        assert not list(tmp_path.glob("model*"))


def test_a_marker_is_enough_to_miss_a_scale(tmp_path: Path) -> None:
    tensors = encoded.denoiser(encoded.demo_encoded(encoded.plain_cast))
    source = encoded.write(tmp_path / "distilled.safetensors", tensors)
    ltx2.convert(source, tmp_path / "model", only=["transformer"])
    encoded.write(source, tensors | {"scaled_fp8": ("F8_E4M3", np.zeros(2, np.uint8))})
    with pytest.raises(CheckpointError, match="has no scale"):
        ltx2.convert(source, tmp_path / "other", only=["transformer"])
