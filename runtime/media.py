"""Video files, written and read through the ffmpeg program that imageio-ffmpeg brings along.

Frames are streamed, so a clip is never held whole; a file appears under its name only when it is complete."""

import subprocess
import wave
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any, cast

import numpy as np

from ltx2.runtime.errors import InputError, MediaError, NumericsError
from ltx2.runtime.paths import check_output

Array = np.ndarray[Any, np.dtype[Any]]

# Said explicitly: ffmpeg would convert with BT.601, and players take HD for BT.709 and show other colours.
COLOUR = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,format=yuv420p,"
    "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
)


@dataclass(frozen=True)
class Encoding:
    """libx264 settings: quality (0 is lossless, 51 worst) and effort."""

    crf: int = 19
    preset: str = "medium"


DELIVERY = Encoding()


@dataclass(frozen=True)
class AudioTrack:
    """Sound: float (channels, samples) in [-1, 1], and its samples per second."""

    samples: Array
    sample_rate: int


def check_target(path: Path) -> None:
    """Find out before a clip is made what would prevent writing it to `path`. Raises InputError."""
    check_output(path)
    if path.suffix.lower() != ".mp4":
        raise InputError(f"cannot write {path}", "clips are written as mp4", f"use {path.with_suffix('.mp4')}")


def write_video(
    path: Path,
    frames: Iterable[Array],
    *,
    fps: float,
    audio: AudioTrack | None = None,
    encoding: Encoding = DELIVERY,
) -> None:
    """Write an mp4 file: H.264 in BT.709 4:2:0, with stereo AAC when there is sound.

    `frames` yields uint8 pictures (H, W, 3) or groups of them (F, H, W, 3), height and width even. All frames and all
    samples are kept, whichever ends first.

    Raises InputError for unusable arguments, NumericsError for sound that is not finite, MediaError when writing
    fails. What `frames` raises passes through. A file that was there is replaced at the end, or not at all.
    """
    check_target(path)
    rate = _rate(fps)
    pictures = _pictures(frames)
    first = next(pictures, None)
    if first is None:
        raise InputError(f"cannot write {path}", "there are no frames", "generate at least one frame")
    with _explained(path):
        folder = TemporaryDirectory(prefix=".ltx2-", dir=path.absolute().parent)  # same disk: can be renamed
    with folder as name:
        sound, clip = Path(name, "sound.wav"), Path(name, "clip.mp4")
        options = ["-f", "rawvideo", "-pixel_format", "rgb24", "-video_size", f"{first.shape[1]}x{first.shape[0]}"]
        options += ["-framerate", str(rate), "-i", "pipe:0"]
        if audio is not None:
            with _explained(path):
                _write_wav(sound, audio)
            options += ["-i", str(sound), "-c:a", "aac", "-b:a", "192k", "-ac", "2"]
        options += ["-c:v", "libx264", "-crf", str(encoding.crf), "-preset", encoding.preset, "-vf", COLOUR]
        # No -shortest: sound is often a little shorter than the picture, which must not lose frames.
        options += ["-movflags", "+faststart", "-f", "mp4", str(clip)]
        _encode(path, options, chain((first,), pictures))
        with _explained(path):
            clip.replace(path)


def read_video(path: Path) -> tuple[Array, float]:
    """All frames of a video, or the one of a picture, as uint8 (F, H, W, 3), and frames per second.

    Raises InputError when there is no such file, MediaError when it cannot be read.
    """
    import imageio_ffmpeg  # type: ignore[import-untyped]

    if not path.is_file():
        raise InputError(f"cannot read {path}", "there is no such file", "check the path")
    try:
        stream = imageio_ffmpeg.read_frames(path.absolute(), output_params=["-fps_mode", "passthrough"])
        about = next(stream)
        frames = [np.frombuffer(frame, np.uint8) for frame in stream]
    except (OSError, RuntimeError) as error:
        why = " | ".join(line.strip() for line in str(error).splitlines()[-2:])
        raise MediaError(f"cannot read {path}", why, "check that it is a picture or video") from error
    width, height = about["size"]
    return np.stack(frames).reshape(-1, height, width, 3), about["fps"]


