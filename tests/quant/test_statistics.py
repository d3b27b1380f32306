"""Quantizing with statistics: corrected biases, the same bytes on every way, and what a folder says of it."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltx2 import api
from ltx2.convert.plan.entries import plan_json
from ltx2.convert.plan.folder import folder_plan
from ltx2.quant.apply import Settings, quantize, quantize_plan, write_quantized
from ltx2.quant.codes.inputs import Inputs
from ltx2.quant.measure.statistics import About, Statistics, identity, write_statistics
from ltx2.quant.plan.replan import repack
from ltx2.quant.plan.step import packings
from ltx2.quant.report import Quantized, Report
from ltx2.runtime.errors import InputError
from ltx2.runtime.events import BytesDone, Warned
from ltx2.runtime.files.tensors import bf16_to_f32, open_tensorfile
from ltx2.runtime.model.layout import ModelFolder
from tests.support.command import Here
from tests.support.encoded import demo_encoded, scaled, write
from tests.support.folders import contents, interrupt, verified
from tests.support.official import DEMO, MONOLITH, plan_of

LAYER = "transformer_blocks.2.attn1.to_q"


def random_statistics(folder: Path, path: Path) -> Path:
    """Of the linear layers of a model folder, as no model has them."""
    plan, rng = folder_plan(ModelFolder.open(folder)), np.random.default_rng(0)
    widths = {
        (name, layer): move.values.shape[1]
        for name in ("text_encoder", "connectors", "transformer")
        for layer, (move, _) in packings(quantize_plan(plan, Settings(recipe="uniform")).moves(name)).items()
        if not layer.endswith("embed_tokens")
    }
    means = {layer: rng.standard_normal(width) for layer, width in widths.items()}
    layers = {layer: Inputs(np.square(m) + rng.uniform(0.1, 4, m.shape), m) for layer, m in means.items()}
    identities = {name: identity(plan, name) for name, _ in layers}
    write_statistics(path, layers, About("0", plan.release, plan.variant, identities, (), ()))
    return path


@pytest.fixture(scope="module")
def stats(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_statistics(demo_model, tmp_path_factory.mktemp("stats") / "stats.safetensors")


@pytest.fixture(scope="module")
def q4(demo_model: Path, stats: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """The demo model at 4 bits, packed with statistics, and the report."""
    out = tmp_path_factory.mktemp("quantized") / "q4"
    return out, api.quantize(demo_model, out, bits=4, recipe="uniform", stats=stats)


def tensor(folder: Path, name: str, component: str = "transformer") -> np.ndarray:
    return np.array(open_tensorfile(folder / component / "model.safetensors").array(name))


class TestBias:
    def test_makes_up_for_what_the_codes_lose(self, demo_model: Path, q4: tuple[Path, Report], stats: Path) -> None:
        """On average over the inputs, to the rounding of a bfloat16 bias."""
        import mlx.core as mx

        inputs = Statistics.open(stats).inputs("transformer", LAYER, biased=True)
        assert inputs is not None and inputs.mean is not None
        codes, scales, biases = (tensor(q4[0], f"{LAYER}.{part}") for part in ("weight", "scales", "biases"))
        scale, offset = (mx.array(bf16_to_f32(a)) for a in (scales, biases))
        packed = mx.dequantize(mx.array(codes), scale, offset, group_size=64, bits=4)
        ours = np.array(packed) @ inputs.mean + bf16_to_f32(tensor(q4[0], f"{LAYER}.bias"))
        weight, bias = (bf16_to_f32(tensor(demo_model, f"{LAYER}.{part}")) for part in ("weight", "bias"))
        before = np.array(packed) @ inputs.mean + bias
        exact = weight @ inputs.mean + bias
        assert np.abs(ours - exact).max() < 0.01 * np.abs(exact).max() < np.abs(before - exact).max()

    def test_only_of_layers_that_are_packed(self, demo_model: Path, q4: tuple[Path, Report]) -> None:
        for name in ("proj_out.bias", "adaln_single.linear.bias", "transformer_blocks.0.attn1.q_norm.weight"):
            assert (tensor(q4[0], name) == tensor(demo_model, name)).all()

    def test_layers_without_one(self, q4: tuple[Path, Report], stats: Path) -> None:
        """The text encoder's have none: there E[x^2] weighs what is packed."""
        plan = quantize_plan(plan_of(*DEMO, variant="distilled"), Settings(stats=stats))
        for layer, (move, packing) in packings(plan.moves("text_encoder")).items():
            assert (packing.known is None) == layer.endswith("embed_tokens")
            assert f"{layer}.bias" not in move.stored()
        assert not [n for n in open_tensorfile(q4[0] / "text_encoder/model.safetensors").tensors if n.endswith(".bias")]


