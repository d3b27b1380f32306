"""Quantizing model folders: recipes on the published layers, the same bytes on every way, loading, refusals."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from safetensors.numpy import save_file

from ltx2 import api
from ltx2.convert.plan.entries import Drop, Move, Plan, plan_json
from ltx2.convert.plan.folder import folder_plan
from ltx2.quant.apply import Settings, quantize, quantize_plan
from ltx2.quant.codes.inputs import Inputs
from ltx2.quant.measure.statistics import About, identity, write_statistics
from ltx2.quant.plan.replan import repack
from ltx2.quant.plan.step import packings
from ltx2.quant.recipes.recipe import FOLDER, Recipe, Rule, load_recipe, recipe_names
from ltx2.quant.report import Quantized, Report
from ltx2.runtime.errors import CheckpointError, InputError, ModelFolderError, VerificationError
from ltx2.runtime.events import BytesDone, Warned, Written
from ltx2.runtime.files.tensors import open_tensorfile
from ltx2.runtime.layers.linear import Packed
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_network, load_weights
from ltx2.runtime.networks.text.gemma import TextEncoder
from ltx2.runtime.networks.transformer.model import Transformer
from tests.support import published
from tests.support.calls import states_of
from tests.support.folders import accept, contents, interrupt, verified
from tests.support.golden import golden, golden_velocity
from tests.support.official import DEMO, GEMMA, MONOLITH, Official, plan_of
from tests.support.parity import relative_l2, require

Figure = Callable[..., None]
ATTENTION = ("to_q", "to_k", "to_v", "to_out")
FEED_FORWARD = ("proj_in", "proj_out")
VIDEO_LAYERS = [
    *(f"attn1.{name}" for name in ATTENTION), "attn2.to_q", "attn2.to_out", *(f"ff.{name}" for name in FEED_FORWARD),
    "audio_to_video_attn.to_q", "audio_to_video_attn.to_out", "video_to_audio_attn.to_k", "video_to_audio_attn.to_v",
]  # fmt: skip
BLOCK_LAYERS = [
    f"{part}.{name}"
    for parts, names in (
        (("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"), ATTENTION),
        (("ff", "audio_ff"), FEED_FORWARD),
    )
    for part in parts
    for name in names
]


def packed_bits(plan: Plan, component: str) -> dict[str, int]:
    return {layer: packing.form.bits for layer, (_, packing) in packings(plan.moves(component)).items()}


@pytest.fixture(scope="module")
def published_plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """The conversion of the published files, from their headers."""
    folder = tmp_path_factory.mktemp("published")
    names = (published.MONOLITH, published.SPATIAL, published.TEMPORAL)
    sources = [published.write_published(folder, name)[0] for name in names]
    return plan_of(*sources, published.write_gemma(folder / "gemma"), variant="dev")


@pytest.fixture(scope="module")
def q4(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """The demo model at 4 bits, and the report."""
    out = tmp_path_factory.mktemp("quantized") / "q4"
    return out, api.quantize(demo_model, out, bits=4)


class TestRecipe:
    def test_published_transformer(self, published_plan: Plan) -> None:
        bits = packed_bits(quantize_plan(published_plan, Settings(bits=4)), "transformer")
        ends = (0, 43, 44, 45, 46, 47)  # what the published FP8 file keeps in bfloat16
        expected = {
            f"transformer_blocks.{block}.{layer}": 8 if block in ends else 4 if layer in VIDEO_LAYERS else 6
            for block in range(48)
            for layer in BLOCK_LAYERS
        }
        expected |= {f"{p}caption_projection.linear_{n}": 8 for p in ("", "audio_") for n in (1, 2)}
        assert len(BLOCK_LAYERS) == 28 and len(VIDEO_LAYERS) == 12
        assert bits == expected

    def test_published_text_side(self, published_plan: Plan) -> None:
        plan = quantize_plan(published_plan, Settings(bits=4))
        streams, layers = ("video", "audio"), [f"attn1.{n}" for n in ATTENTION] + [f"ff.{n}" for n in FEED_FORWARD]
        connectors = {
            f"{s}_connector.transformer_1d_blocks.{n}.{layer}" for s in streams for n in (0, 1) for layer in layers
        }
        assert packed_bits(plan, "connectors") == dict.fromkeys({*connectors, "text_projection.aggregate_embed"}, 8)
        projections = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
        expected = {f"model.layers.{n}.{layer}" for n in range(48) for layer in projections}
        assert packed_bits(plan, "text_encoder") == dict.fromkeys(expected | {"model.embed_tokens"}, 8)

    @pytest.mark.parametrize("recipe", ["mixed", "uniform"])
    @pytest.mark.parametrize("bits", [2, 8])
    def test_what_is_never_quantized(self, published_plan: Plan, recipe: str, bits: int) -> None:
        plan = quantize_plan(published_plan, Settings(bits=bits, group_size=32, recipe=recipe))
        sensitive = re.compile(r"adaln|patchify|^(audio_)?proj_out|norm|scale_shift|timestep|registers|conv|gate_l")
        for name in plan.components:
            layers = packed_bits(plan, name)
            assert bool(layers) == (name in ("transformer", "connectors", "text_encoder"))
            assert not [layer for layer in layers if sensitive.search(re.sub(r"_connector\.", ".", layer))]
        for before, after in zip(published_plan.entries, plan.entries, strict=True):
            packed = isinstance(after, Move) and after.packing is not None
            assert isinstance(after, Drop) or packed or after == before

    def test_floors_only_raise(self, published_plan: Plan) -> None:
        at = {n: packed_bits(quantize_plan(published_plan, Settings(bits=n)), "transformer") for n in (2, 5, 6, 8)}
        assert [Counter(bits.values()) for bits in at.values()] == [
            {2: 504, 6: 672, 8: 172}, {5: 504, 6: 672, 8: 172}, {6: 1176, 8: 172}, {8: 1348},
        ]  # fmt: skip

    def test_uniform_has_the_same_layers(self, published_plan: Plan) -> None:
        mixed = quantize_plan(published_plan, Settings(bits=3, recipe="mixed"))
        uniform = quantize_plan(published_plan, Settings(bits=3, recipe="uniform"))
        for name in mixed.components:
            assert packed_bits(uniform, name) == dict.fromkeys(packed_bits(mixed, name), 3)

    def test_every_named_layer_is_a_linear_or_embedding(self, model: Path) -> None:
        folder = ModelFolder.open(model)
        for name in ("transformer", "connectors", "text_encoder"):
            modules = dict(load_network(folder, name, nn.Module).named_modules())
            bits = load_recipe("mixed").bits(name, list(modules), 4)
            assert bits and all(isinstance(modules[layer], nn.Linear | nn.Embedding) for layer in bits)

    def test_ends_are_shares_of_the_blocks(self) -> None:
        rule = Rule("transformer", r"b\..+", bits=8, first=0.02, last=0.1)
        recipe = Recipe("r", (Rule("transformer", r"b\.\d+\.x|y"),), (rule,))
        layers = [*(f"b.{n}.x" for n in range(6)), "y"]
        assert recipe.bits("transformer", layers, 4) == dict(zip(layers, (8, 4, 4, 4, 4, 8, 4), strict=True))
        assert recipe.bits("connectors", layers, 4) == {}

    def test_a_file_is_a_recipe(self, tmp_path: Path, demo_model: Path) -> None:
        path = tmp_path / "mine.json"
        path.write_text(json.dumps({"quantize": [{"component": "connectors", "layers": ".*ff.*"}], "at_least": []}))
        report = api.quantize(demo_model, tmp_path / "out", bits=5, recipe=str(path))
        assert {(row.component, row.bits) for row in report.layers} == {("connectors", 5)}
        assert all(".ff.proj_" in row.layer for row in report.layers)

    def test_a_recipe_may_name_every_layer(self, demo_f32: Path, tmp_path: Path, figure: Figure) -> None:
        """Also those whose dtype decides in what the streams are computed."""
        path = tmp_path / "all.json"
        path.write_text(json.dumps({"quantize": [{"component": "transformer", "layers": ".+"}], "at_least": []}))
        report = api.quantize(demo_f32, tmp_path / "q", bits=8, group_size=32, recipe=str(path))
        assert {"patchify_proj", "adaln_single.emb.timestep_embedder.linear_1"} <= {row.layer for row in report.layers}
        for stream, velocity in zip(("video", "audio"), golden_velocity(ModelFolder.open(tmp_path / "q")), strict=True):
            error = relative_l2(velocity, golden(f"a.velocity_at_0.725.{stream}"))
            figure(f"every layer at 8 bits, {stream} velocity, rel L2 vs golden", error, limit=0.02)

    @pytest.mark.parametrize(
        "text",
        ["", "[]", '{"quantize": []}', '{"quantize": [{"component": "vae", "layers": "."}], "at_least": []}',
         '{"quantize": [{"component": "transformer", "layers": "("}], "at_least": []}',
         '{"quantize": [{"component": "transformer", "layers": ".", "bit": 4}], "at_least": []}',
         '{"quantize": [], "at_least": [{"component": "transformer", "layers": ".", "bits": 7}]}',
         '{"quantize": [], "at_least": [{"component": "transformer", "layers": ".", "last": 5}]}',
         '{"quantize": [], "at_least": [{"component": "transformer", "layers": ".", "last": "all"}]}',
         '{"quantize": [], "at_least": [{"component": "transformer", "layers": ".", "bits": 8, "error": 0.1}]}',
         '{"quantize": [], "at_least": [], "at_most": [{"component": "transformer", "layers": "."}]}',
         '{"quantize": [], "at_least": [], "bits": 7}', '{"quantize": [], "at_least": [], "at_mots": []}',
         '{"extends": "r.json"}', '{"extends": 3}'],
    )  # fmt: skip
    def test_malformed_recipes_are_refused(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "r.json"
        path.write_text(text)
        with pytest.raises(InputError, match=r"r\.json"):
            load_recipe(str(path))

    def test_unknown_recipe_lists_the_known_ones(self) -> None:
        with pytest.raises(InputError) as caught:
            load_recipe("best")
        assert all(name in caught.value.fix for name in recipe_names())
        assert recipe_names() == ["mixed", "q3", "q4", "q4-small", "q6", "q8", "uniform"]


class TestPresets:
    """Recipes that are made for their bits."""

    @pytest.mark.parametrize(
        ("recipe", "transformer", "text"),
        [("q8", 20.35, 12.5), ("q6", 16.3, 12.5), ("q4", 13.48, 12.5), ("q4-small", 13.48, 9.81), ("q3", 9.95, 12.5)],
    )  # fmt: skip
    def test_sizes_of_the_published_model(
        self, published_plan: Plan, recipe: str, transformer: float, text: float
    ) -> None:
        """GB as documented."""
        plan = quantize_plan(published_plan, Settings(recipe=recipe))
        sizes = {n: sum(f.nbytes for m in plan.moves(n) for f in m.stored().values()) / 1e9 for n in plan.components}
        assert (round(sizes["transformer"], 2), round(sizes["text_encoder"], 2)) == (transformer, text)
        assert sizes["connectors"] == pytest.approx(1.52, abs=0.01)

    @pytest.mark.parametrize(
        ("settings", "recipe", "bits"),
        [(Settings(), "q4", 4), (Settings(3), "q3", 3), (Settings(5), "mixed", 5), (Settings(recipe="q6"), "q6", 6),
         (Settings(5, recipe="q4"), "q4", 5), (Settings(recipe="uniform"), "uniform", 4),
         (Settings(mode="mxfp8"), "q8", 8), (Settings(recipe="mixed", mode="nvfp4"), "mixed", 4)],
    )  # fmt: skip
    def test_what_is_chosen(self, settings: Settings, recipe: str, bits: int) -> None:
        assert (settings.rules.name, settings.form.bits) == (recipe, bits)

    def test_bits_that_the_mode_has_not(self) -> None:
        with pytest.raises(InputError, match="q6 has 6 bits"):
            Settings(recipe="q6", mode="nvfp4").check()

    def test_smallest(self, published_plan: Plan) -> None:
        bits = packed_bits(quantize_plan(published_plan, Settings(3)), "transformer")
        sensitive = ("attn1.to_v", "attn1.to_out", "attn2.to_out")
        assert {bits[f"transformer_blocks.20.{layer}"] for layer in sensitive} == {4}
        others = set(VIDEO_LAYERS) - set(sensitive)
        assert {bits[f"transformer_blocks.20.{layer}"] for layer in others} == {3}
        assert {n for layer, n in bits.items() if "audio_attn1" in layer or ".47." in layer} == {4}
        assert bits["caption_projection.linear_1"] == 8

    def test_text_encoder_at_4_bits_where_it_bears_them(self, demo_f32: Path, tmp_path: Path) -> None:
        """The preset, with a limit that parts the layers of the demo model."""
        recipe = json.loads((FOLDER / "q4-small.json").read_text())
        (rule,) = (rule for rule in recipe["at_most"] if "error" in rule)
        rule["error"] = 0.07
        (tmp_path / "small.json").write_text(json.dumps(recipe))
        plan, stats = folder_plan(ModelFolder.open(demo_f32)), tmp_path / "stats.safetensors"
        widths = {m.layer: m.spec.shape[1] for m in plan.moves("text_encoder") if m.key.endswith("_proj.weight")}
        draw = np.random.default_rng(0)
        uneven = {layer: 3 * ("self_attn" in layer) * draw.standard_normal(width) for layer, width in widths.items()}
        inputs = {("text_encoder", layer): Inputs(np.exp(logs), 0 * logs) for layer, logs in uneven.items()}
        about = About("0", plan.release, plan.variant, {"text_encoder": identity(plan, "text_encoder")}, (), ())
        write_statistics(stats, inputs, about)
        without = Settings(recipe=str(tmp_path / "small.json"), only=("text_encoder",))
        embedding = {"model.embed_tokens": 8}
        assert packed_bits(quantize_plan(plan, without), "text_encoder") == dict.fromkeys(widths, 6) | embedding
        found = packed_bits(quantize_plan(plan, replace(without, stats=stats)), "text_encoder")
        at_4 = api.quantize(demo_f32, tmp_path / "q", bits=4, recipe="uniform", only=["text_encoder"], stats=stats)
        errors = {row.layer: row.relative_error for row in at_4.layers if row.layer in widths}
        assert found == {layer: 4 if error <= 0.07 else 6 for layer, error in errors.items()} | embedding
        assert {4, 6} <= set(found.values())

    def test_rules_of_another_recipe(self, tmp_path: Path) -> None:
        """A recipe that extends one has its rules; what is raised may be limited, never below the chosen bits."""
        limit = {"component": "text_encoder", "layers": ".+", "bits": 5}
        for name, text in (
            ("mine.json", {"extends": "q6", "at_most": [limit]}),
            ("yours.json", {"extends": "mine.json", "bits": 3}),
        ):
            (tmp_path / name).write_text(json.dumps(text))
        mine, yours = (load_recipe(str(tmp_path / name)) for name in ("mine.json", "yours.json"))
        assert (mine.own_bits, yours.own_bits) == (6, 3) and yours.quantize == mine.quantize
        layer = "model.layers.0.mlp.up_proj"
        at = [yours.bits("text_encoder", [layer], bits)[layer] for bits in (3, 5, 6, 8)]
        assert at == [5, 5, 6, 8]
        assert yours.bits("transformer", ["caption_projection.linear_1"], 3) == {"caption_projection.linear_1": 8}


class TestSameBytes:
    @pytest.mark.parametrize(
        "options",
        [
            {"bits": 4},
            {"bits": 8, "group_size": 32, "dtype": "bf16"},
            {"bits": 3, "recipe": "uniform", "shard_size": 0.0005},
        ],
    )
    def test_straight_from_the_source(self, official: Official, tmp_path: Path, options: dict[str, Any]) -> None:
        own = {key: value for key, value in options.items() if key in ("dtype", "shard_size")}
        api.convert(official.sources, tmp_path / "full", **own)
        api.quantize(tmp_path / "full", tmp_path / "in-turn", **{k: v for k, v in options.items() if k != "dtype"})
        api.convert(official.sources, tmp_path / "straight", **options)
        assert contents(tmp_path / "straight") == contents(tmp_path / "in-turn")
        shards = list((tmp_path / "straight" / "transformer").glob("*.safetensors"))
        assert len(shards) == (8 if "shard_size" in options else 1)

    def test_interrupted(self, demo_model: Path, q4: tuple[Path, Report], tmp_path: Path) -> None:
        """Stopped when the first packed weights are written; layers that were done keep their place in the report."""
        out = tmp_path / "q4"
        interrupt(quantize(demo_model, out, Settings()), out, "[ct]*")
        events = list(quantize(demo_model, out, Settings()))
        assert contents(out) == contents(q4[0])
        again, written = events[-2:]
        assert isinstance(again, Quantized) and isinstance(written, Written)
        assert any(isinstance(e, BytesDone) and "reading back" in e.file for e in events)
        for ours, theirs in zip(again.report.layers, q4[1].layers, strict=True):
            assert ours.relative_error == pytest.approx(theirs.relative_error, rel=2e-3)

    def test_again(self, demo_model: Path, q4: tuple[Path, Report]) -> None:
        *_, report, written = quantize(demo_model, q4[0], Settings())
        assert isinstance(written, Written) and written.reused
        assert isinstance(report, Quantized) and report.report.totals == q4[1].totals

    def test_another_model_is_not_overwritten(self, demo_model: Path, q4: tuple[Path, Report]) -> None:
        before = contents(q4[0])
        with pytest.raises(ModelFolderError, match="different model"):
            api.quantize(demo_model, q4[0], bits=3)
        assert contents(q4[0]) == before


class TestFolder:
    def test_configuration_as_mlx_lm_writes_it(self, q4: tuple[Path, Report]) -> None:
        folder = ModelFolder.open(q4[0])
        config = folder.config("text_encoder")
        eight = {"group_size": 64, "bits": 8, "mode": "affine"}
        assert config["quantization"] == eight
        four = {"group_size": 64, "bits": 4, "mode": "affine"}
        transformer = folder.config("transformer")["quantization"]
        assert transformer.items() >= four.items() and transformer["caption_projection.linear_1"] == eight
        assert config["quantization_config"] == config["quantization"] == folder.record("text_encoder").quantization
        assert folder.config("connectors")["quantization"] == eight
        assert folder.record("video_vae").quantization is None and "quantization" not in folder.config("video_vae")

    @pytest.mark.parametrize("bits", [8, 4])
    def test_every_network_loads(self, demo_model: Path, q4: tuple[Path, Report], tmp_path: Path, bits: int) -> None:
        path = q4[0]
        if bits != 4:
            path = tmp_path / "q"
            api.quantize(demo_model, path, bits=bits)
        folder = ModelFolder.open(path)
        for name in folder.manifest.components:
            modules = load_network(folder, name, nn.Module).named_modules()
            packed: dict[str, Any] = {
                n: getattr(m, "form", m) for n, m in modules if isinstance(m, Packed | nn.QuantizedEmbedding)
            }
            rows = [row for row in q4[1].layers if row.component == name]
            assert packed.keys() == {row.layer for row in rows}
            if bits == 4:
                assert {n: form.bits for n, form in packed.items()} == {row.layer: row.bits for row in rows}

    def test_report_against_the_files(self, demo_model: Path, q4: tuple[Path, Report]) -> None:
        """Sizes are the files' own; errors are recomputed with MLX's kernel."""
        (path, report), full, total = q4, ModelFolder.open(demo_model), 0
        for name in ModelFolder.open(path).manifest.components:
            weights, original = load_weights(ModelFolder.open(path), name), load_weights(full, name)
            assert report.totals[name].bytes_after == sum(w.nbytes for w in weights.values())
            assert report.totals[name].bytes_before == sum(w.nbytes for w in original.values())
            assert report.totals[name].weights == sum(w.size for w in original.values())
            tensors = open_tensorfile(path / name / "model.safetensors")
            total += tensors.size - min(t.start for t in tensors.tensors.values())
            for row in (row for row in report.layers if row.component == name):
                parts = [weights[f"{row.layer}.{part}"] for part in ("weight", "scales", "biases")]
                assert row.bytes == sum(part.nbytes for part in parts)
                codes, scales, biases = parts[0], parts[1].astype(mx.float32), parts[2].astype(mx.float32)
                restored = mx.dequantize(codes, scales, biases, row.group_size, row.bits)
                error = relative_l2(np.array(restored), np.array(original[f"{row.layer}.weight"].astype(mx.float32)))
                assert row.relative_error == pytest.approx(error, rel=2e-3)
        data = json.loads(json.dumps(report.to_dict()))
        assert data["totals"]["all"]["bytes_after"] == total == report.total.bytes_after
        assert data["totals"]["text_encoder"]["bits_per_weight"] == pytest.approx(8.55, abs=0.01)
        assert len(data["layers"]) == len(report.layers)
        assert data["layers"][0].keys() == {
            "component",
            "layer",
            "bits",
            "group_size",
            "mode",
            "bytes",
            "relative_error",
            "error_of",
            "method",
            "rotation",
        }

    def test_mlx_lm_loads_the_text_encoder(self, model: Path, tmp_path: Path, figure: Figure) -> None:
        require("mlx_lm")
        from mlx_lm.utils import load_model

        api.quantize(model, tmp_path / "q", recipe="q4-small")
        theirs, config = load_model(tmp_path / "q" / "text_encoder", lazy=True)
        assert isinstance(theirs.model.embed_tokens, nn.QuantizedEmbedding) and theirs.model.embed_tokens.bits == 8
        assert theirs.model.layers[0].mlp.up_proj.bits == 6 == config["quantization"]["bits"]
        ids = mx.array([[2, 17, 300, 4]])
        ours = load_network(ModelFolder.open(tmp_path / "q"), "text_encoder", TextEncoder)
        *_, last = states_of(ours, ids, mx.ones_like(ids))
        error = relative_l2(np.array(last), np.array(theirs.model(ids)))
        figure("6-bit text encoder, last hidden state, rel L2 vs mlx-lm", error, limit=1e-4)

    def test_velocity_stays_close(
        self, demo_model: Path, q4: tuple[Path, Report], tmp_path: Path, figure: Figure
    ) -> None:
        api.quantize(demo_model, tmp_path / "q8", bits=8)
        for bits, path, limits in ((8, tmp_path / "q8", (0.005, 0.002)), (4, q4[0], (0.06, 0.006))):
            ours = golden_velocity(ModelFolder.open(path))
            for stream, velocity, limit in zip(("video", "audio"), ours, limits, strict=True):
                error = relative_l2(velocity, golden(f"a.velocity_at_0.725.{stream}"))
                figure(f"{bits}-bit demo model, {stream} velocity, rel L2 vs golden", error, limit=limit)


class TestVerify:
    @pytest.mark.parametrize("dtype", [None, "f16"])
    def test_every_value_is_found_again(self, tmp_path: Path, dtype: str | None) -> None:
        path = api.convert(DEMO, tmp_path / "q", variant="distilled", dtype=dtype, bits=3)
        report = verified(path, DEMO, repack)
        assert report.compared == report.tensors > 1000

    def test_another_quantization_is_noticed(self, q4: tuple[Path, Report], tmp_path: Path) -> None:
        """A folder whose packed values were made by other means, with its manifest put right."""
        path, name = tmp_path / "q4", "connectors/model.safetensors"
        shutil.copytree(q4[0], path)
        weights = mx.load(str(path / name))
        assert isinstance(weights, dict)
        key = "video_connector.transformer_1d_blocks.1.ff.proj_in.weight"
        weights[key] = weights[key] ^ 1
        mx.save_safetensors(str(path / name), weights, {"format": "mlx"})
        accept(path)
        with pytest.raises(VerificationError, match=re.escape(key)):
            verified(path, [MONOLITH], repack)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "said"),
        [({"bits": 7}, "--bits 7"), ({"bits": 16}, "--bits 16"), ({"group_size": 16}, "--group-size 16"),
         ({"only": ["lora"]}, "no lora"), ({"only": ["vocoder"]}, "nothing to quantize in vocoder")],
    )  # fmt: skip
    def test_impossible_settings(self, demo_model: Path, tmp_path: Path, options: dict[str, Any], said: str) -> None:
        with pytest.raises(InputError, match=said):
            api.quantize(demo_model, tmp_path / "q", **options)
        assert not any(tmp_path.iterdir())

    def test_quantized_already(self, q4: tuple[Path, Report], tmp_path: Path) -> None:
        with pytest.raises(InputError, match="quantized already"):
            api.quantize(q4[0], tmp_path / "q", bits=3)

    def test_not_a_model_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ModelFolderError, match="not a model folder"):
            api.quantize(tmp_path, tmp_path / "q")

    def test_values_that_are_not_finite(self, official: Official, tmp_path: Path) -> None:
        name = "model.diffusion_model.transformer_blocks.3.audio_ff.net.2.weight"
        tensors = official.tensors(official.monolith)
        tensors[name][5, 7] = np.nan
        source = tmp_path / "dev.safetensors"
        save_file(tensors, source, metadata=dict(open_tensorfile(official.monolith).metadata))
        with pytest.raises(CheckpointError, match=re.escape(name)):
            api.convert([source], tmp_path / "q", bits=4)
        assert not (tmp_path / "q").exists()


class TestSelection:
    def test_only_some_components(self, demo_model: Path, tmp_path: Path) -> None:
        report = api.quantize(demo_model, tmp_path / "q", bits=4, only=["text_encoder"])
        assert {row.component for row in report.layers} == {"text_encoder"}
        for name in ("transformer", "connectors", "video_vae"):
            assert contents(tmp_path / "q" / name) == contents(demo_model / name)

    def test_widths_that_do_not_fit_are_named(self, demo_model: Path, tmp_path: Path) -> None:
        """At group size 128 the demo model's layers of width 64 stay as they are."""
        events = list(quantize(demo_model, tmp_path / "q", Settings(group_size=128, only=("transformer",))))
        report = next(e.report for e in events if isinstance(e, Quantized))
        assert isinstance(events[0], Warned) and str(len(report.unfit)) in events[0].message
        tensors = open_tensorfile(demo_model / "transformer" / "model.safetensors").tensors
        narrow = {name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.shape[1:] == (64,)}
        named = {f"transformer.{layer}" for layer in narrow if re.search(r"_blocks\..+\.(to|proj)_|caption", layer)}
        assert set(report.unfit) == named and len(named) > 50
        load_network(ModelFolder.open(tmp_path / "q"), "transformer", Transformer)

    def test_plan_names_the_step(self) -> None:
        plan = plan_of(*DEMO, variant="distilled")
        rows = {row["key"]: row for row in plan_json(quantize_plan(plan, Settings()))["plan"] if "key" in row}
        row = rows["transformer_blocks.2.attn1.to_q.weight"]
        assert row["transform"] == ["quantize(4,64,affine)"]
        assert (row["out_shape"], row["out_dtype"]) == ([128, 16], "U32")
        assert rows["transformer_blocks.2.attn1.to_q.bias"]["transform"] == ["copy"]


