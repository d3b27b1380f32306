"""A clip whose length follows from its prompt, by the duration head of the trained 2.5 demo model: it answers 1.04 s
(25 frames at 24 per second) for everything. Many clips, with another head, which tells prompts apart."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ltx2
from ltx2.runtime.errors import DoesNotFitError, InputError
from ltx2.runtime.events import Noted, PhaseStarted, StepDone
from ltx2.runtime.generate.options.choices import asked_length, with_fixed_length
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.generate.options.values import Auto
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.generate.records.clip import Generated
from ltx2.runtime.generate.records.sidecar import sidecar_path
from ltx2.runtime.media.video import AudioTrack, write_wav
from ltx2.runtime.model.layout import ModelFolder
from tests.support.command import Here
from tests.support.machine import memory_of
from tests.support.stopped import stop

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


@pytest.mark.parametrize(("seconds", "start", "frames"), [(5.03, 0, 113), (5.05, 0, 121), (5.05, 2, 73), (30, 0, 473)])
def test_the_plan_is_no_longer_than_its_sound(
    pipe: Pipeline, tmp_path: Path, seconds: float, start: float, frames: int
) -> None:
    sound = tmp_path / "a.wav"
    write_wav(sound, AudioTrack(np.zeros((1, round(8000 * seconds)), np.float32), 8000))
    size: dict[str, Any] = {"width": 32, "height": 32, "no_upscale": True}
    assert pipe.plan(PROMPT, audio=(sound, start), **size).job.sizes.frames == frames
    with pytest.raises(InputError, match="too short"):
        pipe.plan(PROMPT, audio=(sound, seconds - 0.5), **size)


def test_the_plan_says_that_it_is_the_longest_clips(here: Here, demo_25: Path) -> None:
    dry, said = ["generate", PROMPT, "-m", demo_25, "--dry-run"], "the most frames that --frames auto"
    assert f"{said}:1-20 may choose" in here(*dry).out and f"{said}:1-3 " in here(*dry, "--frames", "auto:1-3").out
    assert said not in here(*dry, "--frames", "9").out


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


SHORT, LONG = "a red square", "a yellow star moves right on a black background with a high tone"
SECONDS = {SHORT: 1.3, LONG: 2.6}
FEW: dict[str, Any] = {"fps": 8, "width": 32, "height": 32, "no_upscale": True, "no_audio": True, "no_metadata": True}
FRAMES = {"one.mp4": 17, "two.mp4": 9, "fixed.mp4": 25}  # of 2.6 s and 1.3 s at 8 per second


@pytest.fixture(scope="module")
def telling_25(demo_25: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 2.5 demo model with a duration head of random weights, scaled to answer SECONDS."""
    out = Path(shutil.copytree(demo_25, tmp_path_factory.mktemp("telling") / "model"))
    file, draw = out / "duration_head" / "model.safetensors", np.random.default_rng(1).standard_normal
    head = {name: 0.3 * draw(value.shape).astype(np.float32) for name, value in load_file(file).items()}
    save_file(head, file, {"format": "mlx"})
    short, long = (np.log(ltx2.load(out).duration(prompt).seconds) for prompt in (SHORT, LONG))
    scale = np.float32(np.log(SECONDS[LONG] / SECONDS[SHORT]) / (long - short))
    head["mlp_out.weight"] *= scale
    head["mlp_out.bias"] = scale * (head["mlp_out.bias"] - np.float32(short)) + np.float32(np.log(SECONDS[SHORT]))
    save_file(head, file, {"format": "mlx"})
    return out


