"""Medians, spreads and receipt files of all measurements."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ltx2.runtime.files.atomic import write_text
from ltx2.runtime.files.paths import check_output


@dataclass(frozen=True)
class Timing:
    """Seconds over several repetitions."""

    median: float
    fastest: float
    slowest: float
    repetitions: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median."""
        return (self.slowest - self.fastest) / self.median if self.median else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {name: round(value, 5) for name, value in asdict(self).items()} | {"spread": round(self.spread, 4)}


def write_receipt(path: Path, receipt: dict[str, Any]) -> None:
    """Raises InputError when `path` cannot be written."""
    check_output(path)
    write_text(path, json.dumps(receipt, indent=2) + "\n")
