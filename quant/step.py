"""Quantization as the last step of a plan entry."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ltx2.convert.plan import Move, packed_layers
from ltx2.convert.steps import Form, Packing, Storage
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

    @property
    def storage(self) -> Storage:
        return Storage(self.affine.bits, self.affine.group_size, "affine")

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


def packings(moves: Iterable[Move]) -> dict[str, tuple[Move, AffinePacking]]:
    """The layers that are quantized among a component's tensors, in natural order."""
    layers = packed_layers(moves)
    return {layer: (m, m.packing) for layer, m in layers.items() if isinstance(m.packing, AffinePacking)}
