"""The options of `generate`, as one table: the request, the command line, Python's signatures, sidecars, resumed runs,
`--from` and benchmark suites all read it. A new option is one row of `Options`.

Nothing here loads MLX, so that help stays instant."""

import hashlib
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from math import inf
from pathlib import Path
from typing import Any, ClassVar, Generic, SupportsFloat, SupportsIndex, TypeVar, cast

from ltx2.runtime.errors import InputError

StrPath = str | os.PathLike[str]
SEEDS = 1 << 64  # a key of MLX's generator has 64 bits
Given = TypeVar("Given", contravariant=True)
Value = TypeVar("Value", covariant=True)


@dataclass(eq=False)
class Option(ABC, Generic[Given, Value]):
    """A row: how an option is read, what it means, and what it is part of.

    It is the descriptor of its field: what is assigned (`Given`; None leaves the default) is read and checked, what is
    got is a `Value`. Raises InputError for a value that is not valid.
    """

    help: str
    _: KW_ONLY
    default: Any = None  # None: what the model's preset says
    metavar: str | None = None
    valid: Callable[[Any], bool] | None = None  # of a value of the right type
    meaning: str = ""  # what a valid value is
    example: str = "another value"
    decides: bool = False  # changes the latents: a run that was cut off cannot be continued with another value
    costs: bool = False  # changes time or memory: benchmarks take it
    recorded: bool = True  # in the sidecar
    repeated: bool = True  # by --from
    command: bool = True  # on the command line under this name
    replaces: tuple[str, ...] = ()  # options that it leaves nothing to do
    sets: tuple[str, ...] = ()  # options whose values come with it

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
        """As the command line spells it."""
        return f"--{self.name.replace('_', '-')}"

    @abstractmethod
    def read(self, value: Any) -> Value:
        """Raises TypeError or ValueError for a value of another type."""

    def checked(self, value: Any) -> Value:
        """The value, read. Raises InputError for one that is not valid."""
        try:
            read = self.read(value)
        except (TypeError, ValueError):
            raise self._invalid(repr(value), f"it must be {self.kind}") from None
        if self.valid is not None and not self.valid(read):
            raise self._invalid(str(read), f"it must be {self.meaning}")
        return read

    def identity(self, value: Any) -> Any:
        """What a value that decides is told from others by."""
        return value

    def record(self, value: Any) -> Any:
        """The value as JSON has it, so that it can be given again from another folder."""
        return value

    def _invalid(self, value: str, why: str) -> InputError:
        return InputError(f"{self.name.replace('_', ' ')} {value} is not valid", why, f"use {self.example}")


class Text(Option[StrPath | None, str | None]):
    """Any text."""

    kind = "a text"
    type: ClassVar[Any] = str

    def read(self, value: Any) -> str:
        text = os.fspath(value)
        if not isinstance(text, str):
            raise TypeError
        return text


class File(Text):
    """The path of a file. Where it decides, its content does."""

    kind = "a text or path"
    type = StrPath

    def identity(self, value: Any) -> Any:
        """The SHA-256 of its content."""
        return value and hashlib.sha256(Path(value).read_bytes()).hexdigest()

    def record(self, value: Any) -> Any:
        """The absolute path."""
        return value and str(Path(value).absolute())


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


@dataclass(eq=False)
class Choice(Option[str | None, str]):
    """One of some names; the first is the default."""

    choices: tuple[str, ...] = ()
    type = str

    @property
    def kind(self) -> str:  # type: ignore[override]
        return f"one of {', '.join(self.choices)}"

    def __post_init__(self) -> None:
        self.default, self.example = self.choices[0], self.choices[0]

    def read(self, value: Any) -> str:
        if value not in self.choices:
            raise ValueError
        return str(value)


@dataclass(frozen=True)
class Options:
    """What `generate` can be told. None is the preset's default."""

    prompt: Text = Text("What the clip shows, and how it sounds.", decides=True, command=False)
    _: KW_ONLY
    width: Whole = Whole("Pixels; a multiple of 64 (32 with --no-upscale).", decides=True, costs=True)
    height: Whole = Whole("Pixels; a multiple of 64 (32 with --no-upscale).", decides=True, costs=True)
    frames: Whole = Whole("8k+1, e.g. 121.", decides=True, costs=True)
    fps: Number = Number("Frames per second.", decides=True, costs=True)
    seed: Whole = Whole(
        "Same seed, same clip.",
        valid=lambda seed: 0 <= seed < SEEDS,
        meaning="between 0 and 2**64 - 1",
        example="10",
        decides=True,
    )
    no_audio: Flag = Flag("Write no sound. The picture stays the same.", costs=True)
    no_upscale: Flag = Flag("One stage at full size, without the upscaler.", decides=True, costs=True)
    embeddings: File = File("Use saved prompt embeddings; skips the text encoder.", decides=True, replaces=("prompt",))
    save_embeddings: File = File("Save the prompt's embeddings.", repeated=False)
    noise: File = File("Start from these noises instead of the seed.", decides=True, replaces=("seed",))
    save_latents: File = File("Save the latents before they are decoded.", repeated=False)
    latents: File = File(
        "Decode these latents only.",
        replaces=("prompt", "embeddings", "save_embeddings", "noise", "no_upscale", "checkpoint_every", "resume"),
        sets=("width", "height", "frames"),
    )
    memory_limit: Number = Number(
        "Stay below; default: what the GPU can use.",
        metavar="GB",
        valid=lambda limit: 0 < limit < inf,
        meaning="a positive number of GB (1e9 bytes)",
        example="24, for example",
        costs=True,
    )
    low_memory: Flag = Flag("Take as little as possible; slower.", costs=True)
    matmul: Choice = Choice(
        "With quantized weights; auto: the fastest, measured once.",
        choices=("auto", "packed", "dequantized", "widened"),
        costs=True,
    )
    checkpoint_every: Whole = Whole(
        "Keep the state after every N denoise steps.",
        metavar="N",
        valid=lambda steps: steps >= 1,
        meaning="a number of denoise steps, at least 1",
        example="1",
        recorded=False,
    )
    resume: Flag = Flag("Continue a run that was cut off, with the same result.", recorded=False)
    output: File = File("The mp4 file that frames go to as they are decoded.", recorded=False, command=False)
    state: File = File("The file that a run is continued from.", recorded=False, command=False)

    def __post_init__(self) -> None:
        if self.state is None and (self.resume or self.checkpoint_every):
            option = "resume" if self.resume else "checkpoint_every"
            what = f"{option} has no effect without a state"
            raise InputError(what, "nothing says in which file the run is kept", "give state=FILE.safetensors")


ROWS: Mapping[str, Option[Any, Any]] = {name: row for name, row in vars(Options).items() if isinstance(row, Option)}


# What benchmarks take: options that change time or memory.
COSTS = tuple(name for name, row in ROWS.items() if row.costs)


def repeated(earlier: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an earlier run with new ones in their place. What the new ones leave nothing to do is left out,
    and what would leave nothing to do for those of them that decide."""
    dropped = {name for file in given for name in (*ROWS[file].replaces, *ROWS[file].sets)}
    dropped |= {row.name for row in ROWS.values() if any(n in given and ROWS[n].decides for n in row.replaces)}
    return {name: value for name, value in earlier.items() if name not in dropped} | dict(given)
