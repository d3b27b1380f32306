"""How a clip is cut into overlapping tiles, and the weights they are blended with. Weights are linear ramps that sum to
one at every pixel. Along time, every tile after the first starts one latent early: a tile's first latent yields a
single frame, which gets weight 0."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol, overload

import numpy as np

from ltx2.runtime.errors import InputError
from ltx2.runtime.networks.video_vae.config import Size

Weights = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Interval = tuple[int, int]  # start, stop


class Tile(NamedTuple):
    """Pixels along the longer side and frames of a tile, and what neighbours share."""

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
    """Ways to decode a clip of so many latents (frames, height, width): first Lightricks' choice (768 pixels along the
    longer side, the other in proportion, 80 frames), each takes less memory than the last. None: in one piece."""
    found = [_tiling(vae, tile, latents) for tile in TILES]
    return list(dict.fromkeys(found))


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
class Intervals(Sequence[Interval]):
    """Cover `length` with intervals of `size` whose neighbours share `overlap`; the last one may be shorter. Computed
    when asked for: a request that is refused for its size may have billions of them."""

    length: int
    size: int
    overlap: int

    def __len__(self) -> int:
        return max(1, -(-(self.length - self.overlap) // (self.size - self.overlap)))

    @overload
    def __getitem__(self, index: int) -> Interval: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Interval]: ...
    def __getitem__(self, index: int | slice) -> Interval | Sequence[Interval]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        start = range(len(self))[index] * (self.size - self.overlap)
        return start, min(start + self.size, self.length)

    @property
    def ends(self) -> Sequence[int]:
        """Indices of the first one and the last two: none is longer or shorter than all of these."""
        return sorted({0, max(0, len(self) - 2), len(self) - 1})


@dataclass(frozen=True)
class Span:
    """One tile along one axis: the positions it reads, those it makes, and their weights."""

    source: slice
    target: slice
    weights: Weights


@dataclass(frozen=True)
class Tiles:
    """A clip of so many latents (frames, height, width), cut as `tiling` says (None: one piece). Along every axis these
    are the latents [start, stop) of each tile. Raises InputError where the tiling does not fit the scale."""

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

    @cached_property
    def times(self) -> Intervals:
        if self.tiling is None:
            return Intervals(self.latents[0], self.latents[0], 0)
        size, overlap = self.tiling.frames, self.tiling.frame_overlap
        return Intervals(self.latents[0], size // self.vae.temporal_scale, overlap // self.vae.temporal_scale)

    @cached_property
    def rows(self) -> Intervals:
        return self._sides(self.latents[1], self.tiling.height if self.tiling else None)

    @cached_property
    def columns(self) -> Intervals:
        return self._sides(self.latents[2], self.tiling.width if self.tiling else None)

    def _sides(self, length: int, side: int | None) -> Intervals:
        if side is None or self.tiling is None:
            return Intervals(length, length, 0)
        space = self.vae.spatial_scale
        return Intervals(length, side // space, self.tiling.overlap // space)


def spatial_spans(tiles: Sequence[Interval], scale: int) -> list[Span]:
    """Tiles over an axis, `scale` positions made per latent."""
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


def temporal_spans(tiles: Sequence[Interval], scale: int) -> list[Span]:
    """Tiles over time: latents [a, b) cover frames [a * scale, (b - 1) * scale + 1)."""
    spans = []
    for i, (start, stop) in enumerate(tiles):
        first = max(0, start - 1)
        weights = np.ones((stop - first - 1) * scale + 1, np.float32)
        if i > 0:
            rise = (tiles[i - 1][1] - start) * scale + 1
            weights[:rise] = np.arange(rise, dtype=np.float32) / np.float32(rise)
        if i + 1 < len(tiles):
            fall = (stop - tiles[i + 1][0]) * scale
            weights[weights.size - fall :] *= 1 - np.arange(1, fall + 1, dtype=np.float32) / np.float32(fall + 1)
        spans.append(Span(slice(first, stop), slice(first * scale, (stop - 1) * scale + 1), weights))
    return _normalised(spans)


def _normalised(spans: list[Span]) -> list[Span]:
    """Divide by the sum of weights at every position, which is one already unless three tiles meet."""
    total: Weights = np.zeros(spans[-1].target.stop, np.float32)
    for span in spans:
        total[span.target] += span.weights
    return [replace(span, weights=span.weights / total[span.target]) for span in spans]
