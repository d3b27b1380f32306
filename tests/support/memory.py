"""Memory is measured from a known state: what other tests have left behind counts neither when it is there nor when it
goes."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx


def settled() -> int:
    """Bytes that MLX holds after all garbage is collected, with an empty cache; the peak counts from here."""
    mx.synchronize()
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    return mx.get_active_memory()


@contextmanager
def waiting() -> Iterator[None]:
    """MLX waits for every operation, as it does without any memory to spare. Otherwise the program runs ahead of the
    device, and how far depends on what else the machine does: peaks differ by a third."""
    before = mx.set_memory_limit(0)
    try:
        yield
    finally:
        mx.set_memory_limit(before)


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes that MLX holds, beside what is there already, while `work` runs and every operation is waited
    for."""
    before = settled()
    with waiting():
        work()
        mx.synchronize()
    return mx.get_peak_memory() - before
