"""Output paths, checked before the work starts: a wrong one must not cost a finished clip. And small text files,
written whole or not at all."""

import os
from pathlib import Path

from ltx2.runtime.errors import InputError


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
