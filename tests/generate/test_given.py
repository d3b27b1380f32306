"""Clips from pictures, sounds and clips, by the trained 2.5 demo model: what is given is there, the rest follows."""

import shlex
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import ltx2
from ltx2.bench.quality.classify import classify
from ltx2.runtime.errors import InputError, UsageError
from ltx2.runtime.events import Noted, PhaseStarted
from ltx2.runtime.generate.job import Job
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.generate.records.clip import Clip
from ltx2.runtime.media.video import AudioTrack, write_wav
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.sampling.conditioning import (
    FirstFrame,
    Frozen,
    Kept,
    Keyframe,
    Place,
    Reference,
    Slots,
    slot_frames,
)  # fmt: skip
from ltx2.runtime.sampling.latents import Grid
from ltx2.runtime.sampling.state import begin_states
from ltx2.runtime.streams import Streams
from tests.support.command import Here
from tests.support.media import ffmpeg, noise_frames, read_video, write_clip, write_frames
from tests.support.sampling import SCALES

PROMPT = "a red square moves left on a white background with a low tone"
WANTED = {"shape": "square", "colour": "red", "background": "white", "motion": "left", "tone": "low"}
SIZE: dict[str, Any] = {"width": 192, "height": 128, "frames": 25, "fps": 24.0}
NO_SIZE = {"width": None, "height": None, "frames": None}


def psnr(ours: Any, theirs: Any) -> float:
    error = np.mean((np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)) ** 2)
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def shows(clip: Clip, *attributes: str) -> dict[str, Any]:
    found = classify(clip.frames, clip.audio, clip.sample_rate)
    return {name: found[name] for name in attributes or WANTED}