class TestSameBytes:
    @pytest.mark.parametrize("options", [{"bits": 4, "shard_size": 0.0003}, {"mode": "nvfp4"}])
    def test_straight_from_the_source(self, stats: Path, tmp_path: Path, options: dict[str, Any]) -> None:
        source: dict[str, Any] = {"variant": "distilled", "only": ["connectors"]}
        api.convert([MONOLITH], tmp_path / "full", **source)
        api.quantize(tmp_path / "full", tmp_path / "in-turn", stats=stats, **options)
        api.convert([MONOLITH], tmp_path / "straight", stats=stats, **source, **options)
        assert contents(tmp_path / "straight") == contents(tmp_path / "in-turn")
        shards = list((tmp_path / "straight" / "connectors").glob("*.safetensors"))
        assert (len(shards) > 1) == ("shard_size" in options)

    def test_interrupted(self, demo_model: Path, stats: Path, q4: tuple[Path, Report], tmp_path: Path) -> None:
        """Layers that were done before are read back, and counted as they count in the output."""
        out, settings = tmp_path / "q4", Settings(recipe="uniform", stats=stats)
        interrupt(quantize(demo_model, out, settings), out, "[ct]*")
        events = list(quantize(demo_model, out, settings))
        assert contents(out) == contents(q4[0])
        assert any(isinstance(e, BytesDone) and "reading back" in e.file for e in events)
        again = next(event.report for event in events if isinstance(event, Quantized))
        for ours, theirs in zip(again.layers, q4[1].layers, strict=True):
            assert ours.relative_error == pytest.approx(theirs.relative_error, rel=2e-3)

    def test_other_statistics_are_another_model(
        self, here: Here, demo_model: Path, q4: tuple[Path, Report], stats: Path
    ) -> None:
        args = ("quantize", demo_model, "-o", q4[0], "--recipe", "uniform")
        assert "already there" in here(*args, "--stats", stats).out
        here(*args).failed(1, "different model")


class TestFolder:
    def test_says_what_it_was_packed_with(self, q4: tuple[Path, Report], stats: Path) -> None:
        path, report = q4
        record = Statistics.open(stats).record
        components = ModelFolder.open(path).manifest.components
        packed = {"transformer", "connectors", "text_encoder"}
        assert {name for name, c in components.items() if c.statistics} == packed
        assert components["transformer"].statistics == record == report.statistics
        assert set(ModelFolder.open(path).config("transformer")["quantization"]) == {"group_size", "bits", "mode"}

    def test_a_copy_keeps_it(self, q4: tuple[Path, Report]) -> None:
        folder = ModelFolder.open(q4[0])
        assert folder_plan(folder).components["transformer"].statistics == folder.record("transformer").statistics

    def test_report(self, demo_model: Path, q4: tuple[Path, Report], tmp_path: Path) -> None:
        plain = api.quantize(demo_model, tmp_path / "q4", bits=4, recipe="uniform")
        assert {row.error_of for row in plain.layers} == {"weights"} and plain.to_dict()["statistics"] is None
        assert {row.layer: row.error_of for row in q4[1].layers if row.error_of != "output"} == {
            "model.embed_tokens": "weights"
        }
        assert plain.totals == q4[1].totals, "biases have their bytes and are counted as parameters"
        data = json.loads(json.dumps(q4[1].to_dict()))
        assert data["statistics"]["name"] == "stats.safetensors"

    def test_plan_names_them(self, stats: Path) -> None:
        plan = quantize_plan(plan_of(*DEMO, variant="distilled"), Settings(stats=stats))
        rows = [row for row in plan_json(plan)["plan"] if row.get("key") == f"{LAYER}.weight"]
        assert len(rows) == 2, "the weight, and the bias that becomes a part of it"
        digits = Statistics.open(stats).record.sha256[:12]
        assert all(row["transform"] == [f"quantize(4,64,affine,stats={digits})"] for row in rows)


class TestFp8:
    def test_the_bf16_models_statistics_serve(self, stats: Path, tmp_path: Path) -> None:
        """Layers whose codes become fewer bits are decoded, weighed and corrected like any other."""
        source = write(tmp_path / "demo-distilled.safetensors", demo_encoded(scaled))
        settings = Settings(stats=stats, recipe="uniform")
        events = list(write_quantized(plan_of(source, only=("transformer",)), tmp_path / "q4", settings))
        assert warnings(events) == []
        report = next(event.report for event in events if isinstance(event, Quantized))
        assert {row.error_of for row in report.layers} == {"output"}
        found = verified(tmp_path / "q4", [source], partial(repack, statistics=Statistics.open(stats)))
        assert found.compared == found.tensors


