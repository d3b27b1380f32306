"""One validated generation: options in, sizes that the model can make out."""

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from ltx2.runtime.errors import InputError, UsageError, nearest
from ltx2.runtime.generate.options.table import ROWS, SAMPLING, SIZE, Options, check_usage, repeated
from ltx2.runtime.sampling.latents import Scales, Sizes

COMMON = ("memory_limit", "low_memory", "matmul", "resume")
DRAWN = 1 << 32  # seeds that are drawn are below
HELP = "ltx2 generate --help shows the options there are"
P = ParamSpec("P")
Self = TypeVar("Self")
Result = TypeVar("Result")


class Request(Options):
    """The options of one `generate`, checked."""

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "Request":
        """Any whole number, path or flag will do, also numpy's and pathlib's; None is left out.

        Raises InputError for an unknown option, UsageError for a value that is not valid and for options that do not go
        together.
        """
        check_known(options)
        request = cls(**options)
        check_usage(request.given)
        return request

    @classmethod
    def again(cls, earlier: Mapping[str, Any], given: Mapping[str, Any]) -> "Request":
        """An earlier run's request with new options in the place of its own. Raises as `from_options`."""
        new, old = cls(**given).given, cls(**earlier).given
        return cls(**repeated(old, new))

    @property
    def given(self) -> dict[str, Any]:
        """The options that differ from the table's defaults."""
        values = {name: getattr(self, name) for name in ROWS}
        return {name: value for name, value in values.items() if value != ROWS[name].default}

    @property
    def replaced(self) -> dict[str, str]:
        """Options that others leave nothing to do, and the one that does."""
        found = {name: file for file in self.given for name in ROWS[file].replaces}
        return {name: file for name, file in found.items() if file not in found}

    @property
    def source(self) -> str | None:
        """The clip that the request's sizes follow from."""
        spans = (self.retake, self.extend)
        return self.video or self.upscale or next((form.path for form in spans if form is not None), None)

    def named(self) -> Iterator[tuple[str, str]]:
        """Option and path of every file to read. A LoRA's path may be its name in the model folder."""
        for name, row in ROWS.items():
            if row.recorded and row.repeated and name not in self.replaced:
                yield from ((name, path) for path in row.files(getattr(self, name)))

    def inputs(self) -> Iterator[tuple[str, str]]:
        """Those of them that exist."""
        yield from ((name, path) for name, path in self.named() if Path(path).exists())

    def recorded(self) -> dict[str, Any]:
        """The values for the sidecar: files by absolute path."""
        return {name: row.record(getattr(self, name)) for name, row in ROWS.items() if row.recorded}

    def identity(self) -> dict[str, Any]:
        """The options that decide the latents: files by their content, None for options that they replace."""
        rows = {name: row for name, row in ROWS.items() if row.decides}
        return {n: None if n in self.replaced else row.identity(getattr(self, n)) for n, row in rows.items()}

    def without_effect(self) -> Iterator[str]:
        """Warnings about options that others leave nothing to do."""
        for name, file in self.replaced.items():
            if name in self.given:
                option = "the prompt" if name == "prompt" else ROWS[name].flag
                yield f"{option} has no effect with {ROWS[file].flag}"
        if self.upscale is not None and self.prompt is None and self.embeddings is None:
            lone = (ROWS[name].flag for name in SAMPLING if name in self.given and name != "resume")
            yield from (f"{flag} has no effect without a prompt, which refines the clip" for flag in lone)

    def for_latents(self, shape: Sequence[int], scales: Scales) -> "Request":
        """With the sizes that latents (1, C, F, H, W) make. Raises InputError when it asks for others."""
        *_, frames, height, width = shape
        made = replace(
            self,
            width=width * scales.spatial,
            height=height * scales.spatial,
            frames=(frames - 1) * scales.temporal + 1,
        )
        for name in SIZE:
            asked, value = getattr(self, name), getattr(made, name)
            if asked not in (None, value):
                what = f"{name} {asked} does not fit the latents"
                raise InputError(what, f"they make {name} {value}", f"leave out --{name}")
        return made

    def with_defaults(self, defaults: Mapping[str, Any]) -> "Request":
        """Fill what was not asked for; a seed is drawn. Raises as `check_prompt`."""
        self.check_prompt()
        usual = {"seed": draw_seed(), **defaults}
        missing = {n: v for n, v in usual.items() if getattr(self, n) is None and n not in self.replaced}
        return replace(self, **missing)

    def check_prompt(self) -> None:
        """Raises InputError without a prompt, embeddings or latents, and for an empty prompt."""
        if all(value is None for value in (self.prompt, self.embeddings, self.latents, self.upscale)):
            why = "nothing says what the clip should show"
            raise InputError("there is no prompt", why, "give a PROMPT, --embeddings or --latents")
        if self.prompt is not None and not self.prompt.strip() and "prompt" not in self.replaced:
            raise InputError("the prompt is empty", "it does not say what the clip should show", "describe the clip")

    @property
    def sizes(self) -> Sizes:
        """The sizes of a request with its defaults."""
        width, height, frames, fps = self.width, self.height, self.frames, self.fps
        assert width is not None and height is not None, "a request has its defaults"
        assert isinstance(frames, int) and fps is not None, "a request has its defaults"
        return Sizes(width, height, frames, fps)


def check_common(requests: Sequence[Request], machines: bool) -> None:
    """Raises UsageError where clips that are made together do not agree on what is the whole run's, and for several
    clips on several `machines`."""
    if machines and len(requests) > 1:
        why, fix = "the machines share one clip at a time", "make them one by one, or on one machine"
        raise UsageError("several clips and several machines do not go together", why, fix)
    for name in COMMON:
        values = list({getattr(request, name): None for request in requests})
        if len(values) > 1:
            what = f"{ROWS[name].flag} is {values[0]} for one clip and {values[1]} for another"
            raise UsageError(what, "it is the whole run's", "give it once, for all clips")


def draw_seed() -> int:
    """One that is short enough to be written down."""
    return secrets.randbelow(DRAWN)


def takes(
    request: Callable[P, Request],
) -> Callable[[Callable[[Self, Request], Result]], Callable[Concatenate[Self, P], Result]]:
    """Make a method of a request one of its options, known by name and type to completion, mypy and help()."""

    def decorate(method: Callable[[Self, Request], Result]) -> Callable[Concatenate[Self, P], Result]:
        @wraps(method)
        def taking(self: Self, /, *args: P.args, **options: P.kwargs) -> Result:
            check_known(options)
            asked = request(*args, **options)
            check_usage(asked.given)
            return method(self, asked)

        own = signature(method)
        given = [
            Parameter(name, parameter.kind, default=parameter.default, annotation=ROWS[name].type | None)
            for name, parameter in signature(request).parameters.items()
            if name in ROWS
        ]
        taking.__signature__ = own.replace(parameters=[own.parameters["self"], *given])  # type: ignore[attr-defined]
        return taking

    return decorate


def check_known(options: Iterable[str]) -> None:
    """Raises InputError for an option that is not in the table."""
    for name in options:
        if name not in ROWS:
            raise InputError(f"unknown option {name!r}", "generate has no such option", nearest(name, ROWS, HELP))
