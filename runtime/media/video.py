"""Video files, written by ffmpeg. Frames are streamed, so a clip is never in memory as a whole; a file gets its name
when it is complete."""

import os
import re
import subprocess
import wave
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np

from ltx2.runtime.errors import InputError, MediaError, NumericsError, reason
from ltx2.runtime.files.atomic import Claim, claimed, growing
from ltx2.runtime.files.paths import check_output
from ltx2.runtime.files.tensors import Array
from ltx2.runtime.media.ffmpeg import REINSTALL, complaint, ffmpeg_program
from ltx2.runtime.media.formats import CRF, FORMATS, MP4, format_of

WAITING = 24  # pictures that ffmpeg may be behind


@dataclass(frozen=True)
class AudioTrack:
    """Sound: float (channels, samples) in [-1, 1], and its samples per second."""

    samples: Array
    sample_rate: int


def check_target(path: Path, *, sound: bool = False) -> None:
    """Check before a clip, or a `sound` alone, is made that it can be encoded. Raises InputError for another suffix,
    MediaError where ffmpeg is missing or lacks an encoder."""
    suffixes, what = ([".wav"], "sounds") if sound else ([*FORMATS], "clips")
    if path.suffix.lower() not in suffixes:
        why = f"{what} are written as {', '.join(suffix[1:] for suffix in suffixes)}"
        raise InputError(f"cannot write {path}", why, f"use {path.with_suffix(suffixes[0])}")
    _check_encoders(ffmpeg_program(), MP4.encoders if sound else format_of(path).encoders)


