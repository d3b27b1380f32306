"""A benchmark's receipt (JSON): the machine, the cases and every phase's time and memory; and its tables."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from statistics import median
from typing import Any

from ltx2.bench.random.model import RandomFolder
from ltx2.bench.speed.ceilings import Ceilings
from ltx2.bench.speed.host import host_facts, mlx_environment
from ltx2.bench.speed.link import Link
from ltx2.bench.speed.stats import Timing
from ltx2.bench.speed.suite import Schedule, Task
from ltx2.runtime.events import PhaseDone
from ltx2.runtime.generate.job import Job
from ltx2.runtime.generate.options.table import COSTS
from ltx2.runtime.generate.phases.order import count
from ltx2.runtime.generate.planning import MemoryPlan
from ltx2.runtime.machine.bounded import ceiling as eval_ceiling
from ltx2.runtime.memory.flops import PhaseWork
from ltx2.runtime.memory.meter import SAMPLED
from ltx2.runtime.model.layout import ModelFolder


@dataclass(frozen=True)
class PhaseRun:
    """One phase of one run, the process's peak memory, and the bytes read from disks, where known."""

    done: PhaseDone
    process_bytes: int
    disk_bytes: int | None


@dataclass(frozen=True)
class CaseRuns:
    """A case and its measured runs. `trace`: memory over the last run; `products`: the chosen product of each form of
    packed weights, by rows; `shares`: of a phase's work that the busiest of several machines has."""

    name: str
    task: Task
    plan: MemoryPlan
    ceilings: Ceilings
    runs: Sequence[Sequence[PhaseRun]]
    trace: Mapping[str, Any]
    products: Mapping[str, Mapping[int, str]]
    shares: Mapping[str, float] = field(default_factory=dict)


def circumstances(
    schedule: Schedule, suite: str | None, ceilings: Sequence[Ceilings], link: Link | None = None
) -> dict[str, Any]:
    """A receipt without its cases. `link`: of several machines."""
    return {
        "kind": "bench",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": host_facts(),
        "environment": mlx_environment(),
        "ceilings": [asdict(ceiling) for ceiling in ceilings],
        "eval_ceiling_seconds": eval_ceiling(),
        "suite": suite,
        "machines": 1 if link is None else link.machines,
        **({} if link is None else {"link": asdict(link)}),
        **asdict(schedule),
    }


def identity(task: Task, job: Job) -> dict[str, Any]:
    """The facts that decide a case's time, beside the machine and the program."""
    request = job.request.recorded()
    options = {name: request[name] for name in COSTS} | ({"lora_rank": task.lora_rank} if task.lora_rank else {})
    return {"part": task.part, "options": options, "model": _model(job.folder)}


def case_receipt(case: CaseRuns) -> dict[str, Any]:
    """One of the receipt's `cases`: seconds, bytes, and shares of 1."""
    job, work = case.plan.job, count(case.plan.job)
    totals = [sum(phase.done.seconds for phase in run) for run in case.runs]
    return {
        "name": case.name,
        **identity(case.task, job),
        "products": case.products,
        "total_seconds": Timing.of(totals).to_dict(),
        "phases": [_phase(list(runs), case, work) for runs in zip(*case.runs, strict=True)],
        "memory": dict(case.trace),
    }


def _model(folder: ModelFolder) -> dict[str, Any]:
    manifest = folder.manifest
    return {
        "weights": "random" if isinstance(folder, RandomFolder) else "files",
        "release": manifest.release,
        "variant": manifest.variant,
        "dtypes": {name: record.dtype for name, record in sorted(manifest.components.items())},
        "layers": {name: _forms(folder, name) for name in sorted(manifest.components)},
    }


def _forms(folder: ModelFolder, component: str) -> dict[str, int]:
    """The number of layers packed in each form."""
    quantization = folder.quantization(component)
    counts: Counter[str] = Counter()
    for file in folder.tensor_files(component):
        for name in file.tensors:
            layer, _, part = name.rpartition(".")
            if part == "scales":
                counts[str(quantization.of(layer))] += 1
    return dict(sorted(counts.items()))


