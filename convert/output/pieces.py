"""The unit of work: some rows of one tensor, read, transformed, and ready to be written or compared.

Pieces are small and independent, so they are worked on in threads, a few ahead of where they are needed, and memory
does not depend on any file's size."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

import numpy as np

from ltx2.convert.plan.entries import Move, packed_key
from ltx2.convert.tensors.steps import Parts, Spec
from ltx2.runtime.errors import NumericsError
from ltx2.runtime.files.ranges import Bytes, RangeReader
from ltx2.runtime.files.tensors import Array, TensorInfo

PIECE_BYTES = 8 << 20  # on the larger side, before or after the steps; larger ones are not faster
WINDOW_BYTES = 48 << 20  # worked on ahead of where they are needed
THREADS = min(4, os.cpu_count() or 1)


class Sized(Protocol):
    """Something that takes memory, in bytes, while it is worked on."""

    @property
    def memory(self) -> int: ...


Item = TypeVar("Item", bound=Sized)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Piece:
    """Bytes [start, end) of a source, which become `stored` bytes. Here they stay as they are."""

    reader: RangeReader
    start: int
    end: int
    stored: int

    @property
    def memory(self) -> int:
        return self.end - self.start

    @property
    def work(self) -> float:
        """Its time, in bytes that are copied meanwhile."""
        return float(self.end - self.start)

    def read(self) -> Bytes:
        return self.reader.read(self.start, self.end)


@dataclass(frozen=True)
class Rows(Piece):
    """`count` rows of one tensor from row `row` on; all of them for a step that needs all at once."""

    move: Move
    row: int
    count: int

    @property
    def memory(self) -> int:
        if self.move.packing is not None and not self.move.packing.main_thread:
            return self.end - self.start + self.stored
        return self.end - self.start + (self.values if self.move.steps else 0)

    @property
    def work(self) -> float:
        return super().work * (1.0 if self.move.packing is None else self.move.packing.effort)

    @property
    def values(self) -> int:
        """Bytes of the rows before they are packed."""
        rows = max(1, self.move.spec.shape[0] if self.move.spec.shape else 1)
        return self.move.spec.nbytes * self.count // rows

    def prepare(self, raw: Bytes) -> Callable[[], Parts]:
        """The rows of every stored tensor, by its name, made of the piece's bytes (n,).

        Any thread may call this. The main thread calls the result, which begins packing that must run there, and then
        what that returns, which waits for it. Raises NumericsError, which names the tensor, and what packing raises.
        """
        move, shape = self.move, self.move.tensor.shape
        rows = move.file.typed(move.tensor.name, raw, (self.count, *shape[1:]) if shape else ())
        values = np.asarray(self._transformed(rows), order="C")
        if move.packing is not None and move.packing.main_thread:
            return partial(self._begin, values)
        begun = self._begin(values)
        return lambda: begun

    def _begin(self, values: Array) -> Parts:
        move = self.move
        if move.packing is None:
            return lambda: {move.key: values}
        constants = {} if self.row else move.packing.constants()
        begun = move.packing.begin(values, move.spec, self.row)
        return lambda: {packed_key(move.key, part): value for part, value in {**begun(), **constants}.items()}

    def _transformed(self, rows: Array) -> Array:
        spec = Spec(self.move.tensor.shape, self.move.tensor.dtype)
        for step in self.move.steps:
            try:
                rows = step.rows(rows, spec, self.row)
            except NumericsError as error:
                raise NumericsError(f"{self.move.tensor.name}: {error.what}", error.why, error.fix) from error
            spec = step.spec(spec)
        return rows


def bytes_of(reader: RangeReader, start: int, end: int) -> Iterator[Piece]:
    """A range of a file, as it is, in pieces."""
    for at in range(start, end, PIECE_BYTES):
        stop = min(at + PIECE_BYTES, end)
        yield Piece(reader, at, stop, stop - at)


def rows_of(move: Move) -> Iterator[Rows]:
    """A tensor in pieces."""
    tensor, count = move.tensor, move.tensor.shape[0] if move.tensor.shape else 1
    specs, constant = move.stored(), move.packing.constants() if move.packing else {}
    constants = sum(specs[packed_key(move.key, part)].nbytes for part in constant)
    stored = sum(spec.nbytes for spec in specs.values()) - constants
    size = PIECE_BYTES if move.packing is None else max(PIECE_BYTES, move.packing.piece_bytes)
    whole = not tensor.shape or any(step.whole for step in move.steps)
    most = max(1, count if whole else size * count // max(1, stored, tensor.nbytes))
    for row in range(0, count, most):
        rows = min(most, count - row)
        made = stored * rows // count + (0 if row else constants)
        yield Rows(move.file.reader, *_range(tensor, row, rows), made, move, row, rows)


def _range(tensor: TensorInfo, row: int, count: int) -> tuple[int, int]:
    """The place of some rows in the tensor's file; a scalar has one."""
    size = tensor.nbytes // (tensor.shape[0] if tensor.shape else 1)
    return tensor.start + size * row, tensor.start + size * (row + count)


def rows_at(move: Move, row: int, count: int) -> Array:
    """Rows [row, row + count) of a tensor as it is before it is packed, (count, ...), without reading the others."""
    plain, tensor = replace(move, packing=None), move.tensor
    assert tensor.shape and not any(step.whole for step in move.steps), "rows are made of rows"
    start, end = _range(tensor, row, count)
    piece = Rows(move.file.reader, start, end, end - start, plain, row, count)
    return piece.prepare(piece.read())()()[move.key]


def values_of(move: Move) -> Iterator[Array]:
    """A tensor as it is before it is packed, in pieces of rows (n, ...)."""
    for piece in rows_of(replace(move, packing=None)):
        yield from piece.prepare(piece.read())()().values()


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int = THREADS, window: int = WINDOW_BYTES
) -> Generator[Result, None, None]:
    """`map`, in threads: results in the items' order, computed while earlier ones are used. About `window` bytes are
    under way at a time. Closing the iterator stops the threads."""
    pool = ThreadPoolExecutor(threads)
    running: deque[tuple[int, Future[Result]]] = deque()
    held = 0
    try:
        for item in items:
            running.append((item.memory, pool.submit(work, item)))
            held += item.memory
            del item  # else memory holds one item more
            while running and (held > window or running[0][1].done()):
                memory, future = running.popleft()
                held -= memory
                yield future.result()
        while running:
            yield running.popleft()[1].result()
    finally:
        pool.shutdown(cancel_futures=True)
