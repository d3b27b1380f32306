"""Files read and written by byte ranges, from any thread, without filling the page cache: what passes through once
would push everything else out of memory, and making room for it is what copying a large file spends most time on.

A range is read, not mapped: a disk that fails or a file that shrinks is then an error with a name, not a signal."""

import errno
import fcntl
import os
import sys
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ltx2.runtime.errors import CheckpointError
from ltx2.runtime.files.paths import check_regular

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
BUFFERS = 1024  # that one call of the system fills


class RangeReader:
    """One file's bytes by range. Raises CheckpointError when it cannot be opened; closes when no longer used.

    `cached` is for what is read again and again: the system may keep it in memory that nobody needs.
    """

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
        """Bytes [start, end). Raises CheckpointError when they cannot be read or are not there any more."""
        block = np.empty(end - start, np.uint8)
        self.fill(start, [block.data])
        _forget(self._descriptor, start, end)
        return block

    def fill(self, start: int, buffers: Sequence[memoryview]) -> None:
        """Read into buffers of bytes, one after the other, what stands in the file from `start` on. Raises as `read`,
        which keeps nothing in the system's cache."""
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
    """A file of known size under construction: blocks are written at their places, in any order. What stands there
    from an earlier attempt is kept.

    Raises OSError as the system does; a disk that is too small is noticed at once where space can be reserved.
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
        """Return when everything written so far is on the disk."""
        flush(self._descriptor)

    def forget(self, end: int) -> None:
        """The bytes before `end` will not be read again."""
        _forget(self._descriptor, 0, end)

    def close(self) -> None:
        self._close()


def write_file(path: Path, blocks: Iterable[bytes | memoryview]) -> None:
    """Write a small file; it appears under its name only when complete and on the disk."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as f:
        for block in blocks:
            f.write(block)
        f.flush()
        flush(f.fileno())
    partial.replace(path)


def flush(descriptor: int) -> None:
    """Bring a file's data to the disk, through the disk's own cache too."""
    if sys.platform == "darwin":
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        except OSError:  # not every file system knows it
            os.fsync(descriptor)
    else:
        os.fdatasync(descriptor)


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def changed(path: Path, how: str) -> CheckpointError:
    """The error for a source that another program writes to."""
    return CheckpointError(f"{path} changed while it was read", how, "let no other program write it, and run again")


def _after(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left of buffers when `count` bytes are filled."""
    for done, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[done + 1 :]]
        count -= len(buffer)
    return []


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot read {path}", str(error), "check the path, its permissions and the disk")


def _reserve(descriptor: int, size: int) -> None:
    if not size or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # the file system cannot
            raise


def _pass_the_cache(descriptor: int) -> None:
    if sys.platform == "darwin":
        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)


def _forget(descriptor: int, start: int, end: int) -> None:
    """Let the system use the memory that holds a range, where it can be told."""
    if end > start and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)
