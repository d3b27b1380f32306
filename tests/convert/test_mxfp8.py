"""MXFP8 files: codes with a power of two for every 32 values, row by row or in ComfyUI's tiles, kept or decoded."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import ltx2
from ltx2.runtime.errors import CheckpointError
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_weights
from tests.support import encoded
from tests.support.encoded import E4M3, Tensors
from tests.support.folders import accept, contents
from tests.support.official import MONOLITH

LAYER = "model.diffusion_model.transformer_blocks.1.attn1.to_q"
OURS = "transformer_blocks.1.attn1.to_q"
ONLY: dict[str, Any] = {"variant": "dev", "only": ("transformer",)}


def source(folder: Path, tiles: bool, exponent: int = 120, dtype: str = "U8", shape: tuple[int, ...] = ()) -> Path:
    tensors = encoded.file_tensors(MONOLITH)
    rows, columns = tensors[f"{LAYER}.weight"][1].shape
    draw = np.random.default_rng(3)
    codes = draw.integers(0, 127, (rows, columns), dtype=np.uint8)
    exponents = draw.integers(exponent - 4, exponent + 4, (rows, columns // 32), dtype=np.uint8)
    extra: Tensors = {f"{LAYER}.weight": ("F8_E4M3", codes)}
    stored = encoded.tiled(exponents) if tiles else exponents
    extra[f"{LAYER}.weight_scale"] = dtype, stored.reshape(shape) if shape else stored
    if tiles:
        extra[f"{LAYER}.comfy_quant"] = "U8", np.frombuffer(b'{"format": "mxfp8"}', np.uint8)
    path = encoded.write(folder / "mxfp8.safetensors", tensors | extra)
    powers = np.repeat(np.exp2(exponents.astype(np.float64) - 127), 32, axis=1)
    np.save(folder / "wanted.npy", E4M3[codes] * powers)
    return path


@pytest.mark.parametrize(("tiles", "dtype"), [(False, "U8"), (True, "U8"), (False, "F8_E8M0")])
def test_kept_and_decoded(tmp_path: Path, tiles: bool, dtype: str) -> None:
    path = source(tmp_path, tiles, dtype=dtype)
    wanted = np.load(tmp_path / "wanted.npy")
    out = ltx2.convert([path], tmp_path / "kept", **ONLY)
    accept(out)
    folder = ModelFolder.open(out)
    weights = load_weights(folder, "transformer")
    assert folder.quantization("transformer").of(OURS).mode == "mxfp8" and f"{OURS}.weight_scale" not in weights
    packed = (weights[f"{OURS}.weight"], weights[f"{OURS}.scales"])
    assert np.array_equal(np.array(mx.dequantize(*packed, None, 32, 8, "mxfp8").astype(mx.float32)), wanted)
    plain = ltx2.convert([path], tmp_path / "plain", dtype="f32", **ONLY)
    assert np.array_equal(np.array(load_weights(ModelFolder.open(plain), "transformer")[f"{OURS}.weight"]), wanted)


def test_quantized_further(tmp_path: Path) -> None:
    """As from the decoded weights."""
    path = source(tmp_path, tiles=False)
    ltx2.convert([path], tmp_path / "direct", bits=4, **ONLY)
    ltx2.convert([path], tmp_path / "plain", dtype="bf16", **ONLY)
    ltx2.quantize(tmp_path / "plain", tmp_path / "turns", bits=4)
    weights = "transformer/model.safetensors"
    assert contents(tmp_path / "direct")[weights] == contents(tmp_path / "turns")[weights]


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a number"):
        ltx2.convert([source(tmp_path, tiles=False, exponent=252)], tmp_path / "out", **ONLY)
    with pytest.raises(CheckpointError, match="or in tiles, with ComfyUI's mark"):
        ltx2.convert([source(tmp_path, tiles=False, shape=(2, -1))], tmp_path / "out", **ONLY)
