"""Kernels on this machine's device against float32 on the CPU: an error and a verdict each."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ltx2.bench.doctor.checks import Check, checks
from ltx2.runtime.files.tensors import Array
from ltx2.runtime.memory.plan import uses_cpu

# Largest relative error. A 16-bit float rounds by up to 0.4 %; GPUs may multiply float32 with 10 bits of mantissa.
LIMITS = {mx.bfloat16: 2e-2, mx.float32: 5e-3}


@dataclass(frozen=True)
class Checked:
    """A kernel's relative L2 error (None: it failed, with the message `said`), and the largest that counts as right."""

    group: str
    name: str
    dtype: str
    error: float | None
    limit: float
    said: str = ""

    @property
    def right(self) -> bool:
        return self.error is not None and self.error <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"right": self.right}


def check_kernels() -> Iterator[Checked]:
    """Every kernel, in the float type that the runtime uses: 16 bits on a GPU, float32 on a CPU."""
    for check in checks():
        dtype = mx.float32 if check.wide or uses_cpu() else mx.bfloat16
        yield _checked(check, dtype)
        mx.clear_cache()


def _checked(check: Check, dtype: mx.Dtype) -> Checked:
    inputs, name, limit = check.inputs(), str(dtype).rpartition(".")[2], check.slack * LIMITS[dtype]
    try:
        made = check.compute({key: _array(value, dtype) for key, value in inputs.items() if key != "values"})
        found = np.array(made.astype(mx.float32))
    except RuntimeError as error:  # the kernel does not compile, or the system has ended it
        return Checked(check.group, check.name, name, None, limit, str(error).splitlines()[0])
    return Checked(check.group, check.name, name, relative(found, check.expected(inputs)), limit)


def _array(value: Array, dtype: mx.Dtype) -> mx.array:
    """An array of any shape; float32 in `dtype`, other types as they are."""
    made = mx.array(value)
    return made.astype(dtype) if made.dtype == mx.float32 else made


def relative(found: Array, expected: Array) -> float | None:
    """Relative L2 distance of two arrays of any shape; None where values are not finite or shapes differ."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return None
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
