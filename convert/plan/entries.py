"""The plan: for every tensor of every source its place and its steps, or why it is dropped.

It is made from headers alone, without MLX (make.py, folder.py). Converting, the dry run, quantizing and verifying all
work from the same plan."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from math import prod
from typing import Any

from ltx2.convert.sources.components import ComponentPlan
from ltx2.convert.tensors.keep import Dequantize, Keep
from ltx2.convert.tensors.steps import Packing, Spec, Step
from ltx2.runtime.files.tensors import FileRecord, TensorFile, TensorInfo
from ltx2.runtime.model.forms import Form

SCALE_PARTS = ("scales", "biases", "weight_scale")  # last name parts of tensors beside a weight kept as codes


@dataclass(frozen=True)
class Move:
    """One source tensor that is stored in `component` under `key`."""

    file: TensorFile
    tensor: TensorInfo
    component: str
    key: str
    steps: tuple[Step, ...] = ()
    packing: Packing | None = None

    @cached_property
    def spec(self) -> Spec:
        """Shape and dtype after the steps, before packing."""
        spec = Spec(self.tensor.shape, self.tensor.dtype)
        for step in self.steps:
            spec = step.spec(spec)
        return spec

    @cached_property
    def values(self) -> Spec:
        """Shape and float type of the parameter, packed or not."""
        return self.spec if self.packing is None else self.packing.values(self.spec)

    @property
    def layer(self) -> str:
        """The path of the layer the tensor belongs to: its key without the last part."""
        return self.key.rpartition(".")[0]

    def parameters(self) -> dict[str, Spec]:
        """The network's parameters that it fills, packed or not."""
        beside = self.packing.absorbed() if self.packing else {}
        return {self.key: self.values} | {packed_key(self.key, part): spec for part, spec in beside.items()}

    def stored(self) -> dict[str, Spec]:
        """Name, shape and dtype of every tensor that this one becomes."""
        if self.packing is None:
            return {self.key: self.spec}
        return {packed_key(self.key, part): spec for part, spec in self.packing.specs(self.spec).items()}


@dataclass(frozen=True)
class Merge:
    """One source tensor that another one uses up: the scale of codes that are dequantized, the bias that packing
    corrects, the alpha of a LoRA's factors (a scale in its config.json)."""

    file: TensorFile
    tensor: TensorInfo
    into: Move


@dataclass(frozen=True)
class Asset:
    """One source tensor whose bytes are a file: `name` in the component's folder (a tokenizer)."""

    file: TensorFile
    tensor: TensorInfo
    component: str
    name: str


@dataclass(frozen=True)
class Drop:
    """One source tensor that is not stored."""

    file: TensorFile
    tensor: TensorInfo
    reason: str


Entry = Move | Merge | Asset | Drop
Layer = tuple[str, str]  # component, and path in its network


@dataclass(frozen=True)
class Plan:
    """A whole model folder. `sources` are files still to be hashed, or records that are known already; `sizes` as in
    ltx2.json."""

    entries: tuple[Entry, ...]
    components: Mapping[str, ComponentPlan]
    release: str | None
    variant: str | None
    sources: tuple[TensorFile | FileRecord, ...] = field(default=())
    sizes: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def all_moves(self) -> tuple[Move, ...]:
        """The tensors that are stored, in the sources' order."""
        return tuple(entry for entry in self.entries if isinstance(entry, Move))

    def moves(self, component: str) -> list[Move]:
        """Those of one component."""
        return list(self._moves.get(component, ()))

    @cached_property
    def _moves(self) -> Mapping[str, Sequence[Move]]:
        found: dict[str, list[Move]] = {}
        for move in self.all_moves:
            found.setdefault(move.component, []).append(move)
        return found

    def assets(self, component: str) -> list[Asset]:
        """The files among the sources' tensors that go into the component's folder."""
        return [e for e in self.entries if isinstance(e, Asset) and e.component == component]


def packed_key(key: str, part: str) -> str:
    """`a.weight` -> `a.scales`: the name of one tensor of a packed layer."""
    return f"{key.rpartition('.')[0]}.{part}"


