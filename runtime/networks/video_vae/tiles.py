"""How a clip is cut into overlapping tiles, and the weights they are blended with. Weights are linear ramps that sum to
one at every pixel. Along time, every tile after the first starts one latent early: a tile's first latent yields a
single frame, which gets weight 0."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from ltx2.runtime.errors import InputError
from ltx2.runtime.networks.video_vae.config import Size

Weights = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Interval = tuple[int, int]  # start, stop


class Tile(NamedTuple):
    """Pixels along a tile's longer side, and its frames; neighbours share the overlaps."""

    side: int
    overlap: int
    frames: int
    frame_overlap: int


# Lightricks' tiles, then smaller ones: halving a side or the frames halves the memory, and costs time for overlaps.
TILES = (
    Tile(768, 64, 80, 24),
    Tile(512, 64, 80, 24),
    Tile(512, 64, 48, 16),
    Tile(384, 64, 48, 16),
    Tile(384, 64, 32, 8),
    Tile(256, 64, 32, 8),
    Tile(256, 64, 24, 8),
)


class Scaled(Protocol):
    """Pixels and frames per latent."""

    @property
    def spatial_scale(self) -> int: ...
    @property
    def temporal_scale(self) -> int: ...


@dataclass(frozen=True)
class Tiling:
    """Largest tile and the overlap of neighbours, in pixels and frames; multiples of the latents' scale."""

    height: int
    width: int
    overlap: int
    frames: int
    frame_overlap: int

    def __post_init__(self) -> None:
        spatial = 0 <= self.overlap < min(self.height, self.width)
        if not (spatial and 0 <= 2 * self.frame_overlap < self.frames):
            raise InputError(
                f"{self} cannot be used",
                "tiles must be larger than their overlap, and hold more than two overlaps of frames",
                "choose larger tiles or smaller overlaps",
            )


def tilings(vae: Scaled, latents: Size) -> list[Tiling | None]:
    """Ways to decode a clip of so many latents (frames, height, width), each in less memory than the last; the first is
    Lightricks' choice: 768 pixels along the longer side, the other in proportion, 80 frames. None: in one piece."""
    return list(dict.fromkeys(_tiling(vae, tile, latents) for tile in TILES))


def _tiling(vae: Scaled, tile: Tile, latents: Size) -> Tiling | None:
    space, time = vae.spatial_scale, vae.temporal_scale
    frames, height, width = latents
    limit, least = tile.side // space, tile.overlap // space + 1
    longest = max(height, width)
    if longest <= limit:
        covered = frames * time <= tile.frames
        return None if covered else Tiling(height * space, width * space, 0, tile.frames, tile.frame_overlap)
    tile_height, tile_width = (space * max(2, least, round(limit * side / longest)) for side in (height, width))
    return Tiling(tile_height, tile_width, tile.overlap, tile.frames, tile.frame_overlap)


@dataclass(frozen=True)
class Intervals:
    """Cover `length` with intervals of `size` whose neighbours share `overlap`; the last one may be shorter. No list: a
    request that is refused for its size may have billions of them."""

    length: int
    size: int
    overlap: int

    def __len__(self) -> int:
        return max(1, -(-(self.length - self.overlap) // (self.size - self.overlap)))

    def __iter__(self) -> Iterator[Interval]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Interval:
        start = range(len(self))[index] * (self.size - self.overlap)
        return start, min(start + self.size, self.length)

    @property
    def ends(self) -> list[int]:
        """Indices of the first one and the last two: none is longer or shorter than all of these."""
        return sorted({0, max(0, len(self) - 2), len(self) - 1})


@dataclass(frozen=True)
class Span:
    """One tile along one axis: the latents it reads, the pixels or frames it makes, and their weights."""

    source: slice
    target: slice
    weights: Weights


@dataclass(frozen=True)
class Tiles:
    """A clip of so many latents (frames, height, width), cut as `tiling` says (None: one piece): along every axis the
    latents [start, stop) of each tile. Raises InputError where the tiling does not fit the scale."""

    latents: Size
    tiling: Tiling | None
    vae: Scaled

    def __post_init__(self) -> None:
        space, time, t = self.vae.spatial_scale, self.vae.temporal_scale, self.tiling
        if t is None:
            return
        if any(side % space for side in (t.height, t.width, t.overlap)) or t.frames % time or t.frame_overlap % time:
            raise InputError(
                f"{t} cannot be used",
                f"tiles and overlaps must be multiples of {space} pixels and {time} frames",
                "round them up",
            )

    @property
    def times(self) -> Intervals:
        return self._along(0)

    @property
    def rows(self) -> Intervals:
        return self._along(1)

    @property
    def columns(self) -> Intervals:
        return self._along(2)

    def _along(self, axis: int) -> Intervals:
        length, t = self.latents[axis], self.tiling
        if t is None:
            return Intervals(length, length, 0)
        size, overlap = ((t.frames, t.frame_overlap), (t.height, t.overlap), (t.width, t.overlap))[axis]
        scale = self.vae.spatial_scale if axis else self.vae.temporal_scale
        return Intervals(length, size // scale, overlap // scale)


def spatial_spans(tiles: Intervals, scale: int) -> list[Span]:
    """Tiles over rows or columns, `scale` pixels per latent."""
    spans = []
    for i, (start, stop) in enumerate(tiles):
        weights = np.ones((stop - start) * scale, np.float32)
        if i > 0:
            up = _ramp((tiles[i - 1][1] - start) * scale)
            weights[: up.size] *= up
        if i + 1 < len(tiles):
            down = _ramp((stop - tiles[i + 1][0]) * scale)[::-1]
            weights[weights.size - down.size :] *= down
        spans.append(Span(slice(start, stop), slice(start * scale, stop * scale), weights))
    return _normalised(spans)


def _ramp(length: int) -> Weights:
    """From above 0 to below 1."""
    return np.arange(1, length + 1, dtype=np.float32) / np.float32(length + 1)


def temporal_spans(tiles: Intervals, scale: int) -> list[Span]:
    """Tiles over time: latents [a, b) cover frames [a * scale, (b - 1) * scale + 1)."""
    spans = []
    for i, (start, stop) in enumerate(tiles):
        first = max(0, start - 1)
        rise = (tiles[i - 1][1] - start) * scale + 1 if i > 0 else 0
        fall = (stop - tiles[i + 1][0]) * scale if i + 1 < len(tiles) else 0
        weights = time_weights((stop - first - 1) * scale + 1, rise, fall)
        spans.append(Span(slice(first, stop), slice(first * scale, (stop - 1) * scale + 1), weights))
    return _normalised(spans)


def time_weights(length: int, rise: int, fall: int) -> Weights:
    """Trapezoid over a tile's frames or latents, (length,): from 0 up in `rise` steps, down at the end in `fall`."""
    weights = np.ones(length, np.float32)
    weights[:rise] = np.arange(rise, dtype=np.float32) / np.float32(max(1, rise))
    weights[length - fall :] *= 1 - np.arange(1, fall + 1, dtype=np.float32) / np.float32(fall + 1)
    return weights


def _normalised(spans: list[Span]) -> list[Span]:
    """Divide by the sum of weights at every position, which is one already unless three tiles meet."""
    total: Weights = np.zeros(spans[-1].target.stop, np.float32)
    for span in spans:
        total[span.target] += span.weights
    return [replace(span, weights=span.weights / total[span.target]) for span in spans]
