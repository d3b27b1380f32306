"""The plan: for every tensor of every source, where it goes and what happens to it, or why it is dropped.

Made from headers alone, without MLX. Converting, the dry run, quantizing and verifying all work from the same plan."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from ltx2.convert.names import rules
from ltx2.convert.sources.checkpoint import VARIANTS, Source, variant_in_name
from ltx2.convert.sources.components import ComponentPlan, component_plan
from ltx2.convert.sources.together import common_release
from ltx2.convert.tensors.codes import Codes, Dequantize, Keep, KeepBlockScales, Nvfp4
from ltx2.convert.tensors.scales import dropped_beside_codes, find_codes
from ltx2.convert.tensors.steps import Cast, Packing, Reshape, Spec, Step, Transpose
from ltx2.runtime.errors import CheckpointError, InputError
from ltx2.runtime.files.tensors import FLOATS, FileRecord, TensorFile, TensorInfo
from ltx2.runtime.model.forms import Form
from ltx2.runtime.model.layout import COMPONENTS, LORAS, is_lora
from ltx2.runtime.model.lorafile import alphas
from ltx2.runtime.model.origin import check_gemma

SCALE_PARTS = ("scales", "weight_scale")  # last name parts of what is stored beside a weight kept as codes


@dataclass(frozen=True)
class Move:
    """One source tensor that is stored in `component` under `key`."""

    file: TensorFile
    tensor: TensorInfo
    component: str
    key: str
    steps: tuple[Step, ...] = ()
    packing: Packing | None = None

    @property
    def spec(self) -> Spec:
        """Shape and dtype after the steps, before packing."""
        spec = Spec(self.tensor.shape, self.tensor.dtype)
        for step in self.steps:
            spec = step.spec(spec)
        return spec

    @property
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
        """Name, shape and dtype of every tensor this one becomes."""
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
Owners = dict[str, dict[str, Source]]  # component -> its tensors and files -> the source of each


@dataclass(frozen=True)
class Options:
    """What the user chose: dev or distilled, a float type for all weights, and the components to convert."""

    variant: str | None = None
    dtype: str | None = None
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A whole model folder. `sources` are files still to be hashed, or records that are known already."""

    entries: tuple[Entry, ...]
    components: Mapping[str, ComponentPlan]
    release: str | None
    variant: str | None
    sources: tuple[TensorFile | FileRecord, ...] = field(default=())

    def moves(self, component: str) -> list[Move]:
        """The component's tensors, in the sources' order."""
        return _of(self.entries, component)

    def assets(self, component: str) -> list[Asset]:
        """The files among the sources' tensors that go into the component's folder."""
        return [e for e in self.entries if isinstance(e, Asset) and e.component == component]


def packed_key(key: str, part: str) -> str:
    """`a.weight` -> `a.scales`: the name of one tensor of a packed layer."""
    return f"{key.rpartition('.')[0]}.{part}"


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


def make_plan(sources: Sequence[Source], options: Options | None = None) -> Plan:
    """Plan the conversion of all sources into one model folder.

    Raises CheckpointError for tensors no rule knows and for components filled twice, InputError for options that do
    not fit the sources, MismatchError for networks that were not trained together.
    """
    options = options or Options()
    _check_options(options)
    entries: list[Entry] = []
    owners: Owners = {}
    release = common_release(sources)
    for source in sources:
        found = [_selected(entry, options) for entry in _entries(source, options)]
        _claim(owners, found, source)
        entries += found
    _check_selection(options, owners)
    components = {
        name: replace(
            component_plan(name, list(dict.fromkeys(owners[name].values()))),
            quantization=quantization_config(_of(entries, name)),
        )
        for name in sorted(owners)
    }
    _check_gemma(components, owners)
    used = {id(e.file): e.file for e in entries if not isinstance(e, Drop)}
    files = tuple(sorted(used.values(), key=lambda f: (f.path.name, f.size)))
    return Plan(tuple(entries), components, release, _variant(owners, options), files)


