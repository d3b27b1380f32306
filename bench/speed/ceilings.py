"""The measured ceilings of this machine: floating-point operations per second of a large matrix product, and bytes per
second of a copy. Speed as a share of these means something on any machine."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

ENOUGH_SECONDS = 0.02  # of one call: larger sizes are not faster
CALLS = 3
SIDES = (256, 512, 1024, 2048, 4096, 8192)  # of square matrices
MEGABYTES = (16, 64, 256)


@dataclass(frozen=True)
class Ceilings:
    """Ceilings of one dtype, by MLX's name."""

    dtype: str
    matmul_flops_per_second: float
    copy_bytes_per_second: float


def measure_ceilings(dtype: mx.Dtype) -> Ceilings:
    """Takes about a second. Sizes grow until one call takes ENOUGH_SECONDS."""
    return Ceilings(str(dtype).rpartition(".")[2], _fastest(_products(dtype)), _fastest(_copies(dtype)))


Work = tuple[int, Callable[[], mx.array]]  # operations or bytes of a call, and the call


def _products(dtype: mx.Dtype) -> Iterator[Work]:
    for side in SIDES:
        a, b = (mx.random.normal((side, side), dtype=dtype, key=mx.random.key(key)) for key in range(2))
        mx.eval(a, b)
        yield 2 * side**3, partial(mx.matmul, a, b)


def _copies(dtype: mx.Dtype) -> Iterator[Work]:
    for megabytes in MEGABYTES:
        x = mx.zeros(((megabytes << 20) // dtype.size,), dtype)
        mx.eval(x)
        yield 2 * x.nbytes, partial(mx.negative, x)


def _fastest(works: Iterator[Work]) -> float:
    best = 0.0
    for amount, call in works:
        mx.eval(call())
        seconds = min(_seconds(call) for _ in range(CALLS))
        best = max(best, amount / seconds)
        if seconds > ENOUGH_SECONDS:
            break
    mx.clear_cache()
    return best


def _seconds(call: Callable[[], mx.array]) -> float:
    start = time.perf_counter()
    mx.eval(call())
    return time.perf_counter() - start
