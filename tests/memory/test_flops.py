"""Work counted from shapes: equal to what the networks execute, and to what is known of the published sizes."""

from collections import defaultdict
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from ltx2.bench.random.model import random_folder
from ltx2.bench.speed.run import PROMPT
from ltx2.runtime.events import PhaseStarted
from ltx2.runtime.generate.phases.order import count
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.memory.flops import (
    connect,
    decode_diffusion,
    decode_still,
    decode_video,
    denoise_step,
    encode_audio,
    encode_text,
    encode_video,
    linear,
    predict_length,
    vocode,
)
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.audio import bandwidth
from ltx2.runtime.networks.audio.vae import AudioAutoencoder
from ltx2.runtime.networks.load import load_network
from ltx2.runtime.networks.text.config import ConnectorsConfig, gemma_config
from ltx2.runtime.networks.text.connectors import EmbeddingsConnectors
from ltx2.runtime.networks.text.duration_head import DurationHead
from ltx2.runtime.networks.text.gemma import TextEncoder
from ltx2.runtime.networks.transformer.config import TransformerConfig
from ltx2.runtime.networks.video_vae.config import VideoVAEConfig
from ltx2.runtime.networks.video_vae.diffusion import build as build_diffusion
from ltx2.runtime.networks.video_vae.model import VideoAutoencoder
from tests.networks.test_diffusion_decoder import SHORT
from tests.networks.test_vocoder import EXTENDED
from tests.support.calls import states_of
from tests.support.media import noise_frames, write_frames

SIZES: dict[str, Any] = {"width": 128, "height": 64, "frames": 9}
STAGES = {"stage1": ((1, 2), 8), "stage2": ((2, 4), 3)}  # rows and columns of latents, steps
ALL_LINEAR = ("text_encoder", "connectors", "stage1", "stage2")  # what goes in and out is counted exactly