def _rate(fps: float) -> Fraction:
    """Whole and decimal rates exactly, and 24000/1001 from its nearest float."""
    if not 0 < fps < 1000:
        raise InputError(f"{fps} frames per second cannot be written", "it must be between 0 and 1000", "use 24")
    return Fraction(fps).limit_denominator(1001)


def _pictures(frames: Iterable[Array]) -> Iterator[Array]:
    """One picture at a time, checked and contiguous."""
    shape = None
    for group in frames:
        for picture in group if group.ndim == 4 else (group,):
            shape = shape or picture.shape
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape != shape or shape[2] != 3:
                raise InputError(
                    "the frames cannot be encoded",
                    f"one is {picture.dtype} {picture.shape}, the first is {shape}",
                    "give uint8 frames (height, width, 3) of one size",
                )
            if shape[0] % 2 or shape[1] % 2:
                raise InputError(
                    f"frames of {shape[1]}x{shape[0]} cannot be encoded",
                    "H.264 with 4:2:0 colour needs an even width and height",
                    f"use {shape[1] // 2 * 2}x{shape[0] // 2 * 2}",
                )
            yield np.ascontiguousarray(picture)


def _write_wav(path: Path, audio: AudioTrack) -> None:
    """16-bit WAV; what is louder than 1 is clipped."""
    samples = audio.samples
    if samples.ndim != 2 or samples.shape[0] not in (1, 2) or audio.sample_rate <= 0:
        raise InputError(
            "the sound cannot be encoded",
            f"it has shape {samples.shape} at {audio.sample_rate} Hz",
            "give float sound (1 or 2 channels, samples) and its sample rate",
        )
    if not np.isfinite(samples).all():
        raise NumericsError(
            "the sound is damaged", "it has NaN or infinite samples", "check the model: ltx2 verify MODEL"
        )
    with wave.open(str(path), "wb") as f:
        f.setnchannels(samples.shape[0])
        f.setsampwidth(2)
        f.setframerate(audio.sample_rate)
        f.writeframes(np.rint(samples.T.clip(-1, 1) * 32767).astype("<i2").tobytes())


def _encode(path: Path, options: list[str], pictures: Iterable[Array]) -> None:
    """Run ffmpeg over the pictures. Raises MediaError with what it said when it fails."""
    command = [_program(), "-hide_banner", "-loglevel", "error", *options]
    with TemporaryFile() as log:  # a pipe could fill up and block ffmpeg while we write to its other one
        with _explained(path):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log)
        try:
            complete = _feed(cast(IO[bytes], process.stdin), pictures)
        except BaseException:
            process.kill()
            raise
        finally:
            status = process.wait()
        if status != 0 or not complete:
            log.seek(0)
            said = log.read().decode(errors="replace").splitlines()[:3]  # the cause first, then what it led to
            why = " | ".join(said) or f"ffmpeg ended with {status}"
            raise MediaError(f"cannot write {path}", why, "check the free space")


def _feed(stdin: IO[bytes], pictures: Iterable[Array]) -> bool:
    """Write every picture and close the pipe; False when ffmpeg closed it first, and its log says why."""
    complete = True
    try:
        for picture in pictures:
            try:
                stdin.write(picture.data)
            except BrokenPipeError:
                complete = False
                break
    finally:
        with suppress(BrokenPipeError):
            stdin.close()
    return complete


def _program() -> str:
    import imageio_ffmpeg  # here: what computes and writes no video works without it

    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise MediaError("ffmpeg was not found", str(error), "pip install --force-reinstall imageio-ffmpeg") from error


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MediaError(f"cannot write {path}", str(error), "check permissions and free space") from error
