"""The rows of the table of options, by the kind of their values."""

import hashlib
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, astuple, dataclass, field
from functools import cache
from math import inf, isfinite
from pathlib import Path
from typing import Any, ClassVar, Generic, SupportsFloat, SupportsIndex, TypeVar, cast

from ltx2.runtime.errors import UnsupportedError, UsageError, of
from ltx2.runtime.events import Event
from ltx2.runtime.generate.options.values import Auto, Form, path_of

StrPath = str | os.PathLike[str]
Given = TypeVar("Given", contravariant=True)
Value = TypeVar("Value", covariant=True)
Chosen = TypeVar("Chosen", covariant=True)
Formed = TypeVar("Formed", bound=Form)


@dataclass(eq=False)
class Option(ABC, Generic[Given, Value]):
    """A row: how an option is read, what it means, and what it is part of.

    It is the descriptor of its field: what is assigned (`Given`; None leaves the default) is read and checked, what is
    got is a `Value`. Raises UsageError for a value that is not valid.
    """

    help: str
    _: KW_ONLY
    default: Any = None  # None: what the model's preset says
    metavar: str | None = None
    least: float = -inf
    most: float = inf
    range: str = ""  # of valid numbers, in words; else made of both ends
    example: str = "another value"
    decides: bool = False  # changes the latents: a run that was cut off cannot be continued with another value
    costs: bool = False  # changes time or memory: benchmarks take it
    recorded: bool = True  # in the sidecar
    repeated: bool = True  # by --from
    command: bool = True  # on the command line under this name
    replaces: tuple[str, ...] = ()  # options that it leaves nothing to do
    sets: tuple[str, ...] = ()  # options whose values come with it
    needs: str = ""  # the option without which it has no effect

    name: str = field(init=False, default="")  # the field's
    kind: ClassVar[str]  # of values, in words
    type: ClassVar[Any]  # of what is given

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object | None, owner: type | None = None) -> Value:
        return cast(Value, self.default if instance is None else instance.__dict__[self.name])

    def __set__(self, instance: object, value: Given) -> None:
        instance.__dict__[self.name] = self.default if value is None else self.checked(value)

    @property
    def flag(self) -> str:
        """The command line's spelling, else Python's."""
        return f"--{self.name.replace('_', '-')}" if self.command else self.name

    @abstractmethod
    def read(self, value: Any) -> Value:
        """Raises TypeError or ValueError for a value of another type."""

    def checked(self, value: Any) -> Value:
        """The value, read. Raises UsageError for one that is not valid."""
        try:
            read = self.read(value)
        except (TypeError, ValueError):
            raise self._invalid(repr(value), f"it must be {self.kind}") from None
        if isinstance(read, int | float) and not (self.least <= read <= self.most and isfinite(read)):
            raise self._invalid(f"{read:.10g}" if isinstance(read, float) else str(read), f"it must be {self._range}")
        return read

    @property
    def _range(self) -> str:
        if self.range or self.least == -inf:
            return self.range or "finite"
        return f"at least {self.least:g}" if self.most == inf else f"between {self.least:g} and {self.most:g}"

    def files(self, value: Any) -> tuple[str, ...]:
        """Paths of the files that a value names."""
        return ()

    def identity(self, value: Any) -> Any:
        """The value as JSON, with the content of files in place of their paths."""
        return value

    def record(self, value: Any) -> Any:
        """The value as JSON; from any folder it can be given again."""
        return value

    def _invalid(self, value: str, why: str) -> UsageError:
        return UsageError(f"{self.flag} {value} is not valid", why, f"use {self.example}")


class Text(Option[StrPath | None, str | None]):
    """Any text."""

    kind = "a text in UTF-8"
    type: ClassVar[Any] = str

    def read(self, value: Any) -> str:
        text = os.fspath(value)
        if not isinstance(text, str):
            raise TypeError
        text.encode()  # raises ValueError for bytes that were no UTF-8 on a command line
        return text.removeprefix("\ufeff")  # the mark that some editors begin a file with


@dataclass(eq=False)
class File(Text):
    """The path of a file. Where it decides, its content does."""

    metavar: str | None = "FILE"
    kind = "a text or path"
    type = StrPath

    def read(self, value: Any) -> str:
        return path_of(value)

    def files(self, value: str | None) -> tuple[str, ...]:
        return () if value is None else (value,)

    def identity(self, value: str | None) -> Any:
        return None if value is None else digest(value)

    def record(self, value: str | None) -> Any:
        return None if value is None else portable(value)


class Whole(Option[SupportsIndex | None, int | None]):
    """A whole number, also numpy's."""

    kind = "a whole number"
    type = int

    def read(self, value: Any) -> int:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)


class Number(Option[SupportsFloat | None, float | None]):
    """A number, also numpy's."""

    kind = "a number"
    type = float

    def read(self, value: Any) -> float:
        return float(value)


@dataclass(eq=False)
class Flag(Option[bool | None, bool]):
    """On or off."""

    default: Any = False
    kind = "true or false"
    type = bool

    def read(self, value: Any) -> bool:
        if value not in (True, False):
            raise TypeError
        return bool(value)


