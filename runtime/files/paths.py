"""Output paths, checked before the work starts: a wrong one must not cost a finished clip. Files opened for reading
whatever stands at their place, names that stay inside a folder, and small text files, written whole or not at all."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ltx2.runtime.errors import InputError

NAME_BYTES = 255  # of file systems


def check_output(path: str | Path) -> None:
    """Raises InputError for what would prevent writing a file to `path`."""
    what, folder = f"cannot write {path}", Path(path).absolute().parent
    if Path(path).is_dir():
        raise InputError(what, "it is a folder", "name a file in it")
    if not folder.is_dir():
        raise InputError(what, f"the folder {folder} does not exist", "create it, or write elsewhere")
    if not os.access(folder, os.W_OK):
        raise InputError(what, f"the folder {folder} cannot be written", "change its permissions, or write elsewhere")


def write_text(path: Path, text: str) -> None:
    """Write a text file; it appears under its name only when complete. Raises InputError when it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}", str(error), "check permissions and free space") from error


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """A file opened for reading, through links too.

    Raises OSError for what cannot be opened, and for a folder, a pipe or a device: opening those may wait for ever.
    """
    check_regular(path)
    with path.open("rb") as file:
        yield file


def check_regular(path: Path) -> None:
    """Raises OSError as `open_regular`."""
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device", str(path))


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except ValueError as error:  # a name that no file can have
        raise FileNotFoundError(errno.ENOENT, str(error), str(path)) from error


def is_base_name(name: object) -> bool:
    """Whether `name` can only be a file directly inside the folder it is joined to."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        return False
    try:
        return len(os.fsencode(name)) <= NAME_BYTES
    except UnicodeEncodeError:  # half a character
        return False
