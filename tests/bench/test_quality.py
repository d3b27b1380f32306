"""Comparing a quantized model with its reference: the metrics, what is found on the demo model, and how it is shown."""

import json
import os
import shutil
import sys
import weakref
from collections.abc import Generator, Iterator, Sequence
from itertools import pairwise
from math import inf, log10
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import ltx2
from ltx2.bench.plots.plot import check_plot
from ltx2.bench.plots.quality import error_maps
from ltx2.bench.quality import quality, teacher
from ltx2.bench.quality.metrics import HOP, WINDOW, Difference, log_spectral_distance, psnr
from ltx2.bench.quality.quality import Compared, Quality, make_receipt, run_quality, tables
from ltx2.bench.quality.teacher import Case, Comparison, Recording, compare, packed_layers, record
from ltx2.quant.measure import calibrate
from ltx2.runtime.errors import InputError, UnsupportedError
from ltx2.runtime.events import Event
from ltx2.runtime.files.tensors import open_tensorfile, write_tensorfile
from ltx2.runtime.generate.phases import sample
from ltx2.runtime.memory import streaming
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_weights
from ltx2.runtime.networks.transformer.config import TransformerConfig
from ltx2.runtime.networks.transformer.model import Transformer
from tests.support.command import SIZE, Here
from tests.support.sampling import shorten

# One stage, no sound: what a second stage and sounds add is seen in test_demo_quality.py.
OPTIONS = {"width": 64, "height": 64, "frames": 9, "no_upscale": True, "no_audio": True}
PROMPT = "a red circle moves right with a low tone"
SIGMAS = (1.0, 0.6, 0.0)
CASE = Case({**OPTIONS, "seed": 5, "matmul": "dequantized"})
DAMAGED = "transformer_blocks.3.ff.proj_out"
Value = TypeVar("Value")


def result(work: Generator[Event, None, Value]) -> Value:
    """What a generator returns."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def compared(model: Path, reference: Path) -> dict[str, Any]:
    """The receipt of one prompt."""
    *_, last = run_quality(model, reference, [PROMPT], OPTIONS)
    assert isinstance(last, Compared)
    return last.receipt


@pytest.fixture(scope="module", autouse=True)
def short_text_and_few_steps() -> Iterator[None]:
    """Of 1024 tokens and eleven steps: what is compared stays the same, and takes a tenth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch, SIGMAS, SIGMAS[-2:])
        patch.setitem(teacher.KEPT, "transformer", (1, 5))
        yield


