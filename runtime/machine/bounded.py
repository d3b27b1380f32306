"""Work in bounded pieces: how long each evaluation takes, and where a large operation is cut into parts.

macOS ends a GPU command that runs for seconds, because the display waits behind it. MLX closes a command after 40 or 50
operations, or when their arrays hold as many Mi of values (device.cpp of its Metal backend). That bounds all but the
last operation of a command, however much is evaluated at once: to 0.15 TFLOP for matrix products (of 4096x4096, say),
to 0.7 for a convolution. MLX does not cut the last operation; the caller must.

One meter serves the process, as MLX's peak memory does: phases follow one another."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import mlx.core as mx

SECONDS = 0.5  # of one operation, at the speed of a matrix product
SLOWER = 4  # convolutions and attention are at most so many times slower than a matrix product
SMALL = 2.0**40  # floating-point operations that the slowest GPU does in that time: an M1's, with 2.3 TFLOP/s
SIDE = 2048  # of the matrices that measure the speed
AHEAD = 1 << 28  # bytes of an evaluation's results: larger ones are always waited for, which costs next to nothing


class Meter:
    """Seconds of the longest evaluation since `start`; None where no single one was waited for."""

    def __init__(self) -> None:
        self._behind = 0
        self._under_way: deque[tuple[mx.array, ...]] = deque()
        self.start()

    def start(self) -> None:
        self.longest: float | None = None
        self.waits = False  # while a queue would be faster: so that single evaluations are timed
        self._queued = False

    def evaluate(self, *arrays: mx.array) -> None:
        """Evaluate and wait; inside `running_ahead`, wait for earlier evaluations only, unless the arrays are large."""
        if self._behind and not self.waits and sum(array.nbytes for array in arrays) <= AHEAD:
            self.queue(*arrays)
            self._under_way.append(arrays)
            if len(self._under_way) > self._behind:
                mx.eval(*self._under_way.popleft())
            return
        started = time.perf_counter()
        mx.eval(*arrays)
        self._under_way.clear()  # the device works in order: earlier ones are done
        if not self._queued:  # else it has waited for earlier ones too
            self.longest = max(self.longest or 0.0, time.perf_counter() - started)
        self._queued = False

    def queue(self, *arrays: mx.array) -> None:
        """Hand the arrays' evaluation to the device; wait only if `waits`."""
        if self.waits:
            self.evaluate(*arrays)
        else:
            mx.async_eval(*arrays)
            self._queued = True

    @contextmanager
    def running_ahead(self, evaluations: int) -> Iterator[None]:
        """Let so many evaluations be under way while the host prepares the next one. Their results take memory, at most
        `AHEAD` each; 0: none. At the end of the block all are done."""
        before, self._behind = self._behind, evaluations
        try:
            yield
        finally:
            self._behind = before
            while len(self._under_way) > before:
                mx.eval(*self._under_way.popleft())


meter = Meter()
evaluate, queue, running_ahead = meter.evaluate, meter.queue, meter.running_ahead


def divided(function: Callable[[mx.array], mx.array], x: mx.array, axis: int, flops: float) -> mx.array:
    """function(x), whose positions along `axis` depend on the same position of `x` alone: in parts where its largest
    operation has too many `flops` for this machine."""
    before = (slice(None),) * axis
    return in_parts(lambda part: function(x[(*before, part)]), x.shape[axis], axis, flops)


def in_parts(compute: Callable[[slice], mx.array], length: int, axis: int, flops: float) -> mx.array:
    """What `compute` makes of an axis of this length: at once or, where that has too many `flops` for this machine, in
    parts that are as large as it should be given, each evaluated by itself, then joined."""
    if not too_large(flops):
        return compute(slice(0, length))
    step = max(1, int(length * limit() / flops))
    pieces = []
    for start in range(0, length, step):
        pieces.append(compute(slice(start, min(start + step, length))))
        evaluate(pieces[-1])
    return mx.concatenate(pieces, axis)


def too_large(flops: float) -> bool:
    """Whether so many floating-point operations are more than this machine should be given as one."""
    return flops > SMALL and flops > limit()


def limit() -> float:
    """Floating-point operations that are handed to this machine as one."""
    if mx.default_device() == mx.Device(mx.cpu):
        return math.inf  # a processor is shared anyway
    return max(SMALL, SECONDS * speed())


def ceiling() -> float | None:
    """The most seconds that one operation takes on this machine. None where operations are not cut."""
    return None if limit() == math.inf else SLOWER * limit() / speed()


@cache
def speed() -> float:
    """Floating-point operations per second of a matrix product in 16 bits, rounded down to a power of two: noise does
    not change where operations are cut."""
    x = mx.ones((SIDE, SIDE), mx.bfloat16)
    mx.eval(x @ x)  # compiles
    times = []
    for _ in range(3):
        started = time.perf_counter()
        mx.eval(x @ x)
        times.append(time.perf_counter() - started)
    return float(2 ** math.floor(math.log2(2 * SIDE**3 / min(times))))
