"""Inspecting published files, folders and model folders, from headers."""

import json
from pathlib import Path

import pytest

import ltx2
from ltx2.convert.inspect import inspect
from ltx2.runtime.errors import CheckpointError
from ltx2.runtime.model.layout import ModelFolder
from tests.support import published
from tests.support.command import Here
from tests.support.official import MONOLITH, UPSCALER


def test_published_checkpoint(tmp_path: Path) -> None:
    path, _ = published.write_published(tmp_path, published.MONOLITH)
    found = inspect(path)
    assert json.loads(json.dumps(found)) == found
    assert (found["kind"], found["release"], found["variant"], found["storage"]) == ("checkpoint", "2.0", "dev", None)
    assert found["bytes"] == path.stat().st_size
    assert found["metadata"] == ["config", "encrypted_wandb_properties", "license"]
    assert {name: part["tensors"] for name, part in found["components"].items()} == {
        "transformer": 3510, "connectors": 59, "video_vae": 184, "audio_vae": 102, "vocoder": 194, "dropped": 3,
    }  # fmt: skip
    assert found["components"]["transformer"] == {
        "tensors": 3510, "parameters": 18_876_174_592, "bytes": 37_758_861_824, "dtypes": {"BF16": 3316, "F32": 194},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ltx-2-19b-fp8", ("checkpoint", "2.0", "dev", "FP8 (E4M3)")),
        ("ltx-2.3-22b", ("checkpoint", "2.3", "dev", None)),
        ("ltx-2.5-22b-transformer-nvfp4", ("checkpoint", "2.5", "distilled", "NVFP4")),
        ("ltx-2.5-22b-transformer-int8", ("checkpoint", "2.5", "dev", "int8")),
        ("ltx-2.5-latent-temporal-upscaler-x2-bf16-1.0", ("temporal_upscaler", None, None, None)),
        ("ltx-2.5-video-vae-bf16", ("diffusion_vae", "2.5", None, None)),
        ("ltx-2.5-duration-head-bf16", ("checkpoint", "2.5", None, None)),
        ("gemma4-12b-with-proj-ltx-2.5-bf16", ("text_encoder", "2.5", None, None)),
        ("gemma4-12b-with-proj-ltx-2.5-int8", ("text_encoder", "2.5", None, "int8")),
        (published.SPATIAL, ("spatial_upscaler", "2.0", None, None)),
        (published.TEMPORAL, ("temporal_upscaler", "2.0", None, None)),
        (published.LORA, ("lora", "2.0", None, None)),
    ],
)
def test_published_files(tmp_path: Path, name: str, expected: tuple[str | None, ...]) -> None:
    found = inspect(published.write_published(tmp_path, name)[0])
    assert tuple(found[key] for key in ("kind", "release", "variant", "storage")) == expected
    assert (found["convert"], found["generate"], found["reason"]) == (True, True, None)
    if name == published.LORA:
        assert set(found["components"]) == {"transformer", "connectors"}


def test_parameters_do_not_depend_on_the_storage(tmp_path: Path) -> None:
    names = ("ltx-2-19b", "ltx-2-19b-fp8", "ltx-2-19b-fp4")
    found = [inspect(published.write_published(tmp_path, name)[0])["components"] for name in names]
    assert {part["transformer"]["parameters"] for part in found} == {18_876_174_592}
    plain, *smaller = (part["transformer"]["bytes"] for part in found)
    assert all(size < plain / 1.7 for size in smaller)


def test_gemma_folder(tmp_path: Path) -> None:
    found = inspect(published.write_gemma(tmp_path / "gemma"))
    assert (found["kind"], found["release"], found["releases"]) == ("gemma", None, ["2.0", "2.3"])
    tensors = {name: part["tensors"] for name, part in found["components"].items()}
    assert tensors == {"text_encoder": 626, "dropped": 439}


def test_what_cannot_be_converted_can_be_inspected(tmp_path: Path) -> None:
    layer = "model.diffusion_model.transformer_blocks.1.attn1.to_k."
    tensors: published.Tensors = {layer + "weight": ("F8_E4M3", (8, 8)), layer + "weight_scale": ("F32", ())}
    found = inspect(published.write_sparse(tmp_path / "later-dev.safetensors", tensors, {"model_version": "2.3.0"}))
    assert (found["release"], found["variant"], found["storage"]) == ("2.3", "dev", "FP8 (E4M3)")
    foreign = inspect(published.write_sparse(tmp_path / "x.safetensors", {"a.b": ("F32", (2,))}, {}))
    assert foreign["kind"] == "unknown" and set(foreign["components"]) == {"other"}


def test_folder_of_files() -> None:
    found = inspect(MONOLITH.parent)
    assert found["kind"] == "folder"
    assert [file["kind"] for file in found["files"]] == ["spatial_upscaler", "checkpoint"]


def test_model_folder(demo_model: Path) -> None:
    found = inspect(demo_model)
    assert (found["kind"], found["release"], found["variant"]) == ("model", "2.0", "distilled")
    assert (found["generate"], found["missing"]) == (True, [])
    assert found["tool_version"] == ltx2.__version__
    assert sorted(found["sources"]) == sorted([MONOLITH.name, UPSCALER.name, "model.safetensors"])
    assert set(found["components"]) == set(ModelFolder.open(demo_model).manifest.components)
    assert found["components"]["vocoder"] == {
        "class": "Vocoder", "dtype": "BF16", "quantization": None, "tensors": 194, "parameters": 272112,
        "bytes": 544224, "dtypes": {"BF16": 194},
    }  # fmt: skip


def test_parts_of_a_model(small_model: Path, here: Here) -> None:
    """Which no clip can be made with alone."""
    found = inspect(small_model)
    assert found["generate"] is False
    assert found["missing"] == ["transformer", "text_encoder", "audio_vae", "video_vae"]
    assert "also needs transformer, text_encoder, audio_vae, video_vae" in here("inspect", small_model).out


def test_quantizing_keeps_the_parameters(demo_model: Path, tmp_path: Path) -> None:
    """Counted as they were before packing."""
    ltx2.quantize(demo_model, tmp_path / "q3", bits=3)
    before, after = inspect(demo_model), inspect(tmp_path / "q3")
    for name, part in before["components"].items():
        assert after["components"][name]["parameters"] == part["parameters"]
    assert after["bytes"] < before["bytes"]
    assert after["components"]["transformer"]["quantization"]["bits"] == 4  # of most layers of the preset


def test_nothing_to_inspect(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        inspect(tmp_path)
    with pytest.raises(CheckpointError, match="cannot read"):
        inspect(tmp_path / "missing")
