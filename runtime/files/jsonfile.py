"""JSON from outside, read within bounds: any content gives plain data or a ValueError."""

import json
from collections.abc import Iterable
from math import isfinite
from pathlib import Path
from typing import Any

from ltx2.runtime.files.paths import open_regular

MAX_BYTES = 4 << 20  # the largest published one, a tokenizer's configuration, has 1.2 MB
MAX_DEPTH = 64  # far below what exhausts the stack of code that walks the data


def read_text(path: Path) -> str:
    """The text of a small UTF-8 file, cut one byte behind the longest that is parsed. Raises OSError when there is no
    such file, ValueError for other encodings."""
    with open_regular(path) as file:
        return file.read(MAX_BYTES + 1).decode()


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises OSError when there is no such file, ValueError for other content."""
    return parse_object(read_text(path))


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object in a text. Raises ValueError."""
    data = parse_json(text)
    if not isinstance(data, dict):
        raise ValueError("it is not a JSON object")
    return data


def parse_json(text: str) -> Any:
    """The value in a JSON text. Raises ValueError for other text, and where it is too long, nests too deeply or has a
    number that is not finite."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"it is longer than the {MAX_BYTES >> 20} MiB that are read")
    deep = f"it is nested deeper than the {MAX_DEPTH} levels that are read"
    try:
        data = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError(deep) from None
    level = [data]
    for _ in range(MAX_DEPTH):
        level = [value for parent in level for value in _values(parent) if isinstance(value, dict | list)]
        if not level:
            return data
    raise ValueError(deep)


def _finite(text: str) -> float:
    """Raises ValueError for NaN and infinities, which Python reads though JSON has none, and for too large numbers."""
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{text} is not a number")
    return value


def _values(parent: Any) -> Iterable[Any]:
    if isinstance(parent, dict):
        return parent.values()
    return parent if isinstance(parent, list) else ()
