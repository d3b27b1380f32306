"""Suites of a benchmark as data: suites/*.json, or a user's file.

A suite is a list of cases (a part of the generation, and options of `generate` that change its cost), the number of
runs of each, and the bits of random weights."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ltx2.runtime.errors import InputError, UsageError, reason
from ltx2.runtime.files.jsonfile import read_object
from ltx2.runtime.generate.options.table import COSTS

FOLDER = Path(__file__).parent / "suites"
DEFAULT = "quick"
# Of a generation: all of it; text encoder and connectors; the stages and the upscaler between them, from given
# embeddings; the decoders, from given latents.
PARTS = ("clip", "text", "denoise", "decode")


@dataclass(frozen=True)
class Schedule:
    """A case's measured runs, its warm-up runs before them, and seconds of rest before every run."""

    repeat: int = 3
    warmup: int = 1
    cooldown: float = 0.0

    def __post_init__(self) -> None:
        if self.repeat < 1 or self.warmup < 0:
            why = "measured runs must be at least 1, warm-up runs 0 or more"
            what = f"--repeat {self.repeat} --warmup {self.warmup} is not possible"
            raise UsageError(what, why, "use --repeat 3 --warmup 1")
        if not 0 <= self.cooldown <= 3600:
            why = "a rest before every run must be between 0 and 3600 s"
            raise UsageError(f"--cooldown {self.cooldown:g} is not valid", why, "use --cooldown 30")


@dataclass(frozen=True)
class Task:
    """One case: a part of a generation with these options, and a LoRA of this rank with random values on all layers (0:
    none)."""

    part: str = "clip"
    options: tuple[tuple[str, Any], ...] = ()
    lora_rank: int = 0


@dataclass(frozen=True)
class Suite:
    """A named suite. `bits`: of random weights; empty: as they were chosen."""

    name: str
    tasks: tuple[Task, ...]
    schedule: Schedule = Schedule()
    bits: tuple[int, ...] = ()

    def changed(self, part: str | None, options: Mapping[str, Any], schedule: Mapping[str, Any]) -> "Suite":
        """With a user's choices in place of its own; None is no choice. Equal cases become one."""
        given = {name: value for name, value in options.items() if value is not None}
        tasks = [
            replace(task, part=part or task.part, options=tuple((dict(task.options) | given).items()))
            for task in self.tasks
        ]
        wanted = {name: value for name, value in schedule.items() if value is not None}
        return replace(self, tasks=tuple(dict.fromkeys(tasks)), schedule=replace(self.schedule, **wanted))


def suite_names() -> list[str]:
    """The suites that come with ltx2."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_suite(name: str = DEFAULT) -> Suite:
    """A suite by its name or file. Raises InputError where it does not exist or is malformed."""
    path = FOLDER / f"{name}.json" if name in suite_names() else Path(name)
    try:
        return _read(path.stem, read_object(path))
    except OSError as error:
        known = " or ".join(suite_names())
        raise InputError(f"there is no suite {name!r}", reason(error), f"use {known}, or the path of a file") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        fix = "write it like the suites that come with ltx2 (bench/suites)"
        raise InputError(f"the suite {path} cannot be used", reason(error), fix) from error


def _read(name: str, data: dict[str, Any]) -> Suite:
    unknown = data.keys() - {"about", "warmup", "repeat", "cooldown", "bits", "cases"}
    if unknown:
        raise ValueError(f"there is no setting {min(unknown)!r}")
    schedule = {key: data[key] for key in ("repeat", "warmup", "cooldown") if key in data}
    tasks = tuple(_task(dict(case)) for case in data["cases"])
    if not tasks:
        raise ValueError("it has no cases")
    return Suite(name, tasks, Schedule(**schedule), tuple(map(int, data.get("bits", ()))))


def _task(case: dict[str, Any]) -> Task:
    part, rank = case.pop("part", "clip"), int(case.pop("lora_rank", 0))
    if part not in PARTS:
        raise ValueError(f"there is no part {part!r}, only {', '.join(PARTS)}")
    if unknown := case.keys() - set(COSTS):
        raise ValueError(f"a case has no option {min(unknown)!r}, only lora_rank, {', '.join(COSTS)}")
    return Task(part, tuple(case.items()), rank)
