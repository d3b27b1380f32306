"""Quantizing as a change of the plan: the same tensors, written by the same code, some of them packed. That is why
`convert --bits` gives the bytes of convert and quantize in turn, in the same bounded memory."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ltx2.convert.folder import folder_plan
from ltx2.convert.plan import Entry, Merge, Move, Plan, packed_layers, quantization_config
from ltx2.convert.recode import Layer, decoded, kept_layers
from ltx2.convert.write import WriteOptions, write_plan
from ltx2.quant.pack import BITS, DTYPES, GROUP_SIZES, Affine
from ltx2.quant.recipe import DEFAULT, load_recipe
from ltx2.quant.report import Quantized, make_report
from ltx2.quant.step import AffinePacking, packings
from ltx2.runtime.errors import InputError, UnsupportedError
from ltx2.runtime.events import Event, Warned, Written
from ltx2.runtime.layout import ModelFolder

HALVED = 8  # bits of the smallest codes that are quantized further
MODES = ("affine",)  # of the kinds that MLX knows, the ones this version packs
Forms = Mapping[str, Mapping[str, Affine]]  # component -> path of a layer -> how it is stored


@dataclass(frozen=True)
class Settings:
    """What the user chose: bits of the layers that the recipe does not raise, values per scale, recipe (a name or a
    file), the components to quantize (none: all that the recipe names), and the kind of codes."""

    bits: int = 4
    group_size: int = 64
    recipe: str = DEFAULT
    only: tuple[str, ...] = ()
    mode: str = "affine"


def quantize(
    model: Path, out: Path, settings: Settings | None = None, options: WriteOptions | None = None
) -> Iterator[Event]:
    """Write a quantized copy of the model folder `model` to `out`; see `write_quantized`.

    Raises ModelFolderError when `model` is not a model folder, InputError when it is quantized already.
    """
    yield from write_quantized(folder_plan(ModelFolder.open(model)), out, settings, options)


def write_quantized(
    plan: Plan, out: Path, settings: Settings | None = None, options: WriteOptions | None = None
) -> Iterator[Event]:
    """Write `plan` quantized. The last two events are Quantized, with the report, and Written.

    Raises what `quantize_plan` and `write_plan` raise.
    """
    settings = settings or Settings()
    quantized = quantize_plan(plan, settings)
    unfit = _unfit(quantized, recipe_forms(plan, settings))
    if unfit:
        width = f"their width is no multiple of {settings.group_size}"
        yield Warned(f"{len(unfit)} layers are not quantized, {width}; the first is {unfit[0]}")
    for event in write_plan(quantized, out, options):
        if isinstance(event, Written):
            yield Quantized((yield from make_report(quantized, ModelFolder.open(out), unfit)))
        yield event


def quantize_plan(plan: Plan, settings: Settings) -> Plan:
    """The plan with every layer packed that the recipe names and whose width is a multiple of the group size. A layer
    that was published as codes stays as it is where the recipe asks for as many bits or more.

    Raises InputError for settings that are not possible or do not fit the plan, and for what is quantized already;
    UnsupportedError for codes that should become smaller and cannot.
    """
    _check(plan, settings)
    forms = recipe_forms(plan, settings)
    quantized = _packed_plan(decoded(plan, dict.fromkeys(_shrinking(plan, forms), "bf16")), forms)
    components = {
        name: replace(component, quantization=quantization_config(quantized.moves(name)))
        for name, component in plan.components.items()
    }
    _check_effect(quantized, settings)
    return replace(quantized, components=components)


def repack(plan: Plan, model: ModelFolder) -> Plan:
    """The plan with the layers packed that are packed in `model`, and as they are there; what verifying compares."""
    return _packed_plan(plan, {name: _stored_forms(model, name) for name in model.manifest.components})


def _stored_forms(model: ModelFolder, component: str) -> dict[str, Affine]:
    config = model.config(component).get("quantization", {})
    names = [name for file in model.tensor_files(component) for name in file.tensors]
    layers = [name.removesuffix(".scales") for name in names if name.endswith(".scales")]
    entries = {layer: config.get(layer, config) for layer in layers}
    return {layer: Affine(e["bits"], e["group_size"]) for layer, e in entries.items() if e.get("mode") in MODES}


def recipe_forms(plan: Plan, settings: Settings) -> Forms:
    """How the recipe wants the layers of the chosen components stored, whether their width allows it or not."""
    recipe = load_recipe(settings.recipe)
    chosen = [name for name in plan.components if name in settings.only or not settings.only]
    bits = {name: recipe.bits(name, [m.layer for m in plan.moves(name)], settings.bits) for name in chosen}
    return {name: {layer: Affine(n, settings.group_size) for layer, n in bits[name].items()} for name in chosen}


def _shrinking(plan: Plan, forms: Forms) -> Iterator[Layer]:
    """The layers kept as published that get fewer bits. Raises UnsupportedError for those of 4 bits."""
    for (component, layer), keep in kept_layers(plan).items():
        affine = forms.get(component, {}).get(layer)
        if affine is None or affine.bits >= keep.storage.bits:
            continue
        if keep.storage.bits < HALVED:
            raise UnsupportedError(
                f"{component}.{layer} is not quantized to {affine.bits} bits",
                f"it is {keep.storage.mode} already, and a second loss would leave little of it",
                "use 4 bits or more, which leave it as it is, or quantize the bf16 model",
            )
        yield component, layer


def _packed_plan(plan: Plan, forms: Forms) -> Plan:
    return replace(plan, entries=tuple(_packed_entry(entry, forms) for entry in plan.entries))


def _packed_entry(entry: Entry, forms: Forms) -> Entry:
    if isinstance(entry, Merge):
        return replace(entry, into=_packed(entry.into, forms.get(entry.into.component, {})))
    return _packed(entry, forms.get(entry.component, {})) if isinstance(entry, Move) else entry


def _packed(move: Move, forms: Mapping[str, Affine]) -> Move:
    """The move with its layer's form, where that has one and the tensor is a weight that can be packed."""
    affine, form = forms.get(move.layer), move.form
    if affine is None or not move.key.endswith(".weight") or len(form.shape) != 2 or form.dtype not in DTYPES:
        return move
    if form.shape[1] % affine.group_size:
        return move
    return replace(move, packing=AffinePacking(affine, move.tensor.name))


