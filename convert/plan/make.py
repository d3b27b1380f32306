"""Makes the plan of sources: every tensor's place by its name (names/rules.py), its steps by its codes."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ltx2.convert.names import rules
from ltx2.convert.plan.entries import Asset, Drop, Entry, Merge, Move, Plan, packed_key, quantization_config
from ltx2.convert.sources.components import ComponentPlan, component_plan
from ltx2.convert.sources.source import VARIANTS, Source, variant_in_name
from ltx2.convert.sources.textencoder import SENTENCEPIECE, TOKENIZER
from ltx2.convert.sources.together import common_release
from ltx2.convert.tensors.codes import Affine, Codes, MlxCodes
from ltx2.convert.tensors.gguf import GgufFile
from ltx2.convert.tensors.keep import Dequantize, Keep, KeepBlockScales
from ltx2.convert.tensors.scales import dropped_beside_codes, find_codes
from ltx2.convert.tensors.steps import Cast, Reshape, Spec, Step, Transpose
from ltx2.runtime.errors import CheckpointError, InputError, UsageError, reason
from ltx2.runtime.files.jsonfile import parse_object
from ltx2.runtime.files.tensors import FLOATS, TensorFile, TensorInfo
from ltx2.runtime.model.forms import Quantization
from ltx2.runtime.model.layout import COMPONENTS, LORAS, is_lora, read_sizes
from ltx2.runtime.model.lorafile import alphas
from ltx2.runtime.model.origin import check_gemma

SIZES = "ltx2_sizes"  # in a file's metadata
DOUBLE = "another source has it unquantized"
Owners = dict[str, dict[str, Source]]  # component -> its tensors and files -> the source of each


@dataclass(frozen=True)
class Options:
    """The user's choices: dev or distilled, a float type for all weights, and the components to convert."""

    variant: str | None = None
    dtype: str | None = None
    only: tuple[str, ...] = ()


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
    for source, found in _without_doubles([(source, list(_entries(source, options))) for source in sources]):
        found = [_selected(entry, options) for entry in found]
        _claim(owners, found, source)
        entries += found
    _check_selection(options, owners)
    components = {
        name: replace(
            component_plan(name, list(dict.fromkeys(owners[name].values())), sources),
            quantization=quantization_config(e for e in entries if isinstance(e, Move) and e.component == name),
        )
        for name in sorted(owners)
    }
    _check_gemma(components, owners)
    used = {id(e.file): e.file for e in entries if not isinstance(e, Drop)}
    files = tuple(sorted(used.values(), key=lambda f: (f.path.name, f.size)))
    return Plan(tuple(entries), components, release, _variant(owners, options), files, _sizes(owners))


def _sizes(owners: Owners) -> dict[str, float]:
    """The sizes of clips that the transformer was made for, where its file states them. Raises CheckpointError for
    other text."""
    for source in dict.fromkeys(owners.get("transformer", {}).values()):
        for text in (file.metadata[SIZES] for file in source.files if SIZES in file.metadata):
            try:
                return read_sizes(parse_object(text))
            except (ValueError, TypeError, AttributeError) as error:
                what = f"the {SIZES} in {source.path.name} cannot be read"
                raise CheckpointError(what, reason(error), "download it again") from error
    return {}


def _without_doubles(planned: list[tuple[Source, list[Entry]]]) -> Iterator[tuple[Source, list[Entry]]]:
    """Drop the connectors of a transformer's GGUF where another source has them unquantized, as people add them."""
    connectors = [e for _, found in planned for e in found if isinstance(e, Move) and e.component == "connectors"]
    exact = {entry.key for entry in connectors if not isinstance(entry.file, GgufFile)}
    doubles = {id(entry) for entry in connectors if isinstance(entry.file, GgufFile) and entry.key in exact}
    for source, found in planned:
        yield source, [Drop(e.file, e.tensor, DOUBLE) if id(e) in doubles else e for e in found]


