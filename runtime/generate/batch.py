"""Several clips made together: all of them go through a phase before any is in the next one, so that each network is
loaded once. Where their lengths follow from their prompts, all are planned anew once these are known. One clip is the
case of one."""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing

from ltx2.runtime.events import Event, Noted, PhaseStarted, PlannedPhase, Warned, WorkPlanned
from ltx2.runtime.generate.job import Job
from ltx2.runtime.generate.networks import Networks
from ltx2.runtime.generate.phases.order import count, merged
from ltx2.runtime.generate.planning import MemoryPlan
from ltx2.runtime.generate.records.clip import Followed, Saved
from ltx2.runtime.generate.run import Common, Predicted, Run
from ltx2.runtime.machine.process import allow_files

FILES = 6  # that a clip has open at once, at most: its names, and what ffmpeg reads
OTHERS = 64
Planner = Callable[[Sequence[Job]], Sequence[MemoryPlan]]


def make_all(
    runs: Sequence[Run], there: Sequence[Saved | Followed], networks: Networks, plan: Planner
) -> Generator[Event, None, None]:
    """The events of all clips; only the last one of clips that are already `there`. `plan` makes the plans of checked
    clips, and raises DoesNotFitError."""
    for made in there:
        if isinstance(made, Saved):
            yield Noted(f"{made.path.name} is finished: nothing of it is left to do")
        yield made
    if not runs:
        return
    allow_files(OTHERS + FILES * len(runs))
    common, said = Common(runs, networks), set[str]()
    for run in runs:
        run.common = common
    clips = len(runs) + len(there)
    yield _planned(runs, clips)
    for event in _in_step(runs, clips, plan):
        if isinstance(event, Warned):  # what is said of one clip goes for the others
            if event.message in said:
                continue
            said.add(event.message)
        yield event


def _in_step(runs: Sequence[Run], clips: int, plan: Planner) -> Iterator[Event]:
    with ExitStack() as held:
        order = _order(runs)
        streams = [held.enter_context(closing(run.events())) for run in runs]
        waiting = dict[int, PhaseStarted | Predicted]()

        def go_on(index: int) -> Iterator[Event]:
            """Continue a clip until it waits again, or ends."""
            run = runs[index]
            while True:
                run.resumed = time.perf_counter()
                event = next(streams[index], None)
                run.seconds += time.perf_counter() - run.resumed
                if event is None:
                    return
                if isinstance(event, PhaseStarted | Predicted):
                    waiting[index] = event
                    return
                yield event

        for index in range(len(runs)):
            yield from go_on(index)
        for name in order:
            for index in sorted(waiting):
                event = waiting[index]
                if isinstance(event, PhaseStarted) and event.name == name:
                    yield waiting.pop(index)
                    yield from go_on(index)
            if seconds := {index: event.seconds for index, event in waiting.items() if isinstance(event, Predicted)}:
                _settle({runs[index]: seconds.get(index) for index in sorted(waiting)}, plan)
                yield _planned(runs, clips, again=True)
                for index in seconds:
                    del waiting[index]
                    yield from go_on(index)


def _settle(runs: Mapping[Run, float | None], plan: Planner) -> None:
    """Give clips the lengths that their prompts need: the seconds by the duration head, None for clips that did not
    wait for it. All of them are planned anew."""
    plans = plan([run.job if seconds is None else run.job.lasting(seconds) for run, seconds in runs.items()])
    for (run, seconds), new in zip(runs.items(), plans, strict=True):
        if seconds is None:
            run.memory = new
        else:
            run.take(new)


def _planned(runs: Sequence[Run], clips: int, again: bool = False) -> WorkPlanned:
    """The phases to come, with their shares of all floating-point operations."""
    phases = [(phase, run.number) for run in runs for phase in run.phases]
    counts = {run.number: count(run.job) for run in runs}
    flops = [counts[number][phase.name].flops for phase, number in phases]
    found = [
        PlannedPhase(phase.name, phase.title, work / max(1, sum(flops)), number)
        for (phase, number), work in zip(phases, flops, strict=True)
    ]
    order = _order(runs)
    found.sort(key=lambda phase: order.index(phase.name))
    return WorkPlanned(tuple(found), runs[0].memory.limit, clips, again)


def _order(runs: Sequence[Run]) -> list[str]:
    return merged([[phase.name for phase in run.phases] for run in runs])