def _unfit(quantized: Plan, forms: Forms) -> list[str]:
    """Layers that the recipe names and that are not packed."""
    packed = {name: packed_layers(quantized.moves(name)) for name in forms}
    return [f"{name}.{layer}" for name in forms for layer in forms[name] if layer not in packed[name]]


def _check(plan: Plan, settings: Settings) -> None:
    if settings.bits not in BITS:
        raise _not_possible("--bits", settings.bits, BITS)
    if settings.group_size not in GROUP_SIZES:
        raise _not_possible("--group-size", settings.group_size, GROUP_SIZES)
    if settings.mode not in MODES:
        raise _not_possible("--mode", settings.mode, MODES)
    for name in settings.only:
        if name not in plan.components:
            raise InputError(f"there is no {name}", f"the model holds {', '.join(plan.components)}", "check --only")
    for name in plan.components:
        if _is_quantized(plan.moves(name)):
            raise InputError(
                f"the model is quantized already ({name})",
                "quantizing twice loses more than once, and what is lost cannot be regained",
                "quantize the model folder it was made from",
            )


def _not_possible(option: str, value: object, values: Iterable[object]) -> InputError:
    allowed = [str(v) for v in values]
    return InputError(
        f"{option} {value} is not possible", f"it is one of {', '.join(allowed)}", f"use {option} {'|'.join(allowed)}"
    )


def _is_quantized(moves: Iterable[Move]) -> bool:
    """Whether some layer is, other than those that stay as they were published."""
    moves = list(moves)
    packed = packed_layers(moves)
    return any(m.key.endswith(".scales") and m.layer not in packed for m in moves)


def _check_effect(plan: Plan, settings: Settings) -> None:
    quantized = [name for name in plan.components if packings(plan.moves(name))]
    idle = [name for name in settings.only if name not in quantized]
    if idle or not quantized:
        raise InputError(
            f"there is nothing to quantize in {', '.join(idle or plan.components)}",
            f"recipe {settings.recipe} names none of its layers, or no width is a multiple of {settings.group_size}",
            "choose other components, another recipe or a smaller --group-size, or leave the model as it is",
        )
