"""Attention of every position of a clip to the 3-D window around it, in plain MLX operations.

A window holds exactly `kernel` positions: at the clip's ends it is shifted inwards, not cut. Queries are taken in small
blocks; a block's keys are gathered from the box that all of its windows lie in, and masked to each query's own window.
For blocks of 4x4x4 and windows of 11x11x11 that is twice the arithmetic of the windows alone, as large matrix products
instead of 1331 small ones. Rows of blocks are done one after the other, so that the gathered keys stay small."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int32]]
Places = np.ndarray[Any, np.dtype[Any]]
Size = tuple[int, int, int]  # frames, height, width
BLOCK = 4  # positions of a block of queries along each axis
GATHERED = 1 << 28  # bytes of keys and values that are gathered at once, as far as one row of blocks allows


class Windows(NamedTuple):
    """Blocks of queries along one axis: the first query of each (blocks,), the positions of its keys (blocks, keys),
    and which of these each query sees (blocks, queries, keys)."""

    starts: Ints
    keys: Ints
    seen: np.ndarray[Any, np.dtype[np.bool_]]


def windows(length: int, kernel: int, starts: Sequence[int], block: int) -> Windows:
    """Blocks of `block` queries from each of `starts` on, over an axis of `length` >= `kernel` positions."""
    first = np.array(starts, np.int32)
    count = min(length, block + kernel - 1)
    box = np.clip(first - kernel // 2, 0, length - count)
    keys = (box[:, None] + np.arange(count)).astype(np.int32)
    window = np.clip(first[:, None] + np.arange(block) - kernel // 2, 0, length - kernel)[:, :, None]
    return Windows(first, keys, (window <= keys[:, None]) & (keys[:, None] < window + kernel))


class Neighbourhood:
    """The windows of `kernel` positions over a clip of `size`, whose queries come in slabs of a few frames."""

    def __init__(self, size: Size, kernel: Size) -> None:
        self.size = size
        self.kernel = kernel

    @cached_property
    def _rows(self) -> Windows:
        return self._blocks(1)

    @cached_property
    def _columns(self) -> Windows:
        return self._blocks(2)

    def _blocks(self, axis: int) -> Windows:
        """Where blocks do not divide the axis, the last one is moved inwards, and some queries are computed twice."""
        length = self.size[axis]
        block = min(BLOCK, length)
        starts = [min(start, length - block) for start in range(0, length, block)]
        return windows(length, self.kernel[axis], starts, block)

    def frames(self, start: int, stop: int) -> slice:
        """The frames of the keys of queries in frames [start, stop)."""
        keys = windows(self.size[0], self.kernel[0], [start], stop - start).keys[0]
        return slice(int(keys[0]), int(keys[-1]) + 1)

    def attend(self, q: mx.array, keys: "Keys", start: int, heads: int) -> Iterator[mx.array]:
        """Attention of queries (t, H, W, C), of the frames from `start` on, in parts (t, rows, W, C) of consecutive
        rows. C is heads by width of a head; queries are scaled already. `keys` reach over `frames(start, start + t)`.
        """
        times = windows(self.size[0], self.kernel[0], [start], q.shape[0])
        times = times._replace(keys=times.keys - keys.start)
        box = prod(axis.keys.shape[1] for axis in (times, self._rows, self._columns))
        step = max(1, GATHERED // (2 * len(self._columns.starts) * box * q.shape[-1] * q.itemsize))
        for first in range(0, len(self._rows.starts), step):
            chosen = slice(first, first + step)
            rows = Windows(self._rows.starts[chosen], self._rows.keys[chosen], self._rows.seen[chosen])
            yield self._attend(q, keys, (times, rows, self._columns), heads, first)

    def _attend(
        self, q: mx.array, keys: "Keys", axes: tuple[Windows, Windows, Windows], heads: int, first: int
    ) -> mx.array:
        """Attention of some rows of blocks, from number `first` on: (t, rows, W, C)."""
        times, rows, columns = axes
        (t, _, width, channels), (_, r, _), (_, c, _) = q.shape, rows.seen.shape, columns.seen.shape
        low, high = int(rows.keys.min()), int(rows.keys.max()) + 1
        gathered = _index((times.keys, rows.keys - low, columns.keys), (high - low, width))
        k, v = (
            mx.concatenate([slab[:, low:high] for slab in slabs]).reshape(-1, channels)[gathered]
            for slabs in (keys.k, keys.v)
        )
        queries = np.arange(t)[None], rows.starts[:, None] + np.arange(r), columns.starts[:, None] + np.arange(c)
        q = q.reshape(-1, channels)[_index(queries, (q.shape[1], width))]
        q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3) for x in (q, k, v))
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=_mask(axes))
        out = out.transpose(0, 2, 1, 3).reshape(-1, channels)
        # Back into rows and columns, of which the last block's may be there twice.
        stop = min((first + len(rows.starts)) * r, self.size[1])
        row_block, row = _place(np.arange(first * r, stop), rows.starts, first, r)
        column_block, column = _place(np.arange(width), columns.starts, 0, c)
        block = row_block[:, None] * len(columns.starts) + column_block
        within = (row * c)[:, None] + column
        return out[mx.array((block * t + np.arange(t)[:, None, None]) * r * c + within)]


class Keys(NamedTuple):
    """Keys and values of the frames from `start` on, in slabs (t, H, W, C)."""

    start: int
    k: Sequence[mx.array]
    v: Sequence[mx.array]


def _index(axes: tuple[Places, Places, Places], sides: tuple[int, int]) -> mx.array:
    """Places in a flat clip of so many rows and columns, from positions along each axis, (blocks, n); one block over
    time: (blocks of rows * blocks of columns, frames * rows * columns)."""
    times, rows, columns = (mx.array(axis.astype(np.int32)) for axis in axes)
    flat = times[:, None, :, None, None] * (sides[0] * sides[1])
    flat = flat + rows[:, None, None, :, None] * sides[1] + columns[None, :, None, None, :]
    return flat.reshape(rows.shape[0] * columns.shape[0], -1)


def _mask(axes: tuple[Windows, Windows, Windows]) -> mx.array:
    """(blocks, 1, queries, keys): which keys are in a query's window along all axes."""
    times, rows, columns = (mx.array(axis.seen) for axis in axes)
    picture = rows[:, None, :, None, :, None] & columns[None, :, None, :, None, :]
    (n, m, r, c, _, _), (_, t, keys) = picture.shape, times.shape
    picture = picture.reshape(n * m, 1, 1, r * c, 1, -1)
    return (picture & times[0][None, None, :, None, :, None]).reshape(n * m, 1, t * r * c, keys * picture.shape[-1])


def _place(positions: Places, starts: Ints, first: int, size: int) -> tuple[Places, Places]:
    """Of each position its block, counted from number `first`, and its place in the block."""
    block = positions // size - first
    return block, positions - starts[block]
