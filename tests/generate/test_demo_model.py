"""The embedded demo model: reference outputs of Lightricks' own modules, and prompts that must be followed.

If the architecture is implemented correctly a clip shows what its prompt says; most mistakes destroy it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

import ltx2
from ltx2.bench.quality.classify import classify
from ltx2.bench.quality.demo_prompts import random_prompts
from ltx2.runtime.generate.job import Job
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_network
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.networks.upsampler import LatentUpsampler
from ltx2.runtime.networks.video_vae.model import VideoAutoencoder
from ltx2.runtime.sampling.latents import audio_positions, video_positions
from ltx2.runtime.streams import Streams
from tests.support.calls import inputs
from tests.support.golden import PROMPTS, golden
from tests.support.parity import relative_l2
from tests.support.sampling import sampled

SIZE: dict[str, Any] = {"width": 192, "height": 128, "frames": 25}
Note = Callable[[str], None]


@pytest.fixture(scope="session")
def demo_quantized(demo_f32: Path) -> dict[int, Path]:
    """The float32 model at 8 and 4 bits."""
    folders = {bits: demo_f32.with_name(f"q{bits}") for bits in (8, 4)}
    for bits, folder in folders.items():
        ltx2.quantize(demo_f32, folder, bits=bits)
    return folders


@pytest.mark.parametrize("which", ["a", "b"])
def test_networks_reproduce_the_reference(demo_f32: Path, figure: Callable[..., None], which: str) -> None:
    """One transformer call, stage 1, the upscaler and stage 2, each from the reference's own inputs."""
    folder = ModelFolder.open(demo_f32)
    job = Job(folder, Request.from_options({"prompt": PROMPTS[which], **SIZE}))

    def want(name: str) -> mx.array:
        return mx.array(golden(f"{which}.{name}"))

    transformer = load_network(folder, "transformer", Transformer)
    contexts = Streams(want("video_context"), want("audio_context"))
    stage1, stage2 = (job.course(number).sigmas for number in job.numbers)
    grid1, grid2 = (job.stage_grid(number) for number in job.numbers)

    noise = Streams(want("stage1.video"), want("stage1.audio"))
    tokens = grid1.segments.zip(noise).map(lambda pair: pair[0].to_tokens(pair[1]))
    positions = Streams(video_positions(grid1, 24.0, job.scales), audio_positions(grid1, job.scales))
    call = inputs(transformer, tokens, contexts, positions, 0.725)
    for name, value in transformer(call).items():
        error = relative_l2(value, want(f"velocity_at_0.725.{name}"))
        figure(f"golden {which}: velocity {name}, rel L2", error, limit=1e-4)

    *_, done = sampled(transformer, grid1, contexts, stage1, noise)
    for name, value in done.items():
        error = relative_l2(value, want(f"stage1.{name}_latent"))
        figure(f"golden {which}: stage 1 {name}, rel L2", error, limit=1e-3)

    statistics = load_network(folder, "video_vae", VideoAutoencoder).per_channel_statistics
    upscaler = load_network(folder, "spatial_upscaler", LatentUpsampler)
    upscaled = statistics.normalise(upscaler(statistics.unnormalise(want("stage1.video_latent"))))
    figure(f"golden {which}: upscaler, rel L2", relative_l2(upscaled, want("upsampled.video_latent")), limit=1e-4)

    start = Streams(want("upsampled.video_latent"), want("stage1.audio_latent"))
    noise = Streams(want("stage2.video"), want("stage2.audio"))
    *_, done = sampled(transformer, grid2, contexts, stage2, noise, start)
    for name, value in done.items():
        error = relative_l2(value, want(f"stage2.{name}_latent"))
        figure(f"golden {which}: stage 2 {name}, rel L2", error, limit=1e-3)


