"""The cases of a benchmark: every task of a suite with every model, a folder or random weights of published shapes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ltx2.bench.random.model import random_folder
from ltx2.bench.speed.run import Case
from ltx2.bench.speed.suite import Suite
from ltx2.quant.apply import Settings
from ltx2.runtime.errors import InputError
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


def bench_cases(models: Sequence[Path], random: RandomWeights | None, suite: Suite) -> list[Case]:
    """Raises ModelFolderError for a path that is no model folder, InputError for a suite that needs random weights."""
    if suite.bits and random is None:
        why = "it names bits, and a model folder has its own"
        fix = f"use --random NAME, or --suite parts and several model folders instead of --suite {suite.name}"
        raise InputError(f"suite {suite.name} is for random weights", why, fix)
    folders = [ModelFolder.open(path) for path in models]
    folders += random.folders(suite.bits) if random is not None else []
    return [Case(folder, task) for folder in folders for task in suite.tasks]
