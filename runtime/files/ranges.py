"""Files read and written by byte ranges, from any thread, without filling the page cache: data that is used once would
push everything else out of memory, and copying a large file spends most of its time on making room.

Ranges are read, not mapped: a failing disk or a shrinking file then raises an error instead of a signal."""

import errno
import fcntl
import hashlib
import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ltx2.runtime.errors import CheckpointError, reason
from ltx2.runtime.files.atomic import flush
from ltx2.runtime.files.paths import check_regular

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
BUFFERS = 1024  # the most that one system call fills
READ_BYTES = 4 << 20  # at a time, when a file is hashed


class RangeReader:
    """One file's bytes by range; closes when no longer used. `cached`: the system may keep them in free memory, for
    data that is read again and again. Raises CheckpointError when the file cannot be opened."""

    def __init__(self, path: Path, *, cached: bool = False) -> None:
        self.path = path
        try:
            check_regular(path)
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise _unreadable(path, error) from error
        weakref.finalize(self, os.close, self._descriptor)
        if not cached:
            _pass_the_cache(self._descriptor)

    def read(self, start: int, end: int) -> Bytes:
        """Bytes [start, end) as uint8 (end - start,). Raises CheckpointError when they cannot be read, or are gone."""
        block = np.empty(end - start, np.uint8)
        self.fill(start, [block.data])
        _forget(self._descriptor, start, end)
        return block

    def fill(self, start: int, buffers: Sequence[memoryview]) -> None:
        """Read from `start` on into buffers of bytes, one after the other. Unlike `read` it leaves the data in the
        page cache. Raises as `read`."""
        rest = [buffer for buffer in buffers if buffer]
        while rest:
            try:
                count = os.preadv(self._descriptor, rest[:BUFFERS], start)
            except OSError as error:
                raise _unreadable(self.path, error) from error
            if not count:
                raise changed(self.path, "it became shorter")
            start += count
            rest = _after(rest, count)


class RangeWriter:
    """A file of known size under construction: blocks are written at their places, in any order; data of an earlier
    attempt stay. Raises OSError as the system does: where space can be reserved, at once for a disk that is too small.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        _pass_the_cache(self._descriptor)
        _reserve(self._descriptor, size)
        os.ftruncate(self._descriptor, size)

    def write(self, start: int, block: bytes | memoryview) -> None:
        """Write a block of bytes at its place."""
        rest, end = memoryview(block), start + len(block)
        while rest:
            rest = rest[os.pwrite(self._descriptor, rest, end - len(rest)) :]

    def sync(self) -> None:
        """Sync everything written so far."""
        flush(self._descriptor)

    def forget(self, end: int) -> None:
        """Drop the bytes before `end` from the page cache."""
        _forget(self._descriptor, 0, end)

    def close(self) -> None:
        self._close()


def sha256(path: Path) -> str:
    """A file's SHA-256 in hex digits. Raises CheckpointError when it cannot be read."""
    digest = hashlib.sha256()
    for _ in digesting(path, digest):
        pass
    return digest.hexdigest()


def digesting(path: Path, *digests: "hashlib._Hash") -> Iterator[int]:
    """Feed a file to digests, reading one block ahead; yields the size of every block. Raises as `sha256`."""
    reader, size = RangeReader(path), path.stat().st_size
    spans = [(start, min(start + READ_BYTES, size)) for start in range(0, size, READ_BYTES)]
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(reader.read, *span) for span in spans[:1]]
        for number in range(1, len(spans) + 1):
            block = ahead.pop().result()
            ahead += [pool.submit(reader.read, *span) for span in spans[number : number + 1]]
            for digest in digests:
                digest.update(block.data)
            yield len(block)


def changed(path: Path, how: str) -> CheckpointError:
    """The error for a file that another program writes to while we read it."""
    return CheckpointError(f"{path} changed while it was read", how, "let no other program write it, and run again")


def _after(buffers: list[memoryview], count: int) -> list[memoryview]:
    """The rest of the buffers once `count` bytes are filled."""
    for done, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[done + 1 :]]
        count -= len(buffer)
    return []


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot read {path}", reason(error), "check the path, its permissions and the disk")


def _reserve(descriptor: int, size: int) -> None:
    """Reserve space, where the file system can. Raises OSError where there is too little."""
    if not size or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _pass_the_cache(descriptor: int) -> None:
    if sys.platform == "darwin":
        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)


def _forget(descriptor: int, start: int, end: int) -> None:
    """Drop a range from the page cache, where the system can."""
    if end > start and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)
