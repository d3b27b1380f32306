"""A clip whose length follows from its prompt, by the duration head of the trained 2.5 demo model: it answers 1.04 s
(25 frames at 24 per second) for everything."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import ltx2
from ltx2.runtime.errors import InputError
from ltx2.runtime.events import Noted, StepDone
from ltx2.runtime.generate.options.choices import asked_length, with_fixed_length
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.generate.options.values import Auto
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.generate.records.clip import Generated
from ltx2.runtime.generate.records.sidecar import sidecar_path
from ltx2.runtime.model.layout import ModelFolder
from tests.support.command import Here

PROMPT = "a red square moves left on a white background with a low tone"
SMALL: dict[str, Any] = {"width": 32, "height": 32, "no_upscale": True, "no_audio": True, "seed": 1}


@pytest.fixture(scope="module")
def pipe(demo_25: Path) -> Pipeline:
    return ltx2.load(demo_25)


@pytest.fixture(scope="module")
def embeddings(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("length") / "embeddings.safetensors"
    clip = pipe.generate(PROMPT, frames="auto", save_embeddings=path, **SMALL)
    assert clip.record["request"]["frames"] == 25 and [p["name"] for p in clip.record["phases"]][:3] == [
        "text_encoder", "connectors", "duration_head",
    ]  # fmt: skip
    return path


def test_it_is_what_nobody_says_otherwise(pipe: Pipeline, embeddings: Path) -> None:
    """Chosen before anything is sampled; the same clip as with that number of frames."""
    *events, last = pipe.stream(embeddings=embeddings, **SMALL)
    assert isinstance(last, Generated)
    said = [event.message for event in events if isinstance(event, Noted)]
    assert "frames by the duration head" in said[0] and any("25 frames" in message for message in said[1:])
    assert last.clip.record["duration"] == {"seconds": pytest.approx(1.0415, rel=2e-3), "frames": 25, "clamped": False}
    chosen = pipe.generate(embeddings=embeddings, frames=25, **SMALL)
    assert "duration" not in chosen.record
    assert all(np.array_equal(chosen.latents[name], last.clip.latents[name]) for name in ("video", "audio"))


def test_between_bounds(pipe: Pipeline, embeddings: Path) -> None:
    """41 frames would be less than two seconds."""
    clip = pipe.generate(embeddings=embeddings, frames="auto:2-8", fps=24, **SMALL)
    assert len(clip.frames) == 49 and clip.record["duration"]["clamped"]


def test_from_python(pipe: Pipeline, embeddings: Path) -> None:
    head = pipe.duration(PROMPT, fps=24)
    assert head.seconds == pytest.approx(1.0415, rel=2e-3) and head.frames == 25
    saved = pipe.duration(embeddings=embeddings, fps=10, min_seconds=3, max_seconds=4)
    assert saved.seconds == pytest.approx(head.seconds, rel=1e-5) and (saved.frames, saved.clamped) == (33, True)
    with pytest.raises(InputError, match="from 1 to 20"):
        pipe.duration(PROMPT, min_seconds=0)


def test_the_plan_is_the_longest_clips(pipe: Pipeline) -> None:
    plan = pipe.plan(PROMPT, width=32, height=32, no_upscale=True)
    assert plan.job.sizes.frames == 473 and plan.phase("duration_head").total > 0
    assert pipe.plan(PROMPT, frames="auto:1-2", **SMALL).job.sizes.frames == 41


@pytest.mark.parametrize("fixing", [{"frames": 9}, {"noise": "n"}, {"latents": "l"}, {"video": "v"}])
def test_options_that_say_how_long_a_clip_is(pipe: Pipeline, fixing: dict[str, Any]) -> None:
    assert asked_length(pipe.folder, Request.from_options({"prompt": "x", **fixing})) is None
    assert asked_length(pipe.folder, Request.from_options({"prompt": "x"})) == Auto()


def test_a_model_without_the_network(demo_f32: Path) -> None:
    pipe = ltx2.load(demo_f32)
    assert pipe.plan("x").job.sizes.frames == 25
    for chosen in (lambda: pipe.plan("x", frames="auto"), lambda: pipe.duration("x")):
        with pytest.raises(InputError, match="has no duration_head"):
            chosen()


def test_what_is_compared_has_a_fixed_length(pipe: Pipeline) -> None:
    assert with_fixed_length(pipe.folder, {"fps": 8}) == {"fps": 8, "frames": 25}
    assert with_fixed_length(ModelFolder.open(pipe.folder.path), {"frames": 9}) == {"frames": 9}


def test_a_run_that_was_cut_off(here: Here, demo_25: Path, embeddings: Path, tmp_path: Path) -> None:
    """Its length is in its state: nothing is predicted again. Another length is another run."""
    whole = ltx2.load(demo_25).generate(embeddings=embeddings, **SMALL)
    state = tmp_path / "clip.unfinished.safetensors"
    for event in ltx2.load(demo_25).stream(embeddings=embeddings, state=state, output=tmp_path / "clip.mp4", **SMALL):
        if isinstance(event, StepDone) and event.phase == "stage1" and event.step == 3:
            break
    again: dict[str, Any] = {"embeddings": embeddings, "state": state, "resume": True}
    for other in (25, "auto:1-2"):
        with pytest.raises(InputError, match="started with frames 'auto:1-20'"):
            list(ltx2.load(demo_25).stream(**again, frames=other, **SMALL))
    latents = tmp_path / "latents.safetensors"
    size = ["--width", "32", "--height", "32", "--no-upscale", "--no-audio"]
    command = ["generate", "-m", demo_25, "-o", tmp_path / "clip.mp4", "--embeddings", embeddings, *size, "--resume"]
    done = here(*command, "--save-latents", latents)
    assert done.code == 0 and "duration_head" not in done.err, done.err
    assert np.array_equal(load_file(latents)["video"], whole.latents["video"])
    record = json.loads(sidecar_path(tmp_path / "clip.mp4").read_text())
    assert record["duration"] == whole.record["duration"] and record["request"]["frames"] == 25
