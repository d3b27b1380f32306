"""LoRAs fused while converting: one sum in float32 and one rounding, before anything is packed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ltx2
from ltx2.convert.verify import verify
from ltx2.runtime.errors import InputError, UnsupportedError
from ltx2.runtime.files.tensors import to_float32
from ltx2.runtime.model.layout import Fused, ModelFolder
from tests.support import encoded
from tests.support.command import Here
from tests.support.folders import accept, contents
from tests.support.loras import random_factors, write_lora
from tests.support.official import MONOLITH

Q, OUT = "transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.proj_out"
NORM = "transformer_blocks.0.attn1.q_norm"
ONLY: dict[str, Any] = {"variant": "dev", "only": ("transformer",)}


def transformer(folder: Path) -> dict[str, np.ndarray]:
    """Its tensors, floats as float32, packed ones as they are."""
    (file,) = ModelFolder.open(folder).tensor_files("transformer")
    whole = {name: (np.array(file.array(name)), tensor.dtype) for name, tensor in file.tensors.items()}
    return {n: to_float32(value, dtype) if dtype in ("BF16", "F32") else value for n, (value, dtype) in whole.items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ltx2.convert([MONOLITH], tmp_path_factory.mktemp("plain") / "model", **ONLY)


@pytest.fixture(scope="module")
def loras(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One that changes two layers at scale 6 / 3, and one that changes a weight, its bias and a norm as a whole."""
    folder, weights = tmp_path_factory.mktemp("loras"), transformer(plain)
    factors = random_factors({path: weights[f"{path}.weight"].shape for path in (Q, OUT)})
    first = write_lora(folder / "factors.safetensors", factors, alpha=6.0)
    draw = np.random.default_rng(1).standard_normal
    names = {f"{Q}.diff": f"{Q}.weight", f"{Q}.diff_b": f"{Q}.bias", f"{NORM}.diff": f"{NORM}.weight"}
    wholes = {f"diffusion_model.{name}": draw(weights[key].shape).astype(np.float32) for name, key in names.items()}
    save_file(wholes, folder / "whole.safetensors")
    return first, folder / "whole.safetensors"


def expected(plain: Path, loras: tuple[Path, Path]) -> dict[str, np.ndarray]:
    """Both in float64, the first at strength 0.5, the second at -1."""
    weights = {name: value.astype(np.float64) for name, value in transformer(plain).items()}
    shapes = {path: weights[f"{path}.weight"].shape for path in (Q, OUT)}
    for path, (down, up) in random_factors(shapes).items():
        weights[f"{path}.weight"] += 0.5 * 2 * up.astype(np.float64) @ down
    whole = load_file(loras[1])
    for name, key in ((f"{Q}.diff", f"{Q}.weight"), (f"{Q}.diff_b", f"{Q}.bias"), (f"{NORM}.diff", f"{NORM}.weight")):
        weights[key] -= whole[f"diffusion_model.{name}"]
    return weights


@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 1e-6), (None, 2**-8)])
def test_values(plain: Path, loras: tuple[Path, Path], tmp_path: Path, dtype: str | None, tolerance: float) -> None:
    out = ltx2.convert([MONOLITH], tmp_path / "model", fuse=[(loras[0], 0.5), f"{loras[1]}:-1"], dtype=dtype, **ONLY)
    accept(out)
    wanted, found = expected(plain, loras), transformer(out)
    changed = {f"{Q}.weight", f"{Q}.bias", f"{OUT}.weight", f"{NORM}.weight"}
    for name, value in wanted.items():
        if name in changed:
            np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=tolerance / 10)
        else:
            assert np.array_equal(found[name], value), name


def test_one_rounding(plain: Path, loras: tuple[Path, Path], tmp_path: Path) -> None:
    """In bf16 nearly all values are the nearest to the sum; two roundings would miss many."""
    out = ltx2.convert([MONOLITH], tmp_path / "model", fuse=[(loras[0], 0.5), (loras[1], -1)], **ONLY)
    wanted = expected(plain, loras)[f"{Q}.weight"].astype(np.float32)
    assert np.mean(transformer(out)[f"{Q}.weight"] == encoded.from_bf16(encoded.to_bf16(wanted))) > 0.999


