"""Decoding in overlapping tiles, streamed over time, so that memory stays bounded for any clip.

Tiles overlap by whole latents and are blended with linear ramps whose weights sum to one at every pixel. Along time,
every tile after the first starts one latent early: a tile's first latent yields a single frame, which gets weight 0."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from ltx2.runtime.errors import InputError
from ltx2.runtime.layers.checks import check_finite
from ltx2.runtime.machine.bounded import evaluate

FRAMES_PER_GROUP = 8  # bounds the float32 frames handed out at a time
Weights = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


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


class Frames(Protocol):
    """Frames (F, H, W, 3) that are taken by groups."""

    def __getitem__(self, frames: slice, /) -> mx.array: ...


class VideoDecoder(Scaled, Protocol):
    """What tiling needs of a video VAE: its scales, and decoding (1, C, f, h, w) to (F, H, W, 3)."""

    def decode(self, latents: mx.array) -> mx.array: ...


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


def auto_tiling(vae: Scaled, frames: int, height: int, width: int) -> Tiling | None:
    """Tiles of Lightricks' choice for a clip of so many latents: 768 pixels along the longer side, the other in
    proportion, 80 frames. None when one tile covers the clip."""
    return _tiling(vae, TILES[0], (frames, height, width))


def tilings(vae: Scaled, frames: int, height: int, width: int) -> list[Tiling | None]:
    """Ways to decode a clip of so many latents, the first is `auto_tiling`'s, each takes less memory than the last."""
    found = [_tiling(vae, tile, (frames, height, width)) for tile in TILES]
    return list(dict.fromkeys(found))


def _tiling(vae: Scaled, tile: Tile, latents: tuple[int, int, int]) -> Tiling | None:
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
class Span:
    """One tile along one axis: the latents it reads, the pixels or frames it covers, and their weights."""

    source: slice
    target: slice
    weights: Weights


