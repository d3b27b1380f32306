"""Latent grids: sizes, token order and positions of the video and audio a clip is made of.

One frame rate serves positions, audio length and the written file: mixing 24 and 25 breaks the sync."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from ltx2.runtime.errors import InputError
from ltx2.runtime.layers.rope import Positions

AUDIO_FREQUENCIES = 16  # latent mel bins per audio latent


@dataclass(frozen=True)
class Scales:
    """What one latent stands for, from the configurations of the two VAEs."""

    spatial: int  # pixels per latent, each side
    temporal: int  # frames per latent (the first latent holds one frame)
    audio_hop: float  # seconds per mel frame
    audio_temporal: int  # mel frames per audio latent (the first holds one)

    @property
    def audio_rate(self) -> float:
        """Audio latents per second."""
        return 1 / (self.audio_hop * self.audio_temporal)


@dataclass(frozen=True)
class Grid:
    """The latents of one stage: video (1, channels, frames, height, width), audio (1, audio_channels, T, 16)."""

    channels: int
    frames: int
    height: int
    width: int
    audio_channels: int
    audio_frames: int

    @property
    def video_shape(self) -> tuple[int, ...]:
        return (1, self.channels, self.frames, self.height, self.width)

    @property
    def audio_shape(self) -> tuple[int, ...]:
        return (1, self.audio_channels, self.audio_frames, AUDIO_FREQUENCIES)

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width


class Scaled(Protocol):
    """A stage, as far as its size goes: the sides are the clip's divided by `downscale`."""

    @property
    def downscale(self) -> int: ...


@dataclass(frozen=True)
class Sizes:
    """What a complete request makes: pixels, frames, rate."""

    width: int
    height: int
    frames: int
    fps: float

    def check(self, scales: Scales, stages: Sequence[Scaled], smallest: int) -> None:
        """`smallest`: pixels of the shortest side that can be decoded. Raises InputError naming both nearest valid
        values."""
        multiple = scales.spatial * max((stage.downscale for stage in stages), default=1)
        smallest = -(-smallest // multiple) * multiple
        for name, value in (("width", self.width), ("height", self.height)):
            if value < smallest or value % multiple:
                why = f"it must be a multiple of {multiple}, at least {smallest}"
                raise _invalid(name, value, _nearest(value, multiple, smallest), why)
        step = scales.temporal
        if self.frames < 1 or (self.frames - 1) % step:
            raise _invalid("frames", self.frames, _nearest(self.frames, step, 1), f"it must be {step}k+1")
        if not 1 <= self.fps <= 240:
            raise InputError(f"fps {self.fps:g} is not valid", "it must be between 1 and 240", "use 24, 25 or 30")

    def grid(self, stage: Scaled, scales: Scales, channels: int, audio_channels: int) -> Grid:
        """The latent grid of one stage."""
        return Grid(
            channels,
            (self.frames - 1) // scales.temporal + 1,
            self.height // stage.downscale // scales.spatial,
            self.width // stage.downscale // scales.spatial,
            audio_channels,
            audio_latent_count(self.frames, self.fps, scales),
        )


def _nearest(value: int, step: int, smallest: int) -> list[int]:
    """The valid values around `value`, of smallest, smallest + step, ..."""
    below = value - (value - smallest) % step
    return sorted({max(below, smallest), max(below + step, smallest)})


def _invalid(name: str, value: int, nearest: list[int], why: str) -> InputError:
    return InputError(f"{name} {value} is not valid", why, f"use {' or '.join(str(n) for n in nearest)}")


@dataclass(frozen=True)
class Latents:
    """Normalised latents, float32, shaped as `Grid` says."""

    video: mx.array
    audio: mx.array

    def to_tokens(self) -> "Latents":
        """Video (1, F*H*W, C), frame by frame, rows then columns; audio (1, T, A*16), channel-major."""
        video = self.video.transpose(0, 2, 3, 4, 1).flatten(1, 3)
        return Latents(video, self.audio.transpose(0, 2, 1, 3).flatten(2))

    def from_tokens(self, grid: Grid) -> "Latents":
        """Inverse of `to_tokens`."""
        video = self.video.reshape(1, grid.frames, grid.height, grid.width, grid.channels).transpose(0, 4, 1, 2, 3)
        audio = self.audio.reshape(1, grid.audio_frames, grid.audio_channels, AUDIO_FREQUENCIES)
        return Latents(video, audio.transpose(0, 2, 1, 3))

    def as_numpy(self) -> Mapping[str, np.ndarray]:
        """Contiguous, as the safetensors library needs them."""
        return {"video": np.array(self.video, order="C"), "audio": np.array(self.audio, order="C")}


def audio_latent_count(frames: int, fps: float, scales: Scales) -> int:
    """Audio latents of a clip: seconds times the latent rate, rounded half to even, at least one."""
    return max(1, round(frames / fps * scales.audio_rate))


def video_positions(grid: Grid, fps: float, scales: Scales) -> Positions:
    """(3, tokens): midpoints of every token's span in seconds, pixel rows and pixel columns."""
    time = _causal_midpoints(grid.frames, scales.temporal) / np.float32(fps)
    rows = (np.arange(grid.height, dtype=np.float32) + 0.5) * scales.spatial
    columns = (np.arange(grid.width, dtype=np.float32) + 0.5) * scales.spatial
    return np.stack(np.meshgrid(time, rows, columns, indexing="ij")).reshape(3, -1).astype(np.float32)


def audio_positions(grid: Grid, scales: Scales) -> Positions:
    """(1, tokens): midpoints of every audio latent's span in seconds."""
    midpoints = _causal_midpoints(grid.audio_frames, scales.audio_temporal)
    return (midpoints * np.float32(scales.audio_hop))[None].astype(np.float32)


def _causal_midpoints(count: int, factor: int) -> np.ndarray:
    """Midpoints of latents in source frames; the first latent spans one frame, the others `factor` each."""
    edges = np.maximum(np.arange(count + 1, dtype=np.float32) * factor - (factor - 1), 0)
    return (edges[:-1] + edges[1:]) / 2