@pytest.fixture(scope="module")
def quantized(demo_f32: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("quantized")
    for bits in (8, 4):
        ltx2.quantize(demo_f32, folder / f"q{bits}", bits=bits, recipe="uniform")
    return {bits: folder / f"q{bits}" for bits in (8, 4)}


@pytest.fixture(scope="module")
def layers(quantized: dict[int, Path]) -> dict[str, set[str]]:
    return packed_layers(ModelFolder.open(quantized[4]))


@pytest.fixture(scope="module")
def recording(demo_f32: Path, layers: dict[str, set[str]]) -> Recording:
    return result(record(demo_f32, PROMPT, CASE, layers))


@pytest.fixture(scope="module")
def comparisons(quantized: dict[int, Path], recording: Recording) -> dict[int, Comparison]:
    return {bits: result(compare(folder, recording, CASE)) for bits, folder in quantized.items()}


@pytest.fixture(scope="module")
def receipts(
    quantized: dict[int, Path], recording: Recording, comparisons: dict[int, Comparison], demo_f32: Path
) -> dict[int, dict[str, Any]]:
    return {bits: receipt_of(comparisons[bits], recording, (folder, demo_f32)) for bits, folder in quantized.items()}


def receipt_of(comparison: Comparison, recording: Recording, folders: tuple[Path, Path]) -> dict[str, Any]:
    """As `compared`, of runs that are known."""
    measured, (model, reference) = Quality(), map(ModelFolder.open, folders)
    measured.add(recording, comparison)
    return make_receipt((model, reference), measured)


class TestMetrics:
    def test_differences(self) -> None:
        a, b = np.array([3.0, 0.0, 4.0]), np.array([0.0, 5.0, 0.0])
        assert Difference.between(a, 2 * a).relative == 1 and Difference.between(a, 2 * a).cosine == 1
        assert Difference.between(a, -a).relative == 2 and Difference.between(a, -a).cosine == -1
        assert Difference.between(a, b).cosine == 0 and Difference.between(a, b).relative == pytest.approx(2**0.5)
        assert (Difference.between(b, b).relative, Difference.between(b, b).cosine) == (0, 1)
        with pytest.raises(ValueError, match="3 values cannot be compared with 2"):
            Difference.between(a, a[:2])

    def test_differences_of_parts_add_up(self) -> None:
        a, b = np.random.default_rng(0).standard_normal((2, 10))
        whole = Difference.between(a, b)
        parts = sum((Difference.between(a[i::2], b[i::2]) for i in range(2)), Difference())
        assert parts.relative == pytest.approx(whole.relative) and parts.cosine == pytest.approx(whole.cosine)

    def test_zeros(self) -> None:
        nothing, something = np.zeros(2), np.ones(2)
        assert (Difference.between(nothing, nothing).relative, Difference.between(nothing, nothing).cosine) == (0, 1)
        assert (Difference.between(nothing, something).relative, Difference().cosine) == (inf, 1)
        assert Difference.between(nothing, something).cosine == Difference.between(something, nothing).cosine == 0

    def test_psnr(self) -> None:
        frames = np.full((3, 4, 5, 3), 100, np.uint8)
        assert psnr(frames, frames) == inf
        assert psnr(frames, frames + 1) == psnr(frames + 1, frames) == pytest.approx(20 * log10(255))
        assert psnr(np.zeros_like(frames), np.full_like(frames, 255)) == 0
        one = frames.copy()
        one[1, 2, 3, 0] = 110  # one value of 180, by 10
        assert psnr(frames, one) == pytest.approx(10 * log10(255**2 * 180 / 100))

    def test_log_spectral_distance_of_a_gain(self) -> None:
        noise = 10 * np.random.default_rng(0).standard_normal((2, WINDOW + 7 * HOP))
        assert log_spectral_distance(noise, noise) == 0
        assert log_spectral_distance(noise, noise / 2) == pytest.approx(20 * log10(2))
        channel = np.stack([noise[0], noise[0] / 2]), np.stack([noise[0], noise[0]])
        assert log_spectral_distance(*channel) == pytest.approx(10 * log10(2))

    def test_log_spectral_distance_of_some_frequencies(self) -> None:
        """A tone is 10 dB apart at its own frequency, under this window also at both beside it, and nowhere else."""
        tone = np.sin(2 * np.pi * 100 * np.arange(WINDOW) / WINDOW)[None]
        expected = 10 * (3 / (WINDOW // 2 + 1)) ** 0.5
        assert log_spectral_distance(0.01 * tone, 0.01 * tone * 10**0.5) == pytest.approx(expected, rel=0.05)

    def test_what_is_below_the_floor_is_silence(self) -> None:
        silence = np.zeros((1, 100))
        assert log_spectral_distance(silence, silence + 1e-6) == 0
        with pytest.raises(ValueError, match="cannot be compared"):
            log_spectral_distance(silence, silence[:, 1:])


class TestRecording:
    def test_steps_are_the_samplers(self, recording: Recording) -> None:
        """Every step's tokens are those before, moved along their velocity."""
        (steps,) = recording.stages
        assert len(steps) == len(SIGMAS) - 1
        for (step, after), (sigma, following) in zip(pairwise(steps), pairwise(SIGMAS[:-1]), strict=True):
            for name, stream in step.call.items():
                moved = np.array(stream.tokens - (sigma - following) * step.velocities.get(name))
                np.testing.assert_allclose(np.array(after.call.get(name).tokens), moved, atol=1e-5)

    def test_rows_are_inputs_and_products(
        self, recording: Recording, demo_f32: Path, layers: dict[str, set[str]]
    ) -> None:
        folder = ModelFolder.open(demo_f32)
        assert {name: {path for c, path in recording.rows if c == name} for name in layers} == {
            name: {path for path in paths if "embed_tokens" not in path} for name, paths in layers.items()
        }
        weights = load_weights(folder, "transformer")
        for layer in ("transformer_blocks.0.attn2.to_k", "transformer_blocks.3.audio_ff.proj_out"):
            for rows in recording.rows["transformer", layer]:
                assert len(rows.inputs) == 5
                product = np.array(rows.inputs @ weights[f"{layer}.weight"].T)
                np.testing.assert_allclose(np.array(rows.products), product, atol=1e-4)
        attended = recording.rows["transformer", "transformer_blocks.1.attn1.to_q"]
        assert len(attended) == 2 and not mx.array_equal(attended[0].inputs, attended[1].inputs)


class TestComparison:
    def test_with_itself(self, quantized: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing differs, not even in the last bit, and not if one reads its blocks from disk in every step. Of both
        never more than one network is in memory."""
        transformers: list[TransformerConfig] = []

        def streamed(folder: ModelFolder, transformer: Transformer, blocks: Sequence[int]) -> Any:
            transformers.append(transformer.config)
            return streaming.streamed(folder, transformer, range(6) if len(transformers) == 2 else blocks)

        monkeypatch.setattr(sample, "streamed", streamed)
        networks: list[weakref.ref[nn.Module]] = []

        def loaded(network: nn.Module, _dtype: Any) -> None:
            alive = {type(other).__name__ for ref in networks if (other := ref()) is not None}
            assert not alive
            networks.append(weakref.ref(network))

        monkeypatch.setattr(teacher, "_cast", loaded)
        receipt = compared(quantized[4], quantized[4])
        assert (len(networks), len(transformers)) == (8, 2)
        assert len(receipt["layers"]) > 200 and len(receipt["steps"]) == 2
        assert {row["relative_error"] for row in receipt["layers"]} == {0}
        for row in receipt["steps"]:
            assert row["video"] == row["audio"] == {"relative_error": 0, "cosine": 1}
        nothing = {"video": 0, "audio": 0}
        same = {"latents": nothing, "psnr_db": None, "log_spectral_distance_db": None}
        assert receipt["contexts"] == nothing and receipt["summary"] == {"velocity": nothing, **same}
        assert receipt["clips"] == [{"prompt": PROMPT, "seed": 0, **same}]

    def test_fewer_bits_are_worse(self, receipts: dict[int, dict[str, Any]]) -> None:
        few, many = receipts[4], receipts[8]
        assert few["model"]["bits_per_weight"] < many["model"]["bits_per_weight"] < 32
        assert few["reference"]["bits_per_weight"] == 32
        for name in ("video", "audio"):
            assert 0 < many["contexts"][name] < few["contexts"][name] < 0.3
            for what, most in (("velocity", 0.3), ("latents", 2)):
                assert 0 < many["summary"][what][name] < few["summary"][what][name] < most
            for ours, theirs in zip(many["steps"], few["steps"], strict=True):
                assert theirs[name]["cosine"] < ours[name]["cosine"] < 1
        assert few["summary"]["psnr_db"] < many["summary"]["psnr_db"] < 100

    def test_layers_say_how_they_are_stored(self, receipts: dict[int, dict[str, Any]]) -> None:
        for bits, most in ((8, 0.01), (4, 0.2)):
            rows = receipts[bits]["layers"]
            assert {(row["mode"], row["bits"], row["group_size"]) for row in rows} == {("affine", bits, 64)}
            assert all(most / 20 < row["relative_error"] < most for row in rows)

    def test_a_damaged_layer_is_the_worst(
        self, quantized: dict[int, Path], recording: Recording, demo_f32: Path, tmp_path: Path
    ) -> None:
        model = shutil.copytree(quantized[8], tmp_path / "damaged")
        (path,) = (model / "transformer").glob("*.safetensors")
        file = open_tensorfile(path)
        tensors = {name: (info.dtype, np.array(file.array(name))) for name, info in file.tensors.items()}
        tensors[f"{DAMAGED}.scales"][1][:] *= 1.25
        write_tensorfile(path, tensors, {"format": "mlx"})
        receipt = receipt_of(result(compare(model, recording, CASE)), recording, (model, demo_f32))
        *_, (_, columns, rows) = tables(receipt)
        assert columns == ["layer", "stored as", "error"] and len(rows) == 10
        assert rows[0][:2] == [f"transformer.{DAMAGED}", "affine 8, 64"] and float(rows[0][2].split()[0]) > 10
        assert all(float(row[2].split()[0]) < 1 for row in rows[1:])
        assert receipt["summary"]["velocity"]["video"] > 0.03

    @pytest.mark.parametrize(
        ("file", "change", "said"),
        [
            ("ltx2.json", {"variant": "dev"}, "the variant is dev in the one and distilled in the other"),
            ("transformer/config.json", {"num_layers": 5}, "num_layers of the transformer is 5 in the one and 6 in"),
            ("video_vae/config.json", {"new": 1}, "new of the video_vae is 1 in the one and None in the other"),
        ],
    )
    def test_folders_of_different_models(
        self, demo_f32: Path, tmp_path: Path, file: str, change: dict[str, Any], said: str
    ) -> None:
        other = tmp_path / "other"
        shutil.copytree(demo_f32, other, copy_function=os.link)
        data = json.loads((other / file).read_text()) | change
        (other / file).unlink()  # it is the original's
        (other / file).write_text(json.dumps(data))
        with pytest.raises(InputError, match=f"cannot be compared with .*{said}.*quantized from"):
            compared(other, demo_f32)


@pytest.fixture
def seeds(recording: Recording, comparisons: dict[int, Comparison], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Runs are not made but known; their seeds are noted."""
    noted: list[int] = []

    def known(what: Recording | Comparison, case: Case) -> Generator[Event, None, Recording | Comparison]:
        noted.append(case.options["seed"])
        return what
        yield

    monkeypatch.setattr(quality, "record", lambda model, prompt, case, layers: known(recording, case))
    monkeypatch.setattr(quality, "compare", lambda model, recording, case: known(comparisons[8], case))
    return noted


class TestPrompts:
    def test_each_has_a_seed_of_its_own(self, quantized: dict[int, Path], seeds: list[int]) -> None:
        *events, last = run_quality(quantized[8], quantized[4], ["one", "two"], {**OPTIONS, "seed": 7})
        assert isinstance(last, Compared) and seeds == [7, 7, 8, 8] and len(events) == 4
        assert len(last.receipt["clips"]) == len(last.strips) == 2
        assert last.strips[0][0].shape == (quality.STRIP, 64, 64, 3)

    def test_models_are_not_compared_on_what_they_were_calibrated_with(self) -> None:
        prompts = quality.built_in_prompts()
        assert len(prompts) == 3 and not set(prompts) & set(calibrate.built_in_prompts())


class TestCommand:
    def test_tables_receipt_and_plot(
        self, here: Here, quantized: dict[int, Path], demo_f32: Path, seeds: list[int], tmp_path: Path
    ) -> None:
        (tmp_path / "p.txt").write_text(f"{PROMPT}\n")
        receipt, plot = tmp_path / "r.json", tmp_path / "r.png"
        done = here(
            "bench", "--quality", quantized[8], "--reference", demo_f32, *SIZE, "--prompts", tmp_path / "p.txt",
            "--seed", 3, "--no-audio", "--no-upscale", "--out", receipt, "--plot", plot,
        )  # fmt: skip
        assert (done.code, seeds) == (0, [3, 3])
        for text in ("text_encoder", "stage 1, step 2", "PSNR", "affine 8, 64", "one prompt"):
            assert text in done.out
        assert json.loads(receipt.read_text())["kind"] == "quality"
        assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and plot.stat().st_size > 20_000

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            (["--quality", "q"], "--quality needs --reference"),
            (["m", "--quality", "q", "--reference", "m"], "MODEL has no effect with --quality"),
            (["--quality", "q", "--reference", "m", "--repeat", "2"], "--repeat has no effect"),
            (["m", "--seed", "1"], "--seed has no effect without --quality"),
            (["m", "--reference", "r"], "--reference has no effect without --quality"),
        ],
    )
    def test_wrong_usage(self, here: Here, args: list[str], said: str) -> None:
        here("bench", *args).failed(2, said)

    def test_a_plot_needs_matplotlib_and_a_format(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(InputError, match=r"no known format .*\.png or \.svg"):
            check_plot(tmp_path / "plot.gif")
        check_plot(tmp_path / "plot.svg")
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(UnsupportedError, match="pip install matplotlib"):
            check_plot(tmp_path / "plot.svg")


def test_maps_by_block_and_kind() -> None:
    names = ["transformer_blocks.1.attn1.to_q", "transformer_blocks.0.attn1.to_q", "caption_projection.linear_1"]
    rows = [{"component": "transformer", "layer": name, "relative_error": i} for i, name in enumerate(names)]
    connectors = ["audio_connector.transformer_1d_blocks.1.ff.proj_in", "text_projection.aggregate_embed"]
    rows += [{"component": "connectors", "layer": name, "relative_error": 3} for name in connectors]
    assert error_maps(rows) == {
        "transformer": {"attn1.to_q": {1: 0, 0: 1}, "caption_projection.linear_1": {-1: 2}},
        "connectors": {"audio: ff.proj_in": {1: 3}, "text_projection.aggregate_embed": {-1: 3}},
    }
