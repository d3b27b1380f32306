"""The report of quantizing: form, size and error of every layer, and the sizes before and after."""

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np

from ltx2.convert.card import Quality
from ltx2.convert.output.pieces import values_of
from ltx2.convert.plan.entries import Move, Plan, packed_key, packed_layers, parameters
from ltx2.convert.tensors.keep import Keep
from ltx2.quant.choose.fitted import Fit
from ltx2.quant.codes.gptq import mean_change, output_loss, stored_values
from ltx2.quant.codes.pack import Loss, Packed, unpack
from ltx2.quant.plan.step import Quantize, packings
from ltx2.runtime.events import BytesDone, Event
from ltx2.runtime.files.tensors import Array, FileRecord, TensorFile
from ltx2.runtime.model.layout import ModelFolder

FEW_VALUES = 1 << 20  # read back at a time
DIGITS = 4  # significant digits of an error: the same for every order of summing it up


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer, or one that keeps its published codes and loses nothing. `bytes` counts codes, scales and
    biases. `relative_error` is that of the "weights", ||W' - W|| / ||W||, or, with statistics of the layer's inputs x,
    of its "output": the expected ||W'x - Wx|| / ||Wx||, its mean kept by the bias, for channels that do not correlate.
    With the `method` "gptq" they may correlate; `method` is None for published codes. `rotation` is the size of the
    blocks in which inputs are rotated, or 0."""

    component: str
    layer: str
    bits: int
    group_size: int
    mode: str
    bytes: int
    relative_error: float
    error_of: str
    method: str | None
    rotation: int


@dataclass(frozen=True)
class Total:
    """Tensor bytes of one component, or of all; `bits_per_weight` counts every tensor, quantized or not."""

    bytes_before: int
    bytes_after: int
    weights: int

    def __add__(self, other: "Total") -> "Total":
        return Total(
            self.bytes_before + other.bytes_before,
            self.bytes_after + other.bytes_after,
            self.weights + other.weights,
        )

    @property
    def bits_per_weight(self) -> float:
        """Average size of a weight after quantizing."""
        return round(8 * self.bytes_after / self.weights, 3) if self.weights else 0.0


@dataclass(frozen=True)
class Report:
    """`unfit` are the layers of the recipe that are not packed, because their width is no multiple of the group size;
    `statistics` is the file that layers were packed with, `fit` the choice of bits for a Mac's memory."""

    layers: tuple[LayerReport, ...]
    totals: Mapping[str, Total]
    unfit: tuple[str, ...] = ()
    statistics: FileRecord | None = None
    fit: Fit | None = None

    @property
    def total(self) -> Total:
        """The whole model folder."""
        return sum(self.totals.values(), Total(0, 0, 0))

    def quality(self) -> dict[str, Quality]:
        """For the model card: every component with quantized layers."""
        found: dict[str, list[LayerReport]] = {}
        for layer in self.layers:
            if layer.method is not None:  # else it stays as it was published
                found.setdefault(layer.component, []).append(layer)
        return {name: _quality(layers, self.totals[name].bits_per_weight) for name, layers in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """As `ltx2 quantize --report` writes it."""
        totals = {**self.totals, "all": self.total}
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "unfit": list(self.unfit),
            "statistics": asdict(self.statistics) if self.statistics else None,
            "totals": {n: asdict(t) | {"bits_per_weight": t.bits_per_weight} for n, t in totals.items()},
            "fit": self.fit.to_dict() if self.fit else None,
        }


