"""What users give: pictures, clips, sounds, and what is none of these."""

import os
import struct
import wave
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltx2.runtime.errors import InputError, MediaError
from ltx2.runtime.media.source import (
    compressed,
    count_frames,
    covering,
    media_facts,
    read_comment,
    read_frames,
    read_picture,
    read_sound,
)  # fmt: skip
from tests.support.media import write_frames
from tests.support.parity import require

Array = np.ndarray[Any, Any]


def pictures(count: int = 3, height: int = 20, width: int = 30) -> Array:
    return np.random.default_rng(1).integers(0, 256, (count, height, width, 3), np.uint8)


def write_sound(path: Path, samples: Array, rate: int = 8000) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[0])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples.T * 32767).astype("<i2").tobytes())
    return path


def test_clip_frame_by_frame(tmp_path: Path) -> None:
    frames = pictures(19)
    clip = write_frames(tmp_path / "a@1:2.mkv", frames, "-c:v", "ffv1", "-pix_fmt", "bgr0")
    assert count_frames(clip) == 19
    np.testing.assert_array_equal(np.concatenate(list(read_frames(clip))), frames)
    facts = media_facts(clip)
    assert (facts.width, facts.height, facts.fps, facts.rate) == (30, 20, 12.0, 0)


@pytest.mark.parametrize("suffix", ["png", "bmp"])
def test_picture(tmp_path: Path, suffix: str) -> None:
    frames = pictures(1)
    np.testing.assert_array_equal(read_picture(write_frames(tmp_path / f"a.{suffix}", frames)), frames[0])


def test_alpha_is_dropped_and_grey_becomes_rgb(tmp_path: Path) -> None:
    frames = pictures(1)
    clear = write_frames(tmp_path / "a.png", frames, "-vf", "format=rgba,colorchannelmixer=aa=0.3")
    np.testing.assert_array_equal(read_picture(clear), frames[0])
    grey = read_picture(write_frames(tmp_path / "b.png", frames, "-pix_fmt", "gray"))
    assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 0] == grey[..., 2]).all() and grey.std() > 10


def test_sound_from_a_second_on(tmp_path: Path) -> None:
    samples = np.sin(np.arange(8000) / 7)[None] * 0.5
    path = write_sound(tmp_path / "a.wav", samples)
    track = read_sound(path, 0.25, 0.5)
    assert track.sample_rate == 8000 and track.samples.shape == (1, 4000)
    np.testing.assert_allclose(track.samples[0], samples[0, 2000:6000], atol=1e-4)
    assert read_sound(path, 0.9, 0.5).samples.shape == (1, 800)
    both = np.stack([samples[0], -samples[0] / 2])
    np.testing.assert_allclose(read_sound(write_sound(path, both)).samples, both, atol=1e-4)


@pytest.mark.parametrize("wanted", [(20, 30), (64, 32), (16, 48), (7, 5)])
def test_covering_as_torch_does(wanted: tuple[int, int]) -> None:
    torch = require("torch")
    frames = pictures(2)
    height, width = wanted
    scale = max(height / 20, width / 30)
    size = int(np.ceil(20 * scale)), int(np.ceil(30 * scale))
    tensor = torch.tensor(frames.astype(np.float32)).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(tensor, size, mode="bilinear", align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    want = resized[:, :, top : top + height, left : left + width].permute(0, 2, 3, 1).numpy() / 127.5 - 1
    np.testing.assert_allclose(covering(frames, height, width), want, atol=2e-5)


def test_compressing() -> None:
    (picture,) = pictures(1, 33, 47)
    coarse, fine = compressed(picture, 40), compressed(picture, 5)
    assert coarse.shape == fine.shape == (32, 46, 3)
    errors = [np.abs(made.astype(int) - picture[:32, :46]).mean() for made in (fine, coarse)]
    assert 0 < errors[0] < errors[1]
    assert compressed(picture, 0) is picture


def garbled(path: Path) -> bytes:
    """A JPEG that is cut off in the middle."""
    write_frames(path, pictures(1, 80, 90))
    return path.read_bytes()[: path.stat().st_size // 2]


def bomb(width: int, height: int) -> bytes:
    """A small PNG that says that it is huge."""
    header = b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = b"IDAT" + zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


NO_MEDIA = {
    "a web page": ("page.png", b"<!DOCTYPE html><html><body>Sign in</body></html>", "cannot read"),
    "nothing": ("none.mp4", b"", "it is empty"),
    "a list of files": ("list.mp4", b"ffconcat version 1.0\nfile /etc/hostname\n", "cannot read"),
    "a playlist": ("list.m3u8", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n", "cannot read"),
    "a bomb": ("bomb.png", bomb(60_000, 60_000), "cannot read"),
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
        assert not raised.value.why.startswith(("Stream", "Input", "["))
    with suppress(InputError, MediaError):
        assert read_comment(path) == ""


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name, said in ((".", "it is a folder"), ("pipe.png", "it is a pipe"), ("none.png", "no such file")):
        for read in (media_facts, read_picture, read_sound, count_frames):
            with pytest.raises(InputError, match=said):
                read(tmp_path / name)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_picture_that_is_cut_off_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(garbled(tmp_path / f"a.{suffix}"))
    with pytest.raises(InputError, match="cannot read"):
        read_picture(path)


def test_large_frames_come_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write_frames(tmp_path / "a.mkv", pictures(5))
    assert [len(group) for group in read_frames(clip)] == [5]
    monkeypatch.setattr("ltx2.runtime.media.source.GROUP_BYTES", 1)
    assert [len(group) for group in read_frames(clip)] == [1] * 5


def test_a_name_is_never_an_option_or_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("-i.png", "http:x.png", "concat:x.png"):
        frames = pictures(1)
        write_frames(tmp_path / "plain.png", frames).rename(tmp_path / name)
        np.testing.assert_array_equal(read_picture(Path(name)), frames[0])
    with pytest.raises(InputError, match="no such file"):
        read_picture(Path("https://example.org/a.png"))


def test_the_wrong_kind(tmp_path: Path) -> None:
    sound = write_sound(tmp_path / "a.wav", np.zeros((1, 800)))
    with pytest.raises(InputError, match="has no picture"):
        read_picture(sound)
    with pytest.raises(InputError, match="has no sound"):
        read_sound(write_frames(tmp_path / "a.png", pictures(1)))
