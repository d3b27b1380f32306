"""Reference implementations for the parity tests: optional on a developer's machine, obligatory in `make test` and CI,
where a test that silently compared nothing would count as passed."""

import os
from importlib import import_module
from types import ModuleType

import numpy as np
import pytest

REQUIRE = "LTX2_REQUIRE_PARITY"  # set by `make test`


def required() -> bool:
    """Whether a missing reference package is an error."""
    return any(os.environ.get(name, "").lower() not in ("", "0", "false") for name in (REQUIRE, "CI"))


def require(name: str) -> ModuleType:
    """Import a reference module, or skip the test (the whole file when called at its top) without it.

    Raises ImportError instead of skipping when `required()`.
    """
    module: ModuleType = import_module(name) if required() else pytest.importorskip(name)
    if name == "torch":  # these networks are tiny, and more threads would wait for those of OpenBLAS: ten times slower
        module.set_num_threads(1)
    return module


def relative_l2(ours: object, theirs: object) -> float:
    """|ours - theirs| / |theirs| in float64, of anything numpy reads. Shapes must agree: broadcasting hides errors."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
