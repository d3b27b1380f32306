"""Calibrating: sums that stay exact, of every layer's own inputs, and files of statistics that are what they say."""

import json
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from ltx2 import api
from ltx2.convert.plan.entries import Layer
from ltx2.convert.plan.folder import folder_plan
from ltx2.quant.codes.inputs import Inputs
from ltx2.quant.measure import calibrate as calibrating
from ltx2.quant.measure.calibrate import Calibrated, Recorder, built_in_prompts, calibrate
from ltx2.quant.measure.statistics import About, Statistics, identity, write_statistics
from ltx2.runtime.errors import CheckpointError, InputError, NumericsError
from ltx2.runtime.events import Event, PhaseStarted, PromptStarted
from ltx2.runtime.files.tensors import open_tensorfile, write_tensorfile
from ltx2.runtime.generate.observe import watch
from ltx2.runtime.generate.options.prompts import read_prompts
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.layers.linear import Linear, LinearLayer, Packed
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_network
from ltx2.runtime.networks.transformer.model import Transformer
from tests.support.command import SIZE, Here
from tests.support.golden import PROMPTS
from tests.support.official import DEMO, MONOLITH, plan_of

Figure = Callable[..., None]
Weights = tuple[mx.array, mx.array]
PROMPT = "a red circle moves right on a white background with a low tone"
OPTIONS: dict[str, Any] = {"width": 64, "height": 64, "frames": 9, "seed": 3}
ABOUT = About("0", "2.0", "distilled", {}, (), ("a prompt",))
LAYER = ("transformer", "transformer_blocks.0.attn1.to_q")


