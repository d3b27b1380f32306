"""Bits chosen for a Mac's memory: budgets, floors, errors, sensitivities, and what a folder and people are told."""

import math
import re
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from ltx2 import api
from ltx2.convert.plan.entries import Plan
from ltx2.convert.plan.folder import folder_plan
from ltx2.quant import apply
from ltx2.quant.apply import Settings, quantize, quantize_plan
from ltx2.quant.choose.budget import Budget
from ltx2.quant.choose.fit import fit_transformer
from ltx2.quant.choose.fitted import Fit
from ltx2.quant.choose.sample import candidates
from ltx2.quant.codes.pack import pack, unpack
from ltx2.quant.measure import sensitivity
from ltx2.quant.measure.recording import Call, Stream, velocities
from ltx2.quant.measure.sensitivity import Method
from ltx2.quant.measure.statistics import Statistics, write_statistics
from ltx2.quant.recipes.recipe import Recipe, Rule, load_recipe
from ltx2.runtime.errors import DoesNotFitError, InputError
from ltx2.runtime.events import BytesDone
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.model.forms import Form
from ltx2.runtime.model.layout import TRANSFORMER, ModelFolder
from ltx2.runtime.networks.load import load_network
from ltx2.runtime.networks.transformer.inputs import Skips, StreamInput
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.streams import Streams
from tests.support.command import Here
from tests.support.encoded import demo_encoded, scaled, write
from tests.support.folders import contents
from tests.support.official import DEMO, MONOLITH, plan_of
from tests.support.parity import relative_l2

Figure = Callable[..., None]
Result = TypeVar("Result")
SIZE: dict[str, Any] = {"width": 192, "height": 128, "frames": 25}  # what the demo model was trained for
MIXED_BYTES = 3_000_000  # for the demo model in bf16: more than the recipe's floors take, less than all at 8 bits


def result(work: Generator[Any, None, Result]) -> Result:
    while True:
        try:
            next(work)
        except StopIteration as stop:
            found: Result = stop.value
            return found


def budget(size: int) -> Budget:
    """Of a Mac that has room for a transformer of this size, and nothing else to do."""
    return Budget(24, "a clip", size, 0, 0)


AT_LEAST_6 = re.compile(r"transformer_blocks\.\d+\.audio_attn1\.")
# A part of the layers, which is quicker, and a floor for some of them.
FEW = Recipe(
    "few",
    (Rule(TRANSFORMER, r"transformer_blocks\.\d+\.(ff|audio_attn1)\..+"),),
    (Rule(TRANSFORMER, r"transformer_blocks\.\d+\.audio_attn1\..+", bits=6),),
)


def fit(plan: Plan, size: int, recipe: Recipe = FEW, statistics: Statistics | None = None) -> Fit:
    return result(fit_transformer(plan, recipe, 64, statistics, budget(size)))


def size_of(plan: Plan) -> int:
    return sum(spec.nbytes for move in plan.moves(TRANSFORMER) for spec in move.stored().values())