def _phase(runs: Sequence[PhaseRun], case: CaseRuns, work: Mapping[str, PhaseWork]) -> dict[str, Any]:
    done = [run.done for run in runs]
    name, steps = done[0].name, [seconds for phase in done for seconds in _usual_steps(phase)]
    read = [run.disk_bytes for run in runs if run.disk_bytes is not None]
    longest = [p.longest_eval_seconds for p in done if p.longest_eval_seconds is not None]
    planned = case.plan.phase(name)
    return {
        "name": name,
        "seconds": Timing.of([phase.seconds for phase in done]).to_dict(),
        "work_seconds": Timing.of([phase.seconds - phase.load_seconds for phase in done]).to_dict(),
        "load_seconds": Timing.of([phase.load_seconds for phase in done]).to_dict(),
        "steps": len(done[0].step_seconds),
        "step_seconds": Timing.of(steps).to_dict() if steps else None,
        "mlx_peak_bytes": max(phase.mlx_peak_bytes for phase in done),
        "planned_bytes": planned.total - planned.clip,
        "process_peak_bytes": max(run.process_bytes for run in runs),
        "longest_eval_seconds": round(max(longest), 5) if longest else None,
        "streamed_bytes_per_step": planned.read,
        "disk_bytes_read": int(median(read)) if read else None,
        **_exchanged(done, case.shares.get(name)),
        **_shares(work[name], median(phase.seconds - phase.load_seconds for phase in done), case.ceilings),
    }


def _exchanged(done: Sequence[PhaseDone], share: float | None) -> dict[str, Any]:
    """For a phase on several machines: bytes that the leading one sent, and seconds of its exchanges, waiting for
    others included."""
    if not any(phase.sent_bytes for phase in done):
        return {}
    seconds = median(phase.exchange_seconds for phase in done)
    return {
        "busiest_share": None if share is None else round(share, 4),
        "sent_bytes": done[0].sent_bytes,
        "exchange_seconds": round(seconds, 4),
        "exchange_share": round(seconds / median(phase.seconds - phase.load_seconds for phase in done), 4),
    }


def _usual_steps(phase: PhaseDone) -> list[float]:
    """Without the step whose evaluations are timed one by one, which slows it."""
    return [seconds for step, seconds in enumerate(phase.step_seconds) if step != SAMPLED]


def _shares(work: PhaseWork, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
    """Operations, bytes, and their shares of the machine's ceilings while the phase computes, without loading."""
    return {
        "flops": work.flops,
        "bytes": work.bytes,
        "matmul_share": round(work.flops / seconds / ceilings.matmul_flops_per_second, 4),
        "copy_share": round(work.bytes / seconds / ceilings.copy_bytes_per_second, 4),
    }


Table = tuple[str, list[str], list[list[str]]]
COLUMNS = ["phase", "seconds", "s/step", "peak GB", "plan GB"]
PEAKS = ("mlx_peak_bytes", "planned_bytes")  # the last two of them
MORE_COLUMNS = ["load s", "steps", "eval s", "matmul", "copy", "process GB", "read GB"]


def tables(receipt: Mapping[str, Any], verbose: bool = False) -> list[Table]:
    """Title, columns and rows of every case, for people; with `verbose` all that was measured."""
    machine = receipt["machine"]
    where = f"on {machine['device']}, mlx {machine['mlx']}"
    best = " or ".join(
        f"{c['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s and {c['copy_bytes_per_second'] / 1e9:.3g} GB/s"
        for c in receipt["ceilings"]
    )
    allowed = receipt["eval_ceiling_seconds"]
    longest = "longest evaluation" if allowed is None else f"longest evaluation, of {allowed:.2g} s allowed"
    legend = f"\neval: {longest}; matmul, copy: of {best}" if verbose else ""
    columns = [*COLUMNS, *(MORE_COLUMNS if verbose else [])]
    return [(f"{case['name']} {where}{legend}", columns, _rows(case, verbose)) for case in receipt["cases"]]


def _rows(case: Mapping[str, Any], verbose: bool) -> list[list[str]]:
    peaks = [_gigabytes(max(phase[key] for phase in case["phases"])) for key in PEAKS]
    total = ["total", _seconds(case["total_seconds"]), "", *peaks]
    rows = [*(_row(phase, verbose) for phase in case["phases"]), total]
    return [row + [""] * (len(rows[0]) - len(row)) for row in rows]


def _row(phase: Mapping[str, Any], verbose: bool) -> list[str]:
    step, longest, read = phase["step_seconds"], phase["longest_eval_seconds"], phase["disk_bytes_read"]
    row = [
        phase["name"],
        _seconds(phase["seconds"]),
        f"{step['median']:.3f}" if step else "",
        *(_gigabytes(phase[key]) for key in PEAKS),
    ]
    more = [
        f"{phase['load_seconds']['median']:.2f}",
        str(phase["steps"] or ""),
        "" if longest is None else f"{longest:.3f}",
        _percent(phase["matmul_share"]),
        _percent(phase["copy_share"]),
        _gigabytes(phase["process_peak_bytes"]),
        "" if read is None else _gigabytes(read),
    ]
    return row + (more if verbose else [])


def _seconds(timing: Mapping[str, float]) -> str:
    """The median, and half of the range from the fastest run to the slowest."""
    return f"{timing['median']:.2f} ± {(timing['slowest'] - timing['fastest']) / 2:.2f}"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
