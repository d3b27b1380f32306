"""Quantization as the last step of a plan entry, and what a component's config.json says of it."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from ltx2.convert.files import natural_order
from ltx2.convert.plan import Move
from ltx2.convert.steps import Form, Packing
from ltx2.quant.pack import Affine, Loss, quantize_rows
from ltx2.runtime.errors import CheckpointError
from ltx2.runtime.tensorfile import Array


@dataclass
class Tally:
    """What packing a tensor has cost so far; `loss` is None while none of it was packed."""

    loss: Loss | None = None

    def add(self, loss: Loss) -> None:
        """Count one more part of the tensor."""
        self.loss = loss if self.loss is None else self.loss + loss


@dataclass(frozen=True)
class AffinePacking(Packing):
    """Codes, scales and biases in place of a weight. `name` is the source tensor's, for errors."""

    affine: Affine
    name: str
    tally: Tally = field(default_factory=Tally, compare=False)

    def __str__(self) -> str:
        return f"quantize({self.affine.bits},{self.affine.group_size},affine)"

    def forms(self, form: Form) -> Mapping[str, Form]:
        """Codes are a stream of bits in uint32; scales and biases have the weight's dtype."""
        rows, width = form.shape
        codes = Form((rows, width * self.affine.bits // 32), "U32")
        scales = Form((rows, width // self.affine.group_size), form.dtype)
        return {"weight": codes, "scales": scales, "biases": scales}

    def rows(self, rows: Array, dtype: str) -> Mapping[str, Array]:
        """Raises CheckpointError when a value is not finite or cannot be represented."""
        try:
            packed, loss = quantize_rows(rows, dtype, self.affine)
        except ValueError as error:
            raise CheckpointError(
                f"{self.name} cannot be quantized", str(error), "use the checkpoint as published"
            ) from error
        self.tally.add(loss)
        return {"weight": packed.codes, "scales": packed.scales, "biases": packed.biases}


def layer_of(move: Move) -> str:
    """The path of the layer a tensor belongs to: its key without the last part."""
    return move.key.rpartition(".")[0]


def packings(moves: Iterable[Move]) -> dict[str, tuple[Move, AffinePacking]]:
    """The packed layers among a component's tensors, in natural order."""
    found = {layer_of(m): (m, m.packing) for m in moves if isinstance(m.packing, AffinePacking)}
    return dict(sorted(found.items(), key=lambda item: natural_order(item[0])))


def quantization_config(moves: Iterable[Move]) -> dict[str, Any] | None:
    """`quantization` in config.json as mlx-lm writes it: the form that most values have, then the layers that have
    another. None when no layer is packed."""
    layers = packings(moves)
    values: Counter[Affine] = Counter()
    for move, packing in layers.values():
        values[packing.affine] += prod(move.form.shape)
    if not values:
        return None
    common = max(values, key=lambda affine: (values[affine], -affine.bits))
    others = {layer: _entry(packing.affine) for layer, (_, packing) in layers.items() if packing.affine != common}
    return _entry(common) | others


def _entry(affine: Affine) -> dict[str, Any]:
    return {"group_size": affine.group_size, "bits": affine.bits, "mode": "affine"}
