"""Streams data into the unfinished folder: some pieces are read and transformed ahead, others hashed and written in
order, those before them synced to the disk, all at the same time.

Every file has its full size from the start, and every byte its place. So a run that was killed continues at its last
mark, in the middle of any number of files."""

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from ltx2.convert.output.files import Block, Blocks, PlannedFile, stream_order
from ltx2.convert.output.hashing import SourceHashes, StreamingHash
from ltx2.convert.output.journal import Partial, file_size
from ltx2.convert.output.pieces import Piece, in_order
from ltx2.convert.plan.entries import Asset, Move, Plan
from ltx2.runtime.events import BytesDone, Event
from ltx2.runtime.files.atomic import sync_folder
from ltx2.runtime.files.ranges import Bytes, RangeReader, RangeWriter
from ltx2.runtime.files.tensors import FileRecord

# Bytes, read or written, between two marks. While one portion is synced the next one is written; it grows while the
# disk is busy, to at most MOST_BYTES written. So a killed run loses at most two portions, and the pieces under way.
# Portions of always 256 MB were 8 % slower.
MARK_BYTES = 64 << 20
MOST_BYTES = 256 << 20
WRITE_WINDOW = 24 << 20  # bytes that wait to be hashed and written


@dataclass(frozen=True)
class Job:
    """One piece of one file; `number` counts all pieces of the conversion."""

    number: int
    file: PlannedFile
    piece: Piece

    @property
    def memory(self) -> int:
        return self.piece.memory


@dataclass(frozen=True)
class Made:
    """A job's bytes, and the blocks to write."""

    job: Job
    raw: Bytes
    blocks: Sequence[Block]

    @property
    def memory(self) -> int:
        return self.job.memory


def make_jobs(plan: Plan, files: Sequence[PlannedFile]) -> list[Job]:
    """All pieces of all files in the sources' order, after those that belong to no tensor."""
    entries = [entry for entry in plan.entries if isinstance(entry, Move | Asset)]
    order = {id(entry): number for number, entry in enumerate(stream_order(entries), 1)}
    pieces = [(order.get(id(entry), 0), file, piece) for file in files for entry, piece in file.pieces()]
    pieces.sort(key=lambda item: item[0])
    return [Job(number, file, piece) for number, (_, file, piece) in enumerate(pieces)]


def stream(
    plan: Plan, files: Sequence[PlannedFile], partial: Partial
) -> Generator[Event, None, tuple[FileRecord, ...]]:
    """Write the missing pieces of `files`, with progress events; returns the records of the sources.

    Raises CheckpointError for a source that cannot be read, OSError when writing fails, and what `Rows.prepare` raises.
    """
    jobs = make_jobs(plan, files)
    first = _first_missing(jobs, partial)
    todo = [job for job in jobs[first:] if job.file.path not in partial.files]
    total = sum(file.size for file in files)
    done = total - sum(job.piece.stored for job in todo)
    work, left = (sum(job.piece.work for job in some) for some in (jobs, todo))
    with (
        SourceHashes(plan.sources, partial.sources, [job.piece for job in todo]) as hashes,
        Writer(partial, hashes, todo) as writer,
    ):
        writer.begin(file for file in files if file.path not in partial.files)
        with (
            closing(in_order(_load, todo)) as loaded,
            closing(in_order(writer.store, _made(loaded), threads=1, window=WRITE_WINDOW)) as stored,
        ):
            for job in stored:
                done += job.piece.stored
                left -= job.piece.work
                yield BytesDone(job.file.path, done, total, 1 - left / work)
                _record(hashes, partial)
        writer.finish()
        yield from hashes.wait()
        _record(hashes, partial)
        return hashes.records()


def missing_bytes(files: Sequence[PlannedFile], partial: Partial) -> int:
    """How much more of the disk the files will take."""
    needed = 0
    for file in files:
        if file.path not in partial.files:
            path = partial.unfinished(file.path)
            needed += max(0, file.size - (path.stat().st_blocks * 512 if path.is_file() else 0))
    return needed


def _first_missing(jobs: Sequence[Job], partial: Partial) -> int:
    """The first piece to write: the mark's, or an earlier one if somebody has removed its file."""
    first = min(partial.pieces, len(jobs))
    whole: dict[str, bool] = {}
    for job in jobs[:first]:
        path = job.file.path
        if path not in whole:
            whole[path] = path in partial.files or file_size(partial.unfinished(path)) == job.file.size
        if not whole[path]:
            partial.mark(job.number)
            return job.number
    return first


def _load(job: Job) -> tuple[Job, Bytes, Callable[[], Blocks]]:
    raw = job.piece.read()
    return job, raw, job.file.prepare(job.piece, raw)


