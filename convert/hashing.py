"""SHA-256 of the sources, computed in threads while the model folder is written (hashlib releases the GIL)."""

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self

from ltx2.runtime.errors import CheckpointError
from ltx2.runtime.events import BytesDone, Event
from ltx2.runtime.tensorfile import FileRecord, TensorFile, read_blocks

THREADS = 2
POLL_SECONDS = 1.0


class SourceHashes:
    """Hashes of a plan's sources; those known already are not read. Leaving the context stops the threads."""

    def __init__(
        self, sources: Sequence[TensorFile | FileRecord], known: Mapping[str, FileRecord] | None = None
    ) -> None:
        known = known or {}
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(THREADS)
        self._done = 0
        self._records = [
            source
            if isinstance(source, FileRecord)
            else known.get(str(source.path)) or self._pool.submit(self._hash, source)
            for source in sources
        ]
        self._running = {
            future: source
            for source, future in zip(sources, self._records, strict=True)
            if isinstance(source, TensorFile) and isinstance(future, Future)
        }
        self._total = sum(source.size for source in self._running.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def collect(self) -> Iterator[tuple[str, FileRecord]]:
        """Path and record of every source whose hash became known since the last call."""
        for future in [f for f in self._running if f.done()]:
            yield str(self._running.pop(future).path), future.result()

    def wait(self) -> Iterator[Event]:
        """Report progress until all hashes are known."""
        while wait(self._running, POLL_SECONDS).not_done:
            yield BytesDone("checksums of the sources", self._done, self._total)

    def records(self) -> tuple[FileRecord, ...]:
        """Base name, size and hash of every source, in order; waits for them."""
        return tuple(r.result() if isinstance(r, Future) else r for r in self._records)

    def _hash(self, source: TensorFile) -> FileRecord:
        before = source.path.stat()
        digest = hashlib.sha256()
        for block in read_blocks(source.path):
            if self._stop.is_set():
                break
            digest.update(block)
            self._done += len(block)
        after = source.path.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise CheckpointError(
                f"{source.path} changed while it was read", "another program wrote to it", "run the command again"
            )
        return FileRecord(source.path.name, after.st_size, digest.hexdigest())