@cache
def natural_order(key: str) -> tuple[str | int, ...]:
    """Sort key that orders numbers by value."""
    parts = re.split(r"(\d{1,18})", key)  # every second one is a number
    return tuple(int(part) if index % 2 else part for index, part in enumerate(parts))


def packed_layers(moves: Iterable[Move]) -> dict[str, Move]:
    """The packed weights among a component's tensors by the path of their layer, in natural order."""
    found = {move.layer: move for move in moves if move.packing is not None}
    return {layer: found[layer] for layer in sorted(found, key=natural_order)}


def parameters(moves: Iterable[Move]) -> dict[str, Spec]:
    """Name, shape and float type of a component's tensors that its network has too: all but the scales of layers that
    are kept packed."""
    moves = list(moves)
    scales = {f"{layer}.{part}" for layer in packed_layers(moves) for part in SCALE_PARTS}
    found: dict[str, Spec] = {}
    for move in moves:
        if move.key not in scales:
            found |= move.parameters()
    return found


def quantization_config(moves: Iterable[Move]) -> dict[str, Any] | None:
    """`quantization` in config.json as mlx-lm writes it: the form that most values have, then the layers that have
    another. None when no layer is packed."""
    layers = {layer: (move.packing.form, move) for layer, move in packed_layers(moves).items() if move.packing}
    values: Counter[Form] = Counter()
    for form, move in layers.values():
        values[form] += prod(move.values.shape)
    if not values:
        return None
    common = max(values, key=lambda form: (values[form], -form.bits, form.mode))
    return common.entry() | {layer: form.entry() for layer, (form, _) in layers.items() if form != common}


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as `convert --dry-run --json` prints it."""
    return {"plan": [_entry_json(entry) for entry in plan.entries]}


def _entry_json(entry: Entry) -> dict[str, Any]:
    head = {"source": str(entry.file.path), "name": entry.file.own_name(entry.tensor.name)}
    if isinstance(entry, Drop):
        return head | {"dropped": entry.reason}
    return head | {"shape": list(entry.tensor.shape), "dtype": entry.tensor.dtype} | _target_json(entry)


def _target_json(entry: Move | Merge | Asset) -> dict[str, Any]:
    """The target of a tensor; for a merged one, that of the tensor that uses it up."""
    if isinstance(entry, Merge):
        return _target_json(entry.into)
    if isinstance(entry, Asset):
        spec, key, steps = Spec(entry.tensor.shape, entry.tensor.dtype), entry.name, []
    else:
        spec = entry.spec if entry.packing is None else entry.packing.specs(entry.spec)["weight"]
        key, steps = entry.key, [name for step in entry.steps for name in step.names]
        steps += [str(entry.packing)] if entry.packing else []
    return {
        "component": entry.component,
        "key": key,
        "transform": steps or ["copy"],
        "out_shape": list(spec.shape),
        "out_dtype": spec.dtype,
    }


def kept_layers(plan: Plan) -> dict[Layer, Keep]:
    """The layers that stay as they were published."""
    return {(move.component, move.layer): move.packing for move in plan.all_moves if isinstance(move.packing, Keep)}


def decoded(plan: Plan, layers: Mapping[Layer, str]) -> Plan:
    """The plan with some of its kept layers decoded to a float type, as --dtype spells it."""
    weights = {
        layer: replace(move, steps=(Dequantize(move.packing.codes, layers[layer]),), packing=None)
        for move in plan.all_moves
        if isinstance(move.packing, Keep) and (layer := (move.component, move.layer)) in layers
    }
    return replace(plan, entries=tuple(_decoded(entry, weights) for entry in plan.entries))


def _decoded(entry: Entry, weights: Mapping[Layer, Move]) -> Entry:
    """The entry where these layers' weights are decoded: their scales are used up."""
    if not isinstance(entry, Move) or (weight := weights.get((entry.component, entry.layer))) is None:
        return entry
    if entry.key == weight.key:
        return weight
    return Merge(entry.file, entry.tensor, weight) if entry.key.rpartition(".")[2] in SCALE_PARTS else entry
