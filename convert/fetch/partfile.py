"""Files that arrive in pieces: `X.partial` grows beside its final name X, and `X.partial.done` lists the bytes that it
holds, so that an interrupted download resumes. And the record of complete files."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from ltx2.runtime.errors import InputError
from ltx2.runtime.files.atomic import PARTIAL, beside, flush, hold, write_text
from ltx2.runtime.files.ranges import digesting

RECORD = ".downloads.json"
SHA256_LENGTH = 64
Span = tuple[int, int]  # [start, stop) in bytes


class PartFile:
    """A file of known size and etag on its way to `target`; use as a context manager. Leftovers of another version are
    discarded. Raises InputError while another process fetches it."""

    def __init__(self, target: Path, size: int, etag: str) -> None:
        self.target, self.size, self.etag = target, size, etag
        self.path, self.journal = beside(target, PARTIAL), beside(target, f"{PARTIAL}.done")
        self.locked = False  # once open: whether other processes are kept out; not where the file system has no locks
        self._write_lock = threading.Lock()
        self._spans: list[Span] = []

    def held(self) -> int:
        """Bytes that are on disk already; the file need not be open."""
        return sum(stop - start for start, stop in self._read_journal())

    def __enter__(self) -> "PartFile":
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._log: IO[str] = self.journal.open("a", encoding="utf-8")
        try:
            self.locked = hold(self._log, self.target)
        except InputError:
            self._log.close()
            raise
        self._spans = self._read_journal()
        self._log.truncate(0)  # a crash may have left half a line at its end
        self._append(json.dumps(self._head()))
        for start, stop in self._spans:
            self._append(f"{start} {stop}")
        self._data = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._data)
        self._log.close()

    def missing(self, longest: int) -> Iterator[Span]:
        """The missing spans, in pieces of at most `longest` bytes."""
        position = 0
        for start, stop in [*self._spans, (self.size, self.size)]:
            while position < start:
                piece = (position, min(position + longest, start))
                yield piece
                position = piece[1]
            position = max(position, stop)

    def write(self, start: int, data: bytes) -> None:
        """Write bytes at their place."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._data, view, start)
            start, view = start + written, view[written:]

    def note(self, start: int, stop: int) -> None:
        """Record that the bytes [start, stop) are there."""
        with self._write_lock:
            if start < stop:
                self._append(f"{start} {stop}")

    def publish(self) -> None:
        """Sync the file and give it its name."""
        flush(self._data)
        self.path.replace(self.target)
        self.journal.unlink()

    def discard(self) -> None:
        """Remove the fetched bytes."""
        self.path.unlink(missing_ok=True)
        self.journal.unlink(missing_ok=True)

    def _append(self, line: str) -> None:
        self._log.write(line + "\n")
        self._log.flush()

    def _head(self) -> dict[str, int | str]:
        return {"size": self.size, "etag": self.etag}

    def _read_journal(self) -> list[Span]:
        """The journal's bytes as sorted, disjoint spans; none if it is another version's."""
        if not self.path.is_file() or not self.journal.is_file():
            return []
        head, *lines = self.journal.read_text(encoding="utf-8").split("\n")[:-1] or [""]
        if head != json.dumps(self._head()):
            return []
        spans: list[Span] = []
        for start, stop in sorted((int(start), int(stop)) for start, stop in map(str.split, lines)):
            if spans and start <= spans[-1][1]:
                start, stop = spans[-1][0], max(stop, spans.pop()[1])
            spans.append((start, stop))
        return spans


class Hashing:
    """Reads a file when iterated, yielding the size of every block. Afterwards `sha256` is the file's, or None where
    size or etag differ. The hub's etag of a large file is its sha256, that of a small one git's hash of it."""

    def __init__(self, path: Path, size: int, etag: str) -> None:
        self._path, self._size, self._etag = path, size, etag
        self.sha256: str | None = None

    def __iter__(self) -> Iterator[int]:
        sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % self._size, usedforsecurity=False)
        large, done = len(self._etag) == SHA256_LENGTH, 0
        for count in digesting(self._path, sha256, *([] if large else [git])):
            done += count
            yield count
        expected = sha256 if large else git
        if done == self._size and self._etag == expected.hexdigest():
            self.sha256 = sha256.hexdigest()


@dataclass(frozen=True)
class Verified:
    """A complete file: its state on disk, and its hashes."""

    size: int
    mtime_ns: int
    etag: str
    sha256: str


class Records:
    """The complete files in the weights folder, which need not be read again."""

    def __init__(self, weights: Path) -> None:
        self._weights = weights
        self._lock = threading.Lock()
        self._files = self._read()

    def find(self, path: Path) -> Verified | None:
        """The record of a file that has not changed since, else None."""
        known = self._files.get(str(path.relative_to(self._weights)))
        if known is None or not path.is_file():
            return None
        state = path.stat()
        return known if (state.st_size, state.st_mtime_ns) == (known.size, known.mtime_ns) else None

    def add(self, path: Path, etag: str, sha256: str) -> None:
        """Record a file that was just found complete."""
        state = path.stat()
        with self._lock:
            known = Verified(state.st_size, state.st_mtime_ns, etag, sha256)
            self._files = {**self._read(), **self._files, str(path.relative_to(self._weights)): known}
            data = {name: asdict(verified) for name, verified in sorted(self._files.items())}
            write_text(self._weights / RECORD, json.dumps(data, indent=1) + "\n")

    def _read(self) -> Mapping[str, Verified]:
        """Empty where the record is damaged: files are then read again."""
        try:
            data = json.loads((self._weights / RECORD).read_text(encoding="utf-8"))
            return {name: Verified(**facts) for name, facts in data.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}
