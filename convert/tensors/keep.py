"""Steps for weights published as codes: decode them, or keep them in MLX's layout."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ltx2.convert.tensors.codes import BlockScales, Codes, MlxCodes
from ltx2.convert.tensors.steps import Packing, Spec, Step
from ltx2.runtime.files.tensors import FLOATS, Array
from ltx2.runtime.model.forms import Form


@dataclass(frozen=True)
class Dequantize(Step):
    """Decode, and round once where `dtype` is not f32; the plan names the two separately."""

    codes: Codes
    dtype: str

    def __str__(self) -> str:
        return f"{self.codes.kind}_dequantize"

    @property
    def names(self) -> tuple[str, ...]:
        return (str(self),) if self.dtype == "f32" else (str(self), f"cast({self.dtype})")

    def spec(self, spec: Spec) -> Spec:
        return Spec(self.codes.shape(spec), FLOATS[self.dtype])

    def rows(self, rows: Array, spec: Spec, start: int) -> Array:
        return self.codes.decoded(rows, spec, start, self.dtype)


@dataclass(frozen=True)
class Keep(Packing):
    """The very codes, as MLX reads them. The scale is a tensor of its own; a missing one is stored as 1."""

    codes: MlxCodes

    def __str__(self) -> str:
        return f"{self.codes.kind}_keep"

    @property
    def form(self) -> Form:
        return self.codes.form

    def values(self, spec: Spec) -> Spec:
        return Spec(self.codes.shape(spec), self.codes.dtype)

    def constants(self) -> Mapping[str, Array]:
        missing = self.codes.multiplied and self.codes.scale is None
        return {"weight_scale": np.ones((), np.float32)} if missing else {}

    def specs(self, spec: Spec) -> Mapping[str, Spec]:
        width = self.codes.shape(spec)[-1] * self.form.bits // 32
        scales = {part: Spec(value.shape, "F32") for part, value in self.constants().items()}
        return {"weight": Spec((*spec.shape[:-1], width), "U32"), **scales}

    def rows(self, rows: Array, spec: Spec, start: int) -> Mapping[str, Array]:
        self.codes.factors(0, 1)  # raises for a scale that is not finite, which is stored as it is
        return {"weight": rows if spec.dtype == "U32" else self.codes.words(rows)}


@dataclass(frozen=True)
class KeepBlockScales(Step):
    """Block scales row by row, as MLX reads them."""

    blocks: BlockScales
    kind: str

    def __str__(self) -> str:
        return f"{self.kind}_keep"

    @property
    def whole(self) -> bool:
        return True

    def spec(self, spec: Spec) -> Spec:
        return Spec(self.blocks.shape, "U8")

    def rows(self, rows: Array, spec: Spec, start: int) -> Array:
        return self.blocks.whole(rows)
