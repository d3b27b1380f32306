"""A finished clip: its frames in memory, what is saved of it, and what is left to do once its video file is there."""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np

from ltx2.runtime.events import Event
from ltx2.runtime.generate.records.places import check_free
from ltx2.runtime.generate.records.sidecar import settings_of, sidecar_path, write_sidecar
from ltx2.runtime.media.video import AudioTrack, video_writer, write_wav
from ltx2.runtime.sampling.latents import Sizes
from ltx2.runtime.streams import Streams

NOTEBOOK_BYTES = 16 << 20


@dataclass(frozen=True, eq=False, repr=False)
class Clip:
    """frames: uint8 (F, H, W, 3), None of a sound alone; audio: float32 (channels, samples) or None; latents:
    normalised, float32; record: what its sidecar holds; state: the file its run could be continued from, which goes
    when it is saved.

    In a notebook it plays. Two clips are equal if they are the same object.
    """

    frames: Any  # np.ndarray or None: who asks for a picture need not ask whether it is there
    audio: np.ndarray | None
    sample_rate: int
    fps: float
    latents: Mapping[str, np.ndarray]
    record: Mapping[str, Any]
    state: Path | None = None

    def __repr__(self) -> str:
        if self.frames is None:
            return f"<Clip: sound at {self.sample_rate} Hz, seed {self.seed}>"
        frames, height, width, _ = self.frames.shape
        sound = "no sound" if self.audio is None else f"sound at {self.sample_rate} Hz"
        return f"<Clip: {frames} frames of {width}x{height}, {frames / self.fps:.1f} s, {sound}, seed {self.seed}>"

    @property
    def seed(self) -> int | None:
        """The seed of its noise; None if the noise came from a file."""
        seed: int | None = self.record["request"]["seed"]
        return seed

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the clip, as mp4, mov or gif by its suffix, and the sidecar JSON beside it. Returns the clip's path.
        Raises InputError where one of them is there already, unless with `overwrite`."""
        video = Path(path)
        if not overwrite:
            check_free(video, "overwrite=True")
        self._write(video)
        write_sidecar(sidecar_path(video), self.record)
        if self.state is not None:
            self.state.unlink(missing_ok=True)
        return video

    def _write(self, video: Path) -> None:
        audio = None if self.audio is None else AudioTrack(self.audio, self.sample_rate)
        if self.frames is None:
            assert audio is not None, "a clip has a picture or sound"
            write_wav(video, audio)
            return
        comment = "" if self.record["request"]["no_metadata"] else json.dumps(settings_of(self.record))
        crf = self.record["request"]["crf"]
        with video_writer(video, fps=self.fps, audio=audio, crf=crf, comment=comment) as writer:
            writer.write(self.frames)

    def _repr_html_(self) -> str:
        """How a notebook shows it: as a player, up to NOTEBOOK_BYTES, which become a part of the notebook."""
        with TemporaryDirectory() as folder:
            video = Path(folder) / "clip.mp4"
            self._write(video)
            if video.stat().st_size > NOTEBOOK_BYTES:
                return f"<code>{escape(repr(self))}</code>: too large to play here; save it"
            data = base64.b64encode(video.read_bytes()).decode()
        if self.frames is None:
            return f'<audio controls src="data:audio/wav;base64,{data}"></audio>'
        _, height, width, _ = self.frames.shape
        return f'<video controls loop width="{width}" height="{height}" src="data:video/mp4;base64,{data}"></video>'


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


@dataclass(frozen=True)
class Followed(Event):
    """Last event of a generation on a machine that does not lead it: its share is done, and the clip is elsewhere."""


class FrameBuffer:
    """All frames of a clip, filled group by group: collecting the groups would need their memory twice."""

    def __init__(self, sizes: Sizes) -> None:
        self.frames = np.empty((sizes.frames, sizes.height, sizes.width, 3), np.uint8)
        self._done = 0

    def write(self, frames: np.ndarray) -> None:
        """Add a group (F, H, W, 3)."""
        self.frames[self._done : self._done + len(frames)] = frames
        self._done += len(frames)
