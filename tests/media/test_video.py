"""Writing clips: nothing is cut, colours and sound survive, and a failure leaves nothing behind."""

import os
import re
import signal
import subprocess
import tracemalloc
import wave
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg  # type: ignore[import-untyped]
import numpy as np
import pytest

from ltx2.runtime.errors import InputError, MediaError, NumericsError
from ltx2.runtime.media.formats import FORMATS, MP4
from ltx2.runtime.media.video import WAITING, AudioTrack, VideoWriter, video_writer, write_wav
from tests.support.media import read_video, write_video
from tests.support.programs import ffmpeg_that

RATE = 24000


def ffmpeg(*args: object) -> str:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def packets(path: Path, stream: str) -> tuple[Fraction, list[tuple[int, int]]]:
    """Time base, and (time, duration) of every packet of a stream, from the container itself."""
    text = ffmpeg("-v", "error", "-i", path, "-map", f"0:{stream}", "-c", "copy", "-f", "framecrc", "-")
    match = re.search(r"#tb 0: (\d+)/(\d+)", text)
    assert match, text
    rows = [line.split(",") for line in text.splitlines() if line and line[0] != "#"]
    return Fraction(int(match[1]), int(match[2])), [(int(r[2]), int(r[3])) for r in rows]


def read_audio(path: Path, folder: Path) -> tuple[np.ndarray, int]:
    target = folder / "decoded.wav"
    ffmpeg("-y", "-i", path, "-c:a", "pcm_s16le", target)
    with wave.open(str(target)) as f:
        samples = np.frombuffer(f.readframes(f.getnframes()), "<i2").reshape(-1, f.getnchannels())
        return samples.T / np.float32(32767), f.getframerate()