class Source:
    """A clip that the model made, as files."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.pipe = ltx2.load(model)
        self.latents, self.text = folder / "clip.safetensors", folder / "text.safetensors"
        saved: dict[str, Any] = {"save_latents": self.latents, "save_embeddings": self.text}
        self.clip = self.pipe.generate(PROMPT, seed=5, **saved, **SIZE)
        assert self.clip.audio is not None
        sound = AudioTrack(self.clip.audio, self.clip.sample_rate)
        self.sound = folder / "sound.wav"
        write_wav(self.sound, sound)
        self.silent = write_clip(folder / "silent.mkv", self.clip.frames, 24)
        self.video = write_clip(folder / "clip.mkv", self.clip.frames, 24, sound)
        self.pictures = {n: write_frames(folder / f"{n}.png", self.clip.frames[n : n + 1]) for n in (0, 24)}

    def generate(self, **options: Any) -> Clip:
        """A clip of the same prompt."""
        return self.pipe.generate(embeddings=self.text, **{"seed": 9, **options})


@pytest.fixture(scope="module")
def source(demo_25: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source(tmp_path_factory.mktemp("source"), demo_25)


def test_first_and_last_picture(source: Source, figure: Callable[..., None]) -> None:
    images: list[Any] = [source.pictures[0], (source.pictures[24], 24)]
    clip = source.generate(image=images, image_crf=0, **SIZE)
    assert shows(clip) == WANTED
    assert psnr(clip.frames[0], source.clip.frames[0]) > 27 and psnr(clip.frames[24], source.clip.frames[24]) > 21
    assert clip.record["stages"][0]["tokens"]["video"] == {"video": 24, "keyframes": 6}


def test_a_sound_is_kept_and_pictured(source: Source) -> None:
    clip = source.generate(audio=source.sound, **SIZE | {"frames": 17})
    count = round(17 / 24 * clip.sample_rate)
    assert clip.audio is not None and source.clip.audio is not None
    np.testing.assert_allclose(clip.audio, source.clip.audio[:, :count].clip(-1, 1), atol=1e-4)
    assert shows(clip, "colour", "background") == {"colour": "red", "background": "white"}
    assert clip.record["sound"] == "given"


def test_a_picture_is_kept_and_given_a_sound(source: Source) -> None:
    clip = source.generate(video=source.silent)
    np.testing.assert_array_equal(clip.frames, source.clip.frames)
    assert shows(clip) == WANTED


@pytest.mark.parametrize("given", ["video", "latents"])
def test_retake(source: Source, given: str) -> None:
    clip = source.generate(retake=(getattr(source, given), 0.42, 0.70))
    assert shows(clip) == WANTED and clip.record["request"]["pipeline"] == "distilled"
    before, made, after = (psnr(clip.frames[span], source.clip.frames[span]) for span in np.s_[:9, 9:17, 17:])
    assert min(before, after) > 30 and made > 22


def test_retake_keeps_a_stream(source: Source) -> None:
    clip = source.generate(retake=(source.latents, 0.0, 9.0), keep="audio", no_audio=True)
    kept, made = (np.linalg.norm(clip.latents[n] - source.clip.latents[n]) for n in ("audio", "video"))
    assert kept == 0 and made > 1


@pytest.mark.parametrize("seconds", [0.4, -0.4])
def test_extension_keeps_the_frames_there_are(source: Source, seconds: float) -> None:
    clip = source.generate(extend=(source.video, seconds), no_audio=True)
    assert clip.frames.shape == (33, 128, 192, 3)
    own = clip.frames[:25] if seconds > 0 else clip.frames[8:]
    np.testing.assert_array_equal(own, source.clip.frames)
    assert shows(clip, "colour", "background") == {"colour": "red", "background": "white"}


def test_sound_alone(source: Source, tmp_path: Path) -> None:
    clip = source.generate(no_video=True, frames=25)
    assert clip.frames is None and clip.latents.keys() == {"audio"}
    assert clip.save(tmp_path / "a.wav").stat().st_size > 90000


def test_slots(source: Source) -> None:
    clip = source.generate(keyframe_slots=1, seed=5, **SIZE)
    assert shows(clip) == WANTED
    stages = [stage["tokens"]["video"] for stage in clip.record["stages"]]
    assert stages == [{"video": 24, "slots": 6}, {"video": 96}]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"image": ["PICTURE", "PICTURE"]}, InputError, "both for frame 0"),
        ({"image": [("PICTURE", 25)]}, InputError, "outside the clip"),
        ({"image": ["/none.png"]}, InputError, "no such file"),
        ({"audio": ("SOUND", 0.9)}, InputError, "too short.*use --frames"),
        ({"audio": ("SOUND", 60)}, InputError, "too short.*begin earlier"),
        ({"audio": "SOUND", "no_audio": True}, UsageError, "do not go together"),
        ({"retake": ("SOUND", 0, 1), **NO_SIZE}, InputError, "has no picture"),
        ({"retake": ("SILENT", 0, 1), "keep": "audio", **NO_SIZE}, InputError, "has no sound to keep"),
    ],
)
def test_what_cannot_be_given(source: Source, options: dict[str, Any], error: type[Exception], said: str) -> None:
    """Before any network is loaded."""
    files = {"PICTURE": source.pictures[0], "SOUND": source.sound, "SILENT": source.silent}

    def named(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(named(part) for part in value)
        return files.get(value, value)

    asked = SIZE | {name: named(value) for name, value in options.items()}
    if "retake" in asked:
        asked.pop("fps")
    with pytest.raises(error, match=said):
        source.pipe.plan(PROMPT, **asked)


def test_a_clip_of_other_sizes(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused by name; the command that the refusal gives makes one that is taken."""
    path = write_clip(tmp_path / "a phone's.mkv", noise_frames(12, 45, 80), 24)
    with pytest.raises(InputError, match=r"phone's\.mkv cannot be used as it is: width 80 is not valid") as caught:
        source.pipe.plan(PROMPT, video=path)
    program, *command = shlex.split(caught.value.fix.partition(": ")[2])
    assert program == "ffmpeg"
    monkeypatch.chdir(tmp_path)
    ffmpeg(*command)
    frames, _ = read_video(tmp_path / command[-1])
    assert frames.shape == (9, 32, 64, 3) and source.pipe.plan(PROMPT, video=tmp_path / command[-1])


