"""Work in bounded pieces: how long each evaluation takes, and into how many parts a large operation is cut.

macOS ends a GPU command that runs for seconds, because the display waits behind it. A command is what MLX submits at
once: it closes one after 40 or 50 operations, or when their arrays hold as many Mi of values (device.cpp of its Metal
backend). That bounds all but the last operation of a command, however much is evaluated at once: to 0.15 TFLOP for
matrix products (of 4096x4096, say), to 0.7 for a convolution. The last one is not cut by MLX: who asks for it has to.

One meter serves the process, as MLX's peak memory does: phases follow one another."""

import math
import time
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import mlx.core as mx

SECONDS = 0.5  # of one operation, at the speed of a matrix product; convolutions and attention are less than 4 x slower
SMALL = 10**12  # floating-point operations that no GPU takes longer for: the slowest, an M1's, has 2.3 TFLOP/s
SIDE = 2048  # of the matrices that are multiplied to find out


class Meter:
    """Seconds of the longest evaluation since `start`; None where no single one was waited for."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.longest: float | None = None
        self.waits = False  # while a queue would be faster: so that single evaluations are timed
        self._queued = False

    def evaluate(self, *arrays: mx.array) -> None:
        """Evaluate and wait."""
        started = time.perf_counter()
        mx.eval(*arrays)
        if not self._queued:  # else it has waited for earlier ones too
            self.longest = max(self.longest or 0.0, time.perf_counter() - started)
        self._queued = False

    def queue(self, *arrays: mx.array) -> None:
        """Hand the arrays' evaluation to the device, and wait only if that is asked for."""
        if self.waits:
            self.evaluate(*arrays)
        else:
            mx.async_eval(*arrays)
            self._queued = True


meter = Meter()
evaluate, queue = meter.evaluate, meter.queue


def divided(compute: Callable[[slice], mx.array], length: int, axis: int, flops: float) -> mx.array:
    """What `compute` makes of the whole `length` of an axis of its result: at once, or part by part, each evaluated by
    itself, where one operation of so many `flops` is too large for this machine."""
    count = parts(flops)
    if count == 1:
        return compute(slice(0, length))
    edges = [length * i // min(count, length) for i in range(min(count, length) + 1)]
    pieces = []
    for start, stop in pairwise(edges):
        pieces.append(compute(slice(start, stop)))
        evaluate(pieces[-1])
    return mx.concatenate(pieces, axis)


def parts(flops: float) -> int:
    """Into how many parts an operation is to be cut here."""
    return 1 if flops <= SMALL else max(1, math.ceil(flops / limit()))


def limit() -> float:
    """Floating-point operations that are handed to this machine as one."""
    if mx.default_device() == mx.Device(mx.cpu):
        return math.inf  # a processor is shared anyway
    return max(SMALL, SECONDS * speed())


@cache
def speed() -> float:
    """Floating-point operations per second of a matrix product in 16 bits, rounded down to a power of two: the same
    machine cuts in the same way in every run."""
    x = mx.ones((SIDE, SIDE), mx.bfloat16)
    mx.eval(x @ x)  # compiles
    times = []
    for _ in range(3):
        started = time.perf_counter()
        mx.eval(x @ x)
        times.append(time.perf_counter() - started)
    return float(2 ** math.floor(math.log2(2 * SIDE**3 / min(times))))
