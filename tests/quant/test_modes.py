"""Quantizing with every kind of code that MLX knows: from a folder, from sources, loaded, run, verified."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import ltx2
from ltx2.quant.apply import Settings, quantize, quantize_plan
from ltx2.quant.plan.replan import repack
from ltx2.quant.plan.step import Multiplier, Quantize
from ltx2.quant.report import Quantized, Report
from ltx2.runtime.errors import InputError
from ltx2.runtime.layers.linear import Packed
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_network, load_weights
from tests.support import encoded
from tests.support.command import Here
from tests.support.folders import contents, verified
from tests.support.golden import golden, golden_velocity
from tests.support.official import DEMO, plan_of
from tests.support.parity import relative_l2

Figure = Callable[..., None]
MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
VELOCITY = {"mxfp4": (0.08, 0.01), "mxfp8": (0.02, 0.007), "nvfp4": (0.06, 0.006)}  # limits: video, audio


@pytest.fixture(scope="module", params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# For what depends on how a kind of code keeps its parts: nvfp4 has the most.
most_parts = pytest.mark.parametrize("mode", ["nvfp4"], indirect=True)


@pytest.fixture(scope="module")
def quantized(mode: str, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("modes") / mode
    return out, ltx2.quantize(demo_model, out, mode=mode)


class TestFolder:
    def test_layers(self, mode: str, quantized: tuple[Path, Report]) -> None:
        """What the recipe raises above the mode's bits is affine."""
        path, report = quantized
        counts = Counter((row.mode, row.bits, row.group_size) for row in report.layers)
        bits, group_size = MODES[mode]
        raised = {("affine", 6, 64), ("affine", 8, 64)} if bits == 4 else set()
        assert counts.keys() == {(mode, bits, group_size), *raised}
        config = ModelFolder.open(path).config("transformer")["quantization"]
        assert {k: config[k] for k in ("mode", "bits", "group_size")} == {
            "mode": mode, "bits": bits, "group_size": group_size,
        }  # fmt: skip

    def test_report_against_the_files(self, mode: str, demo_model: Path, quantized: tuple[Path, Report]) -> None:
        path, report = quantized
        weights, original = (
            load_weights(ModelFolder.open(path), "transformer"),
            load_weights(ModelFolder.open(demo_model), "transformer"),
        )
        for row in (row for row in report.layers if row.mode == mode and row.component == "transformer"):
            codes, scales = weights[f"{row.layer}.weight"], weights[f"{row.layer}.scales"]
            form = (row.group_size, row.bits, mode)
            restored = mx.dequantize(codes, scales, None, *form, dtype=mx.float32)
            restored = restored * weights.get(f"{row.layer}.weight_scale", 1.0)
            error = relative_l2(np.array(restored), np.array(original[f"{row.layer}.weight"].astype(mx.float32)))
            assert row.relative_error == pytest.approx(error, rel=2e-3)
            extra = 4 if mode == "nvfp4" else 0
            assert row.bytes == codes.nbytes + scales.nbytes + extra

    def test_every_network_loads(self, mode: str, quantized: tuple[Path, Report]) -> None:
        folder = ModelFolder.open(quantized[0])
        for name in folder.manifest.components:
            modules = load_network(folder, name, nn.Module).named_modules()
            packed: dict[str, Any] = {
                n: getattr(m, "form", m) for n, m in modules if isinstance(m, Packed | nn.QuantizedEmbedding)
            }
            rows = {row.layer: row.mode for row in quantized[1].layers if row.component == name}
            assert {n: form.mode for n, form in packed.items()} == rows

    def test_velocity_stays_close(self, mode: str, quantized: tuple[Path, Report], figure: Figure) -> None:
        ours = golden_velocity(ModelFolder.open(quantized[0]))
        for stream, velocity, limit in zip(("video", "audio"), ours, VELOCITY[mode], strict=True):
            error = relative_l2(velocity, golden(f"a.velocity_at_0.725.{stream}"))
            figure(f"{mode} demo model, {stream} velocity, rel L2 vs golden", error, limit=limit)

    def test_quantized_already(self, quantized: tuple[Path, Report], tmp_path: Path) -> None:
        with pytest.raises(InputError, match="quantized already"):
            ltx2.quantize(quantized[0], tmp_path / "q", bits=3)


