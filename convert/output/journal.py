"""The unfinished model folder `<name>.partial`: what of it is on the disk, and for which conversion.

Its journal is one JSON line per finished file, hashed source and mark ("the first N pieces are written"), after a
first line with the conversion's fingerprint. Every line is true when it is written and only ever followed by others,
so that a crash at any point costs no more than the last one. The same conversion continues; another starts anew."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from ltx2.runtime.errors import ModelFolderError
from ltx2.runtime.files.atomic import flush, hold, sync_folder
from ltx2.runtime.files.jsonfile import parse_object
from ltx2.runtime.files.tensors import FileRecord
from ltx2.runtime.model.layout import file_record

JOURNAL = "journal.jsonl"


@dataclass
class Partial:
    """An open unfinished folder: finished `files` by path inside the folder, hashed `sources` by the source's path. The
    first `pieces` pieces of the conversion stand in files. `locked` unless the file system has no locks."""

    path: Path
    _journal: BinaryIO
    locked: bool
    files: dict[str, FileRecord] = field(default_factory=dict)
    sources: dict[str, FileRecord] = field(default_factory=dict)
    pieces: int = 0
    _lock: Lock = field(default_factory=Lock)

    def add_file(self, path: str, record: FileRecord) -> None:
        """Record a finished file."""
        self.files[path] = record
        self._append({"file": path, **asdict(record)})

    def add_source(self, path: str, record: FileRecord) -> None:
        """Record a source's hash."""
        self.sources[path] = record
        self._append({"source": path, **asdict(record)})

    def mark(self, pieces: int) -> None:
        """Record how many pieces are on the disk."""
        self.pieces = pieces
        self._append({"pieces": pieces})

    def apply(self, line: dict[str, Any]) -> None:
        """Apply a line of the journal. Raises ValueError, LookupError or TypeError for a malformed one."""
        if "pieces" in line:
            pieces = line["pieces"]
            if type(pieces) is not int or pieces < 0:
                raise ValueError(f"{pieces!r} is no number of pieces")
            self.pieces = pieces
            return
        path, record = Path(line["source"] if "source" in line else line["file"]), file_record(line)
        if path.name != record.name:
            raise ValueError(f"{path} is not called {record.name}")
        (self.sources if "source" in line else self.files)[str(path)] = record

    def unfinished(self, path: str) -> Path:
        """Where a file stands until it is finished."""
        return self.path / f"{path}.partial"

    def _append(self, line: dict[str, Any]) -> None:
        with self._lock:
            self._journal.write(json.dumps(line).encode() + b"\n")
            self._journal.flush()
            flush(self._journal.fileno())

    def remove(self) -> None:
        """Remove the folder: nothing in it is worth continuing."""
        shutil.rmtree(self.path)

    def abandon(self) -> None:
        """Remove the folder if nothing in it is worth continuing."""
        if not (self.files or self.sources or self.pieces):
            self.remove()

    def finish(self, target: Path) -> None:
        """Turn the folder into the finished one at `target`. The journal goes last, so that a crash loses nothing."""
        for folder in [self.path, *(path for path in self.path.rglob("*") if path.is_dir())]:
            sync_folder(folder)
        self.path.rename(target)
        (target / JOURNAL).unlink()
        sync_folder(target)
        sync_folder(target.parent)


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
    with journal.open("a+b") as f:
        partial = Partial(path, f, hold(f, path))
        size = _read(f, partial, fingerprint)
        f.truncate(size)  # a crash may have left half a line at its end
        if size:
            partial.files = {n: file for n, file in partial.files.items() if file_size(path / n) == file.size}
        else:
            _clear(path)
            partial._append({"fingerprint": fingerprint})
            sync_folder(path)
        yield partial


def is_empty_folder(path: Path) -> bool:
    """Whether there is a folder that may be used as if there were none."""
    return path.is_dir() and not any(path.iterdir())


def _read(f: BinaryIO, partial: Partial, fingerprint: str) -> int:
    """Apply the journal's lines up to the first incomplete one, which a crash may leave; returns their size in bytes, 0
    for the journal of another conversion."""
    f.seek(0)
    size = 0
    try:
        for text in f:
            line = parse_object(text.decode())
            if not text.endswith(b"\n"):
                break
            if size:
                partial.apply(line)
            elif line != {"fingerprint": fingerprint}:
                break
            size += len(text)
    except (ValueError, LookupError, TypeError):
        pass  # the line was not written to its end
    return size


def file_size(path: Path) -> int:
    """A file's size in bytes, -1 if there is none."""
    return path.stat().st_size if path.is_file() else -1


def _clear(path: Path) -> None:
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != JOURNAL:
            entry.unlink()
