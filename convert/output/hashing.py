"""SHA-256 of files while their bytes pass by, read or written, so that no file is read only to be hashed."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Self

from ltx2.convert.output.pieces import Piece
from ltx2.runtime.events import BytesDone, Event
from ltx2.runtime.files.ranges import Bytes, RangeReader
from ltx2.runtime.files.tensors import FileRecord, TensorFile

FAR = 64 << 20  # bytes; nobody waits for a hash that is further behind
BLOCK_BYTES = 2 << 20  # read at a time to catch up; several files may do so at once
POLL_SECONDS = 1.0


class StreamingHash:
    """The hash of one file, computed in a thread. Blocks may come in any order, with gaps: a block that continues the
    hashed bytes is taken at once, all others are read from the file when it is their turn."""

    def __init__(self, reader: RangeReader) -> None:
        self.position = 0
        self._reader, self._digest = reader, hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._task: Future[None] | None = None
        self._behind = self._stop = False

    def feed(self, start: int, block: memoryview, ready: int) -> None:
        """Take a block that stands at `start`; all bytes before `ready` stand in the file.

        Waits for the block before it, unless that was far away, and raises that one's errors.
        """
        if self._task is not None:
            if self._behind and not self._task.done():
                return
            self._task.result()
        self._task = self._thread.submit(self._take, start, block, ready)

    def finish(self, size: int) -> "Future[str]":
        """The hash as hex digits, to come: of the whole file, all of which stands there now."""
        return self._thread.submit(self._finish, size)

    def close(self) -> None:
        """Stop the thread."""
        self._stop = True
        self._thread.shutdown(cancel_futures=True)

    def _take(self, start: int, block: memoryview, ready: int) -> None:
        if start <= ready:
            self._read_up_to(start)
        known = self.position - start
        if 0 <= known < len(block):
            self._digest.update(block[known:])
            self.position += len(block) - known

    def _finish(self, size: int) -> str:
        if self._task is not None:
            self._task.result()
        self._read_up_to(size)
        return self._digest.hexdigest()

    def _read_up_to(self, end: int) -> None:
        self._behind = end - self.position > FAR
        while self.position < end and not self._stop:
            block = self._reader.read(self.position, min(end, self.position + BLOCK_BYTES)).data
            self._digest.update(block)
            self.position += len(block)
        self._behind = False


class SourceHashes:
    """Hashes of a plan's sources; those known already are not computed. Leaving the context stops the threads."""

    def __init__(
        self, sources: Sequence[TensorFile | FileRecord], known: Mapping[str, FileRecord], pieces: Iterable[Piece] = ()
    ) -> None:
        self._sources, self._known = sources, dict(known)
        self._files = {f.path: f for f in sources if isinstance(f, TensorFile) and str(f.path) not in known}
        self._hashes = {path: StreamingHash(file.reader) for path, file in self._files.items()}
        self._left = Counter(piece.reader.path for piece in pieces)
        self._digests: dict[Path, Future[str]] = {}
        for path in self._files:
            self._finish_when_read(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self._hashes.values():
            each.close()

    def feed(self, piece: Piece, raw: Bytes) -> None:
        """Take the bytes of a piece; every piece that was announced comes once."""
        path = piece.reader.path
        if path in self._hashes:
            self._hashes[path].feed(piece.start, raw.data, ready=self._files[path].size)
            self._left[path] -= 1
            self._finish_when_read(path)

    def collect(self) -> Iterator[tuple[str, FileRecord]]:
        """Path and record of every source whose hash became known since the last call."""
        for path in [path for path, digest in list(self._digests.items()) if digest.done()]:
            record = FileRecord(path.name, self._files[path].size, self._digests.pop(path).result())
            self._known[str(path)] = record
            yield str(path), record

    def wait(self) -> Iterator[Event]:
        """Report progress until all hashes are known; all pieces have come."""
        total = sum(file.size for file in self._files.values())
        while wait(self._digests.values(), POLL_SECONDS).not_done:
            yield BytesDone("checksums of the sources", sum(h.position for h in self._hashes.values()), total)

    def records(self) -> tuple[FileRecord, ...]:
        """Base name, size and hash of every source, in order; all were collected."""
        return tuple(s if isinstance(s, FileRecord) else self._known[str(s.path)] for s in self._sources)

    def _finish_when_read(self, path: Path) -> None:
        if not self._left[path]:
            self._digests[path] = self._hashes[path].finish(self._files[path].size)
