"""What a stranger may send: files that are malformed or ask for too much, and values where others belong."""

import json
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ltx2.runtime.errors import printable
from ltx2.runtime.files.jsonfile import MAX_BYTES
from ltx2.runtime.files.tensors import HEADER_BYTES
from tests.support.command import Done, Here

HANGS = 600  # seconds after which a command in this process is stopped: it would run for ever
Mutation = Callable[[dict[str, Any]], None]

ESCAPES = "\x1b[2J\x07\r\n\u202e\u2028\x00\x7f"  # what a terminal would obey
DEEP = "[" * 100_000
HUGE = "9" * 5000  # a number of more digits than Python reads
# In the place of any value of a JSON document.
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 10**6, 2**24, 2**63, 10**400, 0.5, 1e308, "", "x", "../../x", ESCAPES, "y" * 5000,
    [], [None], [[]], [1] * 100, ["x", {}], {}, {"x": 1}, {"bits": 0}, {"rope_type": "linear", "factor": 0},
)  # fmt: skip
# In the place of a whole JSON document.
TEXTS: Mapping[str, bytes] = {
    "nothing": b"",
    "half": b'{"a": ',
    "a list": b"[]",
    "null": b"null",
    "deep": DEEP.encode(),
    "deep inside": f'{{"a": {"[" * 900}{"]" * 900}}}'.encode(),
    "deep objects": b'{"a":' * 50_000,
    "huge number": f'{{"a": {HUGE}}}'.encode(),
    "NaN": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "beyond floats": b'{"a": 1e999}',
    "Latin-1": b'{"a": "\xe9"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "twice": b"{}{}",
    "long": b'{"a": "' + b"x" * MAX_BYTES + b'"}',
}
# In the place of the name of a file of a folder.
NAMES: tuple[Any, ...] = (
    "../secret.safetensors", "../../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors", "sub/x.json",
    "", ".", "..", "a\0b", "a\\b", "x" * 300, "\ud800", None, 3, ["x"], {},
)  # fmt: skip


