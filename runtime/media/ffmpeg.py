"""The ffmpeg program that imageio-ffmpeg brings along: its path, a run of it, and its complaints."""

import re
import subprocess
from typing import NamedTuple

import imageio_ffmpeg  # type: ignore[import-untyped]

from ltx2.runtime.errors import MediaError, answered

FACTS = ("Input #", "Stream #", "Duration:", "Metadata:", "At least one output")  # begin lines that complain of nothing
REINSTALL = "pip install --force-reinstall imageio-ffmpeg, or name another program in IMAGEIO_FFMPEG_EXE"


def ffmpeg_program() -> str:
    """Its path. Raises MediaError where there is none."""
    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise MediaError("ffmpeg was not found", str(error), REINSTALL) from error


class Ran(NamedTuple):
    """A finished run: exit status, standard output, standard error."""

    status: int
    out: bytes
    said: str


def run_ffmpeg(*arguments: str, data: bytes = b"") -> Ran:
    """Run it to its end; `data` is its standard input. Raises MediaError where there is no ffmpeg."""
    command = [ffmpeg_program(), "-hide_banner", *arguments]
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    return Ran(done.returncode, done.stdout, done.stderr.decode(errors="replace"))


def complaint(said: str, otherwise: str = "ffmpeg does not know what it is") -> str:
    """The first complaint on its standard error, since the next ones follow from it: the system's answer in plain
    words, or ffmpeg's own; `otherwise` where there is none."""
    lines = (re.sub(r"^(\[[^]]*\] )+", "", line.strip()) for line in said.splitlines())
    first = next((line for line in lines if line and not line.startswith(FACTS)), otherwise)
    if first.startswith("Format not on whitelist"):  # and then names a hundred
        return "it is of a format that is not read"
    return answered(first) or first
