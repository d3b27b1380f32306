"""Benchmark a model folder through the same pipeline that generates: warm-up excluded, repeated, every phase timed."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ltx2.bench.stats import Timing
from ltx2.runtime.clip import Clip
from ltx2.runtime.errors import InputError
from ltx2.runtime.events import Event, Generated, PhaseDone
from ltx2.runtime.machine import machine_facts
from ltx2.runtime.pipeline import Pipeline

PROMPT = "a red square moves left on a white background with a low tone"


@dataclass(frozen=True)
class Case:
    """What is measured: one request, repeated. The first `warmup` runs are not counted."""

    model: Path
    options: dict[str, Any]
    repetitions: int = 3
    warmup: int = 1


@dataclass(frozen=True)
class Benched(Event):
    """Last event of a benchmark: the receipt, as it is written to a file."""

    receipt: dict[str, Any]


def run_bench(case: Case) -> Iterator[Event]:
    """The events of every run; the last one is Benched. Raises InputError and what the pipeline raises."""
    if case.repetitions < 1 or case.warmup < 0:
        why = "measured runs must be at least 1, warm-up runs 0 or more"
        raise InputError("nothing to measure", why, "use --repeat 3 --warmup 1")
    pipeline = Pipeline(case.model)
    runs: list[list[PhaseDone]] = []
    clip: Clip | None = None
    for number in range(case.warmup + case.repetitions):
        phases: list[PhaseDone] = []
        for event in pipeline.stream(PROMPT, **case.options):
            if isinstance(event, PhaseDone):
                phases.append(event)
            if isinstance(event, Generated):
                clip = event.clip
            else:
                yield event
        if number >= case.warmup:
            runs.append(phases)
    assert clip is not None, "a generation ends with its clip"
    yield Benched(_receipt(case, runs, clip))


def _receipt(case: Case, runs: list[list[PhaseDone]], clip: Clip) -> dict[str, Any]:
    request = clip.record["request"]
    sizes = ("width", "height", "frames", "fps", "seed", "no_audio", "no_upscale")
    return {
        "kind": "bench",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_facts(),
        "model": clip.record["model"],
        "case": {name: request[name] for name in sizes},
        "warmup": case.warmup,
        "repetitions": case.repetitions,
        "total_seconds": Timing.of([sum(p.seconds for p in phases) for phases in runs]).to_dict(),
        "phases": [_phase([phases[i] for phases in runs]) for i in range(len(runs[0]))],
    }


def _phase(runs: list[PhaseDone]) -> dict[str, Any]:
    steps = [seconds for run in runs for seconds in run.step_seconds]
    return {
        "name": runs[0].name,
        "seconds": Timing.of([run.seconds for run in runs]).to_dict(),
        "load_seconds": Timing.of([run.load_seconds for run in runs]).to_dict(),
        "step_seconds": Timing.of(steps).to_dict() if steps else None,
        "mlx_peak_bytes": max(run.mlx_peak_bytes for run in runs),
        "process_peak_bytes": max(run.process_peak_bytes for run in runs),
    }


def table(receipt: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for people."""
    columns = ["phase", "seconds", "spread", "s/step", "steps", "peak GiB (MLX)", "process so far"]
    rows = []
    for phase in receipt["phases"]:
        step = phase["step_seconds"]
        rows.append(
            [
                phase["name"],
                f"{phase['seconds']['median']:.2f}",
                f"{100 * phase['seconds']['spread']:.0f} %",
                f"{step['median']:.3f}" if step else "",
                str(step["repetitions"] // receipt["repetitions"]) if step else "",
                f"{phase['mlx_peak_bytes'] / 2**30:.2f}",
                f"{phase['process_peak_bytes'] / 2**30:.2f}",
            ]
        )
    total = receipt["total_seconds"]
    rows.append(["total", f"{total['median']:.2f}", f"{100 * total['spread']:.0f} %", "", "", "", ""])
    return columns, rows
