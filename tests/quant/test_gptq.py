"""GPTQ and rotated inputs: what columns do for each other, from which calls, and what a folder of such codes is."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import ltx2
from ltx2.convert.output import pieces
from ltx2.convert.output.pieces import rows_of
from ltx2.convert.plan.folder import folder_plan
from ltx2.quant.apply import Settings, quantize
from ltx2.quant.codes.correlations import Correlations, Feedback, invert_factor, make_feedback, rounding_order
from ltx2.quant.codes.gptq import pack_in_turn
from ltx2.quant.codes.inputs import Inputs
from ltx2.quant.codes.on_cpu import OnCpu
from ltx2.quant.codes.on_gpu import OnGpu
from ltx2.quant.codes.pack import pack, unpack
from ltx2.quant.measure.recording import given
from ltx2.quant.measure.replay import Replay
from ltx2.quant.measure.statistics import Statistics
from ltx2.quant.plan import step
from ltx2.quant.plan.replan import repack
from ltx2.quant.plan.step import Known, quantized
from ltx2.quant.report import Report
from ltx2.runtime.errors import ConfigError, InputError
from ltx2.runtime.events import BytesDone, Event
from ltx2.runtime.files.tensors import bf16_to_f32, f32_to_bf16
from ltx2.runtime.generate.observe import watch
from ltx2.runtime.layers.linear import Linear, Packed
from ltx2.runtime.layers.packed import quantize_like
from ltx2.runtime.model.forms import Form, Quantization
from ltx2.runtime.model.hadamard import rotated_rows
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_network
from ltx2.runtime.networks.transformer.inputs import Levels
from ltx2.runtime.networks.transformer.model import Transformer
from tests.support.command import Here
from tests.support.folders import contents, interrupt, verified
from tests.support.layers import Layer, layer
from tests.support.official import MONOLITH
from tests.support.parity import relative_l2

Figure = Callable[..., None]
Array = np.ndarray
Q4 = Form(4, 64, "affine")
ROTATED = replace(Q4, rotation=64)
PROMPTS = ("a red circle moves right on a white background with a low tone", "a blue star rises on a black background")
OPTIONS: dict[str, Any] = {"width": 128, "height": 128, "frames": 17, "no_upscale": True}
TO_Q = "transformer_blocks.{}.attn1.to_q"


@pytest.fixture(scope="module")
def known() -> Layer:
    """A synthetic layer, its weights bfloat16."""
    made = layer("heavy", "adaln", width=512, rows=16, tokens=1024)
    return replace(made, weights=bf16_to_f32(f32_to_bf16(made.weights)))


def correlations(x: Array, prompts: int = 1 << 20) -> Correlations:
    return Correlations([x.T @ x / len(x)], x.mean(axis=0), len(x), prompts)


def packed(known: Layer, form: Form, feedback: Feedback) -> tuple[Array, float]:
    """Weights as they are multiplied with inputs, and the relative error of the output, mean corrected."""
    codes, _ = pack_in_turn(f32_to_bf16(known.weights), form, feedback)
    values = unpack(codes, form)
    values = rotated_rows(values, form.rotation) if form.rotation else values
    assert codes.drift is not None
    change = known.inputs @ (values - known.weights).T + codes.drift
    return values, float(np.linalg.norm(change) / np.linalg.norm(known.inputs @ known.weights.T))


class TestCodes:
    @pytest.mark.parametrize(("form", "limit"), [(Q4, 0.69), (ROTATED, 0.41)], ids=["gptq", "gptq-hadamard"])
    def test_against_stock(self, known: Layer, form: Form, limit: float, figure: Figure) -> None:
        feedback = make_feedback(correlations(known.calibration), form, True, OnCpu())
        _, ours = packed(known, form, feedback)
        stock = mx.quantize(mx.array(known.weights).astype(mx.bfloat16), 64, 4)
        scales, biases = (part.astype(mx.float32) for part in stock[1:])
        values = np.array(mx.dequantize(stock[0], scales, biases, group_size=64, bits=4))
        theirs = relative_l2(known.inputs @ values.T, known.inputs @ known.weights.T)
        figure(f"4 bits, {form.rotation or 'not'} rotated: error of GPTQ / mx.quantize", ours / theirs, limit=limit)

    @pytest.mark.parametrize("form", [ROTATED, Form(3, 32, "affine"), Form(4, 16, "nvfp4")], ids=str)
    def test_every_arithmetic_and_number_of_rows(self, known: Layer, form: Form) -> None:
        """Nearly the same codes: sums may be in another order."""
        rows, x = f32_to_bf16(known.weights[:8, :192]), known.calibration[:, :192]
        multiplier = 2.0**-10 if form.mode == "nvfp4" else 1.0
        whole, parts, gpu = (
            pack_in_turn(r, form, make_feedback(correlations(x), form, True, on), multiplier)[0]
            for on, r in ((OnCpu(), rows), (OnCpu(), rows[:3]), (OnGpu(), rows))
        )
        assert (parts.codes == whole.codes[:3]).mean() > 0.99
        assert (gpu.codes == whole.codes).mean() > 0.99

    def test_a_gpu_is_never_given_nothing(self, known: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
        """CUDA ends the process for a product of no rows."""
        multiply = mx.addmm

        def guarded(*arrays: Any, **options: Any) -> mx.array:
            assert all(array.size for array in arrays)
            return multiply(*arrays, **options)

        monkeypatch.setattr(mx, "addmm", guarded)
        rows, inputs = f32_to_bf16(known.weights[:8, :192]), correlations(known.calibration[:, :192])
        pack_in_turn(rows, Q4, make_feedback(inputs, Q4, True, OnGpu()))

    def test_inputs_that_do_not_correlate(self) -> None:
        """Then no column can do anything for another: codes are those of the search."""
        rows = f32_to_bf16(np.random.default_rng(0).standard_normal((32, 256), np.float32))
        known = Correlations([np.eye(256, dtype=np.float32)], np.zeros(256, np.float32), 1 << 30, 1 << 30)
        ours, loss = pack_in_turn(rows, Q4, make_feedback(known, Q4, False, OnCpu()))
        theirs, expected = pack(rows, Q4, Inputs(np.ones(256, np.float32)))
        assert (ours.codes == theirs.codes).mean() > 0.999
        assert loss.relative == pytest.approx(expected.relative, rel=1e-3)
        assert ours.drift is None, "there is no bias"

    def test_loss_is_that_of_the_output(self, known: Layer) -> None:
        """On the inputs that were measured, around their mean."""
        x, rows = known.calibration, f32_to_bf16(known.weights)
        found, loss = pack_in_turn(rows, ROTATED, make_feedback(correlations(x), ROTATED, True, OnCpu()))
        change = rotated_rows(unpack(found, ROTATED), 64) - known.weights
        output = (x - x.mean(axis=0)) @ change.T
        assert loss.relative == pytest.approx(np.linalg.norm(output) / np.linalg.norm(x @ known.weights.T), rel=1e-3)
        assert found.drift == pytest.approx(-change @ x.mean(axis=0), abs=1e-4)

    def test_few_prompts_are_believed_less(self, known: Layer) -> None:
        many, few = (make_feedback(correlations(known.calibration, n), Q4, True, OnCpu()) for n in (1000, 1))
        off_diagonal = [np.abs(f.upper - np.diag(np.diagonal(f.upper))).sum() / np.trace(f.upper) for f in (many, few)]
        assert off_diagonal[1] < 0.7 * off_diagonal[0]

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_what_is_not_finite(self, value: float) -> None:
        rows = np.ones((4, 64), np.float32)
        feedback = make_feedback(correlations(np.eye(64, dtype=np.float32)), Q4, True, OnCpu())
        rows[1, 2] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            pack_in_turn(rows, Q4, feedback)
        with pytest.raises(ValueError, match="not finite"):
            make_feedback(correlations(np.full((4, 64), value, np.float32)), Q4, True, OnCpu())

    def test_impossible_correlations(self) -> None:
        known = Correlations([-np.eye(64, dtype=np.float32)], np.zeros(64, np.float32), 100, 1)
        with pytest.raises(ValueError, match="impossible"):
            make_feedback(known, Q4, False, OnCpu())


class TestFactor:
    @pytest.mark.parametrize("size", [64, 257, 600])
    def test_is_of_the_inverse(self, size: int) -> None:
        x = np.random.default_rng(0).standard_normal((4 * size, size)).astype(np.float32)
        matrix = x.T @ x / len(x)
        invert_factor(upper := matrix.copy())
        assert np.array_equal(upper, np.triu(upper))
        assert relative_l2(upper.T @ upper, np.linalg.inv(matrix)) < 1e-4

    def test_order(self) -> None:
        assert rounding_order(np.array([1, 2, 3, 4, 9, 0, 5, 5]), 4).tolist() == [4, 6, 7, 5, 3, 2, 1, 0]


class TestRotation:
    @pytest.mark.parametrize("bits", [4, 8])
    def test_layer(self, bits: int) -> None:
        """A rotated layer is the product with its weights rotated back."""
        draw = np.random.default_rng(0)
        w, x = (draw.standard_normal((n, 128)).astype(np.float32) for n in (8, 5))
        form = Form(bits, 32, "affine", 64)
        values, _ = pack(rotated_rows(w, 64), form)
        linear = Packed(128, 8, form)
        linear.weight, linear.scales, linear.biases = (mx.array(part) for part in values[:3] if part is not None)
        assert relative_l2(linear(mx.array(x)), x @ rotated_rows(unpack(values, form), 64).T) < 1e-5

    @pytest.mark.parametrize("rotation", [8, "64", 64.0, True, None])
    def test_impossible(self, rotation: object) -> None:
        with pytest.raises(ValueError, match="rotated"):
            Quantization.from_config({"group_size": 64, "bits": 4, "mode": "affine", "rotation": rotation})

    def test_width_that_cannot_be_rotated(self) -> None:
        network = nn.Module()
        network.layer = Linear(96, 8)
        quantization = Quantization(Form(4, 32, rotation=64))
        with pytest.raises(ConfigError, match="blocks of 64"):
            quantize_like(network, quantization, {"layer.scales": (8, 3)})


@pytest.fixture(scope="module")
def stats(demo_f32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two short clips, with calls of the denoiser."""
    out = tmp_path_factory.mktemp("stats") / "stats.safetensors"
    return ltx2.calibrate(demo_f32, out, prompts=PROMPTS, gptq=True, **OPTIONS)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few layers, of two blocks, and one beside them; at 8 bits in the first."""
    path = tmp_path_factory.mktemp("recipe") / "few.json"
    blocks = {"component": "transformer", "layers": r"transformer_blocks\.[01]\.(attn1|ff)\..+"}
    others = {"component": "transformer", "layers": r"caption_projection\.linear_1"}
    first = {"component": "transformer", "layers": r".+", "first": 0.1, "bits": 8}
    path.write_text(json.dumps({"quantize": [blocks, others], "at_least": [first]}))
    return path


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's transformer alone."""
    out = tmp_path_factory.mktemp("denoiser") / "f32"
    return ltx2.convert(MONOLITH, out, variant="distilled", dtype="f32", only=["transformer"])