class TestSameBytes:
    def test_straight_from_the_source_and_verified(
        self, mode: str, quantized: tuple[Path, Report], tmp_path: Path
    ) -> None:
        straight = ltx2.convert(DEMO, tmp_path / "q", variant="distilled", mode=mode)
        assert contents(straight) == contents(quantized[0])
        report = verified(straight, DEMO, repack)
        assert report.compared == report.tensors

    @most_parts
    def test_interrupted(self, mode: str, demo_model: Path, quantized: tuple[Path, Report], tmp_path: Path) -> None:
        run = quantize(demo_model, tmp_path / "q", Settings(mode=mode))
        while getattr(next(run), "file", "") != "transformer/model.safetensors":
            pass
        del run
        *_, again, _ = quantize(demo_model, tmp_path / "q", Settings(mode=mode))
        assert contents(tmp_path / "q") == contents(quantized[0])
        assert isinstance(again, Quantized)
        for ours, theirs in zip(again.report.layers, quantized[1].layers, strict=True):
            assert ours.relative_error == pytest.approx(theirs.relative_error, rel=2e-3)

    @most_parts
    def test_another_type(self, mode: str, tmp_path: Path) -> None:
        """Scales that are no floats do not tell the type that the weights were cast to; other tensors do."""
        path = ltx2.convert(DEMO, tmp_path / "q", variant="distilled", dtype="f16", mode=mode, only=["transformer"])
        report = verified(path, DEMO[:1], repack)
        assert report.compared == report.tensors


def test_fp8_to_fewer_bits(mode: str, tmp_path: Path) -> None:
    """Codes become smaller ones; those of as many bits stay."""
    tensors = encoded.denoiser(encoded.demo_encoded(encoded.scaled, float32=True))
    source = encoded.write(tmp_path / "demo-distilled.safetensors", tensors)
    path = ltx2.convert(source, tmp_path / "q", mode=mode, variant="distilled", only=["transformer"])
    report = verified(path, [source], repack)
    assert report.compared == report.tensors
    load_network(ModelFolder.open(path), "transformer", nn.Module)


def test_embeddings_have_no_output_multiplier(demo_model: Path, tmp_path: Path) -> None:
    """At 4 bits, where a recipe does not raise them, they are affine."""
    report = ltx2.quantize(demo_model, tmp_path / "q", mode="nvfp4", recipe="uniform", only=["text_encoder"])
    assert {row.layer: row.mode for row in report.layers}.pop("model.embed_tokens") == "affine"
    load_network(ModelFolder.open(tmp_path / "q"), "text_encoder", nn.Module)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"mode": "mxfp4", "bits": 8}, "--bits 8 .* with --mode mxfp4: it is 4 "),
     ({"mode": "nvfp4", "group_size": 32}, "--group-size 32"),
     ({"mode": "mxfp8", "bits": 4}, "--bits 4"), ({"mode": "gguf"}, "--mode gguf")],
)  # fmt: skip
def test_forms_that_mlx_does_not_have(demo_model: Path, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        ltx2.quantize(demo_model, tmp_path / "q", **options)
    assert not any(tmp_path.iterdir())


@most_parts
def test_on_the_command_line(mode: str, demo_model: Path, tmp_path: Path, here: Here) -> None:
    done = here("quantize", demo_model, "-o", tmp_path / "q", "--mode", mode, "--only", "connectors", "--json")
    assert done.code == 0 and ModelFolder.open(tmp_path / "q").record("connectors").quantization is not None
    done = here("convert", DEMO[0], "-o", tmp_path / "c", "--mode", mode, "--dry-run", "--variant", "distilled")
    assert done.code == 0
    refused = here("convert", DEMO[0], "-o", tmp_path / "c", "--group-size", "32", "--dry-run")
    assert refused.code == 2 and "without --bits" in refused.err


def test_planning_reads_no_values() -> None:
    """The multiplier is found when it is needed."""
    plan = quantize_plan(plan_of(*DEMO, variant="distilled"), Settings(mode="nvfp4"))
    move = next(m for m in plan.moves("transformer") if "nvfp4" in str(m.packing))
    assert f"{move.layer}.weight_scale" in move.stored()
    assert isinstance(move.packing, Quantize) and isinstance(move.packing.multiplier, Multiplier)
    assert move.packing.multiplier._value is None