def test_a_clip_of_uneven_frames(demo_25: Path, tmp_path: Path) -> None:
    """It is used, and told."""
    even = write_clip(tmp_path / "even.mkv", noise_frames(20, 64, 64), 24)
    uneven = tmp_path / "uneven.mkv"
    ffmpeg("-i", even, "-vf", "select='lte(n,15)+eq(n,19)'", "-fps_mode", "vfr", "-c:v", "ffv1", uneven)
    cut = tmp_path / "cut.mkv"
    ffmpeg("-i", even, "-frames:v", "17", "-c:v", "ffv1", cut)
    jobs = [Job(ModelFolder.open(demo_25), Request.from_options({"prompt": "a", "video": p})) for p in (uneven, cut)]
    said, nothing = (" ".join(job.warnings()) for job in jobs)
    assert "uneven.mkv come unevenly" in said and "unevenly" not in nothing


@pytest.mark.parametrize(("end", "warned"), [(1.04, False), (5.0, True)])
def test_a_retake_that_ends_after_its_clip(source: Source, end: float, warned: bool) -> None:
    """It ends with the clip, and that is told."""
    asked = {"prompt": "a", "retake": (source.silent, 0.5, end)}
    said = " ".join(Job(source.pipe.folder, Request.from_options(asked)).warnings())
    assert ("silent.mkv ends at 1.04 s: what is made anew ends there, not at 5 s" in said) == warned


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"retake": (0, 2)}, "--retake 0-2 touches all of silent.mkv: nothing of its picture is kept"),
        ({"retake": (0.03, 0.71)}, "--retake 0.03-0.71 touches all of silent.mkv"),  # the last eight begin at 0.708
        ({"retake": (0.05, 2)}, ""),
        ({"retake": (0, 0.7)}, ""),
        ({"retake": (0, 2), "keep": "video"}, ""),
        ({"keyframe_slots": 24, "frames": 25}, "--keyframe-slots 24: the clip has 23 frames inside, so some are made"),
        ({"keyframe_slots": 1, "frames": 1}, "--keyframe-slots 1: the clip has 0 frames inside"),
        ({"keyframe_slots": 23, "frames": 25}, ""),
        ({"keyframe_slots": 99, "frames": "auto"}, ""),  # not known yet
    ],
)
def test_what_is_surely_not_meant_is_told(source: Source, options: dict[str, Any], said: str) -> None:
    asked = options | ({"retake": (source.silent, *options["retake"])} if "retake" in options else {})
    told = Job(source.pipe.folder, Request.from_options({"prompt": "a", **asked})).warnings()
    found = [message for message in told if "--retake" in message or "--keyframe-slots" in message]
    assert len(found) == bool(said) and said in " ".join(found)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.5, "16 frames (0.67 s) are made after silent.mkv"),
        (0.17, "8 frames (0.33 s) are made after silent.mkv"),
        (0.01, "8 frames (0.33 s, the fewest there can be) are made after silent.mkv"),
        (-0.6, "16 frames (0.67 s) are made before silent.mkv"),
    ],
)
def test_an_extension_says_what_it_adds(source: Source, here: Here, tmp_path: Path, seconds: float, said: str) -> None:
    """Whole latent frames of eight, in a dry run too."""
    events = source.pipe.stream(embeddings=source.text, extend=(source.silent, seconds))
    before = takewhile(lambda event: not isinstance(event, PhaseStarted), events)
    assert said in [event.message for event in before if isinstance(event, Noted)]
    args = ["generate", "a", "-m", source.pipe.folder.path, "--extend", f"{source.silent}@{seconds}", "--dry-run"]
    done = here(*args, "-o", tmp_path / "a.mp4")
    assert done.code == 0 and said in done.err.splitlines()
    assert here(*args, "-o", tmp_path / "a.mp4", "-q").err == ""


def test_a_frame_may_show_several_pictures(source: Source) -> None:
    """All but the clip's own first one are appended."""
    first, last = source.pictures[0], source.pictures[24]
    job = source.pipe.plan(PROMPT, image=[first, (first, 8), (last, 8)], keyframe=[(last, 0)], **SIZE).job
    assert [given.conditioning for given in job.given] == [FirstFrame(1.0), *map(Keyframe, (8, 8, 0))]