@pytest.fixture(scope="module")
def q4(denoiser: Path, stats: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("q") / "q4"
    return out, ltx2.quantize(denoiser, out, recipe=str(recipe), stats=stats, method="gptq-hadamard")


def new_replay(model: Path, stats: Path) -> Replay:
    return Replay(folder_plan(ModelFolder.open(model)), Statistics.open(stats).calls)


def test_a_gpu_takes_whole_tensors(denoiser: Path, stats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, layer = folder_plan(ModelFolder.open(denoiser)), TO_Q.format(0)
    move = next(move for move in plan.moves("transformer") if move.key == f"{layer}.weight")
    known = Known(Statistics.open(stats), "transformer", layer, None, new_replay(denoiser, stats))
    packed = quantized(move, Q4, known)
    monkeypatch.setattr(pieces, "PIECE_BYTES", move.spec.nbytes // 4)
    assert [piece.count for piece in rows_of(packed)] == [32] * 4, "a CPU takes some rows"
    monkeypatch.setattr(step, "is_gpu", lambda: True)
    assert [piece.count for piece in rows_of(packed)] == [128]
    monkeypatch.setattr(step, "GPU_BLOCK", move.spec.nbytes // 4)
    assert [piece.count for piece in rows_of(quantized(move, Q4))] == [64] * 2, "a block of 16 bits is enough otherwise"


def test_progress_counts_work(denoiser: Path, stats: Path, recipe: Path, tmp_path: Path) -> None:
    """A layer counts by its bytes times its inputs."""
    seen = list[Event]()
    ltx2.quantize(denoiser, tmp_path / "q", recipe=str(recipe), stats=stats, method="gptq", progress=seen.append)
    written = [event for event in seen if isinstance(event, BytesDone) and event.share is not None]
    shares = [0.0, *(event.share or 0.0 for event in written)]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)
    plan = folder_plan(ModelFolder.open(denoiser))
    move = next(move for move in plan.moves("transformer") if move.key.endswith("0.ff.proj_out.weight"))
    known = Known(Statistics.open(stats), "transformer", move.layer, None, new_replay(denoiser, stats))
    (piece,) = rows_of(quantized(move, Q4, known))
    assert piece.work == move.spec.nbytes * 512 / 256
    assert next(rows_of(quantized(move, Q4))).work == move.spec.nbytes


class TestReplay:
    def test_a_third_of_the_steps_is_kept(self, stats: Path) -> None:
        """Others for every prompt."""
        levels = [next(call.values()).levels.values.item() for call in Statistics.open(stats).calls]
        assert levels == pytest.approx([0.9875, 0.909375, 0.99375, 0.975, 0.421875])

    def test_inputs_are_those_of_the_model(self, denoiser: Path, stats: Path) -> None:
        network = load_network(ModelFolder.open(denoiser), "transformer", Transformer)
        path, seen = TO_Q.format(2), []
        watch(network, lambda layer, _, x: seen.append(np.array(x).reshape(-1, 128)) if layer == path else None)
        for call in Statistics.open(stats).calls:
            mx.eval(*network(given(network, call)).values())
        x = np.concatenate(seen)
        found = new_replay(denoiser, stats).feedback(path, Q4, biased=True).given
        assert relative_l2(np.concatenate(found.panels), x.T @ x / len(x)) < 1e-5
        assert relative_l2(found.mean, x.mean(axis=0)) < 1e-5

    def test_layers_in_any_order(self, denoiser: Path, stats: Path) -> None:
        forwards, backwards = new_replay(denoiser, stats), new_replay(denoiser, stats)
        found = {block: forwards.feedback(TO_Q.format(block), Q4, biased=True) for block in (0, 1, 3)}
        for block in (3, 0):
            again = backwards.feedback(TO_Q.format(block), Q4, biased=True)
            assert np.array_equal(again.upper, found[block].upper)

    def test_layers_of_one_input_share_it(self, denoiser: Path, stats: Path) -> None:
        replay = new_replay(denoiser, stats)
        one, other = (replay.feedback(f"transformer_blocks.1.attn2.to_{n}", Q4, biased=True) for n in "kv")
        assert one is other
        assert replay.feedback("transformer_blocks.1.attn2.to_q", Q4, biased=True) is not one

    def test_another_models_calls(self, denoiser: Path, stats: Path) -> None:
        call = Statistics.open(stats).calls[0]
        stranger = call.map(lambda stream: replace(stream, text=stream.text[..., :-1]))
        with pytest.raises(InputError, match="do not fit"):
            Replay(folder_plan(ModelFolder.open(denoiser)), [stranger]).feedback(TO_Q.format(0), Q4, biased=True)


class TestFolder:
    def test_layers(self, q4: tuple[Path, Report]) -> None:
        """Codes of 4 bits are rotated; those of 8 would gain nothing, and layers outside blocks are searched."""
        forms = {row.layer: (row.bits, row.method, row.rotation) for row in q4[1].layers if "transformer" in row.layer}
        assert set(forms.values()) == {(4, "gptq", 64), (8, "gptq", 0)}
        others = [row for row in q4[1].layers if "caption" in row.layer]
        assert [(row.method, row.rotation) for row in others] == [("search", 0)]
        record = ModelFolder.open(q4[0]).record("transformer")
        assert record.method == "gptq"
        assert record.quantization == ROTATED.entry() | {
            row.layer: replace(Q4, bits=row.bits).entry() for row in q4[1].layers if not row.rotation
        }

    def test_is_better_than_the_search(
        self, denoiser: Path, q4: tuple[Path, Report], stats: Path, recipe: Path, tmp_path: Path
    ) -> None:
        """The velocities, at steps that were not recorded."""
        ltx2.quantize(denoiser, tmp_path / "q", recipe=str(recipe), stats=stats)
        level = Levels(mx.array([0.8]), sigma=0.8)
        calls = [call.map(lambda stream: replace(stream, levels=level)) for call in Statistics.open(stats).calls]

        def velocities(folder: Path) -> mx.array:
            network = load_network(ModelFolder.open(folder), "transformer", Transformer)
            found = [network(given(network, call)).values() for call in calls]
            return mx.concatenate([values.reshape(-1) for velocity in found for values in velocity])

        exact = velocities(denoiser)
        ours, theirs = (relative_l2(velocities(folder), exact) for folder in (q4[0], tmp_path / "q"))
        assert ours < 0.85 * theirs

    def test_interrupted(
        self, denoiser: Path, q4: tuple[Path, Report], stats: Path, recipe: Path, tmp_path: Path
    ) -> None:
        """What was done before is read back, and counts as it counts in the output."""
        settings = Settings(recipe=str(recipe), stats=stats, method="gptq-hadamard")
        interrupt(quantize(denoiser, tmp_path / "q4", settings), tmp_path / "q4", "transformer")
        again = ltx2.quantize(denoiser, tmp_path / "q4", recipe=str(recipe), stats=stats, method="gptq-hadamard")
        assert contents(tmp_path / "q4") == contents(q4[0])
        for ours, theirs in zip(again.layers, q4[1].layers, strict=True):
            assert ours.relative_error == pytest.approx(theirs.relative_error, rel=2e-3)

    def test_verified_by_its_hashes(self, q4: tuple[Path, Report], stats: Path) -> None:
        """Another machine would choose other codes."""
        assert verified(q4[0]).tensors > 500
        with pytest.raises(InputError, match="GPTQ chose"):
            verified(q4[0], [MONOLITH], partial(repack, statistics=Statistics.open(stats)))


class TestCommand:
    def test_needs_recorded_calls(self, here: Here, denoiser: Path, tmp_path: Path) -> None:
        args = ("quantize", denoiser, "-o", tmp_path / "q", "--method", "gptq")
        here(*args).failed(1, "nothing says what the denoiser is given", "calibrate --gptq")

    def test_has_no_effect_elsewhere(self, here: Here, demo_f32: Path, stats: Path, tmp_path: Path) -> None:
        args = ("quantize", demo_f32, "-o", tmp_path / "q", "--method", "gptq", "--stats", stats)
        here(*args, "--only", "connectors").failed(1, "no effect")
        here(*args[:-3], "gptq-hadamard", "--stats", stats, "--mode", "nvfp4").failed(1, "does not go with")