def test_what_the_folder_says(plain: Path, loras: tuple[Path, Path], tmp_path: Path) -> None:
    out = ltx2.convert([MONOLITH], tmp_path / "model", fuse=[(loras[0], 0.5), loras[1]], **ONLY)
    manifest = ModelFolder.open(out).manifest
    fused = (Fused("factors.safetensors", 0.5), Fused("whole.safetensors", 1))
    assert manifest.components["transformer"].fused == fused
    assert {source.name for source in manifest.sources} == {MONOLITH.name, "factors.safetensors", "whole.safetensors"}
    before = contents(out)
    assert ltx2.convert([MONOLITH], out, fuse=[(loras[0], 0.5), loras[1]], **ONLY) == out and contents(out) == before
    list(verify(out))
    with pytest.raises(UnsupportedError, match="LoRAs are fused into them"):
        list(verify(out, [MONOLITH]))


def test_strength_0_changes_nothing(plain: Path, loras: tuple[Path, Path], tmp_path: Path) -> None:
    out = ltx2.convert([MONOLITH], tmp_path / "model", fuse=[(loras[0], 0), (loras[1], 0)], **ONLY)
    fused = transformer(out)
    for name, value in transformer(plain).items():
        assert np.array_equal(fused[name], value), name


def test_before_quantizing(loras: tuple[Path, Path], tmp_path: Path) -> None:
    """The same bytes as fusing and quantizing in turn."""
    fuse: list[Any] = [(loras[0], 0.5)]
    fused = ltx2.convert([MONOLITH], tmp_path / "fused", fuse=fuse, **ONLY)
    ltx2.quantize(fused, tmp_path / "two", bits=4)
    ltx2.convert([MONOLITH], tmp_path / "one", fuse=fuse, bits=4, **ONLY)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_codes(plain: Path, loras: tuple[Path, Path], tmp_path: Path) -> None:
    """Layers published as FP8 are decoded where a LoRA changes them, and stay codes elsewhere."""
    source = encoded.demo_sources(tmp_path, encoded.scaled)[0]
    sources = ltx2.convert([source], tmp_path / "decoded", dtype="f32", **ONLY)
    out = ltx2.convert([source], tmp_path / "model", fuse=[(loras[0], 0.5)], **ONLY)
    (file,) = ModelFolder.open(out).tensor_files("transformer")
    kept = {name for name, tensor in file.tensors.items() if tensor.dtype == "U32"}
    assert kept and f"{Q}.weight" not in kept and f"{Q}.weight_scale" not in file.tensors
    accept(out)
    weight = transformer(sources)[f"{Q}.weight"].astype(np.float64)
    ((down, up),) = random_factors({Q: weight.shape}).values()
    wanted = weight + up.astype(np.float64) @ down  # 0.5 * 6 / 3
    np.testing.assert_allclose(transformer(out)[f"{Q}.weight"], wanted, rtol=2**-8, atol=1e-5)


def test_refused(loras: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_lora(tmp_path / "other.safetensors", random_factors({Q: (8, 8)}))
    for fuse, says in (
        ([other], "does not fit the model"),
        ([f"{loras[0]}:1,2"], "one strength"),
        ([(loras[0], float("inf"))], "must be finite"),
        ([tmp_path / "missing.safetensors"], "cannot read"),
    ):
        with pytest.raises(Exception, match=says):
            ltx2.convert([MONOLITH], tmp_path / "model", fuse=fuse, **ONLY)
    with pytest.raises(InputError, match="nothing to fuse"):
        ltx2.convert([MONOLITH], tmp_path / "model", variant="dev", only=("vocoder",), fuse=[loras[0]])
    assert not (tmp_path / "model").exists()


def test_command(here: Here, loras: tuple[Path, Path], tmp_path: Path) -> None:
    fuse = ("--fuse", f"{loras[0]}:0.5", "--dry-run", "--json")
    done = here("convert", MONOLITH, "-o", tmp_path / "out", "--variant", "dev", *fuse)
    steps = {e["key"]: e["transform"] for e in done.json["plan"] if "key" in e}
    assert steps[f"{Q}.weight"] == ["fuse(factors.safetensors:0.5)", "cast(bf16)"]
    assert steps[f"{Q}.bias"] == ["copy"]
