"""Clips and sounds that users give, and pictures that Pillow cannot read (picture.py), read by ffmpeg.

ffmpeg gets files only: their absolute path behind `file:`, and no other protocol, so that it takes no name for an
option or an address. Frames come through a pipe, some at a time."""

import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np

from ltx2.runtime.errors import InputError, MediaError
from ltx2.runtime.files.foreign import check_delivered
from ltx2.runtime.files.tensors import Array
from ltx2.runtime.media.ffmpeg import complaint, ffmpeg_program, run_ffmpeg
from ltx2.runtime.media.video import AudioTrack

# Without playlists and other lists of files, which could name any file of this computer.
FORMATS = (
    "mov,matroska,avi,flv,asf,ogg,mpeg,mpegts,mpegvideo,m4v,h264,hevc,vvc,ivf,obu,av1,mxf,nut,dv,rm,wtv,mjpeg,"
    "yuv4mpegpipe,gif,apng,webp_anim,jpegxl_anim,wav,w64,aiff,au,caf,mp3,flac,aac,ac3,eac3,dts,amr,ape,wv,tta,tak,"
    "image2,bmp_pipe,dds_pipe,dpx_pipe,exr_pipe,gif_pipe,hdr_pipe,j2k_pipe,jpeg_pipe,jpegxl_pipe,pam_pipe,pcx_pipe,"
    "pgm_pipe,png_pipe,ppm_pipe,psd_pipe,qoi_pipe,sgi_pipe,tiff_pipe,webp_pipe"
)
GROUP = 8  # frames in a group, fewer if they are large
GROUP_BYTES = 400_000_000  # at least one frame
MOST_PIXELS = 100_000_000  # of one frame: a small file can say that it holds a huge picture
OTHER = "name a file that plays elsewhere, or save it as a PNG, MP4 or WAV"
UNTIMED = float(-(2**63))  # ffmpeg's time of a frame that has none
QUIET = ("-loglevel", "error")
FLAGS = "bicubic+accurate_rnd+full_chroma_int"


@dataclass(frozen=True)
class Facts:
    """A media file's own facts. `width` and `height` are 0 without a picture, `fps` is 0 where unknown; `rate` and
    `channels` (1 or 2; more become 2) are its sound's, 0 without one."""

    width: int = 0
    height: int = 0
    fps: float = 0.0
    rate: int = 0
    channels: int = 0


def check_file(path: Path) -> None:
    """Raises InputError unless `path` is a file, and neither an empty one nor what was saved in its place."""
    if path.is_dir():
        raise InputError(f"cannot read {path}", "it is a folder", "name a file in it")
    if not path.exists():
        raise InputError(f"cannot read {path}", "there is no such file", "check the path")
    if not path.is_file():  # reading may wait for ever
        raise InputError(f"cannot read {path}", "it is a pipe or a device", "copy its content into a file")
    if path.stat().st_size == 0:
        raise InputError(f"cannot read {path}", "it is empty", OTHER)
    check_delivered(path)


def check_pixels(path: Path, width: int, height: int) -> None:
    """Raises InputError for a picture with too many pixels."""
    if width * height > MOST_PIXELS:
        why = f"it says that it is {width}x{height}, more than {MOST_PIXELS // 10**6} million pixels"
        raise InputError(f"{path} is too large", why, "make it smaller first")


def media_facts(path: Path) -> Facts:
    """The facts of the file's first picture and first sound. Raises InputError for a file that ffmpeg cannot read."""
    check_file(path)
    said = run_ffmpeg(*_input(path)).said
    streams = re.findall(r"^ *Stream #\d+:\d+.*$", said, re.MULTILINE)
    video = next((line for line in streams if " Video: " in line), "")
    audio = next((line for line in streams if " Audio: " in line), "")
    size = re.search(r" (\d+)x(\d+)[ ,\[]", f"{video},")
    fps, rate = re.search(r"([\d.]+k?) (?:fps|tbr)", video), re.search(r"(\d+) Hz", audio)
    if not size and not rate:
        raise InputError(f"cannot read {path}", complaint(said), OTHER)
    width, height = (int(n) for n in size.groups()) if size else (0, 0)
    channels = 0 if not rate else 1 if ", mono" in audio else 2
    check_pixels(path, width, height)
    return Facts(width, height, _frame_rate(fps[1]) if fps else 0.0, int(rate[1]) if rate else 0, channels)


def first_frame(path: Path) -> Array:
    """A picture, or a clip's first frame: uint8 (H, W, 3), rotated as its file says; alpha is dropped, grey becomes
    RGB. Raises InputError, also for a damaged one."""
    if not media_facts(path).width:
        raise InputError(f"{path} has no picture", "it holds sound alone", "name a picture")
    # Without "explode", damaged parts become grey, without a word.
    (picture,) = _frames(path, ["-frames:v", "1"], ["-err_detect", "explode"])
    return picture


