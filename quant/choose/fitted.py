"""The choice of bits for a Mac's memory and the reasons, as data and for people."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from ltx2.quant.choose.budget import Budget
from ltx2.runtime.events import Event
from ltx2.runtime.model.forms import AFFINE, Form
from ltx2.runtime.units import GB

IN_A_BLOCK = re.compile(r"^.*?\.\d+\.")


@dataclass(frozen=True)
class Chosen:
    """The choice for one layer: its bits and bytes (those of its original unless `packed`), the relative error to
    expect in its output, and how much the square of that counts."""

    layer: str
    bits: int
    bytes: int
    packed: bool
    error: float
    sensitivity: float

    @property
    def kind(self) -> str:
        """Which layer of a block it is."""
        return IN_A_BLOCK.sub("", self.layer)

    @property
    def loss(self) -> float:
        return self.sensitivity * self.error**2


@dataclass(frozen=True)
class Fit:
    """The choice. `bytes`: of the whole transformer; `measured`: whether sensitivities were measured; `lowered`: by how
    many sizes the recipe's floors were lowered; `floors`: bytes that they would take, beside 4 bits for all other
    layers."""

    budget: Budget
    layers: tuple[Chosen, ...]
    bytes: int
    measured: bool
    lowered: int
    floors: int

    @property
    def left(self) -> int:
        """Unused bytes of the budget."""
        return self.budget.weights - self.bytes

    @property
    def error(self) -> float:
        """The relative error to expect: of the velocity if sensitivities were measured, else of a layer's output."""
        return sqrt(sum(layer.loss for layer in self.layers))

    def forms(self, group_size: int) -> dict[str, Form]:
        """The forms of the packed layers."""
        return {layer.layer: Form(layer.bits, group_size, AFFINE) for layer in self.layers if layer.packed}

    def kinds(self) -> list[dict[str, Any]]:
        """The choice by the layers' kind: how many have how many bits, bytes, mean error, and share of the loss."""
        groups: dict[str, list[Chosen]] = defaultdict(list)
        for layer in self.layers:
            groups[layer.kind].append(layer)
        total = sum(layer.loss for layer in self.layers)
        return [_kind(name, layers, total) for name, layers in groups.items()]

    def to_dict(self) -> dict[str, Any]:
        """For `--json`; every layer's bits are in the report or plan beside it."""
        return {
            "budget": self.budget.to_dict(),
            "bytes": self.bytes,
            "left": self.left,
            "sensitivity": "measured" if self.measured else "not measured",
            "floors_lowered": self.lowered,
            "floors_bytes": self.floors,
            "relative_error": _digits(self.error),
            "kinds": self.kinds(),
        }

    def reasons(self) -> list[str]:
        """The reasons, in sentences."""
        budget, percent = self.budget, f"{100 * self.error:.2g} %"
        lines = [
            f"a Mac of {budget.memory_gb} GB gives its GPU {_gb(budget.gpu)}: {_gb(budget.activations)} for "
            f"{budget.clip}, {_gb(budget.free)} left free, {_gb(budget.weights)} for the transformer",
            f"the transformer has {_gb(self.bytes)}, {_gb(self.left)} less than it may",
        ]
        if self.measured:
            lines.append(f"sensitivity: measured; the error to expect in the velocity is {percent}")
        else:
            lines.append(f"sensitivity: not measured, so every weight counts alike; the mean error is {percent}")
        if self.lowered:
            sizes = "one size" if self.lowered == 1 else f"{self.lowered} sizes"
            needed = f"the recipe's least bits, beside 4 for all other layers, take {_gb(self.floors)}"
            lines.append(f"{needed}: they are lowered by {sizes}")
        return lines

    def table(self) -> tuple[str, list[str], list[list[str]]]:
        """Title, columns and rows."""
        rows = [
            [
                kind["kind"],
                ", ".join(f"{count} x {bits}" for bits, count in kind["bits"].items()),
                f"{kind['bytes'] / GB:.2f}",
                f"{100 * kind['relative_error']:.2g} %",
                f"{100 * kind['share_of_loss']:.0f} %",
            ]
            for kind in self.kinds()
        ]
        return "bits of the transformer's layers", ["layer", "bits", "GB", "error", "of all loss"], rows


@dataclass(frozen=True)
class Fitted(Event):
    """The bits of the transformer's layers are chosen."""

    fit: Fit


def _kind(name: str, layers: Sequence[Chosen], total: float) -> dict[str, Any]:
    counts = Counter(layer.bits for layer in layers)
    loss = sum(layer.loss for layer in layers)
    return {
        "kind": name,
        "bits": dict(sorted(counts.items())),
        "bytes": sum(layer.bytes for layer in layers),
        "relative_error": _digits(sqrt(sum(layer.error**2 for layer in layers) / len(layers))),
        "share_of_loss": _digits(loss / total) if total else 0.0,
    }


def _gb(size: int) -> str:
    return f"{size / GB:.2f} GB"


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