def _made(loaded: Iterable[tuple[Job, Bytes, Callable[[], Blocks]]]) -> Iterator[Made]:
    """Every piece is begun before the one before it is finished, so that a device is not idle meanwhile."""
    begun: deque[tuple[Job, Bytes, Blocks]] = deque()
    for job, raw, prepared in loaded:
        begun.append((job, raw, prepared()))
        del job, raw, prepared  # else memory holds one piece more
        if len(begun) > 1:
            yield _finished(*begun.popleft())
    yield from (_finished(*one) for one in begun)


def _finished(job: Job, raw: Bytes, blocks: Blocks) -> Made:
    return Made(job, raw, blocks())


def _record(hashes: SourceHashes, partial: Partial) -> None:
    for path, record in hashes.collect():
        partial.add_source(path, record)


class Target:
    """One file under its temporary name, hashed as it is written."""

    def __init__(self, partial: Partial, file: PlannedFile) -> None:
        self.file, self._partial = file, partial
        path = partial.unfinished(file.path)
        self._writer = RangeWriter(path, file.size)
        self._hash = StreamingHash(RangeReader(path))
        self.write(0, memoryview(file.header), 0)

    def write(self, start: int, block: memoryview, ready: int) -> None:
        """Write a block; everything before `ready` was written before."""
        if block:
            self._hash.feed(start, block, ready)
            self._writer.write(start, block)

    def sync(self) -> None:
        """Wait until everything written so far is on the disk; drop hashed bytes from the page cache."""
        hashed = self._hash.position
        self._writer.sync()
        self._writer.forget(hashed)

    def finish(self) -> None:
        """Give the complete file its name and record it."""
        path = self._partial.path / self.file.path
        digest = self._hash.finish(self.file.size)
        self.sync()
        record = FileRecord(self.file.name, self.file.size, digest.result())
        self._partial.unfinished(self.file.path).rename(path)
        sync_folder(path.parent)
        self._partial.add_file(self.file.path, record)
        self.close()

    def close(self) -> None:
        """Stop the hash and close the file."""
        self._hash.close()
        self._writer.close()


class Writer:
    """Stores pieces in order, in one thread. Another one brings them to the disk, finishes files and keeps the journal.

    Leaving the context stops both; what was not marked is written again."""

    def __init__(self, partial: Partial, hashes: SourceHashes, jobs: Sequence[Job]) -> None:
        self._partial, self._hashes = partial, hashes
        self._left = Counter(job.file.path for job in jobs)
        self._open: dict[str, Target] = {}
        self._closing: list[Target] = []
        self._unmarked = self._unsynced = 0  # bytes read or written, and written, since the last mark
        self._behind = ThreadPoolExecutor(1)
        self._tasks: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._behind.shutdown(cancel_futures=True)
        for target in [*self._open.values(), *self._closing]:
            target.close()

    def begin(self, files: Iterable[PlannedFile]) -> None:
        """Reserve the space of all that is missing, and finish the files without missing pieces: some have none."""
        missing = list(files)
        for file in missing:
            path = self._partial.unfinished(file.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            RangeWriter(path, file.size).close()
        for file in missing:
            if not self._left[file.path]:
                self._finish(file)

    def store(self, made: Made) -> Job:
        """Hash and write one piece."""
        job, file = made.job, made.job.file
        self._hashes.feed(job.piece, made.raw)
        target, begin = self._target(file), file.begin(job.piece)
        for start, block in made.blocks:
            target.write(start, block, begin)
        self._left[file.path] -= 1
        if not self._left[file.path]:
            self._finish(file)
        self._unmarked += max(len(made.raw), job.piece.stored)
        self._unsynced += job.piece.stored
        if self._unmarked >= MARK_BYTES and (self._unsynced >= MOST_BYTES or all(task.done() for task in self._tasks)):
            self._mark(job.number + 1)
        return job

    def finish(self) -> None:
        """Wait until everything is on the disk."""
        for task in self._tasks:
            task.result()

    def _mark(self, pieces: int) -> None:
        self.finish()  # at most one portion is on its way to the disk
        self._unmarked = self._unsynced = 0
        self._tasks = [self._behind.submit(self._sync, list(self._open.values()), pieces)]

    def _sync(self, targets: Sequence[Target], pieces: int) -> None:
        for target in targets:
            target.sync()
        self._partial.mark(pieces)

    def _target(self, file: PlannedFile) -> Target:
        if file.path not in self._open:
            self._open[file.path] = Target(self._partial, file)
        return self._open[file.path]

    def _finish(self, file: PlannedFile) -> None:
        target = self._target(file)
        del self._open[file.path]
        self._closing.append(target)
        self._tasks.append(self._behind.submit(target.finish))