class TestVerify:
    def test_every_value_is_found_again(self, q4: tuple[Path, Report], stats: Path) -> None:
        report = verified(q4[0], DEMO, partial(repack, statistics=Statistics.open(stats)))
        assert report.compared == report.tensors > 1000

    def test_needs_the_same_statistics(self, here: Here, q4: tuple[Path, Report], model: Path, tmp_path: Path) -> None:
        args = ("verify", q4[0], "--source", MONOLITH)
        here(*args).failed(1, "--stats stats.safetensors", "needed")
        other = random_statistics(model, tmp_path / "other.safetensors")
        here(*args, "--stats", other).failed(1, "another file was given")

    def test_needs_none_where_none_were_used(self, here: Here, demo_model: Path, stats: Path, tmp_path: Path) -> None:
        args = ("verify", demo_model, "--stats", stats)
        here(*args).failed(2, "no effect without --source")
        api.quantize(demo_model, tmp_path / "q", only=["connectors"])
        here("verify", tmp_path / "q", "--source", MONOLITH, "--stats", stats).failed(1, "not needed")


class TestMisfits:
    def test_another_variant(self, stats: Path) -> None:
        (warning,) = Statistics.open(stats).strangers(plan_of(*DEMO, variant="dev"))
        assert "2.0 distilled, this is 2.0 dev" in warning

    def test_another_training(self, model: Path, stats: Path) -> None:
        """The same networks with other weights."""
        opened, plan = Statistics.open(stats), folder_plan(ModelFolder.open(model))
        (warning,) = opened.strangers(replace(plan, variant="distilled"))
        assert "made with another model (another" in warning and "transformer" in warning
        assert not list(opened.strangers(plan_of(*DEMO, variant="distilled")))

    def test_another_network(self, demo_model: Path, tmp_path: Path) -> None:
        about, layer = About("0", None, None, {}, (), ()), LAYER
        for layers, said in (
            ({("transformer", layer): 32}, "attn1.to_q has 128 inputs, there it has 32"),
            ({("transformer", "blocks.9.ff.proj_in"): 64}, "the model has no transformer.blocks.9.ff.proj_in"),
            ({("duration_head", "a"): 64}, "they are of duration_head"),
        ):
            moments = {layer: Inputs(np.ones(width), np.zeros(width)) for layer, width in layers.items()}
            write_statistics(tmp_path / "s", moments, about)
            with pytest.raises(InputError, match=said):
                api.quantize(demo_model, tmp_path / "q", stats=tmp_path / "s")
        assert not (tmp_path / "q").exists()

    def test_layers_without_statistics_are_named(self, demo_model: Path, tmp_path: Path) -> None:
        plan = folder_plan(ModelFolder.open(demo_model))
        identities = {name: identity(plan, name) for name in plan.components}
        layer = "connectors", "video_connector.transformer_1d_blocks.0.ff.proj_in"
        moments = {layer: Inputs(np.ones(64), np.ones(64))}
        write_statistics(tmp_path / "s", moments, About("0", "2.0", "distilled", identities, (), ()))
        settings = Settings(stats=tmp_path / "s", only=("connectors",))
        plan = replace(plan, variant="dev")
        first, second = warnings(write_quantized(plan, tmp_path / "q", settings))
        assert "this is 2.0 dev" in first and "layers have no statistics" in second and "connectors." in second

    def test_without_bits_they_have_no_effect(self, here: Here, stats: Path, tmp_path: Path) -> None:
        args = ("convert", MONOLITH, "-o", tmp_path / "m", "--variant", "distilled", "--stats", stats)
        here(*args).failed(2, "--stats has no effect without --bits")
        with pytest.raises(InputError, match="nothing is quantized"):
            api.convert(DEMO, tmp_path / "m", variant="distilled", stats=stats)


def warnings(events: Any) -> list[str]:
    return [event.message for event in events if isinstance(event, Warned)]


@pytest.mark.parametrize("bits", [0, 7, 16])
def test_impossible_bits_are_wrong_usage(here: Here, demo_model: Path, tmp_path: Path, bits: int) -> None:
    out = tmp_path / "out"
    for command in (
        ("quantize", demo_model, "-o", out),
        ("convert", MONOLITH, "-o", out, "--variant", "distilled"),
        ("download", "ltx-2-distilled", "-o", out, "--convert", "--dry-run"),
        *([("bench", "--random", "ltx-2-distilled")] if bits != 16 else []),
        ("quantize", tmp_path / "no folder", "-o", out),
        ("convert", tmp_path / "no file", "-o", out),
    ):
        here(*command, "--bits", str(bits)).failed(2, f"--bits {bits} is not possible")
    assert not out.exists()
