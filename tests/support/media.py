"""Pictures, clips and sounds for tests to give."""

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ltx2.runtime.media.ffmpeg import ffmpeg_program
from ltx2.runtime.media.source import media_facts, read_frames
from ltx2.runtime.media.video import AudioTrack, video_writer, write_wav

FFV1 = ("-c:v", "ffv1", "-pix_fmt", "bgr0")  # lossless

Array = np.ndarray[Any, Any]


def ffmpeg(*arguments: str | Path, data: bytes = b"") -> None:
    """Run it on `data` as its input."""
    command = [ffmpeg_program(), "-y", "-loglevel", "error", *map(str, arguments)]
    subprocess.run(command, input=data, check=True)


def noise_frames(count: int = 3, height: int = 20, width: int = 30) -> Array:
    """Frames (F, H, W, 3) uint8 of which no two pixels are alike, always the same."""
    return np.random.default_rng(1).integers(0, 256, (count, height, width, 3), np.uint8)


def write_frames(path: Path, frames: Array, *options: str, rate: float = 12) -> Path:
    """A clip, or a picture, of frames (F, H, W, 3) uint8."""
    _, height, width, _ = frames.shape
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{width}x{height}", "-framerate", f"{rate:g}"]
    ffmpeg(*raw, "-i", "-", *options, path, data=frames.tobytes())
    return path


def write_clip(path: Path, frames: Array, rate: float, sound: AudioTrack | None = None) -> Path:
    """A lossless clip (.mkv), with sound in 16 bits."""
    if sound is None:
        return write_frames(path, frames, *FFV1, rate=rate)
    silent, wav = path.with_suffix(".silent.mkv"), path.with_suffix(".sound.wav")
    write_frames(silent, frames, *FFV1, rate=rate)
    write_wav(wav, sound)
    ffmpeg("-i", silent, "-i", wav, "-c:v", "copy", "-c:a", "pcm_s16le", path)
    for part in (silent, wav):
        part.unlink()
    return path


def write_video(path: Path, frames: Iterable[Array], **options: Any) -> None:
    """A clip as `generate` writes it, of pictures or groups of them; `options` are those of `video_writer`."""
    with video_writer(path, **options) as writer:
        for group in frames:
            writer.write(group)


def read_video(path: Path) -> tuple[Array, float]:
    """All frames (F, H, W, 3) of a clip, and frames per second."""
    return np.concatenate(list(read_frames(path))), media_facts(path).fps
