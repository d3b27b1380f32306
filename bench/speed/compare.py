"""Two receipts of the same cases: what became faster or slower, and what is noise.

The rule: a median of several runs is known to within half of its spread, (slowest - fastest) / median. Two medians
differ if they are further apart than both halves together and than 1 %, the least noise from one session to the next.
With a single run on either side the noise is not known, and there is no verdict."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ltx2.runtime.errors import InputError, reason
from ltx2.runtime.files.jsonfile import read_object

LEAST_NOISE = 0.01
VERSIONS = ("mlx", "ltx2")
# Facts of a machine that change its speed, beside versions.
MACHINE = ("chip", "device", "cores", "gpu_cores", "memory_bytes", "system", "power", "power_mode")
TOTAL = "in all"
STAGE = "stage"  # phases of alike steps


@dataclass(frozen=True)
class Verdict:
    """One phase of one case, or the whole case. `change` and `noise` are shares of the old median; noise None: not
    known."""

    case: str
    phase: str
    old_seconds: float
    new_seconds: float
    noise: float | None

    @property
    def change(self) -> float:
        return self.new_seconds / self.old_seconds - 1 if self.old_seconds else 0.0

    @property
    def text(self) -> str:
        """ "within noise", "faster by 12 %", "slower by 3.4 %"."""
        if self.noise is None:
            return f"{100 * self.change:+.1f} %, noise not known"
        if abs(self.change) <= self.noise:
            return f"within noise ({100 * self.noise:.1f} %)"
        return f"{'slower' if self.change > 0 else 'faster'} by {100 * abs(self.change):.1f} %"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"change": round(self.change, 4), "verdict": self.text}


@dataclass(frozen=True)
class Comparison:
    """Verdicts of all cases that both receipts have, and warnings about differences between the machines."""

    verdicts: tuple[Verdict, ...]
    warnings: tuple[str, ...]
    older: Mapping[str, Any]  # date and versions of the old receipt

    def to_dict(self) -> dict[str, Any]:
        verdicts = [verdict.to_dict() for verdict in self.verdicts]
        return {"older": dict(self.older), "warnings": list(self.warnings), "verdicts": verdicts}


def read_receipt(path: Path) -> dict[str, Any]:
    """A benchmark's receipt. Raises InputError for another file."""
    try:
        receipt = read_object(path)
        if receipt.get("kind") != "bench" or not receipt.get("cases"):
            raise ValueError("it is not the receipt of a benchmark of this version")
        compare(receipt, receipt)  # all that a comparison reads is there
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        fix = "use a file that ltx2 bench --out wrote"
        raise InputError(f"cannot compare with {path}", reason(error), fix) from error
    return receipt


def check_comparable(old: Mapping[str, Any], cases: Iterable[Mapping[str, Any]]) -> None:
    """`cases`: as `identity` returns them. Raises InputError when the receipt has none of them."""
    if not {_key(case) for case in old["cases"]} & {_key(case) for case in cases}:
        why = f"the old one is of {old['cases'][0]['name']}"
        raise InputError("the receipts are of different cases", why, "measure the same model, weights, part and sizes")


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Comparison:
    """Raises InputError when the receipts have no case in common."""
    check_comparable(old, new["cases"])
    before, after = ({_key(case): case for case in receipt["cases"]} for receipt in (old, new))
    both = [key for key in after if key in before]
    verdicts = [verdict for key in both for verdict in _verdicts(before[key], after[key])]
    older = {"created": old["created"], **{name: old["machine"][name] for name in VERSIONS}}
    return Comparison(tuple(verdicts), tuple(_warnings(old, new, [before, after], len(both))), older)


def _key(case: Mapping[str, Any]) -> str:
    return json.dumps([case[name] for name in ("part", "options", "model")], sort_keys=True)


def _verdicts(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Verdict]:
    phases = {phase["name"]: phase for phase in old["phases"]}
    for phase in new["phases"]:
        before = _timings(phases[phase["name"]]) if phase["name"] in phases else {}
        for name, timing in _timings(phase).items():
            if name in before:
                yield _verdict(new["name"], name, before[name], timing)
    yield _verdict(new["name"], TOTAL, old["total_seconds"], new["total_seconds"])


def _timings(phase: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """A phase's times: of the whole, and of a denoise step."""
    timings = {phase["name"]: phase["seconds"]}
    return timings | ({f"{phase['name']}, a step": phase["step_seconds"]} if phase["name"].startswith(STAGE) else {})


def _verdict(case: str, phase: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Verdict:
    known = min(old["repetitions"], new["repetitions"]) > 1
    noise = max(LEAST_NOISE, (old["spread"] + new["spread"]) / 2) if known else None
    return Verdict(case, phase, old["median"], new["median"], noise)


def _warnings(
    old: Mapping[str, Any], new: Mapping[str, Any], cases: list[dict[str, Mapping[str, Any]]], common: int
) -> Iterator[str]:
    for name in MACHINE:
        before, after = old["machine"].get(name), new["machine"].get(name)
        if before != after:
            yield f"another machine: {name.replace('_', ' ')} was {before}, is {after}"
    if old.get("environment") != new.get("environment"):
        yield f"another environment: it was {old.get('environment')}, is {new.get('environment')}"
    left = sum(len(side) - common for side in cases)
    if left:
        yield f"{left} cases are in one of the receipts only"


def table(comparison: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows for people, of a receipt's `comparison`."""
    verdicts = comparison["verdicts"]
    several = len({verdict["case"] for verdict in verdicts}) > 1
    rows = [
        [
            f"{verdict['case']}: {verdict['phase']}" if several else verdict["phase"],
            f"{verdict['old_seconds']:.3f}",
            f"{verdict['new_seconds']:.3f}",
            verdict["verdict"],
        ]
        for verdict in verdicts
    ]
    older = comparison["older"]
    title = f"compared with {older['created'][:10]} (mlx {older['mlx']}, ltx2 {older['ltx2']})"
    return "\n".join([title, *comparison["warnings"]]), ["phase", "old s", "new s", "verdict"], rows
