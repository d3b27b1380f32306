"""The unfinished model folder `<name>.partial`: which of its files are complete, and for which conversion.

Its journal holds one JSON line per finished file and hashed source, after a first line with the conversion's
fingerprint. The same conversion continues; another one starts anew."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from ltx2.runtime.errors import InputError, ModelFolderError
from ltx2.runtime.jsonfile import parse_object
from ltx2.runtime.layout import file_record
from ltx2.runtime.tensorfile import FileRecord

JOURNAL = "journal.jsonl"


@dataclass
class Partial:
    """An open unfinished folder; `files` by path inside the folder, `sources` by the source's path."""

    path: Path
    _journal: IO[str]
    files: dict[str, FileRecord] = field(default_factory=dict)
    sources: dict[str, FileRecord] = field(default_factory=dict)

    def add_file(self, path: str, record: FileRecord) -> None:
        """Record a finished file."""
        self.files[path] = record
        self._append({"file": path, **asdict(record)})

    def add_source(self, path: str, record: FileRecord) -> None:
        """Record a source's hash."""
        self.sources[path] = record
        self._append({"source": path, **asdict(record)})

    def _append(self, line: dict[str, Any]) -> None:
        self._journal.write(json.dumps(line) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def abandon(self) -> None:
        """Remove the folder if nothing in it is worth continuing."""
        if not self.files and not self.sources:
            shutil.rmtree(self.path)

    def finish(self, target: Path) -> None:
        """Turn the folder into the finished one at `target`. The journal goes last, so that a crash loses nothing."""
        for folder in [self.path, *(path for path in self.path.rglob("*") if path.is_dir())]:
            _sync(folder)
        self.path.rename(target)
        (target / JOURNAL).unlink()
        _sync(target)
        _sync(target.parent)


@contextmanager
def open_partial(path: Path, fingerprint: str) -> Iterator[Partial]:
    """Open or create the unfinished folder and hold it for this process.

    Raises ModelFolderError when something else stands at `path`, InputError while another process writes there.
    """
    journal = path / JOURNAL
    linked = path.is_symlink() or journal.is_symlink()  # what is written and removed may be elsewhere
    if linked or (path.exists() and not journal.is_file() and not is_empty_folder(path)):
        raise ModelFolderError(
            f"{path} is in the way", "it is not an unfinished conversion of ours", "move it away, or write elsewhere"
        )
    path.mkdir(parents=True, exist_ok=True)
    with journal.open("a+", encoding="utf-8") as f:
        _lock(f, path)
        lines = _read(f)
        if not lines or lines[0] != {"fingerprint": fingerprint}:
            _clear(path)
            lines = [{"fingerprint": fingerprint}]
        partial = Partial(path, f)
        f.truncate(0)  # a crash may have left half a line at its end
        for line in lines:
            partial._append(line)
        _restore(partial, lines)
        yield partial


def is_empty_folder(path: Path) -> bool:
    """Whether there is a folder that may be used as if there were none."""
    return path.is_dir() and not any(path.iterdir())


def _lock(f: IO[str], path: Path) -> None:
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InputError(
            f"{path} is being written", "another ltx2 process holds it", "wait for it, or write elsewhere"
        ) from error


def _read(f: IO[str]) -> list[dict[str, Any]]:
    """The journal's lines up to the first incomplete one, which a crash may leave."""
    f.seek(0)
    lines: list[dict[str, Any]] = []
    try:
        for text in f:
            line = parse_object(text)
            if lines:
                _recorded(line)
            lines.append(line)
    except (ValueError, LookupError, TypeError):
        return lines
    return lines


def _recorded(line: dict[str, Any]) -> tuple[str, FileRecord]:
    """A line's path and record. Raises ValueError, LookupError or TypeError for another line."""
    path = line["source"] if "source" in line else line["file"]
    return str(Path(path)), file_record(line)


def _restore(partial: Partial, lines: list[dict[str, Any]]) -> None:
    for line in lines[1:]:
        path, record = _recorded(line)
        if "source" in line:
            partial.sources[path] = record
        elif _size(partial.path / path) == record.size:
            partial.files[path] = record


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _clear(path: Path) -> None:
    for entry in path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != JOURNAL:
            entry.unlink()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
