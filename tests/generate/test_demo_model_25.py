"""The trained 2.5 demo model against what Lightricks' own modules made of the same prompts and noise."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

import ltx2
from ltx2.runtime.errors import InputError
from ltx2.runtime.sampling.latents import Segment
from tests.support.golden import PROMPTS_25, golden_25
from tests.support.parity import relative_l2

SIZE = {"width": 192, "height": 128, "frames": 25, "fps": 24.0}


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
