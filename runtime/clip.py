"""A finished clip in memory, and its files: the video and the sidecar that can repeat it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ltx2.runtime.errors import InputError
from ltx2.runtime.media import AudioTrack, write_video


@dataclass(frozen=True)
class Clip:
    """frames: uint8 (F, H, W, 3); audio: float32 (channels, samples) or None; latents: normalised, float32."""

    frames: np.ndarray
    audio: np.ndarray | None
    sample_rate: int
    fps: float
    latents: Mapping[str, np.ndarray]
    record: Mapping[str, Any]

    def save(self, path: str | Path) -> Path:
        """Write the mp4 and, beside it, the sidecar JSON. Returns the video's path."""
        video = Path(path)
        audio = None if self.audio is None else AudioTrack(self.audio, self.sample_rate)
        write_video(video, [self.frames], fps=self.fps, audio=audio)
        sidecar_path(video).write_text(json.dumps(self.record, indent=2) + "\n")
        return video


def sidecar_path(video: Path) -> Path:
    """clip.mp4 -> clip.json"""
    return video.with_suffix(".json")


def read_sidecar(path: Path) -> tuple[dict[str, Any], Path]:
    """The request recorded in a clip's sidecar, less what it saved, and the model folder it used.

    Raises InputError when the file is not a sidecar.
    """
    try:
        record = json.loads(path.read_text())
        request, model = dict(record["request"]), Path(record["model"]["path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"cannot repeat {path}", why, "use the .json that was written beside a clip") from error
    for name in ("save_embeddings", "save_latents"):
        request.pop(name, None)
    return {name: value for name, value in request.items() if value is not None}, model
