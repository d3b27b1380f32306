"""The ffmpeg program that imageio-ffmpeg brings along: where it is, and what it complains of."""

import re

from ltx2.runtime.errors import MediaError, answered

FACTS = ("Input #", "Stream #", "Duration:", "Metadata:", "At least one output")  # no complaints
REINSTALL = "pip install --force-reinstall imageio-ffmpeg, or name another program in IMAGEIO_FFMPEG_EXE"


def ffmpeg_program() -> str:
    """Its path. Raises MediaError where there is none."""
    # Here: what computes and writes no video works without it.
    import imageio_ffmpeg  # type: ignore[import-untyped]

    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise MediaError("ffmpeg was not found", str(error), REINSTALL) from error


def complaint(said: str, otherwise: str = "ffmpeg does not know what it is") -> str:
    """Its first complaint, since what follows comes of it: what the system answered it, in plain words, or its own;
    `otherwise` where there is none."""
    lines = (re.sub(r"^(\[[^]]*\] )+", "", line.strip()) for line in said.splitlines())
    first = next((line for line in lines if line and not line.startswith(FACTS)), otherwise)
    return answered(first) or first
