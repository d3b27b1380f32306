"""One validated generation: options in, sizes that the model can make out."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ltx2.runtime.errors import InputError
from ltx2.runtime.latents import Grid, Scales, audio_latent_count
from ltx2.runtime.presets import Preset, Stage


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

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "Request":
        """Raises InputError for an unknown option."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(options.keys() - known)
        if unknown:
            raise InputError(f"unknown option {unknown[0]!r}", "generate has no such option", f"use {', '.join(known)}")
        return cls(**{name: value for name, value in options.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def with_defaults(self, preset: Preset) -> "Request":
        """Fill what was not asked for. Raises InputError without a prompt, embeddings or latents."""
        if self.prompt is None and self.embeddings is None and self.latents is None:
            why = "nothing says what the clip should show"
            raise InputError("there is no prompt", why, "give a PROMPT, --embeddings or --latents")
        missing = {name: value for name, value in preset.defaults.items() if getattr(self, name) is None}
        return replace(self, **missing)


@dataclass(frozen=True)
class Sizes:
    """What a complete request makes: pixels, frames, rate."""

    width: int
    height: int
    frames: int
    fps: float

    @classmethod
    def of(cls, request: Request) -> "Sizes":
        assert request.width and request.height and request.frames and request.fps, "request without defaults"
        return cls(request.width, request.height, request.frames, request.fps)

    def check(self, scales: Scales, stages: tuple[Stage, ...]) -> None:
        """Raises InputError naming both nearest valid values."""
        multiple = scales.spatial * max(stage.downscale for stage in stages)
        for name, value in (("width", self.width), ("height", self.height)):
            if value < multiple or value % multiple:
                _invalid(name, value, *_nearest(value, multiple, 0), f"it must be a multiple of {multiple}")
        if self.frames < 1 or (self.frames - 1) % scales.temporal:
            step = scales.temporal
            _invalid("frames", self.frames, *_nearest(self.frames, step, 1), f"it must be {step}k+1")
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


def _nearest(value: int, multiple: int, offset: int) -> tuple[int, int]:
    below = (value - offset) // multiple * multiple + offset
    smallest = offset or multiple
    return max(below, smallest), max(below + multiple, smallest)


def _invalid(name: str, value: int, below: int, above: int, why: str) -> None:
    values = f"{below}" if below == above else f"{below} or {above}"
    raise InputError(f"{name} {value} is not valid", why, f"use {values}")
