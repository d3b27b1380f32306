"""Phases: one network is loaded, used and freed before the next. Each phase's time and peak memory is recorded once,
for progress, sidecars and benchmarks alike."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from ltx2.runtime.errors import DeviceError
from ltx2.runtime.events import Loaded, PhaseDone, StepDone
from ltx2.runtime.machine.bounded import meter
from ltx2.runtime.machine.facts import device_memory
from ltx2.runtime.machine.process import process_peak_memory

# MLX keeps freed buffers for reuse, without a limit of its own; a sixteenth of the memory is enough to reuse a step's.
CACHE_FRACTION = 1 / 16
# By what MLX says; the first that applies.
FIXES = {
    "malloc]": "use a smaller size, --low-memory, or a --memory-limit below the planned peak",
    "Insufficient Memory": "close other programs, or use a smaller size, --low-memory or --memory-limit",
    "Command buffer execution failed": (
        "macOS ends GPU work that keeps the display waiting: close programs that draw, or use a smaller size"
    ),
}
SAMPLED = 1  # the step, from 0, in which evaluations are waited for one by one, to know their times; the first compiles


def reusable_memory() -> int:
    """Bytes of freed buffers that are worth keeping."""
    return int(device_memory() * CACHE_FRACTION)


@contextmanager
def limited(memory: int, cache: int, wired: int) -> Iterator[None]:
    """MLX holds at most `cache` bytes of freed buffers, and about `memory` bytes in all: before it takes more, it gives
    freed buffers back and waits for running work to end. macOS 15 and later leaves the first `wired` bytes where they
    are: it neither compresses nor swaps them, which costs many times a step's time where they fill most of the
    memory."""
    wirable = mx.device_info().get("max_recommended_working_set_size", 0)  # more is an error; only a Mac has it
    before = (
        mx.set_memory_limit(max(memory, 0)),
        mx.set_cache_limit(max(cache, 0)),
        mx.set_wired_limit(min(wired, int(wirable))),
    )
    try:
        yield
    finally:
        for restore, value in zip((mx.set_memory_limit, mx.set_cache_limit, mx.set_wired_limit), before, strict=True):
            restore(value)


@contextmanager
def explained(phase: str) -> Iterator[None]:
    """What MLX raises where the GPU's memory, or the system's patience with it, ends becomes a DeviceError."""
    try:
        yield
    except RuntimeError as error:
        fix = next((fix for said, fix in FIXES.items() if said in str(error)), None)
        if fix is None:
            raise
        raise DeviceError(f"the GPU did not finish {phase}", str(error), fix) from error


class Phase:
    """Stopwatch and memory meter of one phase, from construction to `finish`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._steps = 0
        self._step_seconds: list[float] = []
        self._load_seconds = 0.0
        mx.reset_peak_memory()
        meter.start()
        self._start = self._mark = time.perf_counter()

    def loaded(self, steps: int = 0) -> Loaded:
        """The network is ready; what follows is its use, in so many steps (0: not known)."""
        self._steps = steps
        self._mark = time.perf_counter()
        self._load_seconds = self._mark - self._start
        return Loaded(self.name, self._load_seconds)

    def step(self) -> StepDone:
        """One unit of work is done."""
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        self._step_seconds.append(seconds)
        meter.waits = len(self._step_seconds) == SAMPLED
        return StepDone(self.name, len(self._step_seconds), self._steps, seconds, mx.get_active_memory())

    def pause(self) -> None:
        """What happened since the last step is no part of the next one's time."""
        self._mark = time.perf_counter()

    def finish(self) -> PhaseDone:
        """The network is out of scope: return its memory to the system and report."""
        gc.collect()
        mx.clear_cache()
        return PhaseDone(
            self.name,
            time.perf_counter() - self._start,
            self._load_seconds,
            tuple(self._step_seconds),
            mx.get_peak_memory(),
            process_peak_memory(),
            meter.longest,
        )
