"""Phases: one network is loaded, used and freed before the next. The time and peak memory of each are measured once,
for progress, sidecars and benchmarks alike."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from ltx2.runtime.errors import DeviceError
from ltx2.runtime.events import Loaded, PhaseDone, StepDone
from ltx2.runtime.machine.bounded import meter
from ltx2.runtime.machine.process import process_peak_memory

# MLX keeps freed buffers for reuse, without a limit; a sixteenth is enough for a step's.
CACHE_FRACTION = 1 / 16
# Text in MLX's message -> advice; the first match wins.
FIXES = {
    "malloc]": "use a smaller size, --low-memory, or a --memory-limit below the planned peak",
    "Insufficient Memory": "close other programs, or use a smaller size, --low-memory or --memory-limit",
    "Command buffer execution failed": (
        "macOS ends GPU work that keeps the display waiting: close programs that draw, or use a smaller size"
    ),
}
SAMPLED = 1  # index of the step whose evaluations are timed one by one; the first step compiles


def reusable(memory: int) -> int:
    """Bytes of freed buffers worth keeping beside so many in use, or on a machine with so many."""
    return int(memory * CACHE_FRACTION)


@contextmanager
def limited(memory: int, cache: int, wired: int) -> Iterator[None]:
    """Limit MLX to `cache` bytes of freed buffers and about `memory` bytes in all: before it takes more, it frees
    buffers and waits for running work. macOS 15 and later neither compresses nor swaps the first `wired` bytes, which
    would take many times a step's time where they fill most of the memory."""
    wirable = mx.device_info().get("max_recommended_working_set_size", 0)  # more is an error; Macs alone have it
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
    """Raises DeviceError where MLX reports that the GPU ran out of memory or that macOS ended its work."""
    try:
        yield
    except RuntimeError as error:
        fix = next((fix for said, fix in FIXES.items() if said in str(error)), None)
        if fix is None:
            raise
        raise DeviceError(f"the GPU did not finish {phase}", str(error), fix) from error


class Phase:
    """Measures time and memory of one phase, from construction to `finish`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._steps = 0
        self._step_seconds: list[float] = []
        self._load_seconds = 0.0
        mx.reset_peak_memory()
        meter.start()
        self._start = self._mark = time.perf_counter()

    def loaded(self, steps: int = 0) -> Loaded:
        """The network is loaded; `steps` of work follow (0: not known)."""
        self._steps = steps
        self._mark = time.perf_counter()
        self._load_seconds = self._mark - self._start
        return Loaded(self.name, self._load_seconds)

    def step(self) -> StepDone:
        """One step of work is done."""
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        self._step_seconds.append(seconds)
        meter.waits = len(self._step_seconds) == SAMPLED
        return StepDone(self.name, len(self._step_seconds), self._steps, seconds, mx.get_active_memory())

    def pause(self) -> None:
        """Leave the time since the last step out of the next one's."""
        self._mark = time.perf_counter()

    def finish(self) -> PhaseDone:
        """The network is out of scope: return its memory to the system, and report."""
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
