"""A plan with packed layers: in chosen forms, or in those of a model folder, for verifying it.

With statistics of a layer's inputs, its bias becomes a part of the packed weight: packing corrects it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import frexp, inf

from ltx2.convert.plan.entries import Entry, Layer, Merge, Move, Plan, quantization_config
from ltx2.quant.codes.methods import GPTQ
from ltx2.quant.measure.replay import Replay
from ltx2.quant.measure.statistics import Statistics
from ltx2.quant.plan.step import BIAS, MULTIPLIER, SHORT, Known, packings, quantized
from ltx2.runtime.errors import InputError
from ltx2.runtime.files.tensors import FLOATS, FileRecord
from ltx2.runtime.model.forms import Form
from ltx2.runtime.model.layout import ModelFolder

ALONE = "verify without sources: every byte is checked by the hashes"
Forms = Mapping[str, Mapping[str, Form]]  # component -> path of a layer -> how it is stored


@dataclass(frozen=True)
class Given:
    """Used for packing a plan's layers: statistics by component, multipliers of layers that were packed before, and the
    replay of recorded calls for GPTQ."""

    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    multipliers: Mapping[Layer, float] = field(default_factory=dict)
    replay: Replay | None = None


def packed_plan(plan: Plan, forms: Forms, given: Given) -> Plan:
    """The plan with every layer packed that has a form in which its weight can be packed."""
    biases = {_layer(e): e for e in plan.entries if isinstance(e, Move) and _is_bias(e)}
    packed = {
        _layer(move): move
        for entry in plan.entries
        if isinstance(entry, Move) and (move := _packed(entry, forms, given, biases.get(_layer(entry)))) is not None
    }
    replanned = replace(plan, entries=tuple(_replanned(entry, packed) for entry in plan.entries))
    components = {}
    for name, component in plan.components.items():
        moves = replanned.moves(name)
        found = [packing for _, packing in packings(moves).values()]
        record = next((packing.known.statistics.record for packing in found if packing.known), component.statistics)
        method = GPTQ if any(packing.method == GPTQ for packing in found) else component.method
        quantization = quantization_config(moves)
        components[name] = replace(component, quantization=quantization, statistics=record, method=method)
    return replace(replanned, components=components)


def _layer(move: Move) -> Layer:
    return move.component, move.layer


def _is_bias(move: Move) -> bool:
    return move.key.endswith(f".{BIAS}") and move.packing is None and move.spec.dtype in FLOATS.values()


def _packed(move: Move, forms: Forms, given: Given, bias: Move | None) -> Move | None:
    """The move packed in its layer's form; None without a form, or if the tensor cannot be packed."""
    form, spec = forms.get(move.component, {}).get(move.layer), move.spec
    if form is None or move.packing is not None or not move.key.endswith(".weight"):
        return None
    if len(spec.shape) != 2 or spec.dtype not in FLOATS.values() or spec.shape[1] % form.block:
        return None
    statistics = given.statistics.get(move.component)
    known = None
    if statistics is not None and _layer(move) in statistics.layers:
        fits = bias is not None and bias.spec.shape == spec.shape[:1]
        replay = given.replay if given.replay is not None and Replay.covers(*_layer(move)) else None
        known = Known(statistics, *_layer(move), bias if fits else None, replay)
    return quantized(move, form, known, given.multipliers.get(_layer(move)))


def _replanned(entry: Entry, packed: Mapping[Layer, Move]) -> Entry:
    if isinstance(entry, Merge):
        weight = packed.get(_layer(entry.into))
        return entry if weight is None else replace(entry, into=weight)
    weight = packed.get(_layer(entry)) if isinstance(entry, Move) else None
    if weight is None or not isinstance(entry, Move):
        return entry
    if entry.key == weight.key:
        return weight
    return Merge(entry.file, entry.tensor, weight) if entry.key in weight.parameters() else entry


def repack(plan: Plan, model: ModelFolder, statistics: Statistics | None = None) -> Plan:
    """The plan with the layers packed that are packed in `model`, in the same forms.

    Raises InputError unless `statistics` are those that were used, and for codes chosen by GPTQ.
    """
    common = [name for name in plan.components if model.has(name)]
    for name in common:
        if model.record(name).method == GPTQ:
            why = "they depend on how a machine adds up, so that another one would find other codes"
            raise InputError(f"the codes of the {name}, which GPTQ chose, cannot be compared", why, ALONE)
    forms = {name: _stored_forms(model, name) for name in common}
    needed = {name: record for name in common if (record := model.record(name).statistics)}
    _check_statistics(needed, statistics)
    known = dict.fromkeys(needed, statistics) if statistics else {}
    return packed_plan(plan, forms, Given(known, _stored_multipliers(model, forms)))


def _check_statistics(needed: Mapping[str, FileRecord], statistics: Statistics | None) -> None:
    for component, record in needed.items():
        if statistics is None or statistics.record.sha256 != record.sha256:
            given = "another file was given" if statistics else "they are needed to pack its layers again"
            what = f"the {component} was quantized with the statistics {record.name} (SHA-256 {record.sha256[:SHORT]})"
            raise InputError(what, given, f"add --stats {record.name}, or verify without sources")
    if statistics is not None and not needed:
        why = "nothing that the sources hold was quantized with statistics"
        raise InputError(f"{statistics.record.name} is not needed", why, "leave out --stats")


def _stored_forms(model: ModelFolder, component: str) -> dict[str, Form]:
    quantization = model.quantization(component)
    names = [name for file in model.tensor_files(component) for name in file.tensors]
    layers = [name.removesuffix(".scales") for name in names if name.endswith(".scales")]
    return {layer: quantization.of(layer) for layer in layers}


def _stored_multipliers(model: ModelFolder, forms: Forms) -> dict[Layer, float]:
    """The output multipliers of the layers; 1 in place of values that this tool does not write."""
    found = {}
    for name, layers in forms.items():
        where = {key: file for file in model.tensor_files(name) for key in file.tensors}
        for layer, form in layers.items():
            key = f"{layer}.{MULTIPLIER}"
            if form.multiplied and key in where and where[key].tensors[key].dtype == "F32":
                value = float(where[key].array(key).reshape(-1)[0])
                found[name, layer] = value if 0 < value < inf and frexp(value)[0] == 0.5 else 1.0
    return found
