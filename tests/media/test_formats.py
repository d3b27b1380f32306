"""What a clip's file may be: mp4, mov or gif, by its name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ltx2
from ltx2.runtime.errors import InputError, UsageError
from ltx2.runtime.generate.records.sidecar import Sidecar
from ltx2.runtime.media.formats import CRF, FORMATS, MP4, check_crf, format_of
from ltx2.runtime.media.source import media_facts, read_comment, read_frames, read_sound
from ltx2.runtime.media.video import AudioTrack, check_target, video_writer
from tests.support.command import SEED, SIZE, Here
from tests.support.media import write_video

RATE = 24000


def gradient(count: int = 9, height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth picture that brightens, frame by frame."""
    rows, columns = np.mgrid[0:height, 0:width]
    picture = np.stack([rows * 4, columns * 3, np.full_like(rows, 90)], axis=-1)
    return np.stack([np.clip(picture + 6 * number, 0, 255) for number in range(count)]).astype(np.uint8)


def tone(seconds: float) -> AudioTrack:
    samples = 0.5 * np.sin(2 * np.pi * 400 * np.arange(int(seconds * RATE)) / RATE)
    return AudioTrack(np.stack([samples, -samples]).astype(np.float32), RATE)


def frames_of(path: Path) -> np.ndarray:
    return np.concatenate(list(read_frames(path)))


@pytest.mark.parametrize(("suffix", "error"), [(".mp4", 4.0), (".mov", 1.5), (".gif", 12.0), (".MOV", 1.5)])
def test_pictures_and_rate_are_kept(tmp_path: Path, suffix: str, error: float) -> None:
    movie, path = gradient(), tmp_path / f"a{suffix}"
    write_video(path, movie, fps=25)
    found = frames_of(path)
    assert found.shape == movie.shape and media_facts(path).fps == pytest.approx(25)
    assert np.abs(found.astype(float) - movie).mean() < error
    assert list(tmp_path.iterdir()) == [path]


def test_a_mov_has_the_sound_as_it_is_and_the_settings(tmp_path: Path) -> None:
    path, track, text = tmp_path / "a.mov", tone(0.36), json.dumps({"prompt": "a; b = c # d"})
    with video_writer(path, fps=25, audio=track, comment=text) as writer:
        writer.write(gradient())
    sound = read_sound(path, 0.0, 0.36)
    np.testing.assert_allclose(sound.samples, track.samples, atol=1e-4)
    assert read_comment(path) == text


def test_a_gif_has_no_sound(tmp_path: Path) -> None:
    with video_writer(tmp_path / "a.gif", fps=25, audio=tone(0.36), comment="{}") as writer:
        writer.write(gradient())
    assert media_facts(tmp_path / "a.gif").rate == 0 and len(frames_of(tmp_path / "a.gif")) == 9


def test_quality(tmp_path: Path) -> None:
    movie = np.random.default_rng(0).integers(0, 256, (9, 48, 64, 3), np.uint8)
    for crf in (0, CRF, 40):
        write_video(tmp_path / f"{crf}.mp4", movie, fps=24, crf=crf)
    sizes = [(tmp_path / f"{crf}.mp4").stat().st_size for crf in (0, CRF, 40)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 * sizes[2]


def test_room_is_made_sure_of_for_every_kind(tmp_path: Path) -> None:
    """Even for noise, which no clip is."""
    movie = np.random.default_rng(0).integers(0, 256, (9, 192, 256, 3), np.uint8)
    for suffix in (".mov", ".gif"):
        path = tmp_path / f"a{suffix}"
        write_video(path, movie, fps=24)
        assert path.stat().st_size < 1.3 * format_of(path).pixel * movie[..., 0].size
    assert MP4.bytes_of_a_pixel(CRF) == 0.1 and MP4.bytes_of_a_pixel(CRF - 6) == 0.2 and MP4.bytes_of_a_pixel(51) < 0.01
    assert FORMATS[".gif"].bytes_of_a_pixel(0) == FORMATS[".gif"].pixel


@pytest.mark.parametrize("name", ["a.avi", "a", "a.png", "a.wav"])
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"clips are written as mp4, mov, gif \(use .*a\.mp4\)"):
        check_target(tmp_path / name)


def test_a_quality_is_the_mp4_s(tmp_path: Path) -> None:
    check_crf(tmp_path / "a.mp4", 23)
    check_crf(tmp_path / "a.mov", CRF)
    with pytest.raises(UsageError, match=r"--crf and -o .* do not go together"):
        check_crf(tmp_path / "a.mov", 23)


class TestGenerate:
    def run(self, here: Here, demo_f32: Path, *more: Any) -> Any:
        return here("generate", "a red square", "-m", demo_f32, *SIZE, *SEED, "--no-upscale", *more)

    def test_a_mov_is_repeated_from_what_it_holds(self, here: Here, demo_f32: Path, tmp_path: Path) -> None:
        clip, again = tmp_path / "clip.mov", tmp_path / "again.mp4"
        done = self.run(here, demo_f32, "-o", clip)
        assert done.code == 0 and sorted(path.name for path in tmp_path.iterdir()) == ["clip.json", "clip.mov"]
        assert len(frames_of(clip)) == 9 and Sidecar.read(clip).request["prompt"] == "a red square"
        assert here("generate", "--from", clip, "-o", again).code == 0
        assert np.abs(frames_of(again).astype(float) - frames_of(clip)).mean() < 4
        self.run(here, demo_f32, "-o", clip).failed(1, "clip.mov is already there")
        self.run(here, demo_f32, "-o", clip.with_suffix(".gif")).failed(1, "clip.json", "it is the record of clip.mov")

    def test_a_gif_says_that_it_has_no_sound(self, here: Here, demo_f32: Path, tmp_path: Path) -> None:
        done = self.run(here, demo_f32, "-o", tmp_path / "clip.gif", "--json")
        assert done.code == 0 and "warning: clip.gif has no sound" in done.err
        assert done.json["request"]["crf"] == CRF and len(frames_of(tmp_path / "clip.gif")) == 9

    def test_several_with_a_quality_that_they_have_not(self, here: Here, demo_f32: Path, tmp_path: Path) -> None:
        done = self.run(here, demo_f32, "-o", tmp_path / "clip.mov", "--count", "2", "--crf", "23")
        done.failed(2, "--crf and -o", "do not go together")
        self.run(here, demo_f32, "--crf", "52").failed(2, "crf 52 is not valid", "between 0 and 51")

    def test_from_python(self, demo_f32: Path, tmp_path: Path) -> None:
        clip = ltx2.load(demo_f32).generate("a red square", width=64, height=64, frames=9, crf=40, no_upscale=True)
        sizes = [clip.save(tmp_path / f"{kind}.{kind}").stat().st_size for kind in ("mp4", "mov", "gif")]
        assert all(sizes) and clip.record["request"]["crf"] == 40