class Watcher(Option[Callable[[Event], object] | None, Callable[[Event], object] | None]):
    """A function that is called with every event of a run."""

    kind = "a function of an event"
    type = Callable[[Event], object]

    def read(self, value: Any) -> Callable[[Event], object]:
        if not callable(value):
            raise TypeError
        watch: Callable[[Event], object] = value
        return watch


@dataclass(eq=False)
class Choice(Option[str | None, Chosen]):
    """One of some names. `unbuilt`: names that other tools have and this one lacks, and why."""

    choices: tuple[str, ...] = ()
    unbuilt: Mapping[str, str] = field(default_factory=dict)
    type = str

    @property
    def kind(self) -> str:  # type: ignore[override]
        return f"one of {', '.join(self.choices)}"

    def read(self, value: Any) -> Chosen:
        if value in self.unbuilt:
            raise UnsupportedError(f"{self.flag} {value} is not built", self.unbuilt[value], f"use {self.kind}")
        if value not in self.choices:
            raise ValueError
        return cast(Chosen, str(value))


class Numbers(Option[str | SupportsIndex | Iterable[SupportsIndex] | None, tuple[int, ...] | None]):
    """Whole numbers; the command line separates them by commas."""

    kind = "whole numbers"
    type = Sequence[int]

    def read(self, value: Any) -> tuple[int, ...]:
        if isinstance(value, str):
            return tuple(map(int, value.split(",")))
        return tuple(map(operator.index, value if isinstance(value, Iterable) else [value]))

    def identity(self, value: tuple[int, ...] | None) -> Any:
        return None if value is None else list(value)

    record = identity


@dataclass(eq=False)
class Length(Option[SupportsIndex | str | Auto | None, int | Auto | None]):
    """A number of frames, or how long a prediction of it may be."""

    kind = "a whole number, auto or auto:MIN-MAX"
    type = int | str

    def read(self, value: Any) -> int | Auto:
        if isinstance(value, str) and not value.removeprefix("-").isdecimal():
            with of(self.flag):
                value = Auto.read(value)
        if isinstance(value, Auto):
            return value
        if isinstance(value, bool):
            raise TypeError
        return int(value) if isinstance(value, str) else operator.index(value)

    def identity(self, value: int | Auto | None) -> Any:
        return str(value) if isinstance(value, Auto) else value

    record = identity


@dataclass(eq=False)
class _OfForm(Option[Given, Value], Generic[Given, Value, Formed]):
    """Files, and what is said of each: a text, or a tuple."""

    form: type[Formed] = field(kw_only=True)

    def __post_init__(self) -> None:
        self.metavar = self.form.spelling

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.form.spelling


class One(_OfForm[StrPath | tuple[Any, ...] | Formed | None, Formed | None, Formed]):
    """One of them."""

    type = StrPath | tuple[Any, ...]

    def read(self, value: Any) -> Formed:
        with of(self.flag):
            return self.form.read(value)

    def files(self, value: Formed | None) -> tuple[str, ...]:
        return () if value is None else (value.path,)

    def identity(self, value: Formed | None) -> Any:
        return None if value is None else _identity(value)

    def record(self, value: Formed | None) -> Any:
        return None if value is None else _record(value)


@dataclass(eq=False)
class Several(_OfForm[Iterable[StrPath | tuple[Any, ...] | Formed] | None, tuple[Formed, ...], Formed]):
    """Any number of them, in order; the command line repeats the option."""

    default: Any = ()
    type = Sequence[StrPath | tuple[Any, ...]]

    def read(self, value: Any) -> tuple[Formed, ...]:
        with of(self.flag):
            return tuple(map(self.form.read, [value] if isinstance(value, str | os.PathLike | Form) else value))

    def files(self, value: tuple[Formed, ...]) -> tuple[str, ...]:
        return tuple(form.path for form in value)

    def identity(self, value: tuple[Formed, ...]) -> Any:
        return [_identity(form) for form in value]

    def record(self, value: tuple[Formed, ...]) -> Any:
        return [_record(form) for form in value]


def _identity(form: Form) -> list[Any]:
    """A name that is no file's stands for a part of the model folder."""
    return [digest(form.path) if Path(form.path).exists() else form.path, *astuple(form)[1:]]


def _record(form: Form) -> list[Any]:
    return [portable(form.path) if Path(form.path).exists() else form.path, *astuple(form)[1:]]


def portable(path: str | Path) -> str:
    """The absolute path, with `~` for the home folder, whose name is private."""
    absolute, home = Path(path).absolute(), Path.home()
    return str(Path("~") / absolute.relative_to(home)) if absolute.is_relative_to(home) else str(absolute)


def digest(path: str | Path) -> str:
    """SHA-256 of a file, or of a folder's files with their names. Raises OSError."""
    file = Path(path)
    if file.is_dir():
        names = sorted(found for found in file.rglob("*") if found.is_file())
        parts = "\n".join(f"{name.relative_to(file)} {digest(name)}" for name in names)
        return hashlib.sha256(parts.encode()).hexdigest()
    stat = file.stat()
    return _digest(str(file.absolute()), stat.st_size, stat.st_mtime_ns)


@cache
def _digest(path: str, size: int, changed: int) -> str:
    """Once for each state of a file: a LoRA has gigabytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
