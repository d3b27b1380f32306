"""Bits for every layer of the transformer, so that it fits a Mac's memory and loses as little as possible.

The loss of a layer at some bits is the squared relative error of its output times its sensitivity: the squared relative
change of the velocity per squared error. Errors are measured on some of the layer's rows, sensitivities by `calibrate`;
without them every weight of the transformer counts the same."""

from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from time import monotonic

from ltx2.convert.output.pieces import in_order
from ltx2.convert.plan.entries import Plan, kept_layers
from ltx2.quant.choose.budget import Budget
from ltx2.quant.choose.fitted import Chosen, Fit
from ltx2.quant.choose.knapsack import Option, allocate
from ltx2.quant.choose.sample import Candidate, candidates
from ltx2.quant.codes.on_gpu import is_gpu
from ltx2.quant.measure.statistics import Statistics
from ltx2.quant.plan.step import Quantize
from ltx2.quant.recipes.recipe import Recipe
from ltx2.runtime.errors import DoesNotFitError
from ltx2.runtime.events import Event, PhaseStarted, StepDone
from ltx2.runtime.model.layout import TRANSFORMER
from ltx2.runtime.units import GB

CANDIDATES = (3, 4, 5, 6, 8)  # bits; a layer may also stay as it is
USUAL = 4
HALVED = 8  # bits of the smallest codes that are quantized further
PHASE = "choosing bits"
SAMPLE_BYTES = 16 << 20  # about what packing a layer's sample takes


@dataclass(frozen=True)
class Layer:
    """A layer and its sizes. `plain` are its bits and bytes before packing (of codes, if it was published so), `least`
    the bits that the recipe asks for."""

    layer: Candidate
    plain: tuple[int, int]
    least: int

    @property
    def path(self) -> str:
        return self.layer.path

    @property
    def memory(self) -> int:
        return SAMPLE_BYTES

    def sizes(self, lowered: int) -> dict[int, int]:
        """Bits -> bytes of the packed layer, with the floors lowered by so many sizes."""
        floor, (bits, _) = CANDIDATES[max(0, CANDIDATES.index(self.least) - lowered)], self.plain
        return {n: self._bytes(n) for n in CANDIDATES if floor <= n < bits and bits >= HALVED}

    def smallest(self, lowered: int, usual: int) -> int:
        """The fewest bytes of the layer at `usual` bits or more."""
        return min([self.plain[1], *(size for bits, size in self.sizes(lowered).items() if bits >= usual)])

    def _bytes(self, bits: int) -> int:
        parts = Quantize(self.layer.form(bits), self.path).specs(self.layer.weight.spec)
        return sum(spec.nbytes for spec in parts.values())


def fit_transformer(
    plan: Plan, recipe: Recipe, group_size: int, statistics: Statistics | None, budget: Budget
) -> Generator[Event, None, Fit]:
    """Returns the choice; the same for the same plan, statistics and budget. The recipe says which layers are packed,
    and at how many bits at least. If that does not fit beside 4 bits for all other layers, its floors are lowered,
    together and as little as possible: a floor for some layers is not worth 3 bits in most.

    Raises DoesNotFitError if not even 3 bits everywhere fit.
    """
    layers = list(_layers(plan, recipe, group_size, statistics))
    total = sum(spec.nbytes for move in plan.moves(TRANSFORMER) for spec in move.stored().values())
    fixed = total - sum(layer.plain[1] for layer in layers)
    lowered = _lowered(layers, fixed, budget)
    errors = yield from _errors(layers, lowered)
    counts, measured = _sensitivities(layers, statistics)
    options = {layer.path: list(_options(layer, lowered, errors[layer.path], counts[layer.path])) for layer in layers}
    found = allocate(options, budget.weights - fixed)
    assert found is not None, "the smallest options fit"
    chosen = tuple(
        Chosen(path, o.bits, o.bytes, o.bits in errors[path], errors[path].get(o.bits, 0.0), counts[path])
        for path, o in found.items()
    )
    used = fixed + sum(option.bytes for option in found.values())
    return Fit(budget, chosen, used, measured, lowered, fixed + sum(layer.smallest(0, USUAL) for layer in layers))


def _layers(plan: Plan, recipe: Recipe, group_size: int, statistics: Statistics | None) -> Iterator[Layer]:
    """The transformer's layers that the recipe names and that can be packed."""
    moves, kept = plan.moves(TRANSFORMER), kept_layers(plan)
    least = recipe.bits(TRANSFORMER, [move.layer for move in moves], CANDIDATES[0])
    now: Counter[str] = Counter()
    for move in moves:
        now[move.layer] += sum(spec.nbytes for key, spec in move.stored().items() if not key.endswith(".bias"))
    for path, layer in candidates(plan, TRANSFORMER, least, group_size, statistics).items():
        keep = kept.get((TRANSFORMER, path))
        bits = keep.form.bits if keep else 8 * layer.weight.spec.itemsize
        yield Layer(layer, (bits, now[path]), least[path])


def _lowered(layers: Sequence[Layer], fixed: int, budget: Budget) -> int:
    """The number of sizes by which floors must be lowered."""
    for usual, lowered in product((USUAL, CANDIDATES[0]), range(len(CANDIDATES))):
        needed = fixed + sum(layer.smallest(lowered, usual) for layer in layers)
        if needed <= budget.weights:
            return lowered
    what = f"the transformer cannot be made to fit a Mac of {budget.memory_gb} GB"
    why = f"with {CANDIDATES[0]} bits in every layer it has {needed / GB:.2f} GB, {budget.weights / GB:.2f} GB are left"
    raise DoesNotFitError(what, f"{why} for it beside {budget.clip}", "choose a larger --fit")


def _errors(layers: Sequence[Layer], lowered: int) -> Generator[Event, None, dict[str, dict[int, float]]]:
    """Returns for every layer the relative error of its output, by bits."""
    found = {}

    def work(layer: Layer) -> dict[int, float]:
        return layer.layer.errors(sizes) if (sizes := layer.sizes(lowered)) else {}

    yield PhaseStarted(PHASE)
    # MLX works in this thread: functions that it compiled in another thread abort the process when that ends.
    measured = map(work, layers) if is_gpu() else in_order(work, layers)
    before = monotonic()
    for number, (layer, errors) in enumerate(zip(layers, measured, strict=True), start=1):
        found[layer.path] = errors
        now = monotonic()
        yield StepDone(PHASE, number, len(layers), now - before)
        before = now
    return found


def _sensitivities(layers: Sequence[Layer], statistics: Statistics | None) -> tuple[dict[str, float], bool]:
    """Sensitivities by layer, and whether they were measured. A layer without one gets that of its size on average over
    the measured ones; without any, all weights together count as 1."""
    known = statistics.sensitivities if statistics else {}
    found = {la.path: known[TRANSFORMER, la.path] for la in layers if (TRANSFORMER, la.path) in known}
    sizes = {layer.path: prod(layer.layer.weight.spec.shape) for layer in layers}
    each = sum(found.values()) / sum(sizes[path] for path in found) if found else 1 / max(1, sum(sizes.values()))
    return {path: found.get(path, each * size) for path, size in sizes.items()}, bool(found)


def _options(layer: Layer, lowered: int, errors: Mapping[int, float], sensitivity: float) -> Iterator[Option]:
    for bits, size in layer.sizes(lowered).items():
        yield Option(bits, size, sensitivity * errors[bits] ** 2)
    yield Option(*layer.plain, 0.0)
