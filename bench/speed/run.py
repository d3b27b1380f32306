"""Benchmark model folders, or random weights, in the pipeline that generates: runs are repeated after a warm-up, and
every phase is timed.

All cases run once, then all again in reverse order, and so on, so that changes of the machine (it warms up, another
program runs for a while) affect all cases alike."""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx

from ltx2.bench.random.lora import random_lora
from ltx2.bench.random.model import RandomFolder
from ltx2.bench.speed.ceilings import Ceilings, measure_ceilings
from ltx2.bench.speed.compare import check_comparable, compare
from ltx2.bench.speed.link import busiest, measure_link
from ltx2.bench.speed.receipt import CaseRuns, PhaseRun, case_receipt, circumstances, identity
from ltx2.bench.speed.suite import Schedule, Task
from ltx2.bench.speed.trace import MemoryTrace
from ltx2.runtime.distributed.machines import ALONE, Machines
from ltx2.runtime.errors import DoesNotFitError, Ltx2Error, MachinesError
from ltx2.runtime.events import Event, Noted, PhaseDone, PhaseStarted, Warned
from ltx2.runtime.files.tensors import FLOATS, MLX_DTYPES
from ltx2.runtime.generate.job import CONTEXTS, LATENTS, Job
from ltx2.runtime.generate.options.choices import with_fixed_length
from ltx2.runtime.generate.options.preset import ONE_STAGE
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.generate.records.clip import Followed, Generated, Sampled
from ltx2.runtime.generate.records.exchange import write_embeddings, write_latents
from ltx2.runtime.machine.process import disk_bytes_read
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.sampling.guidance import TEXT

PROMPT = "a red square moves left on a white background with a low tone"


@dataclass(frozen=True)
class Case:
    """A part of a generation with a model."""

    model: ModelFolder
    task: Task = field(default_factory=Task)


@dataclass(frozen=True)
class Benched(Event):
    """The receipt of all measurements so far; the last event of a benchmark has the whole one."""

    receipt: dict[str, Any]


def run_bench(
    cases: Sequence[Case],
    schedule: Schedule,
    suite: str | None = None,
    old: Mapping[str, Any] | None = None,
    machines: Machines = ALONE,
) -> Iterator[Event]:
    """The events of every run, and Benched after every measured round. `old`: a receipt to compare with. A case that
    does not fit is left out with a warning. Several `machines` run it together: the leading one measures, and the last
    event of the others is Followed.

    Before any work raises DoesNotFitError where no case fits, InputError where `old` has none of the cases; later what
    the pipeline raises."""
    with TemporaryDirectory() as folder:
        subjects = yield from _fitting(cases, Path(folder), machines)
        if old is not None:
            check_comparable(old, (subject.identity for subject in subjects))
        yield Noted("measuring what this machine reaches at best")
        dtypes = sorted({subject.dtype for subject in subjects})
        ceilings = {dtype: measure_ceilings(getattr(mx, MLX_DTYPES[dtype])) for dtype in dtypes}
        head = circumstances(schedule, suite, list(ceilings.values()), measure_link(machines))
        for number in range(schedule.warmup + schedule.repeat):
            yield from _round(subjects, schedule, number)
            if number >= schedule.warmup and machines.leads:
                receipt = head | {"cases": [case_receipt(s.result(ceilings[s.dtype])) for s in subjects]}
                yield Benched(receipt if old is None else receipt | {"comparison": compare(old, receipt).to_dict()})
        if not machines.leads:
            yield Followed()


def _round(subjects: Sequence["_Subject"], schedule: Schedule, number: int) -> Iterator[Event]:
    """All cases once, in reverse order every second time."""
    for subject in subjects if number % 2 == 0 else reversed(subjects):
        if schedule.cooldown:
            yield Noted(f"resting for {schedule.cooldown:g} s")
            time.sleep(schedule.cooldown)
        yield Noted(f"run {number + 1} of {schedule.warmup + schedule.repeat}: {subject.name}")
        yield from subject.run(counted=number >= schedule.warmup)


def _fitting(cases: Sequence[Case], folder: Path, machines: Machines) -> Generator[Event, None, list["_Subject"]]:
    """The cases that fit in memory on all machines, ready to run."""
    fitting, refused = [], list[tuple[str, Ltx2Error]]()
    for number, case in enumerate(cases):
        subject = _Subject(case, folder / f"{number}.safetensors", machines)
        unfit = None
        try:
            subject.plan.check()
        except DoesNotFitError as error:
            unfit = error
        if all(machines.everyone(unfit is None)):
            fitting.append(subject)
        else:
            elsewhere = MachinesError("it does not fit", "another machine has too little memory", "measure fewer bits")
            refused.append((subject.name, unfit or elsewhere))
    if not fitting:
        raise refused[0][1]
    for name, refusal in refused:
        yield Warned(f"left out: {name}: {refusal.what} ({refusal.why})")
    for subject in fitting:
        if subject.skips_reading:
            yield Warned(f"{subject.name}: what every step would read from disk is made in memory instead")
    return fitting


