"""Another machine than this one, as far as plans and receipts ask: MLX computes where it did."""

import mlx.core as mx
import pytest

from ltx2.bench.speed import ceilings, link

GB = 10**9


def memory_of(patch: pytest.MonkeyPatch, size: float) -> None:
    """The machine has so many GB for MLX."""
    facts = {"device_name": "a machine", "max_recommended_working_set_size": round(size * GB)}
    patch.setattr(mx, "device_info", lambda *_: facts)


def gpu_of(patch: pytest.MonkeyPatch, size: float) -> None:
    """The machine has a GPU of so many GB."""
    memory_of(patch, size)
    patch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))


def small_ceilings(patch: pytest.MonkeyPatch) -> None:
    """Small products, copies and exchanges show what machines reach: for tests that do not look at it."""
    patch.setattr(ceilings, "SIDES", (64,))
    patch.setattr(ceilings, "MEGABYTES", (1,))
    patch.setattr(link, "LARGE", 1 << 20)
