"""Memory of MLX and of the process over time, sampled by a thread while phases run."""

import threading
import time
from types import TracebackType
from typing import Any

import mlx.core as mx

from ltx2.runtime.machine.process import memory_now

INTERVAL_SECONDS = 0.02
MOST_SAMPLES = 400
Sample = tuple[float, int, int]  # seconds since the start, bytes MLX holds, bytes the process holds


class MemoryTrace:
    """Samples while the context is open. A long run has coarser samples: each then is the maximum of several."""

    def __init__(self) -> None:
        self._samples: list[Sample] = []
        self._phases: list[tuple[str, float, float]] = []
        self._peak = 0
        self._every = 1
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryTrace":
        self._start = time.perf_counter()
        self._samples.append(self._sample())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def begin(self, phase: str) -> None:
        """A phase starts."""
        self._name, self._began = phase, time.perf_counter() - self._start
        with self._lock:
            self._peak = memory_now()

    def end(self) -> int:
        """The phase is over; returns the process's peak memory in it, as sampled."""
        self._phases.append((self._name, round(self._began, 3), round(time.perf_counter() - self._start, 3)))
        with self._lock:
            self._peak = max(self._peak, memory_now())
            return self._peak

    def to_dict(self) -> dict[str, Any]:
        """For a receipt: the samples as columns, and start and stop of each phase."""
        seconds, mlx, process = zip(*self._samples, strict=True)
        phases = [{"name": name, "start": start, "stop": stop} for name, start, stop in self._phases]
        return {"seconds": list(seconds), "mlx_bytes": list(mlx), "process_bytes": list(process), "phases": phases}

    def _watch(self) -> None:
        pending: list[Sample] = []
        while not self._stop.wait(INTERVAL_SECONDS):
            pending.append(self._sample())
            if len(pending) >= self._every:
                self._samples.append(_most(pending))
                pending = []
            if len(self._samples) >= MOST_SAMPLES:
                pairs = zip(self._samples[::2], self._samples[1::2], strict=True)
                self._samples, self._every = [_most(list(pair)) for pair in pairs], 2 * self._every

    def _sample(self) -> Sample:
        process = memory_now()
        with self._lock:
            self._peak = max(self._peak, process)
        return round(time.perf_counter() - self._start, 3), mx.get_active_memory(), process


def _most(samples: list[Sample]) -> Sample:
    """One sample in place of several: the time of the first, and maxima."""
    return samples[0][0], max(s[1] for s in samples), max(s[2] for s in samples)
