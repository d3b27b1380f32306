"""The steps of a tensor on its way from a source into a model folder.

A step works on some rows (axis 0) at a time, so a tensor of any size passes through in chunks. Values travel as numpy
arrays; BF16 and FP8 as their integer codes (see NUMPY_DTYPES)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ltx2.runtime.errors import NumericsError
from ltx2.runtime.files.tensors import FLOATS, Array, f32_to_bf16, item_bytes, tensor_bytes, to_float32
from ltx2.runtime.model.forms import Form

SPELLINGS = {dtype: option for option, dtype in FLOATS.items()}  # of float types: in safetensors -> in --dtype
Parts = Callable[[], Mapping[str, Array]]  # waits for work that was begun; arrays of any shape by name


@dataclass(frozen=True)
class Spec:
    """A tensor's shape and safetensors dtype."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def itemsize(self) -> int:
        return item_bytes(self.dtype)

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


class Step(ABC):
    """One transformation. `str(step)` is its name in the plan."""

    @property
    def names(self) -> tuple[str, ...]:
        """Its names in the plan; several where it does a sequence of steps at once."""
        return (str(self),)

    @property
    def whole(self) -> bool:
        """Whether it needs all rows at once: a row of the output is not made of the same row of the input."""
        return False

    @abstractmethod
    def spec(self, spec: Spec) -> Spec:
        """Shape and dtype after the step."""

    @abstractmethod
    def rows(self, rows: Array, spec: Spec, start: int) -> Array:
        """Rows (n, ...) of a tensor of this spec, the first of which is row `start`, transformed: (n, ...), in the
        shape and dtype that `spec` says."""


@dataclass(frozen=True)
class Transpose(Step):
    """Permute the axes, e.g. a convolution kernel into MLX's channels-last layout."""

    axes: tuple[int, ...]

    def __str__(self) -> str:
        return f"transpose({','.join(map(str, self.axes))})"

    @property
    def whole(self) -> bool:
        return self.axes[0] != 0

    def spec(self, spec: Spec) -> Spec:
        return Spec(tuple(spec.shape[axis] for axis in self.axes), spec.dtype)

    def rows(self, rows: Array, spec: Spec, start: int) -> Array:
        return rows.transpose(self.axes)


@dataclass(frozen=True)
class Cast(Step):
    """Convert between floating-point types with one rounding (half to even). `dtype` is spelt as in --dtype."""

    dtype: str

    def __str__(self) -> str:
        return f"cast({self.dtype})"

    def spec(self, spec: Spec) -> Spec:
        return Spec(spec.shape, FLOATS[self.dtype])

    def rows(self, rows: Array, spec: Spec, start: int) -> Array:
        return from_float32(to_float32(rows, spec.dtype), FLOATS[self.dtype])


@dataclass(frozen=True)
class Reshape(Step):
    """The same values in the same order in another shape; for small tensors."""

    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"reshape({','.join(map(str, self.shape))})"

    @property
    def whole(self) -> bool:
        return True

    def spec(self, spec: Spec) -> Spec:
        return Spec(self.shape, spec.dtype)

    def rows(self, rows: Array, spec: Spec, start: int) -> Array:
        return rows.reshape(self.shape)


class Packing(ABC):
    """The last step of a layer's weight that becomes integers in MLX's layout, alone or with scales and biases."""

    @property
    def main_thread(self) -> bool:
        """Whether only the main thread may call `rows`."""
        return False

    @property
    def effort(self) -> float:
        """Its time in copies of the tensor, roughly."""
        return 1.0

    @property
    def piece_bytes(self) -> int:
        """The bytes to give `rows` at once, where that is more than usual."""
        return 0

    @property
    @abstractmethod
    def form(self) -> Form:
        """How MLX is to read the layer."""

    def values(self, spec: Spec) -> Spec:
        """Shape and float type of the weight that is packed, or that codes of this spec stand for."""
        return spec

    def absorbed(self) -> Mapping[str, Spec]:
        """Parts that replace a parameter beside the weight: last name part -> shape and float type."""
        return {}

    def constants(self) -> Mapping[str, Array]:
        """Parts that depend on no row, of any shape; the only ones of `specs` that `rows` does not make."""
        return {}

    @abstractmethod
    def specs(self, spec: Spec) -> Mapping[str, Spec]:
        """Last name part -> shape and dtype, `weight` first."""

    @abstractmethod
    def rows(self, rows: Array, spec: Spec, start: int) -> Mapping[str, Array]:
        """Rows (n, ...) of a tensor of this spec, the first of which is row `start`, as rows (n, ...) of every part."""

    def begin(self, rows: Array, spec: Spec, start: int) -> Parts:
        """Begin what `rows` does; the result waits for it."""
        parts = self.rows(rows, spec, start)
        return lambda: parts


def from_float32(values: Array, dtype: str) -> Array:
    """float32 of any shape to a safetensors float dtype, rounding half to even. Raises NumericsError when F16 is too
    narrow."""
    if dtype == "BF16":
        return f32_to_bf16(values)
    if dtype == "F32":
        return values
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float16)
    if (np.isinf(narrow) & np.isfinite(values)).any():
        largest = float(np.abs(values[np.isfinite(values)]).max())
        raise NumericsError(
            f"a value of {largest:.6g} does not fit f16",
            "float16 ends at 65504",
            "use --dtype bf16, or leave --dtype out",
        )
    return narrow
