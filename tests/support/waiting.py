"""Waiting for another thread or process without a clock: on a busy machine it takes longer, and that is all."""

import time
from collections.abc import Callable

LOOKS = 10_000  # a hundredth of a second apart at least


def until(holds: Callable[[], bool]) -> None:
    """Return as soon as `holds()` is true; fails when it never is."""
    for _ in range(LOOKS):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("what was waited for did not happen")