def movie(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Every frame another grey, so that a lost or doubled one is seen."""
    greys = np.linspace(20, 235, count).astype(np.uint8)
    return np.broadcast_to(greys[:, None, None, None], (count, height, width, 3)).copy()


def tone(seconds: float, hertz: tuple[int, int] = (400, 1000)) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    return np.stack([0.5 * np.sin(2 * np.pi * f * time) for f in hertz]).astype(np.float32)


@pytest.mark.parametrize("seconds", [0.3, 1.01, 1.5])
def test_every_frame_and_sample_is_kept(tmp_path: Path, seconds: float) -> None:
    frames, sound = movie(25), tone(seconds)
    write_video(tmp_path / "a.mp4", frames, fps=24, audio=AudioTrack(sound, RATE))
    got, fps = read_video(tmp_path / "a.mp4")
    assert fps == 24 and got.shape == frames.shape
    assert np.abs(got.astype(int) - frames).max() <= 3
    heard, rate = read_audio(tmp_path / "a.mp4", tmp_path)
    assert rate == RATE
    assert abs(heard.shape[1] - sound.shape[1]) <= 1024  # AAC's own frame


@pytest.mark.parametrize("fps", [24, 25, 23.976, 24000 / 1001, 50.0])
def test_frame_rate_is_exact(tmp_path: Path, fps: float) -> None:
    write_video(tmp_path / "a.mp4", movie(10), fps=fps)
    base, rows = packets(tmp_path / "a.mp4", "v")
    assert {duration * base for _, duration in rows} == {1 / Fraction(fps).limit_denominator(1001)}
    assert len(rows) == 10
    assert float(1 / (rows[0][1] * base)) == pytest.approx(fps, abs=1e-12)


def test_picture_and_sound_start_together(tmp_path: Path) -> None:
    sound = np.zeros((2, RATE), np.float32)
    sound[:, RATE // 2 :] = tone(0.5)
    write_video(tmp_path / "a.mp4", movie(24), fps=24, audio=AudioTrack(sound, RATE))
    heard, _ = read_audio(tmp_path / "a.mp4", tmp_path)
    onset = int(np.argmax(np.abs(heard[0]) > 0.1))
    assert abs(onset - RATE // 2) < RATE // 24


def test_sound_keeps_its_values_and_sides(tmp_path: Path) -> None:
    sound = tone(1.0)
    write_video(tmp_path / "a.mp4", movie(24), fps=24, audio=AudioTrack(sound, RATE))
    heard, _ = read_audio(tmp_path / "a.mp4", tmp_path)
    inner = slice(2048, RATE - 2048)  # without the codec's ramps at both ends
    assert np.corrcoef(heard[0, inner], sound[0, inner])[0, 1] > 0.99
    assert np.corrcoef(heard[1, inner], sound[1, inner])[0, 1] > 0.99
    assert np.sqrt((heard[0, inner] ** 2).mean()) == pytest.approx(0.5 / np.sqrt(2), rel=0.02)


def test_loud_sound_is_clipped_not_wrapped(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", movie(24), fps=24, audio=AudioTrack(3 * tone(1.0), RATE))
    heard, _ = read_audio(tmp_path / "a.mp4", tmp_path)
    inner = slice(2048, RATE - 2048)
    assert np.corrcoef(heard[0, inner], np.clip(3 * tone(1.0)[0, inner], -1, 1))[0, 1] > 0.98


def test_one_channel_becomes_stereo(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", movie(24), fps=24, audio=AudioTrack(tone(1.0)[:1], RATE))
    heard, _ = read_audio(tmp_path / "a.mp4", tmp_path)
    assert heard.shape[0] == 2
    assert np.abs(heard[0] - heard[1]).max() < 0.02


def test_colours_are_bt709(tmp_path: Path) -> None:
    colours = [(220, 30, 30), (30, 200, 40), (30, 40, 220), (230, 220, 30), (240, 240, 240), (10, 10, 10)]
    frames = np.stack([np.broadcast_to(np.array(c, np.uint8), (32, 48, 3)) for c in colours])
    write_video(tmp_path / "a.mp4", frames, fps=24)
    about = ffmpeg("-i", tmp_path / "a.mp4")
    assert re.search(r"h264.*yuv420p\(tv, bt709, progressive\)", about), about
    # The matrix is a fact of the stored codes, not of the tag: decode it by hand.
    raw = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", tmp_path / "a.mp4", "-f", "rawvideo", "-"],
        capture_output=True, check=True,
    ).stdout  # fmt: skip
    luma = np.frombuffer(raw, np.uint8).reshape(6, -1)[:, : 32 * 48].mean(axis=1)
    want = 16 + 219 / 255 * np.array(colours) @ (0.2126, 0.7152, 0.0722)
    assert np.abs(luma - want).max() < 2


def test_groups_and_single_frames_give_the_same_file(tmp_path: Path) -> None:
    frames = movie(9)
    write_video(tmp_path / "a.mp4", frames, fps=24)
    write_video(tmp_path / "b.mp4", (frames[i : i + 4] for i in (0, 4, 8)), fps=24)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_no_sound_no_audio_stream(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", movie(5), fps=24)
    assert "Audio:" not in ffmpeg("-i", tmp_path / "a.mp4")
    write_video(tmp_path / "a.mp4", movie(5), fps=24, audio=AudioTrack(tone(0.2), RATE))
    assert re.search(r"Audio: aac.*24000 Hz, stereo", ffmpeg("-i", tmp_path / "a.mp4"))


def test_players_can_start_before_the_end_of_the_download(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", movie(5), fps=24)
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("name", ["a b.mp4", "紅い凧 é.mp4", "-y.mp4", "a:b%03d.MP4", 'it\'s "x".mp4'])
def test_any_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = tmp_path / "a folder:ü"
    folder.mkdir()
    monkeypatch.chdir(folder)
    write_video(Path(name), movie(3), fps=24, audio=AudioTrack(tone(0.1), RATE))
    assert [p.name for p in folder.iterdir()] == [name]
    assert read_video(Path(name))[0].shape[0] == 3


def test_a_sound_alone(tmp_path: Path) -> None:
    """Its name may be as long as any; it replaces what was there when it is whole, or not at all."""
    sound, path = AudioTrack(tone(0.1), RATE), tmp_path / f"{'a' * 250}.wav"
    write_wav(path, sound)
    before, rate = path.read_bytes(), read_audio(path, tmp_path)[1]
    assert rate == RATE and len(before) > 2 * 0.1 * RATE
    with pytest.raises(NumericsError):
        write_wav(path, AudioTrack(np.full((1, 9), np.nan, np.float32), RATE))
    assert path.read_bytes() == before and not list(tmp_path.glob("*.partial"))
    with pytest.raises(MediaError, match="there is no such file or folder"):
        write_wav(tmp_path / "gone" / "a.wav", sound)


def failing_frames() -> Iterator[np.ndarray]:
    yield from movie(3)
    raise OSError("decoding failed")


def test_failing_source_passes_through_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="decoding failed"):
        write_video(path, failing_frames(), fps=24)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    assert path.read_bytes() == b"old"


def test_ffmpeg_failure_carries_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, ".mp4", replace(MP4, options=("-preset", "no-such-preset")))
    endless = (movie(64, 256, 256) for _ in range(1000))  # far more than a pipe holds: the writer meets a closed one
    with pytest.raises(MediaError, match="no-such-preset"):
        write_video(tmp_path / "a.mp4", endless, fps=24)
    assert list(tmp_path.iterdir()) == []


def process(writer: VideoWriter) -> int:
    """ffmpeg's."""
    assert writer._process is not None
    return writer._process.pid


class TestGrowingFile:
    """A file that is written while frames are computed."""

    def test_has_another_name_until_it_is_complete(self, tmp_path: Path) -> None:
        path = tmp_path / "a.mp4"
        with video_writer(path, fps=24, audio=AudioTrack(tone(0.4), RATE)) as writer:
            for group in np.split(movie(10), 5):
                writer.write(group)
                assert [p.name for p in tmp_path.iterdir()] == ["a.mp4.partial"]
        assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
        assert read_video(path)[0].shape[0] == 10

    def test_what_a_killed_run_left_makes_way(self, tmp_path: Path) -> None:
        """Also while its ffmpeg still writes to it."""
        left = tmp_path / "a.mp4.partial"
        left.write_bytes(b"half a clip")
        with left.open("ab") as orphan:
            write_video(tmp_path / "a.mp4", movie(3), fps=24)
            orphan.write(b"more")
        assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
        assert read_video(tmp_path / "a.mp4")[0].shape[0] == 3

    def test_is_written_by_one_at_a_time(self, tmp_path: Path) -> None:
        with video_writer(tmp_path / "a.mp4", fps=24) as first:
            first.write(movie(2))
            with (
                pytest.raises(InputError, match=r"a\.mp4 is being written"),
                video_writer(tmp_path / "a.mp4", fps=24) as second,
            ):
                second.write(movie(1))
            first.write(movie(2))
        assert read_video(tmp_path / "a.mp4")[0].shape[0] == 4

    def test_ctrl_c_is_not_for_ffmpeg(self, tmp_path: Path) -> None:
        """It would end the file before the block could."""
        with video_writer(tmp_path / "a.mp4", fps=24) as writer:
            writer.write(movie(1))
            assert os.getpgid(process(writer)) != os.getpgid(0)

    def test_memory_does_not_depend_on_the_number_of_frames(self, tmp_path: Path) -> None:
        """tracemalloc sees what numpy holds."""

        def peak(count: int) -> int:
            frames = (np.full((8, 128, 128, 3), i % 256, np.uint8) for i in range(count // 8))
            tracemalloc.start()
            write_video(tmp_path / "a.mp4", frames, fps=24)
            _, most = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            return most

        assert peak(400) < peak(40) + 2 * 128 * 128 * 3 < (4 * 8 + WAITING) * 128 * 128 * 3


class TestFailingFfmpeg:
    @pytest.mark.parametrize("moment", ["during", "at the end"])
    def test_killed(self, tmp_path: Path, moment: str) -> None:
        path = tmp_path / "a.mp4"
        path.write_bytes(b"old")
        with (
            pytest.raises(MediaError, match=r"a\.mp4.*ffmpeg was ended by signal 9"),
            video_writer(path, fps=24) as writer,
        ):
            writer.write(movie(8, 256, 256))
            os.kill(process(writer), signal.SIGKILL)
            if moment == "during":
                writer.write(movie(64, 256, 256))  # more than a pipe holds
                raise AssertionError("nobody has read this")
        assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"] and path.read_bytes() == b"old"

    def test_disk_is_full(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        ffmpeg_that(monkeypatch, tmp_path, "has no space left")
        (tmp_path / "clips").mkdir()
        with pytest.raises(MediaError, match=r"a\.mp4: the disk is full \(check"):
            write_video(tmp_path / "clips" / "a.mp4", movie(48, 128, 128), fps=24)
        assert list((tmp_path / "clips").iterdir()) == []

    def test_lacks_an_encoder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Found before a frame is computed."""

        def never() -> Iterator[np.ndarray]:
            raise AssertionError("frames were computed for a file that cannot be written")
            yield

        ffmpeg_that(monkeypatch, tmp_path, "lacks libx264")
        with pytest.raises(MediaError, match=r"lacks libx264.*IMAGEIO_FFMPEG_EXE"):
            write_video(tmp_path / "a.mp4", never(), fps=24)


def test_missing_ffmpeg_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "absent"))
    with pytest.raises(MediaError, match="absent"):
        write_video(tmp_path / "a.mp4", movie(3), fps=24)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        ([], "no frames"),
        (movie(2, 32, 47), "even width"),
        (movie(2).astype(np.float32), "float32"),
        ([movie(1)[0], movie(1, 64)[0]], "one size"),
        (movie(2)[..., :1], "uint8"),
    ],
)
def test_unusable_frames(tmp_path: Path, frames: list[np.ndarray], says: str) -> None:
    with pytest.raises(InputError, match=says):
        write_video(tmp_path / "a.mp4", frames, fps=24)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fps", [0, -24, float("nan"), float("inf")])
def test_unusable_frame_rate(tmp_path: Path, fps: float) -> None:
    with pytest.raises(InputError, match="frames per second"):
        write_video(tmp_path / "a.mp4", movie(2), fps=fps)


def test_unusable_sound(tmp_path: Path) -> None:
    damaged = tone(0.1)
    damaged[0, 7] = np.nan
    with pytest.raises(NumericsError):
        write_video(tmp_path / "a.mp4", movie(2), fps=24, audio=AudioTrack(damaged, RATE))
    for sound, rate in ((tone(0.1)[0], RATE), (tone(0.1).T, RATE), (tone(0.1), 0)):
        with pytest.raises(InputError, match="sound"):
            write_video(tmp_path / "a.mp4", movie(2), fps=24, audio=AudioTrack(sound, rate))
    assert list(tmp_path.iterdir()) == []


def test_unusable_target(tmp_path: Path) -> None:
    def never() -> Iterator[np.ndarray]:
        raise AssertionError("frames were computed for a file that cannot be written")
        yield

    with pytest.raises(InputError, match="does not exist"):
        write_video(tmp_path / "absent" / "a.mp4", never(), fps=24)
    with pytest.raises(InputError, match="is a folder"):
        write_video(tmp_path, never(), fps=24)
    with pytest.raises(InputError, match=r"use .*a\.mp4"):
        write_video(tmp_path / "a.json", never(), fps=24)  # would be overwritten by the sidecar
