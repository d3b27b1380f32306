"""The cases of a benchmark: every task of a suite with every model, a folder or random weights of published shapes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ltx2.bench.random.model import random_folder
from ltx2.bench.speed.compare import read_receipt
from ltx2.bench.speed.run import Case, run_bench
from ltx2.bench.speed.suite import DEFAULT, Suite, load_suite
from ltx2.quant.apply import Settings
from ltx2.runtime.distributed.machines import ALONE, Machines
from ltx2.runtime.errors import InputError, UsageError
from ltx2.runtime.events import Event
from ltx2.runtime.model.layout import ModelFolder

UNPACKED = 16


@dataclass(frozen=True)
class RandomWeights:
    """A published model by its name, at these bits (16: as published; none: the suite's, else as published), packed by
    `settings`."""

    name: str
    bits: tuple[int, ...] = ()
    settings: Settings = field(default_factory=Settings)

    def folders(self, usual: Sequence[int]) -> Iterator[ModelFolder]:
        """One folder for each bits; `usual`: the suite's. Raises InputError for a form that does not exist, and what
        `random_folder` raises."""
        packed = self.settings != Settings()
        for bits in self.bits or ((None,) if packed else usual or (UNPACKED,)):
            if bits == UNPACKED and packed and len(self.bits) == 1:
                why = "16 bits are not packed, so no mode, group size or recipe applies"
                raise InputError("nothing is packed", why, "give other --bits, or leave the other options out")
            yield random_folder(self.name, None if bits == UNPACKED else replace(self.settings, bits=bits))


def bench_models(models: Sequence[Path], options: Mapping[str, Any], machines: Machines = ALONE) -> Iterator[Event]:
    """The events of `run_bench` with the `options` of `ltx2 bench`; None is not given. Raises UsageError for options
    that have no effect, InputError for a file that is no suite or receipt, and what `bench_cases` raises."""
    given = {name: value for name, value in options.items() if value is not None}
    random, bits, compare = given.pop("random", None), tuple(given.pop("bits", ())), given.pop("compare", None)
    settings = Settings(**{name: given.pop(name) for name in ("mode", "group_size", "recipe") if name in given})
    if random is None and (bits or settings != Settings()):
        raise UsageError("nothing is random", "bits, mode, group_size and recipe are of random weights", "give random")
    if random is None and not models:
        raise UsageError("nothing is measured", "there is no model", "name a model folder, or give random")
    weights = None if random is None else RandomWeights(random, bits, settings)
    schedule: dict[str, Any] = {name: given.pop(name) for name in ("repeat", "warmup", "cooldown") if name in given}
    suite = load_suite(given.pop("suite", DEFAULT)).changed(given.pop("part", None), given, schedule)
    old = None if compare is None else read_receipt(compare)
    return run_bench(bench_cases(models, weights, suite), suite.schedule, suite.name, old, machines)


def bench_cases(models: Sequence[Path], random: RandomWeights | None, suite: Suite) -> list[Case]:
    """Raises ModelFolderError for a path that is no model folder, InputError for a suite that needs random weights."""
    if suite.bits and random is None:
        why = "it names bits, and a model folder has its own"
        fix = f"use --random NAME, or --suite parts and several model folders instead of --suite {suite.name}"
        raise InputError(f"suite {suite.name} is for random weights", why, fix)
    folders = [ModelFolder.open(path) for path in models]
    folders += random.folders(suite.bits) if random is not None else []
    return [Case(folder, task) for folder in folders for task in suite.tasks]
