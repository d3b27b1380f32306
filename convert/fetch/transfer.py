"""Fetch files over several connections at once, piece by piece. Bytes that have arrived are kept whatever happens; a
file gets its name when it is complete and its hash is right. The caller provides the bytes."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass

from ltx2.convert.fetch.partfile import Hashing, PartFile, Span
from ltx2.runtime.errors import DownloadError
from ltx2.runtime.events import BytesDone, Warned
from ltx2.runtime.files.atomic import UNLOCKED

INTERVAL_SECONDS = 0.25  # between progress events
Read = Callable[[PartFile, Span], Iterator[bytes]]


@dataclass(frozen=True)
class Pacing:
    """How to fetch: connections at once, bytes per request, and attempts that get no further before giving up, the
    second after `pause` seconds, each next one after twice as long."""

    connections: int = 8
    piece_bytes: int = 32 << 20
    attempts: int = 6
    pause: float = 1.0


class BrokenConnectionError(Exception):
    """The connection failed; another try may succeed."""


class _Stopped(Exception):  # noqa: N818 (no failure of its own: another thread's, or Ctrl-C, ends this one)
    pass


def fetch(
    parts: Sequence[PartFile], read: Read, finished: Callable[[PartFile, str], None], pacing: Pacing
) -> Iterator[BytesDone | Warned]:
    """Fetch all parts; `read` yields the bytes of a span, `finished` gets every complete file and its sha256.

    Raises DownloadError when the connection stays broken or a file is damaged, and what `read` raises.
    """
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(part)
        if unlocked := [part for part in parts if not part.locked]:
            yield Warned(UNLOCKED.format(unlocked[0].target.parent))
        work = _Work(parts, read, finished, pacing)
        pool = ThreadPoolExecutor(pacing.connections, "download")
        try:
            pending = {pool.submit(work.piece, part, span) for part, span in work.pieces()}
            while pending:
                yield work.progress()
                done, pending = wait(pending, INTERVAL_SECONDS, FIRST_EXCEPTION)
                for future in done:
                    future.result()  # raises
            yield work.progress()
        finally:
            work.stop.set()
            pool.shutdown(cancel_futures=True)


class _Work:
    """The state that the threads share."""

    def __init__(
        self, parts: Sequence[PartFile], read: Read, finished: Callable[[PartFile, str], None], pacing: Pacing
    ) -> None:
        self.stop = threading.Event()
        self._parts, self._read, self._finished, self._pacing = parts, read, finished, pacing
        self._lock = threading.Lock()
        # An empty span stands for a file that has all its bytes and is still to be checked.
        self._spans = {part.target: list(part.missing(pacing.piece_bytes)) or [(0, 0)] for part in parts}
        self._open = {target: len(spans) for target, spans in self._spans.items()}
        self._total = sum(part.size for part in parts)
        missing = sum(stop - start for spans in self._spans.values() for start, stop in spans)
        self._fetched, self._checked = self._total - missing, 0

    def pieces(self) -> Iterator[tuple[PartFile, Span]]:
        """All pieces, file by file."""
        return ((part, span) for part in self._parts for span in self._spans[part.target])

    def progress(self) -> BytesDone:
        """The bytes fetched so far; once all are, the bytes checked."""
        name = next((part.target.name for part in self._parts if self._open[part.target]), "")
        if self._fetched < self._total:
            return BytesDone(name, self._fetched, self._total)
        return BytesDone(f"checking {name}".rstrip(), self._checked, self._total)

    def piece(self, part: PartFile, span: Span) -> None:
        """Fetch one piece; after a file's last one, check the file and give it its name."""
        try:
            self._fetch(part, span)
            with self._lock:
                self._open[part.target] -= 1
                last = not self._open[part.target]
            if last:
                self._finish(part)
        except _Stopped:
            return

    def _fetch(self, part: PartFile, span: Span) -> None:
        first, stop = span
        position, failures = first, 0
        try:
            while position < stop:
                try:
                    for data in self._read(part, (position, stop)):
                        part.write(position, data)
                        position += len(data)
                        failures = 0
                        self._count(fetched=len(data))
                    if position < stop:
                        raise BrokenConnectionError("the connection was closed too early")
                except BrokenConnectionError as error:
                    failures += 1
                    self._pause(part, failures, error)
        finally:
            part.note(first, position)

    def _pause(self, part: PartFile, failures: int, error: BrokenConnectionError) -> None:
        if failures >= self._pacing.attempts:
            raise DownloadError(
                f"the download of {part.target.name} was cut off",
                str(error),
                "run the same command again: it goes on where it stopped",
            ) from error
        if self.stop.wait(self._pacing.pause * 2 ** (failures - 1)):
            raise _Stopped

    def _count(self, fetched: int = 0, checked: int = 0) -> None:
        with self._lock:
            self._fetched += fetched
            self._checked += checked
        if self.stop.is_set():
            raise _Stopped

    def _finish(self, part: PartFile) -> None:
        hashing = Hashing(part.path, part.size, part.etag)
        for count in hashing:
            self._count(checked=count)
        if hashing.sha256 is None:
            part.discard()
            raise DownloadError(
                f"{part.target.name} arrived damaged",
                "its hash is not the one that the hub states",
                "run the same command again: it is fetched anew",
            )
        part.publish()
        self._finished(part, hashing.sha256)