def _check_gemma(components: Mapping[str, ComponentPlan], owners: Owners) -> None:
    """Raises MismatchError when the text encoder is not the one that the transformer was trained with."""
    pair = ("transformer", "text_encoder")
    if all(name in components for name in pair):
        first, second = (next(iter(owners[name].values())).path.name for name in pair)
        check_gemma(components[pair[0]].config, components[pair[1]].config, (first, second))


def packed_by_mlx(source: Source) -> Quantization:
    """How MLX has packed a text encoder's layers, where it has. Raises CheckpointError for other text."""
    try:
        return Quantization.from_config(source.config.get("quantization"))
    except (ValueError, TypeError, AttributeError) as error:
        what = f"the quantization in {source.path}'s configuration cannot be read"
        raise CheckpointError(what, reason(error), "download it again") from error


def _entries(source: Source, options: Options) -> Iterator[Entry]:
    coded, unknown = find_codes(source.files, packed_by_mlx(source)), []
    beside = {path.name for path in source.companions}
    beside |= {SENTENCEPIECE} if TOKENIZER in beside else set()
    for file in source.files:
        strengths = alphas(file) if source.kind == "lora" else {}
        for name, tensor in file.tensors.items():
            owner, part = coded.scales.get(name, (name, ""))  # a scale goes with its weight
            owner = strengths.get(name, owner)
            target = rules.target(source.kind, owner)
            if useless := dropped_beside_codes(name):
                yield Drop(file, tensor, useless)
            elif target is None:
                unknown.append(name)
            elif target.dropped:
                yield Drop(file, tensor, target.dropped)
            elif target.asset and target.key in beside:
                yield Drop(file, tensor, "a tokenizer stands beside the weights")
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
    steps = [*_restored(file, tensor.name), *_turned(component, key, tensor.shape)]
    stays = tensor.dtype == "F32" and rules.FLOAT32_TABLES.fullmatch(key)
    dtype = options.dtype or ("bf16" if isinstance(file, GgufFile) else None)  # its F32 biases were published in BF16
    if dtype and not stays and FLOATS[dtype] != tensor.dtype:
        steps.append(Cast(dtype))
    return Move(file, tensor, component, key, tuple(steps))


def _coded_move(source: Source, codes: Codes, target: rules.Target, options: Options) -> Move:
    """Linear layers stay codes unless the user wants a float type; what MLX cannot multiply as codes becomes BF16."""
    component, key = _place(source, target)
    shape = codes.shape(Spec(codes.tensor.shape, codes.tensor.dtype))
    if options.dtype is None and isinstance(codes, MlxCodes):
        multiplied = rules.is_linear(component, key, shape) or isinstance(codes, Affine)  # MLX packs embeddings, too
        if multiplied and shape[1] % codes.form.group_size == 0:
            return Move(codes.file, codes.tensor, component, key, packing=Keep(codes))
    steps = (*_decoded(codes, key, options), *_turned(component, key, shape))
    return Move(codes.file, codes.tensor, component, key, steps)


def _decoded(codes: Codes, key: str, options: Options) -> list[Step]:
    """Decoding and what the file's format needs after it, with one rounding at the end."""
    dtype = "f32" if rules.FLOAT32_TABLES.fullmatch(key) else options.dtype or "bf16"
    if restored := _restored(codes.file, codes.tensor.name):
        return [Dequantize(codes, "f32"), *restored, *([] if dtype == "f32" else [Cast(dtype)])]
    return [Dequantize(codes, dtype)]


def _restored(file: TensorFile, name: str) -> list[Step]:
    return file.steps(name) if isinstance(file, GgufFile) else []


def _scale_entry(weight: Move, file: TensorFile, tensor: TensorInfo, part: str) -> Move | Merge:
    """A scale of kept codes is stored beside them; decoding uses it up."""
    if not isinstance(weight.packing, Keep):
        return Merge(file, tensor, weight)
    codes = weight.packing.codes
    steps: list[Step] = []
    if part == "scales" and codes.blocks is not None:
        steps.append(KeepBlockScales(codes.blocks, codes.kind))
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
        raise UsageError(
            f"there is no variant {options.variant!r}", "a model is dev or distilled", "use --variant dev|distilled"
        )
    if options.dtype not in (None, *FLOATS):
        raise UsageError(
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