class _Subject:
    """A case, ready to run, and the results of its runs."""

    def __init__(self, case: Case, file: Path, machines: Machines) -> None:
        """Reads headers. `file`: for the values that a part of a generation starts from."""
        self._case, self._machines = case, machines
        self._pipeline = Pipeline(case.model, machines=machines)
        options = with_fixed_length(case.model, dict(case.task.options))
        if rank := case.task.lora_rank:
            option = "lora" if options.get("pipeline", ONE_STAGE) == ONE_STAGE else "distilled_lora"
            lora = (str(random_lora(case.model, rank, file.parent)), 1.0, 1.0)  # in every stage
            options[option] = [lora] if option == "lora" else lora
        whole = self._pipeline.plan(PROMPT, **options).job
        self._request = Request.from_options(_start(whole, case.task.part, options, file))
        self._until = {"text": CONTEXTS, "denoise": LATENTS}.get(case.task.part)
        self.plan = self._pipeline.planned(self._request, self._until)
        self._runs: list[list[PhaseRun]] = []
        self._trace: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """For people: model, part and sizes."""
        sizes, task = self.plan.job.sizes, self._case.task
        pipeline = [value for name, value in task.options if name == "pipeline"]
        named = [name.replace("_", " ") for name, value in task.options if value is True]
        lora = [f"LoRA of rank {task.lora_rank}"] if task.lora_rank else []
        what = ", ".join([task.part, *pipeline, *named, *lora])
        return f"{self._case.model.path.name}, {what}: {sizes.frames} frames of {sizes.width}x{sizes.height}"

    @property
    def identity(self) -> dict[str, Any]:
        """As a receipt has it."""
        return identity(self._case.task, self.plan.job)

    @property
    def dtype(self) -> str:
        """The dtype that the networks compute in, as safetensors spells it."""
        dtype = self._case.model.record(self.plan.job.coder).dtype
        return dtype if dtype in FLOATS.values() else "BF16"

    @property
    def skips_reading(self) -> bool:
        """Whether the plan streams weights that are in no file."""
        return isinstance(self._case.model, RandomFolder) and any(phase.read for phase in self.plan.phases)

    def run(self, counted: bool) -> Iterator[Event]:
        """One run of the case: its events."""
        phases: list[PhaseRun] = []
        with MemoryTrace() as trace, closing(self._pipeline.events(self._request, self._until)) as events:
            read = None
            for event in events:
                if isinstance(event, PhaseStarted):
                    trace.begin(event.name)
                    read = disk_bytes_read()
                if isinstance(event, PhaseDone):
                    phases.append(PhaseRun(event, trace.end(), _since(read)))
                if not isinstance(event, Generated | Sampled | Followed):
                    yield event
        if counted:
            self._runs.append(phases)
            self._trace = trace.to_dict()

    def result(self, ceilings: Ceilings) -> CaseRuns:
        """The case's part of the receipt."""
        task, products = self._case.task, self._pipeline.products
        by_rows = {form: dict(choice.by_rows) for form, choice in products.items()}
        shares = busiest(self.plan, self._machines)
        return CaseRuns(self.name, task, self.plan, ceilings, self._runs, self._trace, by_rows, shares)


def _start(job: Job, part: str, options: dict[str, Any], file: Path) -> dict[str, Any]:
    """The options of a generation that begins with this part, from random values in `file`: times do not depend on
    them."""
    if part == "denoise":
        widths = job.transformer_config.context_dims
        contexts = widths.map(lambda width: _normal((1, job.preset.text_tokens, width)))
        write_embeddings(str(file), dict.fromkeys((TEXT, *job.negatives), contexts))
        return options | {"embeddings": str(file)}
    if part == "decode":
        write_latents(str(file), job.grid().segments.map(lambda segment: _normal(segment.shape)), job.sizes.fps)
        return {name: value for name, value in options.items() if name != "no_upscale"} | {"latents": str(file)}
    return options | {"prompt": PROMPT}


def _normal(shape: tuple[int, ...]) -> mx.array:
    """Normal values of this shape, always the same."""
    return mx.random.normal(shape, key=mx.random.key(0))


def _since(read: int | None) -> int | None:
    """Bytes read from disks since `read` had been."""
    now = disk_bytes_read()
    return None if read is None or now is None else now - read
