"""What users give: clips, sounds, and what is none of these."""

import os
import struct
import wave
import zlib
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltx2.runtime.errors import InputError, MediaError
from ltx2.runtime.media.picture import read_picture
from ltx2.runtime.media.source import (
    check_file,
    count_frames,
    media_facts,
    read_comment,
    read_frames,
    read_sound,
    unevenness,
)  # fmt: skip
from tests.support.media import ffmpeg, noise_frames, write_frames

Array = np.ndarray[Any, Any]


def write_sound(path: Path, samples: Array, rate: int = 8000) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[0])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples.T * 32767).astype("<i2").tobytes())
    return path


def test_clip_frame_by_frame(tmp_path: Path) -> None:
    frames = noise_frames(19)
    clip = write_frames(tmp_path / "a@1:2.mkv", frames, "-c:v", "ffv1", "-pix_fmt", "bgr0")
    assert count_frames(clip) == 19
    np.testing.assert_array_equal(np.concatenate(list(read_frames(clip))), frames)
    facts = media_facts(clip)
    assert (facts.width, facts.height, facts.fps, facts.rate) == (30, 20, 12.0, 0)


@pytest.mark.parametrize("rate", ["24000/1001", "30000/1001", "120000/1001", "23.9", "12.5", "25"])
def test_the_rate_is_exact(tmp_path: Path, rate: str) -> None:
    """ffmpeg says 23.98 of 24000/1001."""
    clip = tmp_path / "a.mp4"
    ffmpeg("-f", "lavfi", "-i", f"color=size=32x32:rate={rate}:duration=1", clip)
    assert media_facts(clip).fps == float(Fraction(rate))


def test_frames_that_come_unevenly(tmp_path: Path) -> None:
    """Of ten frames 0 to 5 and the last one stay. Evenly they would be 1.5 apart, and 5 be shown 2.5 later."""
    clip = write_frames(tmp_path / "even.mkv", noise_frames(10), "-c:v", "ffv1", "-pix_fmt", "bgr0")
    uneven = tmp_path / "uneven.mkv"
    chosen = ["-vf", "select='lte(n,5)+eq(n,9)'", "-fps_mode", "vfr", "-c:v", "ffv1", "-pix_fmt", "bgr0"]
    ffmpeg("-i", clip, *chosen, uneven)
    assert unevenness(clip) < 0.05 and count_frames(uneven) == 7
    assert unevenness(uneven) == pytest.approx(2.5 / 1.5, rel=0.02)
    untimed = write_frames(tmp_path / "a.h264", noise_frames(10, 32, 32), "-c:v", "libx264", "-pix_fmt", "yuv420p")
    assert unevenness(untimed) == 0


def test_sound_from_a_second_on(tmp_path: Path) -> None:
    samples = np.sin(np.arange(8000) / 7)[None] * 0.5
    path = write_sound(tmp_path / "a.wav", samples)
    track = read_sound(path, 0.25, 0.5)
    assert track.sample_rate == 8000 and track.samples.shape == (1, 4000)
    np.testing.assert_allclose(track.samples[0], samples[0, 2000:6000], atol=1e-4)
    assert read_sound(path, 0.9, 0.5).samples.shape == (1, 800)
    both = np.stack([samples[0], -samples[0] / 2])
    np.testing.assert_allclose(read_sound(write_sound(path, both)).samples, both, atol=1e-4)


def bomb(width: int, height: int) -> bytes:
    """A small PNG that says that it is huge."""
    header = b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = b"IDAT" + zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


NO_MEDIA = {
    "a web page": ("page.png", b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page, not the file"),
    "an answer": ("answer.wav", b"Entry not found", "is an error message, not the file"),
    "a pointer": ("clip.mp4", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    "nothing": ("none.mp4", b"", "it is empty"),
    "a list of files": ("list.mp4", b"ffconcat version 1.0\nfile /etc/hostname\n", "cannot read"),
    "a playlist": ("list.m3u8", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n", "cannot read"),
    "a drawing": ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "cannot read"),
    "a bomb": ("bomb.png", bomb(60_000, 60_000), "cannot read|too large"),
    "a smaller bomb": ("bomb.png", bomb(12_000, 12_000), "cannot read|too large"),
}


@pytest.mark.parametrize("name", NO_MEDIA)
def test_what_is_no_media(tmp_path: Path, name: str) -> None:
    file, content, said = NO_MEDIA[name]
    path = tmp_path / file
    path.write_bytes(content)
    for read in (media_facts, read_picture, read_sound, count_frames):
        with pytest.raises(InputError, match=said) as raised:
            read(path)
        assert not raised.value.why.startswith(("Stream", "Input", "[")) and len(str(raised.value)) < 300
    with suppress(InputError, MediaError):
        assert read_comment(path) == ""


def test_a_drawing_is_no_web_page(tmp_path: Path) -> None:
    """Not every ffmpeg reads one."""
    path = tmp_path / "a.svg"
    path.write_bytes(b"<?xml version='1.0'?>\n<!-- x -->\n<svg xmlns='http://www.w3.org/2000/svg'/>")
    check_file(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name, said in ((".", "it is a folder"), ("pipe.png", "it is a pipe"), ("none.png", "no such file")):
        for read in (media_facts, read_picture, read_sound, count_frames):
            with pytest.raises(InputError, match=said):
                read(tmp_path / name)


def test_large_frames_come_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write_frames(tmp_path / "a.mkv", noise_frames(5))
    assert [len(group) for group in read_frames(clip)] == [5]
    monkeypatch.setattr("ltx2.runtime.media.source.GROUP_BYTES", 1)
    assert [len(group) for group in read_frames(clip)] == [1] * 5


def test_a_name_is_never_an_option_or_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("-i.png", "http:x.png", "concat:x.png"):
        frames = noise_frames(1)
        write_frames(tmp_path / "plain.png", frames).rename(tmp_path / name)
        np.testing.assert_array_equal(read_picture(Path(name)), frames[0])
    with pytest.raises(InputError, match="no such file"):
        read_picture(Path("https://example.org/a.png"))


def test_the_wrong_kind(tmp_path: Path) -> None:
    sound = write_sound(tmp_path / "a.wav", np.zeros((1, 800)))
    with pytest.raises(InputError, match="has no picture"):
        read_picture(sound)
    with pytest.raises(InputError, match="has no sound"):
        read_sound(write_frames(tmp_path / "a.png", noise_frames(1)))