class One(nn.Module):
    """A network of one layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = Linear(width, 1)

    def __call__(self, x: mx.array) -> mx.array:
        return self.layer(x)


class Keeping(Recorder):
    """Keeps the inputs beside their sums."""

    kept: ClassVar[dict[Layer, list[np.ndarray]]] = {}

    def _see(self, component: str, path: str, layer: LinearLayer, x: mx.array) -> None:
        self.kept.setdefault((component, path), []).append(np.array(x, np.float64).reshape(-1, x.shape[-1]))
        super()._see(component, path, layer, x)


@pytest.fixture(scope="module")
def calibrated(demo_f32: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    """Statistics of the demo model, and the events of making them."""
    out = tmp_path_factory.mktemp("calibrated") / "stats.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrating, "Recorder", Keeping)
        return out, list(calibrate(demo_f32, out, [PROMPT], OPTIONS))


def recorded(x: np.ndarray, times: int = 1, width: int = 4) -> Inputs:
    recorder, network = Recorder(), One(width)
    recorder.observe("transformer", network)
    for _ in range(times):
        network(mx.array(x))
    (inputs,) = recorder.layers().values()
    return inputs


class TestSums:
    def test_over_millions_of_tokens(self) -> None:
        """Where float32 sums would long have stopped to grow."""
        x = (1000 + np.random.default_rng(0).standard_normal((1, 1 << 16, 4))).astype(np.float32)
        inputs = recorded(x, times=64)
        exact = x.reshape(-1, 4).astype(np.float64)
        assert inputs.mean is not None
        np.testing.assert_allclose(inputs.mean, exact.mean(0), rtol=1e-6)
        np.testing.assert_allclose(inputs.mean_square, np.square(exact).mean(0), rtol=1e-6)

    def test_long_inputs_are_summed_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x = np.random.default_rng(0).standard_normal((2, 55, 4)).astype(np.float32)
        whole = recorded(x)
        monkeypatch.setattr(calibrating, "ROWS", 30)
        parts = recorded(x)
        assert parts.mean is not None and whole.mean is not None
        np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-5)
        np.testing.assert_allclose(parts.mean_square, whole.mean_square, rtol=1e-6)

    def test_what_is_not_finite(self) -> None:
        with pytest.raises(NumericsError, match=r"transformer\.layer are not finite"):
            recorded(np.array([[1, 2, np.nan, 4]], np.float32))

    def test_other_networks_are_not_watched(self) -> None:
        recorder, network = Recorder(), One(4)
        recorder.observe("video_vae", network)
        network(mx.ones((1, 4)))
        assert recorder.layers() == {} and recorder.most == 0


class TestModel:
    def test_moments_are_those_of_the_inputs(self, calibrated: tuple[Path, list[Event]]) -> None:
        statistics = Statistics.open(calibrated[0])
        assert statistics.layers.keys() == Keeping.kept.keys()
        for layer, inputs in Keeping.kept.items():
            x, found = np.concatenate(inputs), statistics.inputs(*layer, biased=True)
            assert found is not None and found.mean is not None
            np.testing.assert_allclose(found.mean_square, np.square(x).mean(0), rtol=1e-5, atol=1e-12)
            np.testing.assert_allclose(found.mean, x.mean(0), atol=1e-5 * np.sqrt(np.square(x).mean()))

    def test_every_linear_layer_is_there(self, demo_f32: Path, calibrated: tuple[Path, list[Event]]) -> None:
        plan = folder_plan(ModelFolder.open(demo_f32))
        weights = {
            (move.component, move.layer)
            for name in ("text_encoder", "connectors", "transformer")
            for move in plan.moves(name)
            if move.key.endswith(".weight") and len(move.spec.shape) == 2 and "embed_tokens" not in move.key
        }
        assert Statistics.open(calibrated[0]).layers.keys() == weights and len(weights) == 261

    def test_work_ends_with_the_latents(self, calibrated: tuple[Path, list[Event]]) -> None:
        first, *events, last = calibrated[1]
        assert first == PromptStarted(1, 1, PROMPT)
        phases = [event.name for event in events if isinstance(event, PhaseStarted)]
        assert phases == ["text_encoder", "connectors", "stage1", "spatial_upscaler", "stage2"]
        assert isinstance(last, Calibrated) and last.prompts == 1
        assert (last.path, last.layers) == (str(calibrated[0]), len(Statistics.open(calibrated[0]).layers))

    def test_the_file_says_where_it_comes_from(self, demo_f32: Path, calibrated: tuple[Path, list[Event]]) -> None:
        about, manifest = Statistics.open(calibrated[0]).about, ModelFolder.open(demo_f32).manifest
        assert (about.prompts, about.options, about.sources) == ((PROMPT,), OPTIONS, manifest.sources)
        assert (about.release, about.variant, about.tool_version) == ("2.0", "distilled", manifest.tool_version)

    def test_interrupted_it_leaves_nothing(self, demo_f32: Path, tmp_path: Path) -> None:
        events = calibrate(demo_f32, tmp_path / "s.safetensors", [PROMPT], OPTIONS)
        with closing(cast(Generator[Event, None, None], events)):
            next(event for event in events if isinstance(event, PhaseStarted))
        assert not any(tmp_path.iterdir())

    def test_a_place_that_cannot_be_written_is_refused_at_once(self, demo_f32: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="does not exist"):
            next(calibrate(demo_f32, tmp_path / "missing" / "s.safetensors"))

    @pytest.mark.parametrize("name", ["first.png", "pr.txt", "stats"])
    def test_another_suffix_is_wrong_usage(self, here: Here, demo_f32: Path, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text(PROMPT)
        args = ["calibrate", demo_f32, "-o", tmp_path / name, "--prompts", tmp_path / name]
        here(*args).failed(2, f"cannot write {tmp_path / name}", ".safetensors")
        assert (tmp_path / name).read_text() == PROMPT

    def test_nothing_but_statistics_is_replaced(self, here: Here, demo_f32: Path, tmp_path: Path) -> None:
        """Not prompts, nor other tensors, nor the model that is read."""
        for content in (PROMPT.encode(), (demo_f32 / "vocoder" / "model.safetensors").read_bytes()):
            (out := tmp_path / "mine.safetensors").write_bytes(content)
            here("calibrate", demo_f32, "-o", out).failed(1, "mine.safetensors is already there", "another name")
            assert out.read_bytes() == content
        for name in ("model.safetensors", "new.safetensors"):
            here("calibrate", demo_f32, "-o", demo_f32 / "transformer" / name).failed(1, "is only read")

    def test_earlier_statistics_are(self, calibrated: tuple[Path, list[Event]], demo_f32: Path, tmp_path: Path) -> None:
        (out := tmp_path / "stats.safetensors").write_bytes(calibrated[0].read_bytes())
        assert isinstance(next(calibrate(demo_f32, out, [PROMPT], OPTIONS)), PromptStarted)

    def test_layers_come_closer(
        self, demo_f32: Path, calibrated: tuple[Path, list[Event]], tmp_path: Path, figure: Figure
    ) -> None:
        """The audio's, in what they make of another prompt, packed to 4 bits with statistics and without. (Of the few
        tokens of such a small picture, one prompt's tell little of another's: that takes several.)"""
        folders = {}
        for name, stats in (("plain", None), ("calibrated", calibrated[0])):
            api.quantize(demo_f32, tmp_path / name, bits=4, recipe="uniform", only=["transformer"], stats=stats)
            folders[name] = ModelFolder.open(tmp_path / name)
        errors = output_errors(demo_f32, folders, PROMPTS["b"])
        ratios = [error / errors["plain"][path] for path, error in errors["calibrated"].items() if ".audio_" in path]
        assert len(ratios) > 80
        figure("4 bits, audio layers' output error with statistics / without, median", np.median(ratios), limit=0.9)


def output_errors(model: Path, folders: Mapping[str, ModelFolder], prompt: str) -> dict[str, dict[str, float]]:
    """Of the packed transformer layers of some folders, beside the model's own, over three steps."""
    squares: dict[str, dict[str, float]] = {name: defaultdict(float) for name in folders}

    def observe(component: str, network: nn.Module) -> None:
        if component == "transformer":
            packed = {name: unpacked_layers(folder) for name, folder in folders.items()}
            watch(network, partial(compare, packed))

    def compare(packed: Mapping[str, Mapping[str, Weights]], path: str, layer: LinearLayer, x: mx.array) -> None:
        for name, layers in packed.items():
            if path in layers:
                weight, bias = layers[path]
                squares[name][path] += float(np.array(mx.square(x @ weight.T + bias - layer.multiply(x)).sum()))

    steps = (e for e in Pipeline(model, observe).stream(prompt, **OPTIONS) if getattr(e, "phase", "") == "stage1")
    assert len(list(islice(steps, 3))) == 3
    return {name: {path: np.sqrt(total) for path, total in counted.items()} for name, counted in squares.items()}


