"""Files of prompts: one a line, or JSON lines with options."""

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from ltx2.runtime.errors import InputError, nearest, of, reason
from ltx2.runtime.files.jsonfile import parse_object
from ltx2.runtime.files.paths import open_regular
from ltx2.runtime.generate.options.request import COMMON, HELP, Request
from ltx2.runtime.generate.options.table import ROWS

OUTPUT = "output"


def read_prompts(path: Path) -> tuple[str, ...]:
    """A file's prompts, for what uses them all with the same options: one a line, or JSON objects with `prompt` alone.
    Raises InputError, which names the line."""
    return tuple(str(options["prompt"]) for options in _read(path, {}, frozenset({"prompt"})))


def read_clips(path: Path, given: Mapping[str, Any] | None = None, *, prompted: bool = False) -> list[dict[str, Any]]:
    """The options of a clip a line, beside those that are `given` for all: a prompt, or a JSON object of options as
    Python spells them, `prompt` and `output` among them. A line that says nothing to show is refused unless an earlier
    run has `prompted` it. Raises InputError, which names the line."""
    known = {OUTPUT, "prompt"} | {name for name, row in ROWS.items() if row.command} - set(COMMON)
    return _read(path, given or {}, known, prompted)


def _read(path: Path, given: Mapping[str, Any], known: Set[str], prompted: bool = False) -> list[dict[str, Any]]:
    Request(**given)  # what is wrong with these is no line's
    clips = []
    for number, line in _lines(path):
        with of(name := f"line {number} of {path}"):
            own = _options(line, known) if line.startswith("{") else {"prompt": line}
            options = {**given, "name": name, **own}
            request = Request(**options)  # raises for a value that is not valid
            if not prompted:
                request.check_prompt()
        clips.append(options)
    return clips


def _options(line: str, known: Set[str]) -> dict[str, Any]:
    try:
        options = {name.replace("-", "_"): value for name, value in parse_object(line).items() if value is not None}
    except ValueError as error:
        fix = 'write {"prompt": "a red kite"}, or the prompt alone'
        raise InputError("it is no JSON object", reason(error), fix) from error
    for name in options.keys() - known:
        why, fix = "there is no such option", nearest(name, known, HELP if len(known) > 1 else "use prompt alone")
        if name in COMMON:
            why, fix = "it is the whole run's", f"leave it out there, and give {ROWS[name].flag} for all clips"
        elif name in ROWS or name == OUTPUT:
            why, fix = "the same options go for all prompts", "leave it out"
        raise InputError(f"{name!r} is no option of one prompt", why, fix)
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
