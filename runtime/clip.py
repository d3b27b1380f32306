"""A finished clip in memory, and its files: the video and the sidecar that can repeat it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ltx2.runtime.errors import InputError
from ltx2.runtime.media import AudioTrack, write_video
from ltx2.runtime.paths import write_text


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
        write_text(sidecar_path(video), json.dumps(self.record, indent=2) + "\n")
        return video


def sidecar_path(video: Path) -> Path:
    """clip.mp4 -> clip.json"""
    return video.with_suffix(".json")


@dataclass(frozen=True)
class Sidecar:
    """What a sidecar says of an earlier run: the options it had, less what it saved, and its model folder with the
    hashes of every component's files."""

    request: Mapping[str, Any]
    model: Path
    files: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Sidecar":
        """Raises InputError when the file is not a sidecar."""
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            request, model, files = dict(record["request"]), Path(record["model"]["path"]), record["model"]["files"]
        except OSError as error:
            raise _not_repeated(path, error.strerror or str(error)) from error
        except (ValueError, KeyError, TypeError) as error:
            raise _not_repeated(path, "it is not the record of a clip") from error
        saved = ("save_embeddings", "save_latents")
        return cls({n: v for n, v in request.items() if v is not None and n not in saved}, model, files)


def _not_repeated(path: Path, why: str) -> InputError:
    return InputError(f"cannot repeat {path}", why, "use the .json that was written beside a clip")