def encoding_memory(width: int, height: int) -> int:
    """Bytes that ffmpeg takes while it encodes any number of frames (it looks ahead, further with more threads), and
    those of the pictures that wait for it. Measured at 768x512 and 1920x1088 with 1, 3 and 18 threads."""
    threads = min(3 * (os.cpu_count() or 1) // 2, height // 32)  # as libx264 chooses
    return 40_000_000 + width * height * (250 + 15 * threads + 3 * WAITING)


@contextmanager
def video_writer(
    path: Path,
    *,
    fps: float,
    audio: AudioTrack | None = None,
    crf: int = CRF,
    comment: str = "",
    claim: Claim | None = None,
) -> Iterator["VideoWriter"]:
    """Write a clip picture by picture, in the format of its suffix (formats.py), in BT.709, with stereo sound where
    there is one and the format has it. `crf` is H.264's quality, 0 lossless to 51 worst; `comment` a text inside the
    file that `source.read_comment` reads. All frames and all samples are kept, whichever end first.

    The file is `<name>.partial`, of the caller's `claim` or an own one, until the block ends without an exception; then
    it replaces any file of that name.

    Raises InputError for unusable arguments, NumericsError for sound that is not finite, MediaError where writing a
    picture or ending the file fails.
    """
    check_output(path)
    check_target(path)
    kind = format_of(path)
    options = ["-f", "rawvideo", "-pixel_format", "rgb24", "-framerate", str(_rate(fps)), "-i", "pipe:0"]
    with ExitStack() as stack:
        with _explained(path):
            log = stack.enter_context(TemporaryFile())  # a pipe could fill up and block ffmpeg
            about, sound = stack.enter_context(TemporaryFile()), stack.enter_context(TemporaryFile())
            _write_comment(about, comment)
            options += ["-f", "ffmetadata", "-i", f"pipe:{about.fileno()}"]
            if audio is not None and kind.audio:
                _write_wav(sound, audio)
                options += ["-i", f"pipe:{sound.fileno()}", "-c:a", kind.audio, *kind.audio_options, "-ac", "2"]
            claim = claim or stack.enter_context(claimed(path.absolute()))
        quality = ["-crf", str(crf)] if kind.crf else []
        options += ["-c:v", kind.video, *kind.options, *quality, "-vf", kind.filters]
        # No -shortest: sound is often a little shorter than the picture, which must not lose frames.
        options += ["-map_metadata", "1", "-movflags", "+faststart", "-f", kind.container, str(claim.partial)]
        writer = VideoWriter(path, options, log, (about, sound))
        stack.callback(writer.stop)
        yield writer
        writer.finish()
        with _explained(path):
            claim.publish()


class VideoWriter:
    """A clip that is being written (see `video_writer`). ffmpeg starts with the first picture, which has the size; a
    thread hands pictures over while the next ones are made."""

    def __init__(self, path: Path, options: list[str], log: IO[bytes], beside: tuple[IO[bytes], ...]) -> None:
        self._path = path
        self._options = options
        self._log = log
        self._beside = beside  # files that ffmpeg reads too
        self._shape: tuple[int, ...] = ()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = ThreadPoolExecutor(1, "ltx2-frames")
        self._waiting: deque[Future[None]] = deque()

    def write(self, frames: Array) -> None:
        """Add a picture, uint8 (H, W, 3), height and width even, or a group of them, (F, H, W, 3); the caller must not
        change them afterwards. Waits where ffmpeg is `WAITING` pictures behind."""
        for picture in frames if frames.ndim == 4 else (frames,):
            self._shape = self._shape or picture.shape
            _check_picture(picture, self._shape)
            self._process = self._process or self._start()
            self._waiting.append(self._thread.submit(self._send, self._process, picture))
            self._wait(WAITING)

    def finish(self) -> None:
        """No more pictures: wait for ffmpeg to write what it holds."""
        if self._process is None:
            raise InputError(f"cannot write {self._path}", "there are no frames", "generate at least one frame")
        self._wait(0)
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            raise self._failure() from None
        if self._process.wait() != 0:
            raise self._failure()

    def stop(self) -> None:
        """Kill ffmpeg if it still runs."""
        if self._process is not None and self._process.stdin is not None:
            self._process.kill()
            self._process.wait()
            self._thread.shutdown(cancel_futures=True)
            with suppress(BrokenPipeError):
                self._process.stdin.close()

    def _wait(self, pictures: int) -> None:
        """Wait until at most so many pictures are still to be handed over."""
        while len(self._waiting) > pictures:
            try:
                self._waiting.popleft().result()
            except BrokenPipeError:
                raise self._failure() from None

    @staticmethod
    def _send(process: "subprocess.Popen[bytes]", picture: Array) -> None:
        assert process.stdin is not None
        process.stdin.write(np.ascontiguousarray(picture).data)

    def _start(self) -> subprocess.Popen[bytes]:
        height, width = self._shape[:2]
        command = [ffmpeg_program(), "-hide_banner", "-loglevel", "error", "-y", "-video_size", f"{width}x{height}"]
        shared = tuple(file.fileno() for file in self._beside)
        with _explained(self._path):
            # In a session of its own: Ctrl-C reaches us alone, and we end it.
            return subprocess.Popen(
                [*command, *self._options],
                stdin=subprocess.PIPE, stderr=self._log, pass_fds=shared, start_new_session=True,
            )  # fmt: skip

    def _failure(self) -> MediaError:
        """ffmpeg's complaint, once it has ended."""
        assert self._process is not None
        status = self._process.wait()
        self._log.seek(0)
        ended = f"ffmpeg was ended by signal {-status}" if status < 0 else f"ffmpeg ended with {status}"
        why = complaint(self._log.read().decode(errors="replace"), ended)
        return MediaError(f"cannot write {self._path}", why, "check the free space")


def _rate(fps: float) -> Fraction:
    """Whole and decimal rates exactly; 24000/1001 from its nearest float."""
    if not 0 < fps < 1000:
        raise InputError(f"{fps} frames per second cannot be written", "it must be between 0 and 1000", "use 24")
    return Fraction(fps).limit_denominator(1001)


def _check_picture(picture: Array, shape: tuple[int, ...]) -> None:
    """Raises InputError unless a picture is uint8 of `shape`, the first one's: (H, W, 3), height and width even."""
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


def write_wav(path: Path, audio: AudioTrack, claim: Claim | None = None) -> None:
    """Write a 16-bit WAV file; `claim` and errors as in `video_writer`."""
    with _explained(path), growing(path.absolute(), claim) as partial, partial.open("w+b") as file:
        _write_wav(file, audio)


def _write_comment(file: IO[bytes], text: str) -> None:
    """In the form that ffmpeg reads: special characters after a backslash."""
    escaped = re.sub(r"([=;#\\\n])", r"\\\1", text)
    file.write(f";FFMETADATA1\ncomment={escaped}\n".encode() if text else b";FFMETADATA1\n")
    file.seek(0)


def _write_wav(file: IO[bytes], audio: AudioTrack) -> None:
    """A 16-bit WAV, then back to its start; samples beyond 1 are clipped."""
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
    with wave.open(file, "wb") as f:
        f.setnchannels(samples.shape[0])
        f.setsampwidth(2)
        f.setframerate(audio.sample_rate)
        f.writeframes(np.rint(samples.T.clip(-1, 1) * 32767).astype("<i2").tobytes())
    file.seek(0)


@cache
def _check_encoders(program: str, encoders: tuple[str, ...]) -> None:
    """Raises MediaError where an ffmpeg, which may be the system's own, lacks one of the encoders."""
    try:
        said = subprocess.run([program, "-hide_banner", "-encoders"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise MediaError(f"{program} cannot be run", reason(error), REINSTALL) from error
    missing = [codec for codec in encoders if f" {codec} " not in said.stdout]
    if missing:
        raise MediaError("ffmpeg cannot encode clips", f"{program} lacks {' and '.join(missing)}", REINSTALL)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raises MediaError in place of OSError."""
    try:
        yield
    except OSError as error:
        raise MediaError(f"cannot write {path}", reason(error), "check permissions and free space") from error
