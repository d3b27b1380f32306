"""The memory plan: against measured peaks, what it chooses under a limit, and what it says where nothing fits."""

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from ltx2.bench.random.model import random_folder
from ltx2.runtime.errors import DoesNotFitError, UsageError
from ltx2.runtime.events import PhaseDone, StepDone
from ltx2.runtime.generate import job
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.generate.planning import MemoryPlan
from ltx2.runtime.layers.attention import FeedForward
from ltx2.runtime.layers.packed import choose_products, quantize_like
from ltx2.runtime.media.video import encoding_memory
from ltx2.runtime.memory import activations
from ltx2.runtime.memory.activations import Activations
from ltx2.runtime.memory.plan import COMMAND_BUFFER, PhasePlan
from ltx2.runtime.model.forms import Form, Quantization
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.audio.config import AudioVAEConfig
from ltx2.runtime.networks.audio.vocoder import VocoderConfig
from ltx2.runtime.networks.load import check_network
from ltx2.runtime.networks.text.config import ConnectorsConfig, Gemma3Config
from ltx2.runtime.networks.transformer.config import TransformerConfig
from ltx2.runtime.networks.upsampler import UpsamplerConfig
from ltx2.runtime.networks.video_vae.config import VideoVAEConfig
from ltx2.runtime.networks.video_vae.tiles import Tiles, Tiling, tilings
from ltx2.runtime.sampling.latents import Grid
from tests.support.command import Here
from tests.support.machine import gpu_of, memory_of
from tests.support.memory import peak_of, settled, waiting
from tests.support.official import DEMO
from tests.support.sparse_model import write_sparse_model

ROOT = Path(__file__).parent.parent.parent
PUBLISHED = random_folder("ltx-2-distilled")
RECEIPTS = sorted((ROOT / "bench" / "results").glob("memory-*.json"))
ROWS: list[dict[str, Any]] = [row for path in RECEIPTS for row in json.loads(path.read_text())["results"]]
CASE = ("case", "bits", "latent", "tiling", "audio_latents", "tokens", "limit_bytes")
EMBEDDING, LAYER = 2 * 3840 * (262208 + 1), 445_000_000  # bytes of the text encoder's
GB = 10**9
SLACK = 10**6 / 2
PROMPT = "a red square"
TOKENIZER = next(path for path in DEMO if path.is_dir())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Pipeline]:
    """The published networks at some bits, without weights."""
    opened: dict[int, Pipeline] = {}

    def at(bits: int) -> Pipeline:
        if bits not in opened:
            folder = tmp_path_factory.mktemp("sparse") / f"q{bits}"
            opened[bits] = Pipeline(write_sparse_model(folder, TOKENIZER, bits))
        return opened[bits]

    return at