class TestStates:
    """Tokens, positions and masks by the formulas of the conditionings."""

    GRID = Grid(channels=4, frames=3, height=2, width=3, audio_channels=2, audio_frames=18)
    PLACE = Place(1, GRID, 24.0, SCALES)

    def states(self) -> Any:
        return begin_states(self.GRID, 24.0, SCALES)

    def test_first_frame(self) -> None:
        picture = mx.random.normal((1, 4, 1, 2, 3))
        state = FirstFrame(0.75).apply(self.states(), self.PLACE, Streams(picture)).get("video")
        np.testing.assert_array_equal(state.mask, [0.25] * 6 + [1] * 12)
        np.testing.assert_array_equal(state.clean[0, :6].T, np.array(picture).reshape(4, 6))

    def test_keyframe(self) -> None:
        state = Keyframe(16, 1.0).apply(self.states(), self.PLACE, Streams()).get("video")
        assert state.tokens == 24 and [s.name for s in state.segments] == ["video", "keyframes"]
        np.testing.assert_allclose(state.positions[0, 18:], 16.5 / 24)
        np.testing.assert_allclose(state.positions[1:, 18:], state.positions[1:, :6])
        np.testing.assert_array_equal(state.mask, [1] * 18 + [0] * 6)

    def test_slots_in_stage_1_alone(self) -> None:
        frames = slot_frames(3, 121)
        assert frames == (30, 60, 90) and slot_frames(1, 121) == (60,)
        later = Place(2, self.GRID, 24.0, SCALES)
        assert Slots(frames).apply(self.states(), self.PLACE, Streams()).get("video").tokens == 36
        assert Slots(frames).apply(self.states(), later, Streams()).get("video").tokens == 18

    def test_reference(self) -> None:
        reference = Reference((2, 1, 2), downscale=2, every=4, attention=0.5)
        with_image = Keyframe(8).apply(self.states(), self.PLACE, Streams())
        state = reference.apply(with_image, self.PLACE, Streams()).get("video")
        own, image, more = np.s_[:18], np.s_[18:24], np.s_[24:]
        # Latents of frames 0 and 1 to 8, at a quarter of the rate, three frames earlier, never before the start.
        edges = np.maximum(np.array([0, 1, 9]) * 4 / 24 - 3 / 24, 0)
        np.testing.assert_allclose(state.positions[0, more], np.repeat((edges[:-1] + edges[1:]) / 2, 2), rtol=1e-6)
        np.testing.assert_allclose(state.positions[2, more], [32, 96] * 2)
        assert state.attention is not None
        seen = np.exp(np.array(state.attention[0, 0], np.float64))
        assert (seen[own, more] == seen[more, own].T).all() and np.allclose(seen[own, more], 0.5)
        assert np.allclose(seen[more, more], 1) and not seen[image, more].any() and np.allclose(seen[own, image], 1)

    def test_kept_outside_a_span(self) -> None:
        latents = Streams(mx.ones(self.GRID.video_shape), mx.ones(self.GRID.audio_shape))
        states = Kept(1.5 / 24, 9 / 24).apply(self.states(), self.PLACE, latents)
        # Video latents span frames 0, 1 to 8 and 9 to 16; the last begins where the span ends.
        np.testing.assert_array_equal(states.get("video").mask, [0] * 6 + [1] * 6 + [0] * 6)
        edges = np.maximum(np.arange(19) * 4 - 3, 0) * 0.01
        np.testing.assert_array_equal(states.get("audio").mask, (edges[1:] > 1.5 / 24) & (edges[:-1] < 9 / 24))

    def test_frozen(self) -> None:
        state = Frozen("audio").apply(self.states(), self.PLACE, Streams(None, mx.ones(self.GRID.audio_shape)))
        levels = state.get("audio").levels(0.7)
        assert levels.sigma == 0 and not np.array(levels.values).any() and state.get("video").levels(0.7).sigma == 0.7