@pytest.mark.parametrize("which", ["a", "b"])
def test_pipeline_reproduces_the_reference_clip(
    demo_f32: Path, figure: Callable[..., None], tmp_path: Path, which: str
) -> None:
    """Prompt and injected noise in, latents, frames and sound out, through the public interface."""
    noise = tmp_path / "noise.safetensors"
    save_file({f"stage{n}.{s}": golden(f"{which}.stage{n}.{s}") for n in (1, 2) for s in ("video", "audio")}, noise)
    clip = ltx2.load(demo_f32).generate(PROMPTS[which], noise=str(noise), **SIZE)
    for name in ("video", "audio"):
        error = relative_l2(clip.latents[name], golden(f"{which}.stage2.{name}_latent"))
        figure(f"golden {which}: pipeline's final {name} latents, rel L2", error, limit=1e-3)
    frames = golden(f"{which}.frames")
    assert clip.frames.shape == frames.shape and clip.frames.dtype == np.uint8
    levels = np.abs(clip.frames.astype(int) - frames.astype(int))
    figure(f"golden {which}: frames, share off by more than 1 level", float((levels > 1).mean()), limit=1e-4)
    audio = golden(f"{which}.audio")
    assert (clip.sample_rate, clip.fps) == (24000, 24.0)
    figure(f"golden {which}: sound, rel L2", relative_l2(clip.audio, audio), limit=1e-3)


BATCH = 6  # prompts a test makes clips of; several tests keep all cores busy
# Lightricks' modules follow 61 of 64 prompts (ltx2/demo/README.md), and every miss of theirs is a shape.
LEAST = 5


def check_followed(model: Path, batch: int, name: str, note: Note, **options: Any) -> None:
    """Clips of one batch of prompts show all five attributes; one of them may not."""
    prompts = list(enumerate(random_prompts(24)))[batch * BATCH : (batch + 1) * BATCH]
    assert count_followed(model, prompts, name, note, **options) >= LEAST


def count_followed(model: Path, prompts: list[tuple[int, Any]], name: str, note: Note, **options: Any) -> int:
    """Of prompts with their seeds, how many the clips show."""
    pipeline, misses = Pipeline(model), []
    for seed, prompt in prompts:
        clip = pipeline.generate(prompt.text, seed=seed, **SIZE, **options)
        seen = classify(clip.frames, clip.audio, clip.sample_rate)
        wrong = {name: seen[name] for name, value in prompt.want.items() if seen[name] != value}
        if wrong:
            misses.append(f"{prompt.text}: {wrong}")
    right = len(prompts) - len(misses)
    note(f"demo prompts followed, {name}: {right} of {len(prompts)} {misses}")
    return right


@pytest.mark.parametrize("batch", range(4))
def test_24_prompts_are_followed(demo_f32: Path, batch: int, note: Note) -> None:
    check_followed(demo_f32, batch, "float32", note)


@pytest.mark.parametrize(("bits", "batch"), [(8, 0), (8, 1), (4, 2)])
def test_prompts_are_followed_when_quantized(
    demo_quantized: dict[int, Path], bits: int, batch: int, note: Note
) -> None:
    check_followed(demo_quantized[bits], batch, f"{bits} bits", note)


# Guided by the text alone, as the demo model was trained.
AS_DEV: dict[str, Any] = {
    "pipeline": "one-stage", "cfg": 3, "stg": 0, "modality_scale": 1, "audio_cfg": 3, "audio_stg": 0,
    "audio_modality_scale": 1,
}  # fmt: skip


@pytest.mark.fuzz
@pytest.mark.parametrize("batch", range(4))
def test_24_prompts_are_followed_when_guided(demo_dev: Path, batch: int, note: Note) -> None:
    """In 30 steps; as often as without guidance."""
    check_followed(demo_dev, batch, "guided, 30 steps", note, steps=30, **AS_DEV)


def test_prompts_are_followed_when_guided(demo_dev: Path, note: Note) -> None:
    """Three of them, in few steps."""
    prompts = list(enumerate(random_prompts(24)))[:3]
    assert count_followed(demo_dev, prompts, "guided, 8 steps", note, steps=8, **AS_DEV) == 3