@pytest.fixture(autouse=True)
def computer(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A GPU, and how many GB it has; 100 unless a test says otherwise."""

    gpu_of(monkeypatch, 100)
    return lambda size: gpu_of(monkeypatch, size)


def refusal(plan: MemoryPlan) -> DoesNotFitError:
    with pytest.raises(DoesNotFitError) as caught:
        plan.check()
    return caught.value


def test_evaluates_nothing(model: Callable[[int], Pipeline]) -> None:
    pipeline = model(16)
    assert peak_of(lambda: pipeline.plan(PROMPT)) < 1 << 20


def test_rotated_inputs() -> None:
    """A feed-forward network that rotates what it is given, against one that does not."""
    published = TransformerConfig.from_dict(PUBLISHED.config("transformer"))
    config = replace(published, num_attention_heads=4, attention_head_dim=64)

    def peak(rotation: int) -> int:
        network = FeedForward(256, bias=False)
        form = Form(8, 64, rotation=rotation)
        quantize_like(network, Quantization(form), {f"proj_{end}.weight_scale": () for end in ("in", "out")})
        choose_products(network, "dequantized")
        x = mx.zeros((1, 4096, 256))
        mx.eval(network, x, network(x))
        return min(peak_of(lambda: mx.eval(network(x))) for _ in range(5))  # arrays are free sooner or later

    assert peak(64) - peak(0) == pytest.approx(activations.rotated(config, 4096, 4), rel=0.1)


@pytest.fixture(scope="class")
def checked_once() -> Iterator[None]:
    """The published networks are built and compared with their files for one plan, not again for each."""
    checked: dict[tuple[Path, str], nn.Module] = {}

    def check(folder: ModelFolder, component: str) -> nn.Module:
        key = folder.path, component
        return checked[key] if key in checked else checked.setdefault(key, check_network(folder, component))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "check_network", check)
        yield


@pytest.mark.usefixtures("checked_once")
class TestPlan:
    def test_phases_are_the_pipelines(self, model: Callable[[int], Pipeline]) -> None:
        names = [phase.name for phase in model(16).plan(PROMPT).phases]
        stages = ["stage1", "spatial_upscaler", "stage2"]
        assert names == ["text_encoder", "connectors", *stages, "audio_vae", "vocoder", "video_vae"]
        names = [phase.name for phase in model(16).plan(PROMPT, no_upscale=True, no_audio=True).phases]
        assert names == ["text_encoder", "connectors", "stage1", "video_vae"]

    def test_weights_are_those_in_use(self, model: Callable[[int], Pipeline]) -> None:
        """The text encoder is streamed: its embedding is the largest part. Encoders are not read."""
        plan = model(16).plan(PROMPT)
        weights = {phase.name: phase.weights for phase in plan.phases}
        assert weights["text_encoder"] == 2 * 262208 * 3840 + 2 * 3840
        assert weights["stage1"] == weights["stage2"] == 37_758_861_824
        assert weights["video_vae"] == 1_056_761_440

    def test_total_is_what_phases_take(self, model: Callable[[int], Pipeline]) -> None:
        plan = model(4).plan(PROMPT)
        for phase in plan.phases:
            assert phase.total == phase.weights + phase.activations + phase.clip + phase.kept
        assert plan.peak == max(phase.total for phase in plan.phases)
        clip = 121 * 512 * 768 * 3
        assert [p.clip for p in plan.phases] == [0] * 7 + [clip]

    def test_a_clip_that_is_written_takes_what_its_encoder_does(self, model: Callable[[int], Pipeline]) -> None:
        """As much for any number of frames."""
        short, long = (model(4).plan(PROMPT, frames=frames, output="clip.mp4").phases for frames in (121, 241))
        assert short[-1].clip == long[-1].clip == encoding_memory(768, 512) < 241 * 512 * 768 * 3

    @pytest.mark.parametrize("changes", [{"frames": 241}, {"width": 1280}, {"height": 1024}])
    def test_larger_clips_take_more(self, model: Callable[[int], Pipeline], changes: dict[str, Any]) -> None:
        """But for text, the sound of pictures, and the video's tiles, which are of one size."""
        same = {"text_encoder", "connectors", *(() if "frames" in changes else ("audio_vae", "vocoder"))}
        small, large = model(4).plan(PROMPT).phases, model(4).plan(PROMPT, **changes).phases
        for less, more in zip(small, large, strict=True):
            if less.name != "video_vae":
                assert (more.activations > less.activations) == (less.name not in same), less.name


@pytest.mark.usefixtures("checked_once")
class TestLimit:
    def test_default_is_what_the_machine_has(
        self, model: Callable[[int], Pipeline], computer: Callable[[float], None]
    ) -> None:
        computer(40)
        assert model(16).plan(PROMPT).limit == 40 * GB
        computer(2)
        error = refusal(model(16).plan(PROMPT))
        assert error.what == "`connectors` does not fit in memory" and "this computer has 2.0 GB" in error.why
        assert "ltx2 quantize" in error.fix and "--bits 4" in error.fix

    def test_blocks_make_way(self, model: Callable[[int], Pipeline]) -> None:
        """As few as will do; the plan says what that costs, and everything else runs as it does without a limit."""
        free, tight = model(4).plan(PROMPT), model(4).plan(PROMPT, memory_limit=11.0)
        assert free.fits and tight.fits and tight.peak <= 11 * GB < free.peak
        for usual, stage in ((p, tight.phase(p.name)) for p in free.phases if p.name.startswith("stage")):
            assert stage.activations == usual.activations and not stage.held_back and not usual.streamed
            assert 0 < len(stage.streamed) < 48 and stage.weights < usual.weights
            block = stage.read // len(stage.streamed)
            assert 11 * GB - stage.total < block, "one more block would not fit"
            assert stage.weights == usual.weights - stage.read + 2 * block
        (said,) = tight.warnings()
        assert "2.0 GB in every step of stage1 and 2.6 GB in every step of stage2" in said, said
        assert not list(free.warnings())

    def test_a_transformer_larger_than_memory(self, model: Callable[[int], Pipeline]) -> None:
        """19B in 16 bits, 37.8 GB."""
        plan = model(16).plan(PROMPT, memory_limit=8.0)
        assert plan.fits and plan.phase("stage2").read > 30 * GB

    def test_the_transformer_waits_for_the_gpu_before_anything_is_refused(
        self, model: Callable[[int], Pipeline]
    ) -> None:
        plan = model(4).plan(PROMPT, width=1920, height=1088, memory_limit=4.2)
        stage = plan.phase("stage2")
        assert stage.held_back and len(stage.streamed) == 48 and stage.total <= 4.2 * GB

    def test_tiles_become_smaller(self, model: Callable[[int], Pipeline]) -> None:
        size: dict[str, Any] = {"width": 1280, "height": 704}
        free, tight = (model(4).plan(PROMPT, memory_limit=limit, **size) for limit in (7.0, 3.05))
        assert free.tiling is not None and tight.tiling is not None and tight.tiling.height < free.tiling.height
        assert tight.phase("video_vae").total <= 3.05 * GB < free.phase("video_vae").total

    def test_one_piece_where_the_transformer_takes_as_much(self, model: Callable[[int], Pipeline]) -> None:
        """And where kernels can index it."""
        plan = model(4).plan(PROMPT)
        assert plan.tiling is None and plan.phase("video_vae").total < plan.phase("stage1").weights
        assert model(4).plan(PROMPT, memory_limit=4.0).tiling is not None
        large: dict[str, Any] = {"width": 1280, "height": 704, "frames": 241}
        assert model(4).plan(PROMPT, **large).tiling is not None and model(16).plan(PROMPT, **large).tiling is None
        assert model(16).plan(PROMPT, width=1920, height=1088, frames=241).tiling is not None

    def test_tilings_take_less_and_less(self) -> None:
        config = video_config()
        for latents in [(16, 16, 24), (61, 32, 18), (16, 34, 60)]:
            sizes = [
                activations.decode_video(config, Tiles(latents, tiling, config), 2, False).needed
                for tiling in tilings(config, latents)
            ]
            assert sizes == sorted(sizes, reverse=True) and len(sizes) > 4

    def test_low_memory_is_the_least(self, model: Callable[[int], Pipeline]) -> None:
        """Of the hungriest phase, here the connectors, which are not streamed; the others use what that one takes."""
        usual, low = model(4).plan(PROMPT), model(4).plan(PROMPT, low_memory=True)
        for phase, least in zip(usual.phases, low.phases, strict=True):
            assert least.total <= phase.total and least.cache == 0
        assert low.peak == low.phase("connectors").total < 0.25 * usual.peak
        assert not low.phase("stage1").held_back and 40 < len(low.phase("stage1").streamed) < 48
        assert len(low.phase("stage2").streamed) == 48
        assert not model(4).plan(PROMPT, memory_limit=low.peak / GB - 0.001).fits
        assert model(4).plan(PROMPT, memory_limit=low.peak / GB + 0.001).fits

    @pytest.mark.parametrize("memory", [24, 64, 512])
    def test_freed_buffers_hardly_raise_the_peak(
        self, model: Callable[[int], Pipeline], monkeypatch: pytest.MonkeyPatch, memory: int
    ) -> None:
        """However much memory there is."""
        memory_of(monkeypatch, memory)
        plan = model(4).plan(PROMPT)
        assert all(phase.total + phase.cache < 1.07 * plan.peak for phase in plan.phases)
        assert all(phase.cache or phase.beside for phase in plan.phases), "each may keep some"

    def test_nearest_sizes(self, model: Callable[[int], Pipeline]) -> None:
        """What is suggested fits; one step more does not."""
        options: dict[str, Any] = {"width": 1920, "height": 1088, "frames": 241, "memory_limit": 4.5}
        error = refusal(model(4).plan(PROMPT, **options))
        assert error.what == "241 frames of 1920x1088 do not fit in memory" and "the limit is 4.5 GB" in error.why
        found = re.fullmatch(r"use --frames (\d+), or --width (\d+) --height (\d+)", error.fix)
        assert found is not None, error.fix
        frames, width, height = map(int, found.groups())
        assert model(4).plan(PROMPT, **options | {"frames": frames}).fits
        assert not model(4).plan(PROMPT, **options | {"frames": frames + 8}).fits
        assert model(4).plan(PROMPT, **options | {"width": width, "height": height}).fits
        assert abs(height / width - 1088 / 1920) < 0.05
        assert not model(4).plan(PROMPT, **options | {"width": width + 64, "height": height + 64}).fits

    def test_weights_that_are_packed_already(self, model: Callable[[int], Pipeline]) -> None:
        assert "fewer --bits" in refusal(model(4).plan(PROMPT, memory_limit=2.0)).fix

    @pytest.mark.parametrize("limit", [0, -1, float("inf"), float("nan")])
    def test_limits_that_are_none(self, model: Callable[[int], Pipeline], limit: float) -> None:
        with pytest.raises(UsageError, match="--memory-limit"):
            model(4).plan(PROMPT, memory_limit=limit)


class TestCommand:
    def test_dry_run(self, generate: Here, tmp_path: Path) -> None:
        done = generate(PROMPT, "--dry-run", "--json")
        plan = done.json["plan"]
        assert plan["fits"] and plan["peak"] == max(phase["total"] for phase in plan["phases"])
        assert (plan["width"], plan["height"], plan["frames"]) == (64, 64, 9)
        shown = generate(PROMPT, "--dry-run")
        assert shown.code == 0 and "\nfits: " in shown.out and shown.err == ""
        assert all(phase["name"] in shown.out for phase in plan["phases"])
        assert generate(PROMPT, "--dry-run", "-q").out == ""
        assert list(tmp_path.iterdir()) == []

    def test_dry_run_of_what_does_not_fit(self, generate: Here, tmp_path: Path) -> None:
        args = [PROMPT, "--dry-run", "--memory-limit", "0.012"]
        done = generate(*args)
        assert done.code == 3 and "video_vae" in done.out and "do not fit" in done.err
        assert generate(*args, "--json").json["error"]["kind"] == "does-not-fit"
        assert generate(PROMPT, "--memory-limit", "0.012").code == 3
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.usefixtures("small_runs")
    def test_mlx_is_held_to_the_plan(self, demo_f32: Path) -> None:
        """In every phase, and let go after it."""
        options: dict[str, Any] = {"width": 64, "height": 64, "frames": 9, "memory_limit": 0.4}
        pipeline, before, held = Pipeline(demo_f32), memory_limit(), dict[str, int]()
        for event in pipeline.stream(PROMPT, **options):
            if isinstance(event, StepDone):
                held[event.phase] = memory_limit()
            elif isinstance(event, PhaseDone):
                assert memory_limit() == before
        planned = {p.name: p.total - p.clip + p.cache for p in pipeline.plan(PROMPT, **options).phases}
        assert held == planned and max(planned.values()) <= 0.4 * GB

    @pytest.mark.usefixtures("small_runs")
    def test_a_limit_beyond_the_machine_is_said(self, generate: Here, monkeypatch: pytest.MonkeyPatch) -> None:
        memory_of(monkeypatch, 2)
        done = generate(PROMPT, "--memory-limit", "3")
        assert done.code == 0 and "warning: --memory-limit 3 is more than the 2.0 GB there are" in done.err

    @pytest.mark.usefixtures("small_runs")
    def test_low_memory_makes_the_same_clip(self, generate: Here, tmp_path: Path) -> None:
        plain = (PROMPT, "--no-metadata")
        assert generate(*plain).code == 0 and generate(*plain, "--low-memory", to="low.mp4").code == 0
        assert (tmp_path / "clip.mp4").read_bytes() == (tmp_path / "low.mp4").read_bytes(), "one tile covers it"


@pytest.mark.parametrize(("wirable", "wired"), [(1000, 125), (110, 110), (None, 0)])
def test_what_stays_is_wired(monkeypatch: pytest.MonkeyPatch, wirable: int | None, wired: int) -> None:
    """Weights, and what is kept beside them, as far as a Mac's GPU may hold them; for one phase."""
    limits = [3]

    def limit(value: int) -> int:
        limits.append(value)
        return limits[-2]

    facts = {} if wirable is None else {"max_recommended_working_set_size": wirable}
    monkeypatch.setattr(mx, "device_info", lambda: facts)
    monkeypatch.setattr(mx, "set_wired_limit", limit)
    with PhasePlan("stage1", weights=100, activations=50, clip=7, cache=10, held_back=0, beside=20, text=5).applied():
        assert limits[-1] == wired
    assert limits[-1] == 3


def memory_limit() -> int:
    """What MLX is held to now."""
    limit = mx.set_memory_limit(1 << 40)
    mx.set_memory_limit(limit)
    return limit


def video_config() -> VideoVAEConfig:
    return VideoVAEConfig.from_dict(PUBLISHED.config("video_vae"))


def planned(row: dict[str, Any]) -> Activations:
    """What the plan says of a measured case."""
    case, audio, tokens = row["case"], row.get("audio_latents", 1), row.get("tokens", 0)
    frames, height, width = row.get("latent", (1, 1, 1))
    grid = Grid(128, frames, height, width, 8, audio)
    if case == "video decode":
        tiling, config = Tiling(*row["tiling"]) if row["tiling"] else None, video_config()
        return activations.decode_video(config, Tiles((frames, height, width), tiling, config), 2, False)
    if case == "denoise step":
        return activations.denoise_step(TransformerConfig.from_dict(PUBLISHED.config("transformer")), grid, 1024, 2)
    if case == "upscaler":
        return activations.upscale(UpsamplerConfig.from_dict(PUBLISHED.config("spatial_upscaler")), grid, 2)
    if case == "audio decode":
        return activations.decode_audio(AudioVAEConfig.from_dict(PUBLISHED.config("audio_vae")), audio)
    if case == "vocoder":
        return activations.vocode(VocoderConfig.from_dict(PUBLISHED.config("vocoder")), 4 * audio)
    if case == "connectors":
        return activations.connectors(ConnectorsConfig.from_dict(PUBLISHED.config("connectors")), tokens, 1024, 2)
    assert case == "text encoder"
    found = activations.text_encoder(
        Gemma3Config.from_dict(PUBLISHED.config("text_encoder")), LAYER, EMBEDDING, tokens, 2
    )
    return replace(found, needed=found.needed + EMBEDDING)  # its weights are read while it is measured


def name(row: dict[str, Any]) -> str:
    return " ".join(str(row[key]) for key in CASE if row.get(key) is not None).replace(" ", "-")


class TestMeasured:
    """Receipts of one GPU: peaks of MLX with all networks at their published sizes. First calls also compile."""

    @pytest.mark.parametrize("row", [row for row in ROWS if row["limit_bytes"] is None], ids=name)
    def test_at_full_speed(self, row: dict[str, Any], note: Callable[[str], None]) -> None:
        """Never more than 5 % below, at most 10 % above."""
        peak = max(row["peak_bytes"][1:])
        above = row["weight_bytes"] + planned(row).full - peak
        note(f"memory plan of {name(row)}: {peak / GB:.2f} GB measured, {100 * above / peak:+.1f} %")
        assert -0.05 * peak <= above <= 0.10 * peak

    @pytest.mark.parametrize("row", [row for row in ROWS if row["limit_bytes"] is not None], ids=name)
    def test_under_a_limit(self, row: dict[str, Any]) -> None:
        """MLX passes its limit by what the plan allows for, or takes what is needed at least. Arrays are free sooner
        or later, calls of the vocoder differ by a fifth: the least of them counts."""
        plan, peak = planned(row), min(row["peak_bytes"][1:])
        passed = row["limit_bytes"] + plan.largest + COMMAND_BUFFER
        assert peak <= 1.05 * max(passed, row["weight_bytes"] + plan.needed)

    def test_all_networks_are_measured(self) -> None:
        phases = {"text encoder", "connectors", "denoise step", "upscaler", "video decode", "audio decode", "vocoder"}
        assert {row["case"] for row in ROWS} == phases
        assert {row["bits"] for row in ROWS if row["case"] == "denoise step"} == {4, 8, 16}

    @pytest.mark.parametrize("waits", [True, False])
    def test_on_a_cpu(self, demo_f32: Path, monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
        """Every phase of the demo model, on this computer: what is needed, when MLX waits for every operation; and at
        full speed the most it may be, since nobody knows how far ahead of the device the program runs. Half a megabyte
        is let pass: its networks are tiny."""
        monkeypatch.undo()
        options: dict[str, Any] = {"width": 64, "height": 64, "frames": 17}
        pipeline = Pipeline(demo_f32)
        plan = pipeline.plan(PROMPT, **options)
        before = settled()
        with waiting() if waits else nullcontext():
            if waits:
                monkeypatch.setattr(mx, "set_memory_limit", lambda limit: 0)
            done = [event for event in pipeline.stream(PROMPT, **options) if isinstance(event, PhaseDone)]
            monkeypatch.undo()
        for phase, need in zip(done, plan.needs, strict=True):
            measured = phase.mlx_peak_bytes - before
            used = need.activations.needed if waits else need.activations.full
            above = need.weights + used + plan.phase(phase.name).kept - measured
            most = 0.25 * measured if waits else math.inf
            assert -0.05 * measured - SLACK <= above <= most + SLACK, (phase.name, measured, above)
