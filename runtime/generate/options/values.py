"""Values that are more than one word: a file with a place, a span or a strength, as the command line spells them and as
Python's tuples have them.

In a text, the last `@` and, after it (or without it), the last `:` followed by a number separate: a path may hold
others."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from ltx2.runtime.errors import InputError, UsageError

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


@dataclass(frozen=True)
class Form:
    """A file, and what is said of it.

    `pattern` matches the text after the path; its groups are the fields, which are numbers. `spelling` is for people.
    """

    path: str

    pattern: ClassVar[str]
    spelling: ClassVar[str]

    @classmethod
    def read(cls, value: Any) -> Self:
        """From a text, a path, or a tuple of the fields. Raises ValueError or TypeError for anything else, InputError
        for a frame or strength out of range, UsageError for another number that is."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str | os.PathLike):
            found = re.fullmatch(rf"(?P<path>.+?){cls.pattern}", os.fspath(value), re.DOTALL)
            if found is None:
                raise ValueError
            parts = {name: text for name, text in found.groupdict().items() if text is not None}
        else:
            names = [field.name for field in fields(cls)]
            if not isinstance(value, Sequence) or not 0 < len(value) <= len(names):
                raise TypeError
            parts = {name: part for name, part in zip(names, value, strict=False) if part is not None}
        numbers: dict[str, Any] = {name: _number(part) for name, part in parts.items() if name != "path"}
        return cls(path_of(parts["path"]), **numbers)


def path_of(value: Any) -> str:
    """A path as text, `~` being the home folder. Raises TypeError for anything else."""
    path = os.fspath(value)
    if not isinstance(path, str):
        raise TypeError
    return str(Path(path).expanduser()) if path.startswith("~/") else path


def _number(value: Any) -> float:
    """Whole if it is spelt so. Raises ValueError or TypeError."""
    if isinstance(value, bool):
        raise TypeError
    number = float(value)
    return int(number) if number.is_integer() else number


def _strength(value: float, path: str) -> None:
    if not 0 <= value <= 1:
        what = f"strength {value:g} of {path} is not valid"
        raise InputError(what, "it must be between 0 (as good as not given) and 1 (kept as it is)", "use 1")


def _seconds(value: float, path: str) -> None:
    if not 0 <= value < float("inf"):
        raise UsageError(f"second {value:g} of {path} is not valid", "seconds count from 0", "use 0 or more")


@dataclass(frozen=True)
class Picture(Form):
    """An image, the pixel frame that it is for, and how much of it is kept."""

    frame: int = 0
    strength: float = 1

    pattern = rf"(?:@(?P<frame>{NUMBER}))?(?::(?P<strength>{NUMBER}))?"
    spelling = "PATH[@FRAME[:STRENGTH]]"

    def __post_init__(self) -> None:
        if not isinstance(self.frame, int) or self.frame < 0:
            what = f"frame {self.frame:g} of {self.path} is not valid"
            raise InputError(what, "frames are whole numbers that count from 0", "use 0 for the first")
        _strength(self.strength, self.path)


@dataclass(frozen=True)
class KeyPicture(Picture):
    """The same with a frame that must be said."""

    pattern = rf"@(?P<frame>{NUMBER})(?::(?P<strength>{NUMBER}))?"
    spelling = "PATH@FRAME[:STRENGTH]"


@dataclass(frozen=True)
class Sound(Form):
    """A file with a sound track, and the second from which on it is used."""

    start: float = 0

    pattern = rf"(?:@(?P<start>{NUMBER}))?"
    spelling = "PATH[@SECONDS]"

    def __post_init__(self) -> None:
        _seconds(self.start, self.path)


@dataclass(frozen=True)
class Span(Form):
    """A clip, and the seconds of it that are meant."""

    start: float
    end: float

    pattern = r"@(?P<start>[\d.]+)-(?P<end>[\d.]+)"
    spelling = "PATH@START-END"

    def __post_init__(self) -> None:
        _seconds(self.start, self.path)
        if not self.start < self.end < float("inf"):
            what = f"the span {self.start:g}-{self.end:g} of {self.path} is not valid"
            raise UsageError(what, "its end must come after its start", f"use {self.start:g}-{self.start + 1:g}")


@dataclass(frozen=True)
class Extension(Form):
    """A clip, and how many seconds follow it; negative ones come before it."""

    seconds: float

    pattern = rf"@(?P<seconds>{NUMBER})"
    spelling = "PATH@SECONDS"

    def __post_init__(self) -> None:
        if not 0 < abs(self.seconds) < float("inf"):
            what = f"{self.path} cannot be extended by {self.seconds:g} s"
            raise UsageError(what, "there is nothing to make", "use 2 for two seconds after it, -2 for two before it")


@dataclass(frozen=True)
class Reference(Form):
    """A control or source video for an IC-LoRA, and how much of it is kept."""

    strength: float = 1

    pattern = rf"(?::(?P<strength>{NUMBER}))?"
    spelling = "PATH[:STRENGTH]"

    def __post_init__(self) -> None:
        _strength(self.strength, self.path)


@dataclass(frozen=True)
class Lora(Form):
    """A LoRA and its strengths, in all stages or in stage 1 and stage 2; None: not said."""

    strength: float | None = None
    second: float | None = None

    pattern = rf"(?::(?P<strength>{NUMBER})(?:,(?P<second>{NUMBER}))?)?"
    spelling = "PATH[:S[,S2]]"

    def __post_init__(self) -> None:
        for strength in (self.strength, self.second):
            if strength is not None and not abs(strength) < float("inf"):
                raise UsageError(f"strength {strength} of {self.path} is not valid", "it must be finite", "use 1")


@dataclass(frozen=True)
class Auto:
    """A length that the duration head predicts, between these seconds."""

    least: float = 1.0
    most: float = 20.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most <= 20:
            what = f"auto:{self.least:g}-{self.most:g} is not valid"
            raise UsageError(what, "seconds go from 1 to 20, the smaller number first", "use auto or auto:2-8")

    @classmethod
    def read(cls, value: Any) -> "Auto":
        """From `auto` or `auto:MIN-MAX`. Raises ValueError for another text."""
        found = re.fullmatch(r"auto(?::([\d.]+)-([\d.]+))?", value)
        if found is None:
            raise ValueError
        return cls() if found[1] is None else cls(float(found[1]), float(found[2]))

    def __str__(self) -> str:
        return f"auto:{self.least:g}-{self.most:g}"
