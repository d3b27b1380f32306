"""One validated generation: options in, sizes that the model can make out."""

import math
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ltx2.runtime.errors import InputError
from ltx2.runtime.generate.presets import Preset, Stage
from ltx2.runtime.layers.matmul import AUTO, CHOICES
from ltx2.runtime.sampling.latents import Grid, Scales, audio_latent_count

SEEDS = 1 << 64  # a key of MLX's generator is 64 bits
# What a given file stands for, so that these options have nothing left to do.
REPLACED: Mapping[str, tuple[str, ...]] = {
    "latents": (
        "prompt", "embeddings", "save_embeddings", "noise", "no_upscale", "checkpoint_every", "resume",
    ),
    "embeddings": ("prompt",),
}  # fmt: skip
# How a clip is made, not which: not part of its record.
UNRECORDED = ("output", "state", "checkpoint_every", "resume")


def repeated(earlier: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an earlier run with new ones in their place, less what the new ones leave nothing to do."""
    dropped = {name for file, names in REPLACED.items() if file in given for name in names}
    if "prompt" in given:
        dropped |= REPLACED.keys()
    if "latents" in given:
        dropped |= {"width", "height", "frames"}  # the latents' own
    return {name: value for name, value in earlier.items() if name not in dropped} | dict(given)


@dataclass(frozen=True)
class Request:
    """The options of `generate`. None is the preset's default."""

    prompt: str | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    fps: float | None = None
    seed: int | None = None
    no_audio: bool = False
    no_upscale: bool = False
    embeddings: str | None = None
    save_embeddings: str | None = None
    noise: str | None = None
    save_latents: str | None = None
    latents: str | None = None
    memory_limit: float | None = None  # GB
    low_memory: bool = False
    matmul: str = AUTO  # with packed weights
    output: str | None = None  # the mp4 file that frames are written to as they are decoded; else the clip has them
    state: str | None = None  # the file that an interrupted run is continued from
    checkpoint_every: int | None = None  # steps
    resume: bool = False

    def __post_init__(self) -> None:
        if self.seed is not None and not 0 <= self.seed < SEEDS:
            why = "it must be between 0 and 2**64 - 1"
            raise InputError(f"seed {self.seed} is not valid", why, "use 10")
        if self.memory_limit is not None and not 0 < self.memory_limit < math.inf:
            why = "it must be a positive number of GB (1e9 bytes)"
            raise InputError(f"memory limit {self.memory_limit:g} is not valid", why, "use 24, for example")
        if self.matmul not in CHOICES:
            why = f"it is one of {', '.join(CHOICES)}"
            raise InputError(f"matmul {self.matmul!r} is not known", why, "leave it out")
        if self.checkpoint_every is not None and self.checkpoint_every < 1:
            why = "it counts denoise steps, at least 1"
            raise InputError(f"checkpoint every {self.checkpoint_every} is not valid", why, "use 1")
        if self.state is None and (self.resume or self.checkpoint_every):
            option = "resume" if self.resume else "checkpoint_every"
            what = f"{option} has no effect without a state"
            raise InputError(what, "nothing says in which file the run is kept", "give state=FILE.safetensors")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "Request":
        """Any whole number, path or flag will do, also numpy's and pathlib's; None is left out.

        Raises InputError for an unknown option and for a value of the wrong type.
        """
        types = {f.name: f.type for f in fields(cls)}
        unknown = sorted(options.keys() - types.keys())
        if unknown:
            known = ", ".join(types)
            raise InputError(f"unknown option {unknown[0]!r}", "generate has no such option", f"use {known}")
        return cls(**{n: _read(n, types[n], value) for n, value in options.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """As the sidecar records it: files by absolute path."""
        files = ("embeddings", "save_embeddings", "noise", "save_latents", "latents")
        given = {name: path for name in files if (path := getattr(self, name)) is not None}
        options = {name: value for name, value in asdict(self).items() if name not in UNRECORDED}
        return options | {name: str(Path(path).absolute()) for name, path in given.items()}

    def without_effect(self) -> Iterator[str]:
        """Warnings about options that others leave nothing to do."""
        file = next((name for name in REPLACED if getattr(self, name) is not None), "")
        for name in REPLACED.get(file, ()):
            if getattr(self, name) not in (None, False):
                option = "the prompt" if name == "prompt" else f"--{name.replace('_', '-')}"
                yield f"{option} has no effect with --{file}"

    def for_latents(self, shape: Sequence[int], scales: Scales) -> "Request":
        """With the sizes that latents (1, C, F, H, W) make. Raises InputError when it asks for others."""
        *_, frames, height, width = shape
        made = replace(
            self,
            width=width * scales.spatial,
            height=height * scales.spatial,
            frames=(frames - 1) * scales.temporal + 1,
        )
        for name in ("width", "height", "frames"):
            asked, value = getattr(self, name), getattr(made, name)
            if asked not in (None, value):
                what = f"{name} {asked} does not fit the latents"
                raise InputError(what, f"they make {name} {value}", f"leave out --{name}")
        return made

    def with_defaults(self, preset: Preset) -> "Request":
        """Fill what was not asked for. Raises InputError without a prompt, embeddings or latents."""
        if self.prompt is None and self.embeddings is None and self.latents is None:
            why = "nothing says what the clip should show"
            raise InputError("there is no prompt", why, "give a PROMPT, --embeddings or --latents")
        missing = {name: value for name, value in preset.defaults.items() if getattr(self, name) is None}
        return replace(self, **missing)


def _read(name: str, kind: Any, value: Any) -> Any:
    read, meaning = READERS[kind]
    try:
        return read(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} {value!r} is not valid", f"it must be {meaning}", "give another value") from None


def _text(value: Any) -> str:
    text = os.fspath(value)
    if not isinstance(text, str):
        raise TypeError
    return text


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _flag(value: Any) -> bool:
    if value not in (True, False):
        raise TypeError
    return bool(value)


# By the type of a Request's field: how a user's value is read, and what it must be.
READERS: Mapping[Any, tuple[Callable[[Any], Any], str]] = {
    str: (_text, "a text"),
    str | None: (_text, "a text or path"),
    int | None: (_whole, "a whole number"),
    float | None: (float, "a number"),
    bool: (_flag, "true or false"),
}


@dataclass(frozen=True)
class Sizes:
    """What a complete request makes: pixels, frames, rate."""

    width: int
    height: int
    frames: int
    fps: float

    @classmethod
    def of(cls, request: Request) -> "Sizes":
        width, height, frames, fps = request.width, request.height, request.frames, request.fps
        assert width is not None and height is not None, "a request has its defaults"
        assert frames is not None and fps is not None, "a request has its defaults"
        return cls(width, height, frames, fps)

    def check(self, scales: Scales, stages: tuple[Stage, ...], smallest: int) -> None:
        """`smallest`: pixels of the shortest side that can be decoded. Raises InputError naming both nearest valid
        values."""
        multiple = scales.spatial * max((stage.downscale for stage in stages), default=1)
        smallest = -(-smallest // multiple) * multiple
        for name, value in (("width", self.width), ("height", self.height)):
            if value < smallest or value % multiple:
                why = f"it must be a multiple of {multiple}, at least {smallest}"
                raise _invalid(name, value, _nearest(value, multiple, smallest), why)
        step = scales.temporal
        if self.frames < 1 or (self.frames - 1) % step:
            raise _invalid("frames", self.frames, _nearest(self.frames, step, 1), f"it must be {step}k+1")
        if not 1 <= self.fps <= 240:
            raise InputError(f"fps {self.fps:g} is not valid", "it must be between 1 and 240", "use 24, 25 or 30")

    def grid(self, stage: Stage, scales: Scales, channels: int, audio_channels: int) -> Grid:
        """The latent grid of one stage."""
        return Grid(
            channels,
            (self.frames - 1) // scales.temporal + 1,
            self.height // stage.downscale // scales.spatial,
            self.width // stage.downscale // scales.spatial,
            audio_channels,
            audio_latent_count(self.frames, self.fps, scales),
        )


def _nearest(value: int, step: int, smallest: int) -> list[int]:
    """The valid values around `value`, of smallest, smallest + step, ..."""
    below = value - (value - smallest) % step
    return sorted({max(below, smallest), max(below + step, smallest)})


def _invalid(name: str, value: int, nearest: list[int], why: str) -> InputError:
    return InputError(f"{name} {value} is not valid", why, f"use {' or '.join(str(n) for n in nearest)}")
