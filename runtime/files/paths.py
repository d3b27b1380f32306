"""Checks of paths. Before work starts: may we write there, and is there room? A wrong place must not cost a finished
clip. Before reading: is it a file? And of names: do they stay inside a folder?"""

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ltx2.runtime.errors import DoesNotFitError, InputError, Ltx2Error, reason
from ltx2.runtime.units import gb

NAME_BYTES = 255  # of file systems


def check_output(path: str | Path, new: Path | None = None) -> None:
    """Raises InputError where a file cannot be written to `path`; `new`: a folder that will be made for it."""
    what, folder = f"cannot write {path}", Path(path).absolute().parent
    if Path(path).is_dir():
        raise InputError(what, "it is a folder", "name a file in it")
    if not folder.is_dir() and (new is None or folder != new.absolute()):
        raise InputError(what, f"the folder {folder} does not exist", "create it, or write elsewhere")
    check_folder(folder, path)


def check_folder(folder: Path, path: str | Path) -> None:
    """Raises InputError where a folder, which need not exist yet, cannot be written; `path` is named as the target."""
    what, place = f"cannot write {path}", existing(folder)
    if not place.is_dir():
        raise InputError(what, f"{place} is not a folder", "choose another place")
    if not os.access(place, os.W_OK | os.X_OK):
        why = f"the folder {place} cannot be written"
        raise InputError(what, why, "change its permissions, or choose another place")


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def free_bytes(path: Path) -> int:
    """Free space on the disk of `path`, which need not exist yet."""
    return shutil.disk_usage(existing(path)).free


def check_room(*needs: tuple[Path, int], else_: str = "") -> None:
    """Raises DoesNotFitError when a disk lacks room for all bytes that go there; `else_`: another way out."""
    disks: dict[int, tuple[Path, int]] = {}
    for path, count in needs:
        place = existing(path)
        first, sum_ = disks.get(place.stat().st_dev, (place, 0))
        disks[place.stat().st_dev] = (first, sum_ + count)
    for place, count in disks.values():
        if count and count > (free := free_bytes(place)):
            raise DoesNotFitError(
                "the disk is too small",
                f"{gb(count)} are needed, {gb(free)} are free at {place}",
                f"free some space, or write to another disk (-o){else_}",
            )


def write_failure(error: OSError, path: Path) -> Ltx2Error:
    """The error for a command that failed while writing to `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "free some space and run the same command again: what is here is kept"
        return DoesNotFitError("the disk is full", f"there is no room left for {path}", fix)
    return InputError(f"cannot write {path}", reason(error), "check the folder and its permissions")


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """A file opened for reading; links are followed. Raises OSError where it cannot be opened, and for a folder, a pipe
    or a device, which might block forever."""
    check_regular(path)
    with path.open("rb") as file:
        yield file


def check_regular(path: Path) -> None:
    """Raises OSError as `open_regular`."""
    try:
        mode = path.stat().st_mode
    except ValueError as error:  # a name that no file can have
        raise FileNotFoundError(errno.ENOENT, str(error), str(path)) from error
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device", str(path))


def visible(folder: Path, pattern: str) -> list[Path]:
    """The matching paths in a folder, sorted, without hidden ones such as `._name`, which macOS writes on file systems
    that cannot store its attributes."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def is_base_name(name: object) -> bool:
    """Whether `name` stays inside the folder that it is joined to."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        return False
    try:
        return len(os.fsencode(name)) <= NAME_BYTES
    except UnicodeEncodeError:  # half a character
        return False
