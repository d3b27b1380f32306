"""Decoding a clip in tiles, streamed over time, so that memory stays bounded for any length."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple, Protocol, TypeVar

import mlx.core as mx
import numpy as np

from ltx2.runtime.layers.checks import check_finite
from ltx2.runtime.machine.bounded import evaluate, running_ahead
from ltx2.runtime.networks.video_vae.tiles import Scaled, Span, Tiles, Tiling, spatial_spans, temporal_spans

FRAMES_PER_GROUP = 8  # bounds the float32 frames that are handed out at a time
COPIES = 4  # threads that copy frames to the host
UNDER_WAY = 1 << 25  # bytes of frames that they copy while later ones are made
Pictures = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Decode = Callable[[slice, slice, slice], mx.array]  # what a tile reads over time, rows, columns -> (F, H, W, 3)
Place = tuple[Span, Span, Span]  # of a tile: over time, rows, columns
Group = TypeVar("Group")
Finish = Callable[[Iterator[mx.array]], Iterator[Group]]  # of the groups of frames that one tile over time completes
Spread = Callable[[Sequence[Place], Decode], Iterator[mx.array]]  # how tiles are decoded, in this order


class Frames(Protocol):
    """Frames (F, H, W, 3), of which groups are taken."""

    def __getitem__(self, frames: slice, /) -> mx.array: ...


class VideoDecoder(Scaled, Protocol):
    """Decodes (1, C, f, h, w) to (F, H, W, 3), nominally in [-1, 1]."""

    def decode(self, latents: mx.array) -> mx.array: ...


def one_by_one(places: Sequence[Place], decode: Decode) -> Iterator[mx.array]:
    """The tiles at these places."""
    return (decode(*(span.source for span in place)) for place in places)


def decode_frames(
    vae: VideoDecoder, latents: mx.array, tiling: Tiling | None = None, ahead: int = 0, spread: Spread = one_by_one
) -> Iterator[Pictures]:
    """Decode normalised latents (1, C, f, h, w) to groups of frames (n, H, W, 3), uint8, in order.

    Without `tiling` the clip is decoded in one piece. `ahead`: how many layers the device may lag behind the host;
    faster, at the price of their memory, and the frames are the same. `spread` decodes the tiles. Raises InputError for
    tiles that do not fit the latents' scale or are too large to decode, NumericsError for frames that are not finite.
    """
    return decode_tiles(vae, latents, tiling, pictures, ahead, spread)


def decode_tiles(
    vae: VideoDecoder,
    latents: mx.array,
    tiling: Tiling | None,
    finish: Finish[Group],
    ahead: int = 0,
    spread: Spread = one_by_one,
) -> Iterator[Group]:
    """As `decode_frames`, but what `finish` makes of frames in float32, nominally in [-1, 1] and not evaluated."""
    frames, height, width = latents.shape[2:]
    tiles = Tiles((frames, height, width), tiling, vae)
    times = temporal_spans(tiles.times, vae.temporal_scale)
    rows, columns = (spatial_spans(side, vae.spatial_scale) for side in (tiles.rows, tiles.columns))

    def decode(time: slice, row: slice, column: slice) -> mx.array:
        with running_ahead(ahead):
            return vae.decode(latents[:, :, time, row, column])

    decoded = spread([(time, row, column) for time in times for row in rows for column in columns], decode)
    return blended(times, rows, columns, lambda *_: next(decoded), finish)


def pictures(groups: Iterator[mx.array]) -> Iterator[Pictures]:
    """Groups of frames (n, H, W, 3) in [-1, 1] as uint8. Threads copy them to the host while later ones are made: where
    the GPU has its own memory, that takes longest. Raises what `to_levels` raises."""
    with ThreadPoolExecutor(COPIES, "ltx2-copies") as pool:
        copies: deque[Future[Pictures]] = deque()
        for levels in map(_checked_levels, groups):
            copies.append(pool.submit(_copied, levels))
            if len(copies) * levels.nbytes >= UNDER_WAY:
                yield copies.popleft().result()
        while copies:
            yield copies.popleft().result()


def to_levels(frames: mx.array) -> Pictures:
    """(n, H, W, 3) in [-1, 1] -> [0, 255], clamped and rounded. Raises NumericsError for values that are not finite,
    which clamping would hide."""
    return _copied(_checked_levels(frames))


def _checked_levels(frames: mx.array) -> mx.array:
    levels, finite = _to_levels(frames)
    evaluate(levels, finite)
    if not finite.item():
        check_finite(frames, "the decoded frames")
    return levels


def _copied(levels: mx.array) -> Pictures:
    return np.array(levels)


@mx.compile
def _to_levels(frames: mx.array) -> tuple[mx.array, mx.array]:
    levels = mx.round(mx.clip((frames + 1) / 2, 0, 1) * 255).astype(mx.uint8)
    return levels, mx.isfinite(frames).all()


def blended(
    times: list[Span], rows: list[Span], columns: list[Span], decode: Decode, finish: Finish[Group]
) -> Iterator[Group]:
    """What `finish` makes of groups of frames (n, H, W, 3), float32, in order: the weighted sum of the tiles over them.
    A frame is yielded before the next tile over time is decoded, unless that tile adds to it."""
    starts = [time.target.start for time in times[1:]] + [times[-1].target.stop]
    pending: mx.array | None = None
    for time, following in zip(times, starts, strict=True):
        frames, ramp = _decoded(decode, time.source, rows, columns), mx.array(time.weights)[:, None, None, None]
        final = following - time.target.start
        yield from finish(_finished(frames, ramp, pending, final))
        pending = frames[final:] * ramp[final:]
        del frames
        evaluate(pending)


def _decoded(decode: Decode, time: slice, rows: list[Span], columns: list[Span]) -> Frames:
    """All frames (F, H, W, 3) of a tile over time, blended over space."""
    if len(rows) == len(columns) == 1:
        return decode(time, rows[0].source, columns[0].source)
    picture = _Picture(rows, columns)
    for row in rows:
        for column in columns:
            picture.add(decode(time, row.source, column.source), row, column)
    return picture


class _Picture:
    """Frames as the sum of tiles, in cells: the pieces between the edges of tiles. A tile is added cell by cell, so
    that memory never holds more than one cell twice."""

    def __init__(self, rows: list[Span], columns: list[Span]) -> None:
        self._rows, self._columns = _pieces(rows), _pieces(columns)
        self._cells: dict[tuple[int, int], mx.array] = {}

    def add(self, tile: mx.array, row: Span, column: Span) -> None:
        """Add a tile's frames (F, H, W, 3), weighted."""
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


def _finished(frames: Frames, ramp: mx.array, pending: mx.array | None, final: int) -> Iterator[mx.array]:
    """The first `final` frames in groups (n, H, W, 3), with the `pending` ones of the tile before added."""
    start = 0 if pending is None else pending.shape[0]
    for group in [*_groups(0, start), *_groups(start, final)]:
        weighted = frames[group] * ramp[group]
        yield weighted if pending is None or group.start >= start else weighted + pending[group]


def _groups(start: int, stop: int) -> list[slice]:
    return [slice(i, min(i + FRAMES_PER_GROUP, stop)) for i in range(start, stop, FRAMES_PER_GROUP)]
