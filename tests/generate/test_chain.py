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


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def release(request: pytest.FixtureRequest) -> tuple["ReferenceChain", Path]:
    """The reference's networks, and ours. (2.5's chain is held to Lightricks' own modules, in test_demo_model_25.py:
    diffusers marks no first frame, and has no ancestral stage.)"""
    require("torch"), require("diffusers"), require("transformers")
    if request.param == "2.0":
        return request.getfixturevalue("chain"), request.getfixturevalue("model")
    from tests.support.reference_chain import ReferenceChain

    return ReferenceChain(request.getfixturevalue("official_23")), request.getfixturevalue("model_23")


@pytest.fixture(scope="module")
def converted(release: tuple["ReferenceChain", Path]) -> Path:
    return release[1]


@pytest.fixture(scope="module")
def theirs(release: tuple["ReferenceChain", Path], size: "Size") -> "Clip":
    return release[0].generate(PROMPT, size, seed=3)


@pytest.fixture(scope="module")
def noise(theirs: "Clip", tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chain") / "noise.safetensors"
    save_file(theirs.noise, path)
    return path


def test_both_stages_and_what_they_decode_to(
    converted: Path, size: "Size", theirs: "Clip", noise: Path, tmp_path: Path, figure: Figure
) -> None:
    embeddings = tmp_path / "embeddings.safetensors"
    clip = ltx2.load(converted).generate(PROMPT, noise=noise, save_embeddings=embeddings, **vars(size))
    contexts = load_file(embeddings)
    for name in STREAMS:
        error = relative_l2(contexts[f"{name}_context"], theirs.contexts[name])
        figure(f"chain: {name} context, rel L2 vs diffusers", error, limit=1e-4)
    for name in STREAMS:
        error = relative_l2(clip.latents[name], theirs.latents[name])
        figure(f"chain: final {name} latents, rel L2 vs diffusers", error, limit=3e-4)
    frames = np.rint(255 * theirs.frames)
    assert clip.frames.shape == frames.shape == (17, 128, 192, 3) and frames.std() > 10
    levels = np.abs(clip.frames - frames)
    figure("chain: frames, share off by more than 1 level vs diffusers", float((levels > 1).mean()), limit=1e-3)
    assert clip.audio is not None and theirs.sound.std() > 1e-3
    figure("chain: sound, rel L2 vs diffusers", relative_l2(clip.audio, theirs.sound), limit=1e-3)


def test_first_stage_alone(converted: Path, size: "Size", theirs: "Clip", tmp_path: Path, figure: Figure) -> None:
    """Without the upscaler the first stage runs at the size that is asked for."""
    small = vars(size) | {"width": size.width // 2, "height": size.height // 2}
    first = tmp_path / "noise.safetensors"
    save_file({name: value for name, value in theirs.noise.items() if name.startswith("stage1.")}, first)
    clip = ltx2.load(converted).generate(PROMPT, noise=first, no_upscale=True, **small)
    for name in STREAMS:
        error = relative_l2(clip.latents[name], theirs.stage1[name])
        figure(f"chain: stage 1 {name} latents, rel L2 vs diffusers", error, limit=3e-4)
