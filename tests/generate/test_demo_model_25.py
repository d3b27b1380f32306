"""The trained 2.5 demo model against what Lightricks' own modules made of the same prompts and noise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

import ltx2
from ltx2.runtime.errors import InputError
from ltx2.runtime.generate.job import Job
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_network
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.sampling.conditioning import FirstFrame, Keyframe, Place
from ltx2.runtime.sampling.denoise import Denoiser, begin, denoise
from ltx2.runtime.sampling.latents import Segment
from ltx2.runtime.streams import Streams
from tests.support.followed import Note, check_followed, once_packed
from tests.support.golden import PROMPTS_25, golden_25
from tests.support.parity import relative_l2

SIZE: dict[str, Any] = {"width": 192, "height": 128, "frames": 25, "fps": 24.0}


def write_noise(path: Path, which: str) -> Path:
    """The golden file has noise as tokens; a noise file has latents."""
    tensors = {}
    for stream in ("video", "audio"):
        for stage in (1, 2):
            segment = Segment(stream, golden_25(f"{which}.stage{stage}.{stream}_latent").shape)
            tokens = golden_25(f"{which}.stage{stage}.{stream}").reshape(1, segment.tokens, -1)
            tensors[f"stage{stage}.{stream}"] = np.array(segment.from_tokens(mx.array(tokens)), order="C")
        segment = Segment(stream, golden_25(f"{which}.stage1.{stream}_latent").shape)
        rows = golden_25(f"{which}.ancestral.{stream}").reshape(7, 1, segment.tokens, -1)
        latents = [np.array(segment.from_tokens(mx.array(row))) for row in rows]
        tensors[f"ancestral.{stream}"] = np.ascontiguousarray(np.concatenate(latents))
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("which", ["a", "b"])
def test_pipeline_reproduces_the_reference_clip(
    demo_25: Path, figure: Callable[..., None], tmp_path: Path, which: str
) -> None:
    """Distilled two-stage with an ancestral first stage, and sound at 48 kHz."""
    noise = write_noise(tmp_path / "noise.safetensors", which)
    clip = ltx2.load(demo_25).generate(PROMPTS_25[which], noise=noise, **SIZE)
    for name in ("video", "audio"):
        error = relative_l2(clip.latents[name], golden_25(f"{which}.stage2.{name}_latent"))
        figure(f"golden 2.5 {which}: pipeline's final {name} latents, rel L2", error, limit=3e-4)
    levels = np.abs(clip.frames[::6].astype(int) - golden_25(f"{which}.frames").astype(int))
    figure(f"golden 2.5 {which}: frames, largest difference in levels", float(levels.max()), limit=1)
    assert clip.sample_rate == 48000
    figure(f"golden 2.5 {which}: sound, rel L2", relative_l2(clip.audio, golden_25(f"{which}.audio")), limit=1e-3)


def test_noise_files_hold_what_is_drawn(demo_25: Path, tmp_path: Path) -> None:
    noise = write_noise(tmp_path / "noise.safetensors", "a")
    with pytest.raises(InputError, match=r"has no tensor|holds .* which this run does not draw"):
        ltx2.load(demo_25).generate(PROMPTS_25["a"], noise=noise, pipeline="one-stage", steps=2, **SIZE)


class GoldenNoise:
    """The golden draws of case `c` by their names; the last tokens of its video draws are the appended picture's."""

    def __call__(self, name: str, shape: tuple[int, ...], row: int | None = None) -> mx.array:
        stage, _, what = name.partition(".")
        stream, segment = "audio" if what == "audio" else "video", Segment(what, shape)
        tokens = golden_25(f"c.{stage}.{stream}")
        tokens = tokens.reshape(1 if row is None else 7, -1, tokens.shape[-1])[row or 0][None]
        own = tokens[:, -segment.tokens :] if what == "keyframes" else tokens[:, : segment.tokens]
        return segment.from_tokens(mx.array(np.ascontiguousarray(own)))


def test_first_and_last_picture(demo_25: Path, figure: Callable[..., None]) -> None:
    """Both stages of case `c`, each from the reference's own latents: a picture in the first frame, one appended."""
    folder = ModelFolder.open(demo_25)
    job = Job(folder, Request.from_options({"prompt": PROMPTS_25["c"], **SIZE}))
    transformer = load_network(folder, "transformer", Transformer)
    contexts = {"text": Streams(*(mx.array(golden_25(f"a.{name}_context")) for name in ("video", "audio")))}
    upscaled = Streams(*(mx.array(golden_25(f"c.{n}_latent")) for n in ("upsampled.video", "stage1.audio")))
    noise = GoldenNoise()
    for number, size, start in ((1, "64x96", Streams[mx.array]()), (2, "128x192", upscaled)):
        place = Place(number, job.stage_grid(number), 24.0, job.scales)
        first, last = (mx.array(golden_25(f"c.picture{n}.latent_{size}")) for n in (0, 24))
        states = FirstFrame().apply(job.states(number, start), place, Streams(first))
        states = Keyframe(24).apply(states, place, Streams(last))
        denoiser, course = Denoiser(transformer, contexts, states), job.course(number)
        *_, step = denoise(denoiser, course, noise, begin(course, states, noise))
        for name, state in states.items():
            error = relative_l2(state.latents(step.x.get(name)), golden_25(f"c.stage{number}.{name}_latent"))
            figure(f"golden 2.5 c: stage {number} {name} with pictures, rel L2", error, limit=3e-4)


@pytest.fixture(scope="session")
def packed_25(demo_25: Path) -> Callable[[int], Path]:
    return once_packed(demo_25)


@pytest.mark.parametrize(("bits", "numbers"), [(8, range(1)), (4, range(2, 4))])
def test_prompts_are_followed_when_quantized(
    packed_25: Callable[[int], Path], bits: int, numbers: range, note: Note
) -> None:
    check_followed(packed_25(bits), numbers, 0, f"2.5 at {bits} bits", note)


@pytest.mark.prompts
@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("batch", range(4))
def test_as_many_prompts_are_followed_as_by_the_reference(
    packed_25: Callable[[int], Path], bits: int, batch: int, note: Note
) -> None:
    """Lightricks' modules follow 61 of 64, and 30 of 32 others (the demo's README)."""
    check_followed(packed_25(bits), range(16 * batch, 16 * (batch + 1)), 3, f"2.5 at {bits} bits", note)
