"""A finished clip in memory, and how it is saved."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ltx2.runtime.media import AudioTrack, write_video
from ltx2.runtime.paths import write_text
from ltx2.runtime.sidecar import sidecar_path


@dataclass(frozen=True)
class Clip:
    """frames: uint8 (F, H, W, 3); audio: float32 (channels, samples) or None; latents: normalised, float32;
    record: what its sidecar holds; state: the file its run could be continued from, which goes when it is saved."""

    frames: np.ndarray
    audio: np.ndarray | None
    sample_rate: int
    fps: float
    latents: Mapping[str, np.ndarray]
    record: Mapping[str, Any]
    state: Path | None = None

    def save(self, path: str | Path) -> Path:
        """Write the mp4 and, beside it, the sidecar JSON. Returns the video's path."""
        video = Path(path)
        audio = None if self.audio is None else AudioTrack(self.audio, self.sample_rate)
        write_video(video, [self.frames], fps=self.fps, audio=audio)
        write_text(sidecar_path(video), json.dumps(self.record, indent=2) + "\n")
        if self.state is not None:
            self.state.unlink(missing_ok=True)
        return video
