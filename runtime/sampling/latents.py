"""Latent grids: sizes, token order and positions of the video and audio a clip is made of.

One frame rate serves positions, audio length and the written file: mixing 24 and 25 breaks the sync."""

from dataclasses import dataclass
from math import prod

import mlx.core as mx
import numpy as np

from ltx2.runtime.errors import InputError
from ltx2.runtime.layers.rope import Positions
from ltx2.runtime.streams import Streams

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
class Segment:
    """A run of a stream's tokens, by the name of its noise. `shape` is that of its latents, (1, C, F, H, W) or
    (1, A, T, 16). `noisy`: some of its tokens start with noise in them.

    Tokens and latents are row-contiguous. A matrix product of a transposed view may be summed in another order (by
    OpenBLAS with AVX-512, for example), so values read from a file would not give the same bits as those computed."""

    name: str
    shape: tuple[int, ...]
    noisy: bool = True

    @property
    def tokens(self) -> int:
        return prod(self.shape[2:5]) if len(self.shape) == 5 else self.shape[2]

    def to_tokens(self, latents: mx.array) -> mx.array:
        """Latents shaped `shape` -> (1, tokens, channels): a picture's frame by frame and row by row; of a sound the
        features are channel-major."""
        if len(self.shape) == 5:
            return mx.contiguous(latents.transpose(0, 2, 3, 4, 1).flatten(1, 3))
        return mx.contiguous(latents.transpose(0, 2, 1, 3).flatten(2))

    def from_tokens(self, tokens: mx.array) -> mx.array:
        """Inverse of `to_tokens`."""
        batch, channels, *rest = self.shape
        if len(self.shape) == 5:
            return mx.contiguous(tokens.reshape(batch, *rest, channels).transpose(0, 4, 1, 2, 3))
        return mx.contiguous(tokens.reshape(batch, rest[0], channels, rest[1]).transpose(0, 2, 1, 3))


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
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width of the video's latents."""
        return self.frames, self.height, self.width

    @property
    def frame_tokens(self) -> int:
        """Of one latent frame of the video."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """Of the video."""
        return self.frames * self.frame_tokens

    @property
    def segments(self) -> Streams[Segment]:
        """Each stream's own tokens."""
        return Streams(Segment("video", self.video_shape), Segment("audio", self.audio_shape))


def as_numpy(latents: Streams[mx.array]) -> dict[str, np.ndarray]:
    """Latents by stream, contiguous: the safetensors library needs them so."""
    return {name: np.array(value, order="C") for name, value in latents.items()}


def audio_latent_count(frames: int, fps: float, scales: Scales) -> int:
    """Audio latents of a clip: seconds times the latent rate, rounded half to even, at least one."""
    return max(1, round(frames / fps * scales.audio_rate))


def video_positions(grid: Grid, fps: float, scales: Scales) -> Positions:
    """(3, tokens): midpoints of every token's span in seconds, pixel rows and pixel columns."""
    times = _causal_midpoints(grid.frames, scales.temporal) / np.float32(fps)
    return spread_positions(times, grid.height, grid.width, scales.spatial)


def spread_positions(times: np.ndarray, height: int, width: int, scale: int) -> Positions:
    """(3, tokens) of pictures at `times` (frames,), in seconds: `height` x `width` tokens of `scale` pixels each."""
    rows, columns = ((np.arange(n, dtype=np.float32) + 0.5) * scale for n in (height, width))
    return np.stack(np.meshgrid(times, rows, columns, indexing="ij")).reshape(3, -1).astype(np.float32)


def audio_positions(grid: Grid, scales: Scales) -> Positions:
    """(1, tokens): midpoints of every audio latent's span in seconds."""
    midpoints = _causal_midpoints(grid.audio_frames, scales.audio_temporal)
    return (midpoints * np.float32(scales.audio_hop))[None].astype(np.float32)


def causal_edges(count: int, factor: int) -> np.ndarray:
    """Where latents begin and end, in source frames: (count + 1,). The first spans one frame, the others `factor`."""
    return np.maximum(np.arange(count + 1, dtype=np.float32) * factor - (factor - 1), 0)


def _causal_midpoints(count: int, factor: int) -> np.ndarray:
    edges = causal_edges(count, factor)
    return (edges[:-1] + edges[1:]) / 2


@dataclass(frozen=True)
class Sizes:
    """A clip's width and height in pixels, frames, and frames per second."""

    width: int
    height: int
    frames: int
    fps: float

    def check(self, scales: Scales, downscale: int, smallest: int) -> None:
        """Raises InputError, with both nearest valid values, for sizes that cannot be made. `downscale`: a stage's
        largest. `smallest`: pixels of the shortest side that can be decoded."""
        multiple = scales.spatial * downscale
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

    def fitting(self, scales: Scales, downscale: int, smallest: int) -> "Sizes":
        """The nearest sizes that pass `check`, at the same rate: the nearest sides, no more frames."""
        multiple = scales.spatial * downscale
        smallest = -(-smallest // multiple) * multiple
        width, height = (
            min(_nearest(side, multiple, smallest), key=lambda valid: abs(valid - side))
            for side in (self.width, self.height)
        )
        return Sizes(width, height, _nearest(self.frames, scales.temporal, 1)[0], self.fps)

    def grid(self, downscale: int, scales: Scales, channels: int, audio_channels: int) -> Grid:
        """The latents, with each side divided by `downscale`."""
        return Grid(
            channels,
            (self.frames - 1) // scales.temporal + 1,
            self.height // downscale // scales.spatial,
            self.width // downscale // scales.spatial,
            audio_channels,
            audio_latent_count(self.frames, self.fps, scales),
        )


def _nearest(value: int, step: int, smallest: int) -> list[int]:
    """The valid values around `value`, of smallest, smallest + step, ..."""
    below = value - (value - smallest) % step
    return sorted({max(below, smallest), max(below + step, smallest)})


def _invalid(name: str, value: int, nearest: list[int], why: str) -> InputError:
    return InputError(f"{name} {value} is not valid", why, f"use {' or '.join(str(n) for n in nearest)}")