class Meter:
    """Counts what is executed, by phase: operations, and values in and out."""

    def __init__(self) -> None:
        self.flops: dict[str, int] = defaultdict(int)
        self.values: dict[str, int] = defaultdict(int)
        self.phase = ""

    def add(self, flops: int, *arrays: mx.array) -> None:
        self.flops[self.phase] += flops
        self.values[self.phase] += sum(array.size for array in arrays)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        linear, attention = nn.Linear.__call__, mx.fast.scaled_dot_product_attention

        def counted_linear(layer: nn.Linear, x: mx.array) -> mx.array:
            y = linear(layer, x)
            self.add(2 * x.size * y.shape[-1], x, y)
            return y

        def counted_attention(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
            y = attention(q, k, v, **options)
            self.add(4 * q.size * k.shape[2], q, k, v, y)
            return y

        patch.setattr(nn.Linear, "__call__", counted_linear)
        patch.setattr(mx.fast, "scaled_dot_product_attention", counted_attention)
        for name in ("conv1d", "conv2d", "conv3d"):
            patch.setattr(mx, name, self._convolution(getattr(mx, name)))

    def _convolution(self, convolve: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def counted(x: mx.array, weight: mx.array, *args: Any, **options: Any) -> mx.array:
            y = convolve(x, weight, *args, **options)
            self.add(2 * y.size * (weight.size // weight.shape[0]), x, y)
            return y

        return counted


@pytest.fixture(scope="module")
def measured(demo_f32: Path) -> Meter:
    """What generating a clip executes."""
    return watched(Pipeline(demo_f32))


def watched(pipeline: Pipeline, **options: Any) -> Meter:
    meter = Meter()
    with pytest.MonkeyPatch.context() as patch:
        meter.install(patch)
        for event in pipeline.stream(PROMPT, **SIZES, **options):
            if isinstance(event, PhaseStarted):
                meter.phase = event.name
    return meter


def test_as_executed(measured: Meter, demo_f32: Path) -> None:
    plan = Pipeline(demo_f32).plan(PROMPT, **SIZES)
    counted = {name: work.flops for name, work in count(plan.job).items()}
    executed = dict(measured.flops)
    # The vocoder executes more than there is to do: it pads signals, and the kernels of transposed convolutions.
    assert counted.pop("vocoder") == pytest.approx(executed.pop("vocoder"), rel=0.25)
    assert counted == executed


def test_previews_as_executed(measured: Meter, demo_f32: Path, tmp_path: Path) -> None:
    """Both stages have them; a third of what the decoder would take for the same frames, and less."""
    pipeline = Pipeline(demo_f32)
    meter, counted = watched(pipeline, preview=tmp_path), count(pipeline.plan(PROMPT, **SIZES, preview=tmp_path).job)
    assert {name: counted[name].flops for name in STAGES} == {name: meter.flops[name] for name in STAGES}
    config = VideoVAEConfig.from_dict(ModelFolder.open(demo_f32).config("video_vae"))
    for name, (size, steps) in STAGES.items():
        extra = meter.flops[name] - measured.flops[name]
        assert 0 < 3 * extra < steps * decode_video(config, (1, *size)).flops


def test_keyframes_as_executed(demo_f32: Path, tmp_path: Path) -> None:
    """Beside their noise level, of which the stage has one more."""
    picture = write_frames(tmp_path / "a.png", noise_frames(1))
    pipeline = Pipeline(demo_f32)
    options: dict[str, Any] = {"keyframe": [(picture, 0), (picture, 4)], "image_crf": 0}
    meter, counted = watched(pipeline, **options), count(pipeline.plan(PROMPT, **SIZES, **options).job)
    for name in STAGES:
        assert counted[name].flops == pytest.approx(meter.flops[name], rel=0.05)


@pytest.mark.parametrize("name", ["ltx-2-distilled", "ltx-2.5-distilled"])
def test_a_preview_costs_next_to_nothing(name: str) -> None:
    """Calculated, beside a step of 121 frames of 512x768 in either stage."""
    job = Pipeline(random_folder(name)).plan(PROMPT, width=768, height=512, frames=121).job
    transformer = TransformerConfig.from_dict(job.folder.config("transformer"))
    decoder = VideoVAEConfig.from_dict(job.folder.config("video_vae"))
    for number in job.numbers:
        grid = job.stage_grid(number)
        step = denoise_step(transformer, grid, job.preset.text_tokens)
        assert 0.001 < decode_still(decoder, (grid.height, grid.width)).flops / step.flops < 0.003


def test_the_text_of_other_releases(model_25: Path) -> None:
    """Gemma 4, connectors with gates and own widths, and the duration head; networks alone."""
    folder, meter = ModelFolder.open(model_25), Meter()
    encoder = load_network(folder, "text_encoder", TextEncoder)
    connectors = load_network(folder, "connectors", EmbeddingsConnectors)
    head = load_network(folder, "duration_head", DurationHead)
    ids, mask = mx.ones((1, 20), mx.int32), (mx.arange(128) >= 108)[None].astype(mx.int32)
    with pytest.MonkeyPatch.context() as patch:
        meter.install(patch)
        meter.phase = "text_encoder"
        states = list(states_of(encoder, ids, mx.ones_like(ids)))
        meter.phase = "connectors"
        contexts = connectors(states, mask)
        meter.phase = "duration_head"
        head.seconds(contexts)
    # The head's attention multiplies with one matrix for queries, keys and values, which is no layer.
    for tokens in (1, 2 * 128, 2 * 128):
        meter.flops["duration_head"] += linear(tokens, 64, 64).flops
        meter.values["duration_head"] += linear(tokens, 64, 64).values
    counted = {
        "text_encoder": encode_text(gemma_config(folder.config("text_encoder")), 20),
        "connectors": connect(ConnectorsConfig.from_dict(folder.config("connectors")), 20, 128),
        "duration_head": predict_length(head.config, 128),
    }
    assert {name: work.flops for name, work in counted.items()} == meter.flops
    assert {name: work.values for name, work in counted.items()} == meter.values


def test_bandwidth_extension_as_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    meter, network = Meter(), bandwidth.build(EXTENDED)
    meter.install(monkeypatch)
    mx.eval(network(mx.zeros((1, 2, 40, 64))))
    work = vocode(network.config, 40)
    assert (meter.flops[""], meter.values[""]) == pytest.approx((work.flops, work.values), rel=0.05)


def test_encoding_sound_as_executed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meter, network = Meter(), load_network(ModelFolder.open(model), "audio_vae", AudioAutoencoder)
    meter.install(monkeypatch)
    mx.eval(network.encode(mx.zeros((1, 2, 16000))))
    work = encode_audio(network.config, 16000)
    assert meter.flops[""] == work.flops
    assert meter.values[""] == pytest.approx(work.values, rel=0.1)  # beside the borders


def test_encoding_pictures_as_executed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meter, network = Meter(), load_network(ModelFolder.open(model), "video_vae", VideoAutoencoder)
    meter.install(monkeypatch)
    mx.eval(network.encode(mx.zeros((1, 3, 9, 64, 64))))
    assert meter.flops[""] == encode_video(network.config, (9, 64, 64)).flops


def test_values_moved(measured: Meter, demo_f32: Path) -> None:
    """Bytes beside the weights."""
    plan = Pipeline(demo_f32).plan(PROMPT, **SIZES)
    work = count(plan.job)
    weights = {need.name: need.weights for need in plan.needs}
    steps = {f"stage{number}": plan.job.course(number).steps for number in plan.job.numbers}
    (file,) = plan.job.folder.tensor_files("transformer")
    once = sum(tensor.nbytes for name, tensor in file.tensors.items() if "attn2.to_k" in name or "attn2.to_v" in name)
    for phase in ALL_LINEAR[1:]:
        count_of = steps.get(phase, 1)
        moved = count_of * weights[phase] - (count_of - 1) * once
        assert work[phase].bytes == 4 * measured.values[phase] + moved, phase
    assert work["text_encoder"].bytes > 4 * measured.values["text_encoder"]


def test_known_totals() -> None:
    """A step of 121 frames of 512x768, in TFLOP; known of a model whose blocks have a few gates more."""
    plan = Pipeline(random_folder("ltx-2-distilled")).plan(PROMPT, width=768, height=512, frames=121)
    config = TransformerConfig.from_dict(plan.job.folder.config("transformer"))
    for number, known in zip(plan.job.numbers, (48.0, 198.9), strict=True):
        step = denoise_step(config, plan.job.stage_grid(number), plan.job.preset.text_tokens)
        assert step.flops / 1e12 == pytest.approx(known, rel=2e-3)


def test_given_latents_and_no_sound(demo_f32: Path) -> None:
    """Only what runs is counted."""
    pipeline = Pipeline(demo_f32)
    assert list(count(pipeline.plan(PROMPT, no_audio=True, no_upscale=True, **SIZES).job)) == [
        "text_encoder", "connectors", "stage1", "video_vae",
    ]  # fmt: skip


def test_diffusion_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers as executed; of attention, which gathers more keys than are seen, the windows."""
    vae, meter, latents = build_diffusion(SHORT), Meter(), (4, 4, 5)
    attention = mx.fast.scaled_dot_product_attention
    meter.install(monkeypatch)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    for _ in vae.decode_frames(mx.zeros((1, 8, *latents)), mx.zeros(vae.config.canvas(latents)), steps=2):
        pass
    *stages, last = vae.config.stages(latents)
    windows = [(s.depth, s.positions * prod(s.kernel) * s.channels) for s in (*stages, last, last)]
    scores = sum(4 * depth * size for depth, size in windows)
    assert decode_diffusion(vae.config, latents, steps=2).flops == meter.flops[""] + scores