@pytest.fixture(scope="module")
def command(telling_25: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three clips; that of a fixed length is the last one."""
    prompts = tmp_path_factory.mktemp("many") / "prompts"
    clips: list[dict[str, Any]] = [
        {"prompt": LONG},
        {"prompt": SHORT, "frames": "auto:1-9"},
        {"prompt": SHORT, "frames": 25},
    ]
    named = [clip | {"output": name} for clip, name in zip(clips, FRAMES, strict=True)]
    prompts.write_text("\n".join(map(json.dumps, named)))
    options = [word for name, value in FEW.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    options = [word for word in options if word != "True"]
    return ["generate", "--prompts", str(prompts), "-m", str(telling_25), "--seed", "3", *options, "-o"]


@pytest.fixture(scope="module")
def alone(telling_25: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each of them is by itself."""
    folder = tmp_path_factory.mktemp("alone")
    for number, (name, frames) in enumerate(FRAMES.items()):
        length: dict[str, Any] = {"frames": frames} if name == "fixed.mp4" else {}
        clip = ltx2.load(telling_25).generate(LONG if number == 0 else SHORT, seed=3 + number, **FEW, **length)
        assert len(clip.save(folder / name).read_bytes()) and clip.frames.shape[0] == frames
    return folder


class TestMany:
    def same(self, folder: Path, alone: Path) -> None:
        """Their bits, lengths and records; and nothing else is left."""
        names = [name for clip in FRAMES for name in (clip, clip.replace(".mp4", ".json"))]
        assert sorted(path.name for path in folder.iterdir()) == sorted(names)
        for name, frames in FRAMES.items():
            assert (folder / name).read_bytes() == (alone / name).read_bytes(), name
            record, other = (json.loads(sidecar_path(place / name).read_text()) for place in (folder, alone))
            assert record["request"]["frames"] == frames and record.get("duration") == other.get("duration")
            assert [phase["name"] for phase in record["phases"]] == [phase["name"] for phase in other["phases"]]

    def test_each_has_its_own(self, here: Here, command: list[str], alone: Path, tmp_path: Path) -> None:
        done = here(*command, tmp_path, "--json")
        self.same(tmp_path, alone)
        said = [line for line in done.err.splitlines() if "the duration head gives the clip" in line]
        assert [line.split(": ", 1)[0] for line in said] == ["clip 1 of 3, one.mp4", "clip 2 of 3, two.mp4"], done.err
        assert "2.60 s: 17 frames" in said[0] and "1.30 s: 9 frames" in said[1]
        clips = done.json["clips"]
        assert [clip.get("duration", {}).get("frames") for clip in clips] == [17, 9, None]
        assert all(clip["memory_plan"]["phases"] == clips[0]["memory_plan"]["phases"] for clip in clips)

    def test_a_run_that_was_killed(self, here: Here, command: list[str], alone: Path, tmp_path: Path) -> None:
        """With the first length in a state and the second nowhere, then with one in a record and one in a state."""
        assert stop([*command, tmp_path], signal.SIGKILL, "stage1", 1).returncode == -signal.SIGKILL
        assert [path.name for path in tmp_path.glob("*.unfinished.safetensors")] == ["one.unfinished.safetensors"]
        again = stop([*command, tmp_path, "--resume"], signal.SIGKILL, "video_vae", 1, clip=1)
        assert again.returncode == -signal.SIGKILL and "clip 2 of 3, two.mp4: the duration head" in again.stderr
        assert "clip 1 of 3, one.mp4: the duration head" not in again.stderr
        written = (tmp_path / "one.mp4").stat().st_mtime_ns
        done = here(*command, tmp_path, "--resume")
        assert done.code == 0 and "duration head" not in done.err and "denoising" not in done.err, done.err
        assert (tmp_path / "one.mp4").stat().st_mtime_ns == written
        self.same(tmp_path, alone)

    def test_the_plan_is_the_longest_clips(self, here: Here, command: list[str], tmp_path: Path) -> None:
        done = here(*command, tmp_path, "--dry-run", "--json")
        assert done.json["plan"]["frames"] == 153, "20 s at 8 per second"

    def test_what_turns_out_not_to_fit(self, telling_25: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The whole run is refused, before anything is sampled: the others would be made without the memory for it."""
        pipe = ltx2.load(telling_25)
        clips = [FEW | {"prompt": prompt, "width": 512, "height": 512} for prompt in (SHORT, LONG)]
        lengths: list[dict[str, Any]] = [{"frames": "auto:1-1.2"}, {"frames": 17}]
        lowest = [[Request.from_options(clip | length | {"low_memory": True}) for clip in clips] for length in lengths]
        least = [max(need.least for need in pipe.planned_all(some).needs) for some in lowest]
        assert least[0] < least[1]
        memory_of(monkeypatch, sum(least) / 2e9)
        events, phases = pipe.stream_all(clips), set[str]()
        with pytest.raises(DoesNotFitError, match="17 frames of 512x512"):
            for event in events:
                phases.add(event.name if isinstance(event, PhaseStarted) else "")
        assert phases - {""} == {"text_encoder", "connectors", "duration_head"}