def entry(start: int, end: int, shape: Any, dtype: Any = "F32") -> dict[str, Any]:
    """A tensor in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of this header (JSON, or what becomes it); `length` is what the file says of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(name: str = "a", **changed: Any) -> bytes:
    """A file of one tensor, with some of its entry changed."""
    return raw({name: entry(0, 4, [1]) | changed}, bytes(4))


ENTRY = json.dumps(entry(0, 4, [1])).encode()
GOOD = b'{"a":' + ENTRY + b"}"
# Files that the safetensors library rejects, with duplicate names, or with a header of a length that is not read.
MALFORMED: Mapping[str, bytes] = {
    "empty": b"",
    "one byte": b"\x08",
    "only a length": struct.pack("<Q", 2),
    "zeros": bytes(1000),
    "length 2^63": raw(GOOD, bytes(4), 1 << 63),
    "length 2^64-1": raw(GOOD, bytes(4), (1 << 64) - 1),
    "length of a terabyte": raw(GOOD, bytes(4), 1 << 40),
    "length beyond the limit": raw(GOOD, bytes(4), HEADER_BYTES + 1),
    "length beyond the file": raw(GOOD, bytes(4), HEADER_BYTES),
    "length too short": raw(GOOD, bytes(4), len(GOOD) - 1),
    "length into the data": raw(GOOD, bytes(4), len(GOOD) + 2),
    "no JSON": raw(b"hello"),
    "half": raw(GOOD[:-3]),
    "trailing garbage": raw(GOOD + b"x", bytes(4)),
    "trailing zeros": raw(GOOD + b"\0\0", bytes(4)),
    "byte order mark": raw(b"\xef\xbb\xbf" + GOOD, bytes(4)),
    "list": raw([]),
    "null": raw(None),
    "not UTF-8": raw(b'{"\xff\xfe":' + ENTRY + b"}", bytes(4)),
    "half a surrogate": raw(b'{"\\ud800":' + ENTRY + b"}", bytes(4)),
    "deep": raw(DEEP.encode()),
    "deep in an entry": raw(GOOD[:-2] + b',"x":' + b"[" * 5000 + b"]" * 5000 + b"}}", bytes(4)),
    "NaN": raw(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)),
    "huge number": raw(b'{"a":{"dtype":"F32","shape":[' + HUGE.encode() + b'],"data_offsets":[0,4]}}', bytes(4)),
    "duplicate names": raw(b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}", bytes(4)),
    "duplicate metadata": raw(b'{"__metadata__":{"x":"1","x":"2"},"a":' + ENTRY + b"}", bytes(4)),
    "metadata is a list": raw({"__metadata__": [], "a": entry(0, 4, [1])}, bytes(4)),
    "metadata of numbers": raw({"__metadata__": {"config": 3}, "a": entry(0, 4, [1])}, bytes(4)),
    "metadata of objects": raw({"__metadata__": {"config": {"x": 1}}, "a": entry(0, 4, [1])}, bytes(4)),
    "unknown dtype": one(dtype="F33"),
    "dtype is a number": one(dtype=32),
    "dtype is an object": one(dtype={"F32": None}),
    "no dtype": raw({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "no shape": raw({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)),
    "shape is null": one(shape=None),
    "shape of texts": one(shape=["1"]),
    "shape of fractions": one(shape=[1.0]),
    "negative shape": one(shape=[-1]),
    "shape is nested": one(shape=[[1]]),
    "overflowing shape": one(shape=[1 << 32, 1 << 32]),
    "overflowing bytes": one(shape=[1 << 62]),
    "overflowing before zero": one(shape=[1 << 63, 2, 0]),
    "shape beyond its bytes": one(shape=[2]),
    "offsets beyond the file": raw({"a": entry(0, 1 << 40, [1 << 38])}, bytes(4)),
    "offsets past the end": one(data_offsets=[8, 12]),
    "offsets backwards": one(data_offsets=[4, 0]),
    "negative offsets": one(data_offsets=[-4, 0]),
    "one offset": one(data_offsets=[0]),
    "three offsets": one(data_offsets=[0, 4, 4]),
    "overlapping": raw({"a": entry(0, 4, [1]), "b": entry(2, 6, [1])}, bytes(6)),
    "same place": raw({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, bytes(4)),
    "gap": raw({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)),
    "gap at the start": raw({"a": entry(4, 8, [1])}, bytes(8)),
    "truncated": raw({"a": entry(0, 4, [1])}, bytes(3)),
    "longer than it says": raw({"a": entry(0, 4, [1])}, bytes(5)),
    "not whole bytes": raw({"a": entry(0, 2, [3], "F4")}, bytes(2)),
}


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's whole path is short
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


def _piped(path: Path) -> None:
    os.mkfifo(path.with_suffix(".pipe"))
    path.symlink_to(path.with_suffix(".pipe"))


# What stands at a path instead of a file.
PLACES: Mapping[str, Callable[[Path], None]] = {
    "nothing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "socket": _socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to a pipe": _piped,
}


def paths(data: Any, to: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every value of a JSON document, as keys and indices."""
    items: Any = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [to, *(path for key, value in items for path in paths(value, (*to, key)))]


def put(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The document with another value at one place."""
    if not path:
        return value
    items = dict(data) if isinstance(data, dict) else list(data)
    items[path[0]] = put(data[path[0]], path[1:], value)
    return items


def content(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, without following links: bytes of files, None for the rest."""
    found = sorted(folder.rglob("*"))
    return {str(p): p.read_bytes() if p.is_file() and not p.is_symlink() else None for p in found}


def harmless(done: Done) -> Done:
    """Done, refused or wrong usage, without a traceback or anything that a terminal obeys. Restarts the time limit."""
    signal.alarm(HANGS)
    assert done.code in (0, 1, 2) and "Traceback" not in done.err, done
    assert all(line == printable(line) for line in (done.out + done.err).split("\n")), done
    return done


def refused(here: Here, *args: str | Path, said: str = "", beside: Path) -> None:
    """The command fails as expected, and nothing in the folder `beside` is written."""
    before = content(beside)
    harmless(here(*args)).failed(1, said)
    assert content(beside) == before


def spoiled(data: Any) -> Iterator[str]:
    """A JSON document with other values at one place at a time, three of them for each."""
    for number, path in enumerate(paths(data)):
        for n in range(3):
            yield json.dumps(put(data, path, VALUES[(3 * number + n) % len(VALUES)]))


def edit(path: Path, change: Mutation) -> None:
    """Change a JSON file."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