def _check_gemma(components: Mapping[str, ComponentPlan], owners: Owners) -> None:
    """Raises MismatchError when the text encoder is not the one that the transformer was trained with."""
    pair = ("transformer", "text_encoder")
    if all(name in components for name in pair):
        first, second = (next(iter(owners[name].values())).path.name for name in pair)
        check_gemma(components[pair[0]].config, components[pair[1]].config, (first, second))


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as `convert --dry-run --json` prints it."""
    return {"plan": [_entry_json(entry) for entry in plan.entries]}


def _entry_json(entry: Entry) -> dict[str, Any]:
    head = {"source": str(entry.file.path), "name": entry.tensor.name}
    if isinstance(entry, Drop):
        return head | {"dropped": entry.reason}
    return head | {"shape": list(entry.tensor.shape), "dtype": entry.tensor.dtype} | _target_json(entry)


def _target_json(entry: Move | Merge | Asset) -> dict[str, Any]:
    """Where a tensor ends up; one that is merged, where the other one does."""
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


def _of(entries: Iterable[Entry], component: str) -> list[Move]:
    return [entry for entry in entries if isinstance(entry, Move) and entry.component == component]


def _entries(source: Source, options: Options) -> Iterator[Entry]:
    coded, unknown = find_codes(source.files), []
    for file in source.files:
        strengths = alphas(file) if source.kind == "lora" else {}
        for name, tensor in file.tensors.items():
            owner, part = coded.scales.get(name, (name, ""))  # a scale goes where what it scales goes
            owner = strengths.get(name, owner)
            target = rules.target(source.kind, owner)
            if reason := dropped_beside_codes(name):
                yield Drop(file, tensor, reason)
            elif target is None:
                unknown.append(name)
            elif target.dropped:
                yield Drop(file, tensor, target.dropped)
            elif target.asset:
                yield Asset(file, tensor, target.component, target.key)
            elif name in strengths:
                yield Merge(file, tensor, _move(source, file, file.tensors[owner], target, options))
            elif part:
                yield _scale_entry(_coded_move(source, coded.codes[owner], target, options), file, tensor, part)
            elif name in coded.codes:
                yield _coded_move(source, coded.codes[name], target, options)
            else:
                yield _move(source, file, tensor, target, options)
    if unknown:
        raise CheckpointError(
            f"{source.path.name} holds tensors this version does not know",
            f"{len(unknown)} of {source.tensor_count()} match no rule, the first are {', '.join(unknown[:3])}",
            "use the file as published, or a newer ltx2",
        )


def _move(source: Source, file: TensorFile, tensor: TensorInfo, target: rules.Target, options: Options) -> Move:
    component, key = _place(source, target)
    steps = _turned(component, key, tensor.shape)
    stays = tensor.dtype == "F32" and rules.FLOAT32_TABLES.fullmatch(key)
    if options.dtype and not stays and FLOATS[options.dtype] != tensor.dtype:
        steps.append(Cast(options.dtype))
    return Move(file, tensor, component, key, tuple(steps))


def _coded_move(source: Source, codes: Codes, target: rules.Target, options: Options) -> Move:
    """Linear layers stay codes unless the user wants a float type; what MLX cannot multiply as codes becomes BF16."""
    component, key = _place(source, target)
    shape = codes.shape(Spec(codes.tensor.shape, codes.tensor.dtype))
    if options.dtype is None and rules.is_linear(component, key, shape) and shape[1] % codes.form.group_size == 0:
        return Move(codes.file, codes.tensor, component, key, packing=Keep(codes))
    steps = (Dequantize(codes, options.dtype or "bf16"), *_turned(component, key, shape))
    return Move(codes.file, codes.tensor, component, key, steps)


def _scale_entry(weight: Move, file: TensorFile, tensor: TensorInfo, part: str) -> Move | Merge:
    """A scale of kept codes is stored beside them; otherwise decoding has used it up."""
    if not isinstance(weight.packing, Keep):
        return Merge(file, tensor, weight)
    codes = weight.packing.codes
    steps: list[Step] = []
    if part == "scales" and isinstance(codes, Nvfp4):
        steps.append(KeepBlockScales(codes.blocks))
    elif codes.scale is not None and codes.scale.shape != tensor.shape:
        steps.append(Reshape(codes.scale.shape))
    if part == "weight_scale" and tensor.dtype != "F32":
        steps.append(Cast("f32"))
    return Move(file, tensor, weight.component, packed_key(weight.key, part), tuple(steps))


def _place(source: Source, target: rules.Target) -> tuple[str, str]:
    """Component and key."""
    if source.kind == "lora":
        return f"{LORAS}/{lora_name(source.path)}", f"{target.component}.{target.key}"
    return target.component, target.key


def _turned(component: str, key: str, shape: tuple[int, ...]) -> list[Step]:
    axes = rules.axes(component, key, len(shape))
    return [Transpose(axes)] if axes else []


def lora_name(path: Path) -> str:
    """The folder name of a LoRA: its file's name without suffix, in plain characters."""
    return re.sub(r"[^a-z0-9._]+", "-", path.stem.lower()).strip("-.") or "lora"


def _selected(entry: Entry, options: Options) -> Entry:
    if not options.only or isinstance(entry, Drop):
        return entry
    component = entry.into.component if isinstance(entry, Merge) else entry.component
    if component in options.only or component.split("/")[0] in options.only:
        return entry
    return Drop(entry.file, entry.tensor, f"{component} is not selected (--only)")


def _claim(owners: Owners, entries: Iterable[Entry], source: Source) -> None:
    """A component may come from several sources, each of its tensors from one."""
    for entry in entries:
        if not isinstance(entry, Move | Asset):
            continue
        key = entry.key if isinstance(entry, Move) else entry.name
        other = owners.setdefault(entry.component, {}).setdefault(key, source)
        if other is not source:
            raise CheckpointError(
                f"two sources hold a {entry.component}",
                f"{other.path} and {source.path} would fill the same folder",
                "name only one of them, or convert them into two models",
            )


def _check_options(options: Options) -> None:
    if options.variant not in (None, *VARIANTS):
        raise InputError(
            f"there is no variant {options.variant!r}", "a model is dev or distilled", "use --variant dev|distilled"
        )
    if options.dtype not in (None, *FLOATS):
        raise InputError(
            f"there is no float type {options.dtype!r}", f"weights are {', '.join(FLOATS)}", "use --dtype bf16|f16|f32"
        )
    for name in options.only:
        if name not in COMPONENTS and name.split("/")[0] != LORAS:
            raise InputError(
                f"there is no component {name!r}", f"components are {', '.join(COMPONENTS)} and {LORAS}", "check --only"
            )


def _check_selection(options: Options, owners: Owners) -> None:
    for name in options.only:
        if name not in owners and not (name == LORAS and any(map(is_lora, owners))):
            have = ", ".join(sorted(owners)) or "nothing else of what --only names"
            raise InputError(f"the sources hold no {name}", f"they hold {have}", "check --only, or add the source")


def _variant(owners: Owners, options: Options) -> str | None:
    if options.variant is not None or "transformer" not in owners:
        return options.variant
    path = next(iter(owners["transformer"].values())).path
    variant = variant_in_name(path.stem)
    if variant is None:
        raise InputError(
            f"{path.name}: dev or distilled?",
            "the two cannot be told apart by content, and the file's name does not say it",
            "add --variant dev or --variant distilled",
        )
    return variant
