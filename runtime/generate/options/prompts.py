"""Files of prompts: one a line, or JSON lines with options."""

from pathlib import Path
from typing import Any

from ltx2.runtime.errors import InputError, of, reason
from ltx2.runtime.files.jsonfile import parse_object
from ltx2.runtime.files.paths import open_regular
from ltx2.runtime.generate.options.request import COMMON, Request
from ltx2.runtime.generate.options.table import ROWS

OUTPUT = "output"


def read_prompts(path: Path) -> tuple[str, ...]:
    """A file's prompts, one per line. Raises InputError when there is none."""
    return tuple(line for _, line in _lines(path))


def read_clips(path: Path) -> list[dict[str, Any]]:
    """The options of a clip a line: a prompt, or a JSON object of options as Python spells them, `prompt` and `output`
    among them. Raises InputError, which names the line."""
    clips = []
    for number, line in _lines(path):
        with of(f"line {number} of {path}"):
            clips.append(_options(line) if line.startswith("{") else {"prompt": line})
            Request(**clips[-1])  # raises for a value that is not valid
    return clips


def _options(line: str) -> dict[str, Any]:
    try:
        options = {name.replace("-", "_"): value for name, value in parse_object(line).items() if value is not None}
    except ValueError as error:
        fix = 'write {"prompt": "a red kite", "frames": 49}, or the prompt alone'
        raise InputError("it is no JSON object", reason(error), fix) from error
    known = {OUTPUT, "prompt"} | {name for name, row in ROWS.items() if row.command} - set(COMMON)
    for name in options.keys() - known:
        why = "it is the whole run's" if name in COMMON else "generate has no such option"
        raise InputError(f"{name!r} is no option of one clip", why, f"use {', '.join(sorted(known))}")
    return options


def _lines(path: Path) -> list[tuple[int, str]]:
    """Lines that are not empty, by number from 1."""
    try:
        with open_regular(path) as file:
            lines = file.read().decode("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        fix = "name a text file in UTF-8 with one prompt per line"
        raise InputError(f"cannot read the prompts {path}", reason(error), fix) from error
    found = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"{path} holds no prompt", "all of its lines are empty", "write one prompt per line")
    return found