def read_frames(path: Path) -> Iterator[Array]:
    """A clip's frames in groups, uint8 (n, H, W, 3), each once. Raises InputError."""
    frames = _frames(path, ["-fps_mode", "passthrough"])
    while group := list(islice(frames, 1)):
        group += islice(frames, max(0, min(GROUP, GROUP_BYTES // group[0].nbytes) - 1))
        yield np.stack(group)


def count_frames(path: Path) -> int:
    """Frames of a clip, by reading it. Raises InputError."""
    return sum(1 for _ in _frames(path, ["-fps_mode", "passthrough"]))


def count_packets(path: Path) -> int:
    """Frames that a clip's file lists; decodes nothing. Raises InputError."""
    return len(_times(path))


def unevenness(path: Path) -> float:
    """How far frames of a clip are shown from their place at an even rate, at most, in frames; 0 where the file has no
    times. Decodes nothing. Raises InputError."""
    times = _times(path)
    if len(times) < 3 or times[0] == UNTIMED or not (step := (times[-1] - times[0]) / (len(times) - 1)) > 0:
        return 0.0
    return float(np.abs(times - times[0] - step * np.arange(len(times))).max() / step)


def _times(path: Path) -> Array:
    """The times at which a clip's frames are shown, sorted: float64 (F,) in the file's own unit; UNTIMED first where it
    has none."""
    check_file(path)
    packets = run_ffmpeg(*QUIET, *_input(path), "-map", "0:v:0", "-c", "copy", "-f", "framecrc", "-").out
    # A line a packet: stream, decoding time, time, duration, ...
    lines = (line.split(b",") for line in packets.splitlines() if not line.startswith(b"#"))
    return np.sort(np.array([int(line[2]) for line in lines], np.float64))


def read_sound(path: Path, start: float = 0.0, seconds: float | None = None) -> AudioTrack:
    """A file's sound from second `start` on, at its own rate; at most `seconds` of it, fewer where the file ends. More
    than two channels become two. Raises InputError where there is no sound."""
    facts = media_facts(path)
    if not facts.rate:
        raise InputError(f"{path} has no sound", "it holds no sound track", "name a file with sound")
    cut = ["-ss", f"{start:.6f}"] if start else []
    length = [] if seconds is None else ["-t", f"{seconds + 1:.6f}"]
    made = ["-vn", "-map", "0:a:0", "-ac", str(facts.channels), "-f", "f32le", "-c:a", "pcm_f32le", "pipe:1"]
    done = run_ffmpeg(*QUIET, *cut, *_input(path), *length, *made)
    if done.status:
        raise InputError(f"cannot read {path}", complaint(done.said), OTHER)
    samples = np.frombuffer(done.out, "<f4").reshape(-1, facts.channels).T
    if seconds is not None:
        samples = samples[:, : round(seconds * facts.rate)]
    return AudioTrack(np.ascontiguousarray(samples), facts.rate)


def read_comment(path: Path) -> str:
    """The comment inside a media file, empty if there is none. Raises InputError as `check_file`, MediaError for a file
    that ffmpeg cannot read."""
    check_file(path)
    done = run_ffmpeg(*QUIET, *_input(path), "-f", "ffmetadata", "-")
    if done.status:
        raise MediaError(f"cannot read {path}", complaint(done.said), "check that it is a picture or video")
    # key=value, the value's special characters (a line's end among them) after a backslash
    found = re.search(r"^comment=((?:\\.|[^\\\n])*)$", done.out.decode(), re.MULTILINE | re.DOTALL)
    return re.sub(r"\\(.)", r"\1", found[1], flags=re.DOTALL) if found else ""


def _input(path: Path) -> list[str]:
    """ffmpeg's arguments that read a file, within limits."""
    limits = ["-format_whitelist", FORMATS, "-protocol_whitelist", "file,pipe", "-max_pixels", str(MOST_PIXELS)]
    return [*limits, "-i", f"file:{path.absolute()}"]


def _frames(path: Path, options: list[str], reading: Sequence[str] = ()) -> Iterator[Array]:
    """Frames, uint8 (H, W, 3), as they are decoded: at least one, all of one size. It is read off the frames, since
    rotated ones have another than the file says. Raises InputError."""
    check_file(path)
    command = [ffmpeg_program(), "-hide_banner", *QUIET, *reading, *_input(path)]
    command += ["-map", "0:v:0", *options, "-sws_flags", FLAGS, "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24"]
    shape: tuple[int, ...] | None = None
    with _running([*command, "pipe:1"], path) as pipe:
        while (frame := _read_ppm(pipe)) is not None:
            shape = shape or frame.shape
            if frame.shape != shape:
                why = f"one frame is {shape[1]}x{shape[0]}, another {frame.shape[1]}x{frame.shape[0]}"
                raise InputError(f"cannot use {path}", why, "make all frames one size first")
            yield frame
    if shape is None:
        raise InputError(f"cannot read {path}", "no frame of it can be decoded", OTHER)


@contextmanager
def _running(command: list[str], path: Path) -> Iterator[IO[bytes]]:
    """A program's standard output while it runs. Raises InputError where it fails."""
    with TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
        assert process.stdout is not None
        try:
            yield process.stdout
            if process.wait():
                log.seek(0)
                raise InputError(f"cannot read {path}", complaint(log.read().decode(errors="replace")), OTHER)
        finally:
            process.kill()
            process.stdout.close()
            process.wait()


def _read_ppm(pipe: IO[bytes]) -> Array | None:
    """The next picture of a stream, uint8 (H, W, 3); None at its end."""
    if pipe.readline() != b"P6\n":
        return None
    width, height = (int(n) for n in pipe.readline().split())
    pipe.readline()
    data = pipe.read(width * height * 3)
    return np.frombuffer(data, np.uint8).reshape(height, width, 3) if len(data) == width * height * 3 else None


def _frame_rate(said: str) -> float:
    """Frames per second, from ffmpeg's two decimals: 23.98 is 24000/1001, and so for the other rates of television."""
    rate = float(said.removesuffix("k")) * (1000 if said.endswith("k") else 1)
    television = round(rate * 1.001) * 1000 / 1001
    return television if f"{television:.2f}" == said else rate