def unpacked_layers(folder: ModelFolder) -> dict[str, Weights]:
    """Weights and biases of the packed layers."""
    modules = load_network(folder, "transformer", Transformer).named_modules()
    packed = {path: module for path, module in modules if isinstance(module, Packed)}
    return {path: (mx.dequantize(m.weight, m.scales, m.biases, 64, 4), m.bias) for path, m in packed.items()}


class TestCommand:
    def test_result_and_progress(self, here: Here, demo_f32: Path, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr(Pipeline, "events", no_generation)
        (tmp_path / "prompts.txt").write_text("one\n\n  two  \n")
        out, args = tmp_path / "s.safetensors", ("--prompts", tmp_path / "prompts.txt", *SIZE, "--seed", "5")
        done = here("calibrate", demo_f32, "-o", out, *args)
        assert "prompt 2 of 2: two" in done.err and "s.safetensors" in done.out and "2 prompts" in done.out
        about = Statistics.open(out).about
        assert about.prompts == ("one", "two")
        assert about.options == {"width": 64, "height": 64, "frames": 9, "seed": 5}
        found = here("calibrate", demo_f32, "-o", out, *args, "--json").json
        assert (found["stats"], found["prompts"]) == (str(out), 2)
        assert here("calibrate", demo_f32, "-o", out, *args, "-q").err == ""

    def test_failures(self, here: Here, demo_f32: Path, tmp_path: Path) -> None:
        out = tmp_path / "s.safetensors"
        here("calibrate", tmp_path, "-o", out).failed(1, "not a model folder")
        here("calibrate", demo_f32, "-o", out, "--width", "65").failed(1, "width 65")
        here("calibrate", demo_f32, "-o", out, "--prompts", tmp_path / "none.txt").failed(1, "none.txt")
        (tmp_path / "empty.txt").write_text("\n \n")
        here("calibrate", demo_f32, "-o", out, "--prompts", tmp_path / "empty.txt").failed(1, "no prompt")
        assert not out.exists()


def no_generation(_: Pipeline, request: Request, until: str) -> Iterator[Event]:
    yield PhaseStarted("stage1")


def test_built_in_prompts() -> None:
    prompts = built_in_prompts()
    assert len(set(prompts)) == len(prompts) == 16 and all(len(prompt) > 60 for prompt in prompts)


def test_prompts_are_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot read the prompts"):
        read_prompts(tmp_path / "p")
    (tmp_path / "p").write_bytes(b"\xef\xbb\xbfa red square\r\na blue star\r\n")  # as editors on Windows write it
    assert read_prompts(tmp_path / "p") == ("a red square", "a blue star")
    (tmp_path / "p").write_text('a red square\n{"prompt": "a blue star"}\n')
    assert read_prompts(tmp_path / "p") == ("a red square", "a blue star")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "frames": 9}', "line 2 of .*: 'frames' is no option of one prompt: the same options go for"),
        ('{"prompt": "a", "output": "c.mp4"}', "line 2 of .*'output' is no option"),
        ('{"text": "a"}', "line 2 of .*'text' is no option of one prompt: there is no such option"),
        ("{}", "line 2 of .*there is no prompt"),
        ('{"prompt": "a"', "line 2 of .*no JSON object.*in column 15"),
    ],
)
def test_a_line_that_is_no_prompt_is_refused(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "p").write_text(f"a red square\n{line}\n")
    with pytest.raises(InputError, match=said):
        read_prompts(tmp_path / "p")


