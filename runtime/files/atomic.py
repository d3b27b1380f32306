"""Files that appear whole or not at all: one process writes them under another name, syncs and renames them.

The lock is the system's own, on the file that is being written, so a killed process leaves neither a lock nor a lock
file (the filelock package would leave a second file beside every clip)."""

import fcntl
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ltx2.runtime.errors import InputError, reason
from ltx2.runtime.files.paths import NAME_BYTES

PARTIAL = ".partial"
UNLOCKED = "the file system of {} has no locks: make sure that no other ltx2 writes there"


def beside(path: Path, suffix: str) -> Path:
    """`path` with `suffix` behind its name. A name that is too long for a file system is cut, and a hash keeps it
    unique."""
    name = path.name + suffix
    if len(os.fsencode(name)) > NAME_BYTES:
        mark = f"-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]}{suffix}"
        name = os.fsencode(path.name)[: NAME_BYTES - len(mark)].decode(errors="ignore") + mark
    return path.with_name(name)


def hold(file: IO[Any], path: Path) -> bool:
    """Lock an open file until it is closed. False where the file system has no locks. Raises InputError while another
    process holds it, which names `path` as the file that is being written."""
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
    """A new file that becomes `path`; not `locked` where the file system has no locks."""

    path: Path
    partial: Path
    locked: bool

    def publish(self) -> None:
        """Sync the file and give it its name; it replaces one that was there."""
        with self.partial.open("rb+") as file:
            flush(file.fileno())
        self.partial.replace(self.path)
        sync_folder(self.path.absolute().parent)


@contextmanager
def claimed(path: Path) -> Iterator[Claim]:
    """A new file beside `path` that only this process may write; removed when the block ends unless published.

    A killed run's leftover is removed, not written over, because a program that it started may still write to it.
    Raises InputError while another process writes there, OSError as the system does.
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
def growing(path: Path, claim: Claim | None = None) -> Iterator[Path]:
    """A file to write that is renamed to `path`, or as the caller's `claim` says, when the block ends without an
    exception. Raises as `claimed`."""
    with nullcontext(claim) if claim is not None else claimed(path) as held:
        yield held.partial
        held.publish()


def write_file(path: Path, blocks: Iterable[bytes | memoryview], claim: Claim | None = None) -> None:
    """Write a small file. Raises as `claimed`."""
    with growing(path, claim) as partial, partial.open("wb") as file:
        file.writelines(blocks)


def write_text(path: Path, text: str, claim: Claim | None = None) -> None:
    """Write a small text file. Raises InputError when it cannot be written."""
    try:
        write_file(path, [text.encode()], claim)
    except OSError as error:
        raise InputError(f"cannot write {path}", reason(error), "check permissions and free space") from error


def flush(descriptor: int) -> None:
    """Sync a file's data, through the disk's own cache too."""
    if sys.platform == "darwin":
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        except OSError:  # some file systems do not know it
            os.fsync(descriptor)
    else:
        os.fdatasync(descriptor)


def sync_folder(folder: Path) -> None:
    """Sync a folder's names."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
