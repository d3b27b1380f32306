"""The plan: for every tensor of every source, where it goes and what happens to it, or why it is dropped.

Made from headers alone, without MLX. Converting, the dry run, quantizing and verifying all work from the same plan."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltx2.convert import rules
from ltx2.convert.checkpoint import VARIANTS, Source, variant_in_name
from ltx2.convert.components import ComponentPlan, component_plan
from ltx2.convert.steps import FLOATS, Cast, Form, Packing, Step, Transpose
from ltx2.runtime.config import STORAGE_KEYS
from ltx2.runtime.errors import CheckpointError, InputError
from ltx2.runtime.layout import COMPONENTS, CONFIG, INDEX, LORAS, ModelFolder, is_lora
from ltx2.runtime.tensorfile import FileRecord, TensorFile, TensorInfo


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
    def form(self) -> Form:
        """Shape and dtype after the steps, before packing."""
        form = Form(self.tensor.shape, self.tensor.dtype)
        for step in self.steps:
            form = step.form(form)
        return form

    def stored(self) -> dict[str, Form]:
        """Name, shape and dtype of every tensor this one becomes."""
        if self.packing is None:
            return {self.key: self.form}
        return {packed_key(self.key, part): form for part, form in self.packing.forms(self.form).items()}


@dataclass(frozen=True)
class Merge:
    """One source tensor that another one's steps use up, e.g. the scale of codes that are dequantized."""

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
        return [e for e in self.entries if isinstance(e, Move) and e.component == component]

    def assets(self, component: str) -> list[Asset]:
        """The files among the sources' tensors that go into the component's folder."""
        return [e for e in self.entries if isinstance(e, Asset) and e.component == component]


def packed_key(key: str, part: str) -> str:
    """`a.weight` -> `a.scales`: the name of one tensor of a packed layer."""
    return f"{key.rpartition('.')[0]}.{part}"


def make_plan(sources: Sequence[Source], options: Options | None = None) -> Plan:
    """Plan the conversion of all sources into one model folder.

    Raises CheckpointError for tensors no rule knows and for components filled twice, InputError for options that do
    not fit the sources.
    """
    options = options or Options()
    _check_options(options)
    entries: list[Entry] = []
    owners: dict[str, Source] = {}
    for source in sources:
        found = [_selected(entry, options) for entry in _entries(source, options)]
        for component in dict.fromkeys(e.component for e in found if isinstance(e, Move | Asset)):
            _claim(owners, component, source)
        entries += found
    _check_selection(options, owners)
    components = {name: component_plan(name, owners[name]) for name in sorted(owners)}
    used = {id(e.file): e.file for e in entries if not isinstance(e, Drop)}
    files = tuple(sorted(used.values(), key=lambda f: (f.path.name, f.size)))
    return Plan(tuple(entries), components, _release(sources), _variant(owners, options), files)


def folder_plan(folder: ModelFolder) -> Plan:
    """The plan that copies a model folder as it is; what quantizing starts from."""
    entries: list[Entry] = []
    components = {}
    for name, record in folder.manifest.components.items():
        extra = [folder.path / name / f.name for f in record.files if _is_companion(f.name)]
        config = {k: v for k, v in folder.config(name).items() if k not in STORAGE_KEYS}
        components[name] = ComponentPlan(name, record.cls, config, tuple(extra), record.quantization)
        entries += [Move(f, t, name, t.name) for f in folder.tensor_files(name) for t in f.tensors.values()]
    manifest = folder.manifest
    return Plan(tuple(entries), components, manifest.release, manifest.variant, manifest.sources)


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
        form, key, steps = Form(entry.tensor.shape, entry.tensor.dtype), entry.name, []
    else:
        form = entry.form if entry.packing is None else entry.packing.forms(entry.form)["weight"]
        key, steps = entry.key, [str(step) for step in (*entry.steps, *([entry.packing] if entry.packing else []))]
    return {
        "component": entry.component,
        "key": key,
        "transform": steps or ["copy"],
        "out_shape": list(form.shape),
        "out_dtype": form.dtype,
    }


def _entries(source: Source, options: Options) -> Iterator[Entry]:
    unknown = []
    for file in source.files:
        for name, tensor in file.tensors.items():
            target = rules.target(source.kind, name)
            if target is None:
                unknown.append(name)
            elif target.dropped:
                yield Drop(file, tensor, target.dropped)
            else:
                yield _move(source, file, tensor, target, options)
    if unknown:
        raise CheckpointError(
            f"{source.path.name} holds tensors this version does not know",
            f"{len(unknown)} of {source.tensor_count()} match no rule, the first are {', '.join(unknown[:3])}",
            "use the file as published, or a newer ltx2",
        )


def _move(source: Source, file: TensorFile, tensor: TensorInfo, target: rules.Target, options: Options) -> Move:
    if source.kind == "lora":
        key, component = f"{target.component}.{target.key}", f"{LORAS}/{lora_name(source.path)}"
    else:
        key, component = target.key, target.component
    steps: list[Step] = []
    if axes := rules.axes(component, key, len(tensor.shape)):
        steps.append(Transpose(axes))
    stays = tensor.dtype == "F32" and rules.FLOAT32_TABLES.fullmatch(key)
    if options.dtype and not stays and FLOATS[options.dtype] != tensor.dtype:
        steps.append(Cast(options.dtype))
    return Move(file, tensor, component, key, tuple(steps))


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


def _claim(owners: dict[str, Source], component: str, source: Source) -> None:
    other = owners.setdefault(component, source)
    if other is not source:
        raise CheckpointError(
            f"two sources hold a {component}",
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


def _check_selection(options: Options, owners: Mapping[str, Source]) -> None:
    for name in options.only:
        if name not in owners and not (name == LORAS and any(map(is_lora, owners))):
            have = ", ".join(sorted(owners)) or "nothing else of what --only names"
            raise InputError(f"the sources hold no {name}", f"they hold {have}", "check --only, or add the source")


def _release(sources: Sequence[Source]) -> str | None:
    found = {s.release.name: s for s in sources if s.release is not None}
    if len(found) > 1:
        names = "; ".join(f"{s.path.name} belongs to {s.release.title}" for s in found.values() if s.release)
        raise CheckpointError("the sources belong to different releases", names, "use files of one release")
    return next(iter(found), None)


def _variant(owners: Mapping[str, Source], options: Options) -> str | None:
    if options.variant is not None or "transformer" not in owners:
        return options.variant
    path = owners["transformer"].path
    variant = variant_in_name(path.stem)
    if variant is None:
        raise InputError(
            f"{path.name}: dev or distilled?",
            "the two cannot be told apart by content, and the file's name does not say it",
            "add --variant dev or --variant distilled",
        )
    return variant


def _is_companion(name: str) -> bool:
    return name not in (CONFIG, INDEX) and not name.endswith(".safetensors")