class TestFile:
    def test_same_values_same_bytes(self, tmp_path: Path) -> None:
        layers = {LAYER: Inputs(np.ones(4), np.zeros(4)), ("connectors", "a"): Inputs(np.ones(2), np.ones(2))}
        write_statistics(tmp_path / "a", layers, ABOUT, {LAYER: 0.5})
        write_statistics(tmp_path / "b", dict(reversed(layers.items())), ABOUT, {LAYER: 0.5})
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        opened = Statistics.open(tmp_path / "a")
        assert opened.about == ABOUT and opened.layers == {LAYER: 4, ("connectors", "a"): 2}
        assert opened.sensitivities == {LAYER: 0.5} and opened.inputs("connectors", "b", biased=True) is None
        found = opened.inputs(*LAYER, biased=False)
        assert found is not None and found.mean is None and (found.weights == 1).all()

    @pytest.mark.parametrize(
        ("tensors", "said"),
        [
            ({"transformer.a.mean": np.ones(4)}, "only one moment"),
            ({"transformer.a.mean": np.ones(4), "transformer.a.mean_square": np.ones(5)}, "another shape"),
            ({"transformer.a.hessian": np.ones(4)}, "no statistic"),
            ({"vae.a.mean": np.ones(4)}, "no statistic"),
            ({"transformer.a.mean": np.ones((2, 2))}, "no statistic"),
            ({"transformer.a.sensitivity": np.ones(1)}, "no statistic"),
        ],
    )
    def test_tensors_that_are_none(self, tmp_path: Path, tensors: dict[str, np.ndarray], said: str) -> None:
        metadata = self.metadata(tmp_path)
        values = {name: ("F32", value.astype(np.float32)) for name, value in tensors.items()}
        write_tensorfile(tmp_path / "s", values, metadata)
        with pytest.raises(InputError, match=said):
            Statistics.open(tmp_path / "s")

    @pytest.mark.parametrize("about", ["", "[]", "{}", json.dumps({"sources": 3})])
    def test_metadata_that_says_nothing(self, tmp_path: Path, about: str) -> None:
        write_tensorfile(tmp_path / "s", {}, self.metadata(tmp_path) | {"about": about})
        with pytest.raises(InputError, match="cannot be used"):
            Statistics.open(tmp_path / "s")

    @pytest.mark.parametrize(("value", "said"), [(-1.0, "negative"), (np.inf, "not finite")])
    def test_values_that_are_none(self, tmp_path: Path, value: float, said: str) -> None:
        write_statistics(tmp_path / "s", {LAYER: Inputs(np.full(4, value), np.zeros(4))}, ABOUT)
        with pytest.raises(InputError, match=said):
            Statistics.open(tmp_path / "s").inputs(*LAYER, biased=True)

    def test_other_files(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="another kind"):
            Statistics.open(MONOLITH)
        (tmp_path / "text").write_text("no statistics")
        for path in (tmp_path / "text", tmp_path / "missing", tmp_path):
            with pytest.raises(CheckpointError):
                Statistics.open(path)

    @staticmethod
    def metadata(tmp_path: Path) -> dict[str, str]:
        write_statistics(tmp_path / "right", {}, ABOUT)
        return dict(open_tensorfile(tmp_path / "right").metadata)


class TestIdentity:
    def test_is_of_the_model_not_of_how_it_is_stored(self, demo_f32: Path, tmp_path: Path) -> None:
        names = ("transformer", "connectors", "text_encoder")
        stored = plan_of(*DEMO, variant="distilled"), plan_of(*DEMO, variant="dev", dtype="f16")
        quantized = tmp_path / "q"
        api.quantize(demo_f32, quantized, bits=8)
        plans = [folder_plan(ModelFolder.open(path)) for path in (demo_f32, quantized)]
        for name in names:
            assert len({identity(plan, name) for plan in (*stored, *plans)}) == 1
        assert len({identity(plans[0], name) for name in names}) == 3

    def test_tells_models_apart(self, demo_f32: Path, model: Path) -> None:
        ours, theirs = (folder_plan(ModelFolder.open(path)) for path in (demo_f32, model))
        assert identity(ours, "transformer") != identity(theirs, "transformer")
