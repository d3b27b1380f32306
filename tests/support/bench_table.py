"""The tables of speed in README and docs/performance.md, made from receipts. A bench table has a row for a phase and a
column for a case: of denoising one step, of other phases the computing without loading; and the most memory that MLX
held. A clip table has a row for a case."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ltx2.bench.speed.compare import STAGE

MARKS = re.compile(
    r"<!-- (?P<kind>bench|clip) table: (?P<paths>[^>]+?) -->\n(?P<table>.*?)\n<!-- end of table -->", re.DOTALL
)
Case = Mapping[str, Any]


def markdown(receipts: Sequence[Mapping[str, Any]]) -> str:
    """One table of all cases of some receipts."""
    cases = [case for receipt in receipts for case in receipt["cases"]]
    phases = [{phase["name"]: phase for phase in case["phases"]} for case in cases]
    names = list(dict.fromkeys(name for found in phases for name in found))
    rows = [[_row_name(name), *(_cell(found[name]) if name in found else "" for found in phases)] for name in names]
    several = len({case["name"].rpartition(": ")[2] for case in cases}) > 1
    head = ["", *(_column(case, several) for case in cases)]
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in (head, ["---"] * len(head), *rows))


def clips(receipts: Sequence[Mapping[str, Any]]) -> str:
    """One table of all cases of some receipts: seconds of a whole clip, and of a step of each stage, and memory."""
    rows = [["model", "a clip", "a step of stage 1", "of stage 2", "memory"], ["---"] * 5]
    for case in (case for receipt in receipts for case in receipt["cases"]):
        phases = {phase["name"]: phase for phase in case["phases"]}
        steps = [_time(phases[stage]["step_seconds"]["median"]) for stage in ("stage1", "stage2")]
        peak = max(phase["mlx_peak_bytes"] for phase in phases.values())
        seconds = case["total_seconds"]["median"]
        rows.append([case["name"].partition(", ")[0], f"{seconds:.1f} s", *steps, f"{peak / 1e9:.1f} GB"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


MADE = {"bench": markdown, "clip": clips}


def tables_in(text: str) -> Iterator[tuple[str, list[str], str]]:
    """Kind, paths of the receipts and the table, of every marked one."""
    for found in MARKS.finditer(text):
        yield found["kind"], found["paths"].split(), found["table"]


def _row_name(phase: str) -> str:
    return f"{phase}, one step" if phase.startswith(STAGE) else phase


def _column(case: Case, sized: bool) -> str:
    """The model, the part where it is not the whole clip, and the size where there are several."""
    name, _, size = case["name"].rpartition(": ")
    model, _, part = name.partition(", ")
    return ", ".join([model, *([] if part == "clip" else [part]), *([size] if sized else [])])


def _cell(phase: Mapping[str, Any]) -> str:
    seconds = phase["step_seconds"] if phase["name"].startswith(STAGE) else phase["work_seconds"]
    return f"{_time(seconds['median'])}, {phase['mlx_peak_bytes'] / 1e9:.1f} GB"


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"