def intervals(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """Cover `length` with intervals of `size` whose neighbours share `overlap`; the last one may be shorter."""
    step = size - overlap
    count = max(1, -(-(length - overlap) // step))
    return [(i * step, min(i * step + size, length)) for i in range(count)]


def spatial_spans(length: int, size: int, overlap: int, scale: int) -> list[Span]:
    """Tiles of `size` latents over an axis of `length` latents, `scale` pixels each."""
    up = np.arange(1, overlap * scale + 1, dtype=np.float32) / np.float32(overlap * scale + 1)
    spans = []
    for start, stop in intervals(length, size, overlap):
        weights = np.ones((stop - start) * scale, np.float32)
        if start > 0:
            weights[: up.size] *= up
        if stop < length:
            weights[weights.size - up.size :] *= up[::-1]
        spans.append(Span(slice(start, stop), slice(start * scale, stop * scale), weights))
    return _normalised(spans)


def temporal_spans(length: int, size: int, overlap: int, scale: int) -> list[Span]:
    """Tiles of `size` latents over `length` latents: latents [a, b) cover frames [a·scale, (b - 1)·scale + 1)."""
    rise = np.arange(overlap * scale + 1, dtype=np.float32) / np.float32(overlap * scale + 1)
    fall = 1 - np.arange(1, overlap * scale + 1, dtype=np.float32) / np.float32(overlap * scale + 1)
    spans = []
    for start, stop in intervals(length, size, overlap):
        first = max(0, start - 1)
        weights = np.ones((stop - first - 1) * scale + 1, np.float32)
        if start > 0:
            weights[: rise.size] = rise
        if stop < length:
            weights[weights.size - fall.size :] *= fall
        spans.append(Span(slice(first, stop), slice(first * scale, (stop - 1) * scale + 1), weights))
    return _normalised(spans)


def _normalised(spans: list[Span]) -> list[Span]:
    """Divide by the sum of weights at every position, which is one already unless three tiles meet."""
    total: Weights = np.zeros(spans[-1].target.stop, np.float32)
    for span in spans:
        total[span.target] += span.weights
    return [replace(span, weights=span.weights / total[span.target]) for span in spans]


def decode_frames(vae: VideoDecoder, latents: mx.array, tiling: Tiling | None = None) -> Iterator[mx.array]:
    """Decode normalised latents (1, C, f, h, w) to groups of frames (n, H, W, 3) in [0, 1], float32, in order.

    Without `tiling` the clip is decoded in one piece. Raises InputError for tiles that do not fit the latents' scale
    or are too large to decode, NumericsError for frames that are not finite.
    """
    times, rows, columns = _plan(vae, latents, tiling)
    starts = [time.target.start for time in times[1:]] + [times[-1].target.stop]
    pending: mx.array | None = None
    for time, following in zip(times, starts, strict=True):
        part = latents[:, :, time.source]
        final = following - time.target.start
        pending = yield from _finished(_decode_tiles(vae, part, rows, columns), time.weights, pending, final)


def _plan(vae: VideoDecoder, latents: mx.array, tiling: Tiling | None) -> tuple[list[Span], ...]:
    frames, height, width = latents.shape[2:]
    space, time = vae.spatial_scale, vae.temporal_scale
    t = tiling or Tiling(height * space, width * space, 0, frames * time, 0)
    if any(pixels % space for pixels in (t.height, t.width, t.overlap)) or t.frames % time or t.frame_overlap % time:
        raise InputError(
            f"{t} cannot be used",
            f"tiles and overlaps must be multiples of {space} pixels and {time} frames",
            "round them up",
        )
    return (
        temporal_spans(frames, t.frames // time, t.frame_overlap // time, time),
        spatial_spans(height, t.height // space, t.overlap // space, space),
        spatial_spans(width, t.width // space, t.overlap // space, space),
    )


def _decode_tiles(vae: VideoDecoder, latents: mx.array, rows: list[Span], columns: list[Span]) -> Frames:
    """All frames of some latents, blended over space."""
    if len(rows) == len(columns) == 1:
        return vae.decode(latents)
    picture = _Picture(rows, columns)
    for row in rows:
        for column in columns:
            picture.add(vae.decode(latents[..., row.source, column.source]), row, column)
    return picture


class _Picture:
    """Frames as the sum of tiles, in cells: the pieces between the edges of tiles. A tile is added cell by cell, so
    that no more than a cell is ever there twice."""

    def __init__(self, rows: list[Span], columns: list[Span]) -> None:
        self._rows, self._columns = _pieces(rows), _pieces(columns)
        self._cells: dict[tuple[int, int], mx.array] = {}

    def add(self, tile: mx.array, row: Span, column: Span) -> None:
        for i, high in enumerate(self._rows):
            for j, wide in enumerate(self._columns):
                if _within(high, row) and _within(wide, column):
                    self._add_cell((i, j), tile, _Part.of(high, row), _Part.of(wide, column))

    def _add_cell(self, cell: tuple[int, int], tile: mx.array, high: "_Part", wide: "_Part") -> None:
        part = tile[:, high.pixels, wide.pixels] * (high.weights[:, None, None] * wide.weights[:, None])
        self._cells[cell] = part + self._cells[cell] if cell in self._cells else part
        evaluate(self._cells[cell])

    def __getitem__(self, frames: slice) -> mx.array:
        """(n, H, W, 3), float32"""
        lines = (
            mx.concatenate([self._cells[i, j][frames] for j in range(len(self._columns))], axis=2)
            for i in range(len(self._rows))
        )
        return mx.concatenate(list(lines), axis=1)


class _Part(NamedTuple):
    """A piece of an axis inside a tile: the tile's own pixels, and their weights."""

    pixels: slice
    weights: mx.array

    @classmethod
    def of(cls, piece: slice, span: Span) -> "_Part":
        pixels = slice(piece.start - span.target.start, piece.stop - span.target.start)
        return cls(pixels, mx.array(span.weights[pixels]))


def _pieces(spans: list[Span]) -> list[slice]:
    """An axis cut at the edges of all its tiles."""
    cuts = sorted({edge for span in spans for edge in (span.target.start, span.target.stop)})
    return [slice(start, stop) for start, stop in pairwise(cuts)]


def _within(piece: slice, span: Span) -> bool:
    return bool(span.target.start <= piece.start and piece.stop <= span.target.stop)


def _finished(
    frames: Frames, ramp: Weights, pending: mx.array | None, final: int
) -> Generator[mx.array, None, mx.array]:
    """Yield the first `final` frames in groups; return the others, to which the next tile will add."""
    weights = mx.array(ramp)[:, None, None, None]
    start = 0 if pending is None else pending.shape[0]
    for group in [*_groups(0, start), *_groups(start, final)]:
        before = pending[group] if pending is not None and group.start < start else None
        yield _to_unit(_weighted(frames[group], weights[group], before))
    rest = frames[final:] * weights[final:]
    evaluate(rest)
    return rest


def _weighted(frames: mx.array, weights: mx.array, before: mx.array | None) -> mx.array:
    return frames * weights if before is None else frames * weights + before


def _groups(start: int, stop: int) -> list[slice]:
    return [slice(i, min(i + FRAMES_PER_GROUP, stop)) for i in range(start, stop, FRAMES_PER_GROUP)]


def _to_unit(frames: mx.array) -> mx.array:
    """[-1, 1] -> [0, 1], clamped. Raises NumericsError for what is not finite, which clamping would hide."""
    check_finite(frames, "the decoded frames")
    frames = mx.clip((frames + 1) / 2, 0, 1)
    evaluate(frames)
    return frames