@pytest.fixture(scope="module")
def plan(demo_model: Path) -> Plan:
    return folder_plan(ModelFolder.open(demo_model))


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`room(size)`: from now on a Mac has room for a transformer of so many bytes."""
    return lambda size: monkeypatch.setattr(apply, "mac_budget", lambda plan, memory: budget(size))


class TestChoice:
    def test_a_budget_is_kept_and_floors_hold(self, plan: Plan) -> None:
        recipe = load_recipe("mixed")
        found = fit(plan, MIXED_BYTES, recipe)
        assert found.lowered == 0 and 0 <= found.left < 20_000
        floors = recipe.bits(TRANSFORMER, [move.layer for move in plan.moves(TRANSFORMER)], 3)
        assert {layer.layer for layer in found.layers} == floors.keys()
        assert all(layer.bits >= floors[layer.layer] for layer in found.layers)
        assert len({layer.bits for layer in found.layers}) >= 3
        packed = quantize_plan(plan, Settings(fit=24, only=(TRANSFORMER,)), found)
        assert size_of(packed) == found.bytes <= MIXED_BYTES

    def test_more_room_never_loses_more(self, plan: Plan) -> None:
        floors, most = fit(plan, size_of(plan)).floors, size_of(plan)
        found = [fit(plan, size) for size in (floors, floors + 5, (3 * floors + most) // 4, most - 1, most)]
        errors = [one.error for one in found]
        assert errors == sorted(errors, reverse=True) and errors[1] > errors[2] > errors[3] > errors[4] == 0
        assert found[0].layers == found[1].layers and found[1].left - found[0].left == 5
        assert not any(layer.packed for layer in found[4].layers)

    def test_floors_give_way_where_not_even_they_fit(self, plan: Plan) -> None:
        """Beside 4 bits for the other layers, that is."""
        floors = fit(plan, size_of(plan)).floors
        shapes = [move.spec.shape for move in plan.moves(TRANSFORMER) if AT_LEAST_6.match(move.key)]
        two_bits = sum(math.prod(shape) for shape in shapes if len(shape) == 2) * 2 // 8
        assert floors - two_bits == fit(plan, size_of(plan), replace(FEW, at_least=())).floors
        assert fit(plan, floors).lowered == 0
        lowered = fit(plan, floors - 1)
        assert lowered.lowered == 1 and lowered.bytes < floors
        assert min(layer.bits for layer in lowered.layers if AT_LEAST_6.match(layer.layer)) >= 5
        assert "lowered by one size" in lowered.reasons()[-1]
        with pytest.raises(DoesNotFitError, match="3 bits in every layer"):
            fit(plan, 1_000_000)

    def test_errors_are_those_of_whole_layers(self, plan: Plan, demo_model: Path, tmp_path: Path) -> None:
        """A sample's beside a report's."""
        report = api.quantize(demo_model, tmp_path / "q", bits=4, recipe="uniform", only=[TRANSFORMER])
        whole = {row.layer: row.relative_error for row in report.layers}
        layers = candidates(plan, TRANSFORMER, whole, 64, None)
        assert layers.keys() == whole.keys()
        ratios = [layers[path].errors([4])[4] / error for path, error in whole.items() if ".ff." in path]
        assert max(map(abs, np.log(ratios))) < 0.05

    def test_published_codes_cost_nothing_and_stay(self, tmp_path: Path) -> None:
        plan = plan_of(write(tmp_path / "ltx-2-distilled.safetensors", demo_encoded(scaled)))
        kept = fit(plan, size_of(plan))
        codes = [layer for layer in kept.layers if layer.bits == 8]
        assert len(codes) > 20 and all(layer.error == 0 and not layer.packed for layer in codes)
        assert size_of(quantize_plan(plan, Settings(fit=24), kept)) == kept.bytes == size_of(plan)
        smaller = fit(plan, (kept.floors + kept.bytes) // 2)
        assert any(layer.packed for layer in smaller.layers)
        assert size_of(quantize_plan(plan, Settings(fit=24), smaller)) == smaller.bytes < kept.bytes


@pytest.fixture(scope="module")
def stats(demo_f32: Path, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    """With sensitivities, of all blocks together at one step: as few as may be."""
    out = tmp_path_factory.mktemp("stats") / "stats.safetensors"
    method = Method(error=0.05, bands=1, prompts=1, steps=1, weights={"video": 1.0, "audio": 1.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "load_method", lambda: method)
        prompts = ["a red square moves left on a white background with a low tone"]
        api.calibrate(demo_f32, out, prompts=prompts, sensitivity=True, **SIZE)
    return Statistics.open(out)


@pytest.fixture(scope="module")
def steps(demo_f32: Path) -> list[Call]:
    """What the transformer is given for another prompt, in both stages."""
    kept: list[Call] = []

    def call(transformer: Transformer, inputs: Streams[StreamInput], skips: Skips) -> Streams[mx.array]:
        kept.append(inputs.map(Stream.of))
        return transformer.velocities(inputs, skips)

    def observe(component: str, network: nn.Module) -> None:
        if isinstance(network, Transformer):
            network.around = call

    Pipeline(demo_f32, observe).generate("a blue star moves up on a black background in silence", no_audio=True, **SIZE)
    return kept[2::4]


def velocity_error(folder: Path, steps: list[Call], bits: dict[str, int]) -> float:
    """Relative error of the velocities, both streams together, with some layers packed; without statistics, since those
    of one short clip are poor ones."""
    network = load_network(ModelFolder.open(folder), TRANSFORMER, Transformer)
    clean = [velocities(network, step) for step in steps]
    for path, layer in network.named_modules():
        if path in bits:
            form = Form(bits[path], 64, "affine")
            layer.weight = mx.array(unpack(pack(np.array(layer.weight), form)[0], form))
    pairs = [was.zip(velocities(network, step)).values() for was, step in zip(clean, steps, strict=True)]
    squares = [relative_l2(np.array(now), np.array(was)) ** 2 for pair in pairs for was, now in pair]
    return float(np.sqrt(sum(squares) / len(steps)))


class TestSensitivity:
    def test_the_help_says_what_it_costs(self, here: Here) -> None:
        method, text = sensitivity.load_method(), " ".join(here("calibrate", "--help").out.split())
        kinds, single = 28, 4  # layers of a block, and those of the text's projections
        groups, steps = kinds * method.bands + single, method.prompts * method.steps
        assert f"{groups} groups" in text and f"{steps} steps" in text
        assert f"as long as {round(groups * steps, -1)} more" in text

    def test_every_layer_has_one(self, stats: Statistics, plan: Plan) -> None:
        named = load_recipe("uniform").bits(TRANSFORMER, [m.layer for m in plan.moves(TRANSFORMER)], 8)
        assert stats.sensitivities.keys() == {(TRANSFORMER, layer) for layer in named}
        assert all(value > 0 for value in stats.sensitivities.values())

    def test_negative_ones_are_refused(self, stats: Statistics, tmp_path: Path) -> None:
        layer = (TRANSFORMER, "caption_projection.linear_1")
        inputs = stats.inputs(*layer, biased=True)
        assert inputs is not None
        write_statistics(tmp_path / "stats.safetensors", {layer: inputs}, stats.about, {layer: -1.0})
        with pytest.raises(InputError, match="negative"):
            _ = Statistics.open(tmp_path / "stats.safetensors").sensitivities

    @pytest.mark.parametrize("kind", ["ff.proj_in", "attn1.to_v"])
    def test_foretells_what_packing_changes(
        self, stats: Statistics, steps: list[Call], demo_f32: Path, kind: str, figure: Figure
    ) -> None:
        """One kind of layer at 4 bits, in all blocks."""
        plan = folder_plan(ModelFolder.open(demo_f32))
        layers = candidates(plan, TRANSFORMER, [f"transformer_blocks.{n}.{kind}" for n in range(6)], 64, None)
        foretold = sum(stats.sensitivities[TRANSFORMER, p] * la.errors([4])[4] ** 2 for p, la in layers.items())
        ratio = velocity_error(demo_f32, steps, dict.fromkeys(layers, 4)) / np.sqrt(foretold)
        figure(f"{kind} at 4 bits, measured / foretold error of the velocity", ratio, limit=2.5)
        figure(f"{kind} at 4 bits, foretold / measured", 1 / ratio, limit=2.5)

    def test_makes_better_models_of_the_same_bytes(
        self, stats: Statistics, steps: list[Call], demo_f32: Path, figure: Figure
    ) -> None:
        plan = folder_plan(ModelFolder.open(demo_f32))
        size = size_of(quantize_plan(plan, Settings(4, recipe="uniform", only=(TRANSFORMER,))))
        found = fit(plan, size, load_recipe("uniform"), stats)
        assert found.measured and 0.97 * size < found.bytes <= size
        ours = velocity_error(demo_f32, steps, {layer.layer: layer.bits for layer in found.layers if layer.packed})
        theirs = velocity_error(demo_f32, steps, {layer.layer: 4 for layer in found.layers})
        figure("velocity error of bits by sensitivity / of 4 bits everywhere", ours / theirs, limit=0.97)


class TestFolder:
    def test_same_bytes_on_every_way(self, demo_model: Path, room: Callable[[int], None], tmp_path: Path) -> None:
        room(MIXED_BYTES)
        report = api.quantize(demo_model, tmp_path / "in-turn", fit=24)
        straight = api.convert(DEMO, tmp_path / "straight", variant="distilled", fit=24)
        assert contents(straight) == contents(tmp_path / "in-turn")
        assert report.fit is not None and report.totals[TRANSFORMER].bytes_after == report.fit.bytes <= MIXED_BYTES
        bits = {row.layer: row.bits for row in report.layers if row.component == TRANSFORMER}
        assert bits == {layer.layer: layer.bits for layer in report.fit.layers}
        assert {row.bits for row in report.layers if row.component != TRANSFORMER} == {8}
        out, settings = tmp_path / "interrupted", Settings(fit=24)
        for event in quantize(demo_model, out, settings):
            if isinstance(event, BytesDone):
                break
        assert not out.exists() and out.with_name("interrupted.partial").exists()
        list(quantize(demo_model, out, settings))
        assert contents(out) == contents(straight)

    def test_people_are_told(self, here: Here, demo_model: Path, room: Callable[[int], None], tmp_path: Path) -> None:
        room(MIXED_BYTES)
        done = here("quantize", demo_model, "-o", tmp_path / "q", "--fit", "24")
        assert done.code == 0 and "attn1.to_out" in done.out and "of all loss" in done.out
        assert "sensitivity: not measured" in done.out and "a Mac of 24 GB" in done.out

    def test_data_say_it_too(self, here: Here, room: Callable[[int], None], tmp_path: Path) -> None:
        room(MIXED_BYTES)
        common = ("convert", *DEMO, "-o", tmp_path / "q", "--variant", "distilled", "--fit", "24", "--json")
        planned = here(*common, "--dry-run").json
        assert not (tmp_path / "q").exists()
        made = here(*common).json
        assert planned["fit"] == made["report"]["fit"] and planned["fit"]["sensitivity"] == "not measured"
        kinds = {kind["kind"]: kind for kind in planned["fit"]["kinds"]}
        assert len(kinds) == 32 and sum(kinds["ff.proj_in"]["bits"].values()) == 6
        assert sum(kind["share_of_loss"] for kind in kinds.values()) == pytest.approx(1, abs=1e-3)
        packed = [row for row in planned["plan"] if row.get("key", "").endswith("caption_projection.linear_1.weight")]
        assert all("quantize(8,64,affine)" in row["transform"] for row in packed) and len(packed) == 2

    @pytest.mark.parametrize(
        ("options", "said"),
        [({"fit": 0}, "--fit 0"), ({"fit": 24, "bits": 4}, "--bits does not go with --fit"),
         ({"fit": 24, "mode": "nvfp4"}, "--mode does not go with --fit"),
         ({"fit": 24, "only": ["text_encoder"]}, "--only leaves that out"),
         ({"fit": 24, "only": [TRANSFORMER]}, "has room for it as it is")],
    )  # fmt: skip
    def test_what_does_not_go_together(
        self, demo_model: Path, tmp_path: Path, options: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(InputError, match=said):
            api.quantize(demo_model, tmp_path / "q", **options)
        assert not any(tmp_path.iterdir())

    def test_needs_what_tells_a_clips_memory(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="needs the model's video_vae"):
            api.convert(MONOLITH, tmp_path / "q", variant="distilled", only=[TRANSFORMER], fit=24)