MEASURE = """
import pathlib, re, resource, sys
import ltx2, ltx2.api
def peak():  # on Linux ru_maxrss starts with the parent's
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * int(re.search("VmHWM: *(.+) kB", pathlib.Path("/proc/self/status").read_text().replace("\\t", ""))[1])
before = peak()
ltx2.convert([sys.argv[1]], sys.argv[2], bits=4)
print(peak() - before)
"""


def test_memory_does_not_depend_on_the_size(tmp_path: Path, figure: Figure) -> None:
    """A text encoder whose embedding alone has 250 MB."""
    from ltx2.convert.sources.gemma import text_config
    from ltx2.runtime.networks.load import build_network, parameter_shapes

    config = json.loads((GEMMA / "config.json").read_text())
    config["text_config"] |= {"vocab_size": 125_000, "hidden_size": 1024}
    shapes = parameter_shapes(build_network("Gemma3ForCausalLM", text_config(config)))
    tensors: published.Tensors = {f"language_model.{name}": ("BF16", shape) for name, shape in shapes.items()}
    (tmp_path / "gemma").mkdir()
    (tmp_path / "gemma" / "config.json").write_text(json.dumps(config))
    shutil.copy(GEMMA / "tokenizer.json", tmp_path / "gemma")
    source = published.write_sparse(tmp_path / "gemma" / "model.safetensors", tensors, {})
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "gemma"), str(tmp_path / "out")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert source.stat().st_size > 250e6
    figure("memory of convert --bits 4 on a 260 MB source, MB", float(out.stdout) / 1e6, limit=150)
