"""Layers kept as codes, decoded after all: to be quantized further, or to compare a folder that holds them decoded."""

from collections.abc import Mapping
from dataclasses import replace

from ltx2.convert.plan.entries import SCALE_PARTS, Entry, Merge, Move, Plan
from ltx2.convert.tensors.codes import Dequantize, Keep

Layer = tuple[str, str]  # component, and path in its network


def kept_layers(plan: Plan) -> dict[Layer, Keep]:
    """The layers that stay as they were published."""
    moves = (entry for entry in plan.entries if isinstance(entry, Move))
    return {(move.component, move.layer): move.packing for move in moves if isinstance(move.packing, Keep)}


def decoded(plan: Plan, layers: Mapping[Layer, str]) -> Plan:
    """The plan with some of its kept layers decoded to a float type, as --dtype spells it."""
    weights = {
        (move.component, move.layer): replace(
            move, steps=(Dequantize(move.packing.codes, layers[move.component, move.layer]),), packing=None
        )
        for move in plan.entries
        if isinstance(move, Move) and isinstance(move.packing, Keep) and (move.component, move.layer) in layers
    }
    return replace(plan, entries=tuple(_decoded(entry, weights) for entry in plan.entries))


def _decoded(entry: Entry, weights: Mapping[Layer, Move]) -> Entry:
    weight = weights.get((entry.component, entry.layer)) if isinstance(entry, Move) else None
    if weight is None or not isinstance(entry, Move):
        return entry
    if entry.key == weight.key:
        return weight
    scale = entry.key.rpartition(".")[2] in SCALE_PARTS
    return Merge(entry.file, entry.tensor, weight) if scale else entry
