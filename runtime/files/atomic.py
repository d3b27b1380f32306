"""Files that appear whole or not at all: written beside their name by one process, brought to the disk, then renamed.

A lock is the system's own on the file that is being written, so a killed process leaves neither a lock nor a lock file
(the filelock package would leave a second file beside every clip)."""

import fcntl
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ltx2.runtime.errors import InputError, reason
from ltx2.runtime.files.paths import NAME_BYTES

PARTIAL = ".partial"
# The one warning where a file system has no locks: such a system is no second process.
UNLOCKED = "the file system of {} has no locks: make sure that no other ltx2 writes there"


def beside(path: Path, suffix: str) -> Path:
    """The file whose name is `path`'s and `suffix`. A name that would be too long for a file system is cut, and told
    from others by a hash."""
    name = path.name + suffix
    if len(os.fsencode(name)) > NAME_BYTES:
        mark = f"-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]}{suffix}"
        name = os.fsencode(path.name)[: NAME_BYTES - len(mark)].decode(errors="ignore") + mark
    return path.with_name(name)


def hold(file: IO[Any], path: Path) -> bool:
    """Keep other processes from holding an open file, until it is closed. False where the file system has no locks.

    Raises InputError, which names `path` as what is being written, while another process holds it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise _held(path) from error
    except OSError:
        return False
    return True


def _held(path: Path) -> InputError:
    why = "another process is writing it"
    return InputError(f"{path} is being written", why, "wait for it, or choose another name")


@dataclass(frozen=True)
class Claim:
    """A new file that becomes `path`; `locked` unless the file system has no locks."""

    path: Path
    partial: Path
    locked: bool

    def publish(self) -> None:
        """Bring the file to the disk and give it its name; one that was there is replaced."""
        with self.partial.open("rb+") as file:
            flush(file.fileno())
        self.partial.replace(self.path)
        sync_folder(self.path.absolute().parent)


@contextmanager
def claimed(path: Path) -> Iterator[Claim]:
    """A new file beside `path` that is this process's while the block runs, and then gone unless it was published.

    One that a killed run has left makes way: it is removed, not written over, because a program that run had started
    may still be busy with it. Raises InputError while another process writes there, OSError as the system does.
    """
    partial = beside(path, PARTIAL)
    with partial.open("ab") as old:
        hold(old, path)
        partial.unlink()
        try:
            new = partial.open("xb")
        except FileExistsError as error:  # another process was faster
            raise _held(path) from error
        with new:
            try:
                yield Claim(path, partial, hold(new, path))
            finally:
                partial.unlink(missing_ok=True)


@contextmanager
def growing(path: Path) -> Iterator[Path]:
    """Where to write a file that gets its name `path` when the block ends without an exception. Raises as `claimed`."""
    with claimed(path) as claim:
        yield claim.partial
        claim.publish()


def write_file(path: Path, blocks: Iterable[bytes | memoryview]) -> None:
    """Write a small file. Raises as `claimed`."""
    with growing(path) as partial, partial.open("wb") as file:
        file.writelines(blocks)


def write_text(path: Path, text: str) -> None:
    """Write a small text file. Raises InputError when it cannot be written."""
    try:
        write_file(path, [text.encode()])
    except OSError as error:
        raise InputError(f"cannot write {path}", reason(error), "check permissions and free space") from error


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