def _quality(layers: list[LayerReport], bits: float) -> Quality:
    errors = sorted(layer.relative_error for layer in layers)
    return Quality(bits, len(errors), errors[len(errors) // 2], errors[-1], layers[0].error_of)


@dataclass(frozen=True)
class Quantized(Event):
    """The model is quantized; comes right before Written."""

    report: Report


def make_report(plan: Plan, folder: ModelFolder, unfit: Iterable[str] = ()) -> Generator[Event, None, Report]:
    """Returns the report on a quantized plan that was written to `folder`.

    Errors were counted while packing. Layers that an earlier, interrupted run wrote or began are read back and
    compared, with progress events."""
    layers: list[LayerReport] = []
    for name in plan.components:
        packed = packings(plan.moves(name))
        unknown = {layer: move for layer, (move, packing) in packed.items() if not packing.tally.covers(move)}
        losses = yield from _read_back(unknown, folder.tensor_files(name))
        losses |= {layer: packing.tally.loss for layer, (_, packing) in packed.items() if layer not in losses}
        layers += _layer_reports(name, plan.moves(name), losses)
    totals = {name: _total(plan.moves(name)) for name in plan.components}
    records = (component.statistics for component in plan.components.values())
    return Report(tuple(layers), totals, tuple(unfit), next(filter(None, records), None))


def _layer_reports(component: str, moves: list[Move], losses: Mapping[str, Loss]) -> Iterator[LayerReport]:
    sizes: Counter[str] = Counter()
    for move in moves:
        stored = move.stored().items()
        sizes[move.layer] += sum(spec.nbytes for key, spec in stored if not key.endswith(".bias"))
    for layer, move in packed_layers(moves).items():
        assert move.packing is not None
        form, error = move.packing.form, float(f"{losses.get(layer, Loss()).relative:.{DIGITS}g}")
        quantize = move.packing if isinstance(move.packing, Quantize) else None
        of, method = "output" if quantize and quantize.known else "weights", quantize.method if quantize else None
        sizes_of = (form.bits, form.group_size, form.mode)
        yield LayerReport(component, layer, *sizes_of, sizes[layer], error, of, method, form.rotation)


def _read_back(moves: Mapping[str, Move], files: Iterable[TensorFile]) -> Generator[Event, None, dict[str, Loss]]:
    where = {key: file for file in files for key in file.tensors}
    total = sum(move.spec.nbytes for move in moves.values())
    losses, done = {}, 0
    for layer, move in moves.items():
        losses[layer] = measured_loss(move, where)
        done += move.spec.nbytes
        yield BytesDone("report (reading back)", done, total)
    return losses


def _total(moves: list[Move]) -> Total:
    total = Total(0, 0, 0)
    for move in moves:
        after = sum(spec.nbytes for spec in move.stored().values())
        absorbed = sum(spec.nbytes for spec in move.packing.absorbed().values()) if move.packing else 0
        kept = isinstance(move.packing, Keep)
        total += Total(after if kept else move.spec.nbytes + absorbed, after, 0)
    return total + Total(0, 0, sum(prod(spec.shape) for spec in parameters(moves).values()))


def measured_loss(move: Move, files: Mapping[str, TensorFile]) -> Loss:
    """Compare a written layer with its source. `files`: name of a tensor -> its file, for the whole component."""
    assert isinstance(move.packing, Quantize)
    form, multiplier, known = move.packing.form, move.packing.multiplier, move.packing.known
    columns = known.inputs().columns(move.spec.shape[1]) if known else None
    errors, norms = (columns.errors, columns.values) if columns else (1.0, 1.0)
    feedback = known.feedback(form) if known else None
    keys = [packed_key(move.key, part) for part in ("weight", "scales", "biases")]
    keys = [key for key in keys if key in files]
    loss, start = Loss(), 0
    for rows in _few_rows(move):
        packed = Packed(*(files[key].rows(key, start, start + len(rows)) for key in keys))
        values = stored_values(rows, form)
        change = unpack(packed, form, multiplier.value if multiplier else 1.0) - values
        if feedback is not None:
            loss += output_loss(values, change, mean_change(change, feedback), feedback)
        else:
            loss += Loss(_squares(change, errors), _squares(values, norms))
        start += len(rows)
    return loss


def _few_rows(move: Move) -> Iterator[Array]:
    """The tensor before packing, in pieces (rows, width) of at most FEW_VALUES values."""
    step = max(1, FEW_VALUES // move.spec.shape[1])
    for chunk in values_of(move):
        for start in range(0, len(chunk), step):
            yield chunk[start : start + step]


def _squares(values: Array, counts: Array | float) -> float:
    """The sum of squares of values (rows, width), each times its column's count (width,)."""
    return float((np.square(values, dtype=np.float64) * counts).sum())
