"""The whole generation against diffusers' own pipelines, on random weights: prompt and noise in, picture and sound out.

Everything a user relies on meets here: tokens, text networks, two stages, upscaling, decoding and all that lies between
them, through the public interface."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ltx2
from tests.support.parity import relative_l2, require

if TYPE_CHECKING:
    from tests.support.reference_chain import Clip, ReferenceChain, Size

Figure = Callable[..., None]
PROMPT = "a yellow triangle moves up on a black background with a high tone"
STREAMS = ("video", "audio")


@pytest.fixture(scope="module")
def size() -> "Size":
    require("torch"), require("diffusers"), require("transformers")
    from tests.support.reference_chain import Size

    return Size(width=192, height=128, frames=17, fps=30.0)  # no two axes alike, no default rate


@pytest.fixture(scope="module")
def theirs(chain: "ReferenceChain", size: "Size") -> "Clip":
    return chain.generate(PROMPT, size, seed=3)


@pytest.fixture(scope="module")
def noise(theirs: "Clip", tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chain") / "noise.safetensors"
    save_file(theirs.noise, path)
    return path


def test_both_stages_and_what_they_decode_to(
    model: Path, size: "Size", theirs: "Clip", noise: Path, tmp_path: Path, figure: Figure
) -> None:
    embeddings = tmp_path / "embeddings.safetensors"
    clip = ltx2.load(model).generate(PROMPT, noise=noise, save_embeddings=embeddings, **vars(size))
    contexts = load_file(embeddings)
    for name in STREAMS:
        error = relative_l2(contexts[f"{name}_context"], theirs.contexts[name])
        figure(f"chain: {name} context, rel L2 vs diffusers", error, limit=1e-4)
    for name in STREAMS:
        error = relative_l2(clip.latents[name], theirs.latents[name])
        figure(f"chain: final {name} latents, rel L2 vs diffusers", error, limit=1e-3)
    frames = np.rint(255 * theirs.frames)
    assert clip.frames.shape == frames.shape == (17, 128, 192, 3) and frames.std() > 10
    levels = np.abs(clip.frames - frames)
    figure("chain: frames, share off by more than 1 level vs diffusers", float((levels > 1).mean()), limit=1e-3)
    assert clip.audio is not None and theirs.sound.std() > 1e-3
    figure("chain: sound, rel L2 vs diffusers", relative_l2(clip.audio, theirs.sound), limit=1e-3)


def test_first_stage_alone(model: Path, size: "Size", theirs: "Clip", tmp_path: Path, figure: Figure) -> None:
    """Without the upscaler the first stage runs at the size that is asked for."""
    small = vars(size) | {"width": size.width // 2, "height": size.height // 2}
    first = tmp_path / "noise.safetensors"
    save_file({name: value for name, value in theirs.noise.items() if name.startswith("stage1.")}, first)
    clip = ltx2.load(model).generate(PROMPT, noise=first, no_upscale=True, **small)
    for name in STREAMS:
        error = relative_l2(clip.latents[name], theirs.stage1[name])
        figure(f"chain: stage 1 {name} latents, rel L2 vs diffusers", error, limit=1e-3)
