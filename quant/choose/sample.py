"""The error of packing a layer, measured on some of its rows: enough to choose bits by, in a fraction of the time."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ltx2.convert.output.pieces import rows_at
from ltx2.convert.plan.entries import Move, Plan, decoded, kept_layers
from ltx2.quant.codes.pack import pack
from ltx2.quant.measure.statistics import Statistics
from ltx2.quant.plan.replan import Given, packed_plan
from ltx2.quant.plan.step import Known, packings
from ltx2.quant.recipes.recipe import BITS, Error, unknown
from ltx2.runtime.errors import CheckpointError
from ltx2.runtime.files.tensors import Array
from ltx2.runtime.model.forms import AFFINE, Form

ROWS, RUNS = 64, 8  # of a tensor, in runs of neighbours: a run is read at once, and rows of one head are alike
DIGITS = 4  # significant digits of an error: the same on every machine, so that all choose the same


@dataclass(frozen=True)
class Candidate:
    """A layer that can be packed: its weight before packing, and the statistics of its inputs."""

    path: str
    weight: Move
    known: Known | None
    group_size: int

    def form(self, bits: int) -> Form:
        return Form(bits, self.group_size, AFFINE)

    def errors(self, bits: Iterable[int]) -> dict[int, float]:
        """Bits -> relative error of the layer's output; without statistics that of the weights. Raises CheckpointError
        if a value is not finite."""
        rows, inputs = _sample(self.weight), self.known.inputs() if self.known else None
        try:
            found = {n: pack(rows, self.form(n), inputs)[1].relative for n in bits}
        except ValueError as error:
            what, fix = f"{self.weight.tensor.name} cannot be quantized", "use the checkpoint as published"
            raise CheckpointError(what, str(error), fix) from error
        return {n: float(f"{value:.{DIGITS}g}") for n, value in found.items()}


def candidates(
    plan: Plan, component: str, paths: Iterable[str], group_size: int, statistics: Statistics | None
) -> dict[str, Candidate]:
    """The layers of a component that can be packed, in natural order; published codes are decoded."""
    kept = {layer: "bf16" for layer in kept_layers(plan) if layer[0] == component}
    form = Form(max(BITS), group_size, AFFINE)
    given = Given({component: statistics} if statistics else {})
    packed = packed_plan(decoded(plan, kept), {component: dict.fromkeys(paths, form)}, given)
    layers = packings(packed.moves(component)).items()
    return {path: Candidate(path, weight, packing.known, group_size) for path, (weight, packing) in layers}


def known_errors(plan: Plan, component: str, group_size: int, statistics: Statistics | None) -> Error:
    """The errors of the layers that have statistics."""
    if statistics is None:
        return unknown
    paths = [path for name, path in statistics.layers if name == component]
    layers = candidates(plan, component, paths, group_size, statistics)

    def error(layer: str, bits: int) -> float | None:
        return layers[layer].errors([bits])[bits] if layer in layers else None

    return error


def _sample(weight: Move) -> Array:
    """Up to ROWS rows (rows, width), spread over a weight."""
    rows = weight.spec.shape[0]
    if rows <= ROWS:
        return rows_at(weight, 0, rows)
    length = ROWS // RUNS
    starts = (run * (rows - length) // (RUNS - 1) for run in range(RUNS))
    return np.concatenate([rows_at(weight, start, length) for start in starts])
