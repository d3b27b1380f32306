"""Stand-ins for ffmpeg: the real program behind a script that makes it fail as a user's can."""

from pathlib import Path

import imageio_ffmpeg  # type: ignore[import-untyped]
import pytest

# Arguments are the real program's; what it writes is the last of them.
FAILING = {
    "has no space left": '[[ "$*" == *-encoders* ]] && exec "$FFMPEG" "$@"; exec "$FFMPEG" "${@:1:$#-1}" /dev/full',
    "lacks libx264": '"$FFMPEG" "$@" | grep -v libx264',
}


def ffmpeg_that(monkeypatch: pytest.MonkeyPatch, folder: Path, fails: str) -> None:
    """From now on, the ffmpeg of this process and of those it starts fails in that way."""
    program = folder / "ffmpeg"
    program.write_text(f"#!/bin/bash\nFFMPEG={imageio_ffmpeg.get_ffmpeg_exe()}\n{FAILING[fails]}\n")
    program.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
