"""A finished clip: its frames in memory, what is saved of it, and what is left to do once its video file is there."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ltx2.runtime.events import Event
from ltx2.runtime.files.atomic import write_text
from ltx2.runtime.generate.sidecar import sidecar_path
from ltx2.runtime.media.video import AudioTrack, write_video, write_wav
from ltx2.runtime.sampling.latents import Sizes
from ltx2.runtime.streams import Streams


@dataclass(frozen=True)
class Clip:
    """frames: uint8 (F, H, W, 3), None of a sound alone; audio: float32 (channels, samples) or None; latents:
    normalised, float32; record: what its sidecar holds; state: the file its run could be continued from, which goes
    when it is saved."""

    frames: Any  # np.ndarray or None: who asks for a picture need not ask whether it is there
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
        if self.frames is None:
            assert audio is not None, "a clip has a picture or sound"
            write_wav(video, audio)
            conclude(video, self.record, self.state)
            return video
        write_video(video, [self.frames], fps=self.fps, audio=audio)
        conclude(video, self.record, self.state)
        return video


@dataclass(frozen=True)
class Sampled(Event):
    """Last event of a generation that is not decoded: the prompts' contexts by name, and the latents if there are any
    yet."""

    contexts: Mapping[str, Streams[mx.array]]
    latents: Streams[mx.array]


@dataclass(frozen=True)
class Generated(Event):
    """Last event of a generation whose clip is in memory."""

    clip: Clip


@dataclass(frozen=True)
class Saved(Event):
    """Last event of a generation that wrote its clip while it decoded it: the mp4 file, and what its sidecar holds."""

    path: Path
    record: Mapping[str, Any]


class FrameBuffer:
    """All frames of a clip, filled group by group: collecting the groups would need their memory twice."""

    def __init__(self, sizes: Sizes) -> None:
        self.frames = np.empty((sizes.frames, sizes.height, sizes.width, 3), np.uint8)
        self._done = 0

    def write(self, frames: np.ndarray) -> None:
        """Add a group (F, H, W, 3)."""
        self.frames[self._done : self._done + len(frames)] = frames
        self._done += len(frames)


def conclude(video: Path, record: Mapping[str, Any], state: Path | None) -> None:
    """Write the sidecar beside a finished video; the state of its run is not needed any more."""
    write_text(sidecar_path(video), json.dumps(record, indent=2) + "\n")
    if state is not None:
        state.unlink(missing_ok=True)
