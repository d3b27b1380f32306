"""Quantizing changes the plan: the same tensors, written by the same code, some of them packed. So `convert --bits`
gives the bytes of convert and quantize in turn, in the same bounded memory."""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ltx2.convert.card import write_card
from ltx2.convert.plan.entries import Layer, Plan, decoded, kept_layers, packed_layers
from ltx2.convert.plan.folder import folder_plan
from ltx2.convert.write import WriteOptions, write_plan
from ltx2.quant.choose.budget import mac_budget
from ltx2.quant.choose.fit import HALVED, fit_transformer
from ltx2.quant.choose.fitted import Fit, Fitted
from ltx2.quant.choose.sample import known_errors
from ltx2.quant.codes.methods import GPTQ, GPTQ_HADAMARD, METHODS, SEARCH
from ltx2.quant.measure.replay import Replay
from ltx2.quant.measure.statistics import Statistics
from ltx2.quant.plan.replan import Forms, Given, packed_plan
from ltx2.quant.plan.step import packings
from ltx2.quant.recipes.recipe import GENERAL, Recipe, choose_recipe
from ltx2.quant.report import Quantized, make_report
from ltx2.runtime.errors import InputError, UnsupportedError, UsageError
from ltx2.runtime.events import Event, Warned, Written
from ltx2.runtime.model.forms import AFFINE, MODES, Form
from ltx2.runtime.model.layout import TRANSFORMER, ModelFolder

AFFINE_GROUP = 64  # group size of layers that become affine because the mode lacks their bits
EMBEDDING = "embed_tokens"  # MLX's embeddings have no output multiplier
DEFAULT_BITS = 4
ROTATION = 64  # inputs of a block; wider ones gain a few percent on synthetic layers, nothing on the demo model
UNROTATED = 8  # at so many bits, rotating gains too little for its time
BESIDE = 8  # bits of the layers outside a fitted transformer, unless the recipe has its own


@dataclass(frozen=True)
class Settings:
    """The user's choices: `bits` of the layers that the recipe does not raise (None: the recipe's own, else the
    mode's); `group_size`, values per scale (None: 64, else the mode's); `recipe`, a name or a file (None: the preset
    for the bits); `only` these components (none: all that the recipe names); `mode`, the kind of codes; `stats`, a file
    of statistics of the layers' inputs; `fit`, in place of `bits`, the memory in GB of the Mac to choose the
    transformer's bits for; `method`, how codes of the transformer's blocks are chosen."""

    bits: int | None = None
    group_size: int | None = None
    recipe: str | None = None
    only: tuple[str, ...] = ()
    mode: str = AFFINE
    stats: Path | None = None
    fit: int | None = None
    method: str = SEARCH

    @cached_property
    def statistics(self) -> Statistics | None:
        """The opened file. Raises InputError or CheckpointError for another file."""
        return None if self.stats is None else Statistics.open(self.stats)

    @cached_property
    def rules(self) -> Recipe:
        """The recipe. Raises InputError if it is missing or malformed."""
        return choose_recipe(GENERAL if self.fit and not self.recipe else self.recipe, self.bits or self._usual_bits)

    @property
    def form(self) -> Form:
        """The form of layers that the recipe does not raise. Raises as `check`."""
        self.check()
        sizes = MODES[self.mode].group_sizes
        group_size = AFFINE_GROUP if AFFINE_GROUP in sizes else sizes[0]
        usual = BESIDE if self.fit else self._usual_bits
        bits = self.bits or self.rules.own_bits or usual
        return Form(bits, self.group_size or group_size, self.mode)

    def check(self) -> None:
        """Raises UsageError for a form that MLX lacks, InputError for settings that do not go together."""
        if self.mode not in MODES:
            raise _not_possible("--mode", self.mode, MODES)
        mode = MODES[self.mode]
        given = (("--bits", self.bits, mode.bits), ("--group-size", self.group_size, mode.group_sizes))
        for option, value, values in given:
            if value is not None and value not in values:
                raise _not_possible(option, value, values, "" if self.mode == AFFINE else f" with --mode {self.mode}")
        own = self.bits or self.rules.own_bits
        if own is not None and own not in mode.bits:
            why = f"{self.mode} has {' or '.join(map(str, mode.bits))}"
            fix = f"choose another recipe, or add --bits {mode.bits[0]}"
            raise InputError(f"the recipe {self.rules.name} has {own} bits", why, fix)
        if self.fit is not None:
            self._check_fit()
        if self.method not in METHODS:
            raise _not_possible("--method", self.method, METHODS)
        if self.method == GPTQ_HADAMARD and self.mode != AFFINE:
            why = "its scales are made for weights as they are"
            raise InputError(f"--mode {self.mode} does not go with {GPTQ_HADAMARD}", why, f"use --method {GPTQ}")

    def _check_fit(self) -> None:
        if self.bits is not None or self.mode != AFFINE:
            option = "--bits" if self.bits is not None else "--mode"
            why = "every layer's bits are chosen, among the sizes of affine codes"
            raise InputError(f"{option} does not go with --fit", why, f"leave out {option}, or --fit")
        if self.only and TRANSFORMER not in self.only:
            raise InputError("--fit chooses the transformer's bits", "--only leaves that out", "leave out one of them")

    @property
    def _usual_bits(self) -> int:
        return DEFAULT_BITS if DEFAULT_BITS in MODES[self.mode].bits else MODES[self.mode].bits[0]

    def form_of(self, layer: str, bits: int) -> Form:
        """The form of a layer with these bits by the recipe."""
        chosen = self.form
        if bits in MODES[chosen.mode].bits and not (chosen.multiplied and layer.endswith(EMBEDDING)):
            return Form(bits, chosen.group_size, chosen.mode)
        return Form(bits, AFFINE_GROUP, AFFINE)


def quantize(
    model: Path, out: Path, settings: Settings | None = None, options: WriteOptions | None = None
) -> Iterator[Event]:
    """Write a quantized copy of the model folder `model` to `out`; see `write_quantized`.

    Raises ModelFolderError when `model` is not a model folder, InputError when it is quantized already.
    """
    (settings or Settings()).check()
    yield from write_quantized(folder_plan(ModelFolder.open(model)), out, settings, options)


def write_quantized(
    plan: Plan, out: Path, settings: Settings | None = None, options: WriteOptions | None = None
) -> Iterator[Event]:
    """Write `plan` quantized. The last two events are Quantized, with the report, and Written.

    Raises what `quantize_plan` and `write_plan` raise.
    """
    settings = settings or Settings()
    fit = yield from fitted(plan, settings)
    forms = recipe_forms(plan, settings, fit)
    quantized = _quantized(plan, settings, forms)
    unfit = _unfit(quantized, forms)
    yield from _warnings(plan, quantized, settings)
    if unfit:
        width = f"their width is no multiple of {settings.form.group_size}"
        yield Warned(f"{len(unfit)} layers are not quantized, {width}; the first is {unfit[0]}")
    for event in write_plan(quantized, out, options):
        if isinstance(event, Written):
            folder = ModelFolder.open(out)
            report = yield from make_report(quantized, folder, unfit)
            write_card(folder, report.quality())
            yield Quantized(replace(report, fit=fit))
        yield event


def quantize_plan(plan: Plan, settings: Settings, fit: Fit | None = None) -> Plan:
    """The plan with every layer packed that the recipe names and whose width is a multiple of the group size. A layer
    published as codes stays as it is unless the recipe asks for fewer bits. `fit`: what `fitted` returned, for settings
    with --fit.

    Raises InputError for impossible settings, settings that do not fit the plan, and a quantized model;
    UnsupportedError for published codes that cannot become smaller.
    """
    assert (fit is None) == (settings.fit is None), "fitting takes time: `fitted` reports its progress"
    _check(plan, settings)
    return _quantized(plan, settings, recipe_forms(plan, settings, fit))


def fitted(plan: Plan, settings: Settings) -> Generator[Event, None, Fit | None]:
    """Returns the choice of --fit, None without it. The last event, if any, is Fitted.

    Raises as `quantize_plan`, and DoesNotFitError for a Mac that is too small.
    """
    _check(plan, settings)
    if settings.fit is None:
        return None
    budget, size = mac_budget(plan, settings.fit), settings.form.group_size
    fit = yield from fit_transformer(plan, settings.rules, size, settings.statistics, budget)
    yield Fitted(fit)
    return fit


def _quantized(plan: Plan, settings: Settings, forms: Forms) -> Plan:
    statistics = settings.statistics
    replay = _replay(plan, settings) if settings.method != SEARCH else None
    given = Given(dict.fromkeys(plan.components, statistics) if statistics else {}, replay=replay)
    quantized = packed_plan(decoded(plan, dict.fromkeys(_shrinking(plan, forms), "bf16")), forms, given)
    _check_effect(quantized, settings)
    return quantized


def _replay(plan: Plan, settings: Settings) -> Replay:
    """The recorded calls that GPTQ learns from. Raises InputError without any, and if no layer uses GPTQ."""
    option = f"--method {settings.method}"
    if settings.statistics is None or not settings.statistics.calls:
        what = "it has not recorded" if settings.statistics else "nothing says"
        why, fix = f"{what} what the denoiser is given", "add --stats FILE, a file of ltx2 calibrate --gptq"
        raise InputError(f"{option} is not possible", why, fix)
    if TRANSFORMER not in (settings.only or plan.components) or TRANSFORMER not in plan.components:
        why = "it is for the transformer's blocks, which are left out"
        raise InputError(f"{option} has no effect", why, f"leave out {option}")
    return Replay(plan, settings.statistics.calls)


def _warnings(plan: Plan, quantized: Plan, settings: Settings) -> Iterator[Event]:
    """Warnings about the statistics."""
    if settings.statistics is None:
        return
    for message in settings.statistics.strangers(plan):
        yield Warned(message)
    layers = {f"{n}.{layer}": p for n in plan.components for layer, (_, p) in packings(quantized.moves(n)).items()}
    without = [name for name, packing in layers.items() if packing.known is None and not name.endswith(EMBEDDING)]
    if without:
        yield Warned(f"{len(without)} layers have no statistics and are packed without; the first is {without[0]}")


def recipe_forms(plan: Plan, settings: Settings, fit: Fit | None = None) -> Forms:
    """The forms that the recipe or the `fit` gives layers of the chosen components, even if their width forbids
    them."""
    form, forms = settings.form, {}
    for name in [name for name in plan.components if name in settings.only or not settings.only]:
        error = known_errors(plan, name, AFFINE_GROUP, settings.statistics)
        bits = settings.rules.bits(name, [move.layer for move in plan.moves(name)], form.bits, error)
        forms[name] = {layer: settings.form_of(layer, n) for layer, n in bits.items()}
    forms |= {TRANSFORMER: fit.forms(form.group_size)} if fit else {}
    return _rotated(forms) if settings.method == GPTQ_HADAMARD else forms


def _rotated(forms: Forms) -> Forms:
    """With rotation for the layers that gain by it."""
    return {
        name: {
            layer: replace(form, rotation=ROTATION) if form.bits < UNROTATED and Replay.covers(name, layer) else form
            for layer, form in layers.items()
        }
        for name, layers in forms.items()
    }


def _shrinking(plan: Plan, forms: Forms) -> Iterator[Layer]:
    """Layers kept as published that get fewer bits. Raises UnsupportedError for those of 4 bits."""
    for (component, layer), keep in kept_layers(plan).items():
        form = forms.get(component, {}).get(layer)
        if form is None or form.bits >= keep.form.bits or keep.codes.width % form.group_size:
            continue  # a width that cannot be packed: decoded, the layer would only grow
        if keep.form.bits < HALVED:
            raise UnsupportedError(
                f"{component}.{layer} is not quantized to {form.bits} bits",
                f"it is {keep.form.mode} already, and a second loss would leave little of it",
                "use 4 bits or more, which leave it as it is, or quantize the bf16 model",
            )
        yield component, layer


def _unfit(quantized: Plan, forms: Forms) -> list[str]:
    """Layers that have a form and are not packed."""
    packed = {name: packed_layers(quantized.moves(name)) for name in forms}
    return [f"{name}.{layer}" for name in forms for layer in forms[name] if layer not in packed[name]]


def _check(plan: Plan, settings: Settings) -> None:
    settings.check()
    if settings.statistics is not None:
        settings.statistics.check(plan)
    for name in settings.only:
        if name not in plan.components:
            raise InputError(f"there is no {name}", f"the model holds {', '.join(plan.components)}", "check --only")
    for name in plan.components:
        moves = plan.moves(name)
        published = packed_layers(moves)
        if any(move.key.endswith(".scales") and move.layer not in published for move in moves):
            raise InputError(
                f"the model is quantized already ({name})",
                "quantizing twice loses more than once, and what is lost cannot be regained",
                "quantize the model folder it was made from",
            )


def _not_possible(option: str, value: object, values: Iterable[object], beside: str = "") -> UsageError:
    allowed = [str(v) for v in values]
    why = f"it is {'one of ' if len(allowed) > 1 else ''}{', '.join(allowed)}"
    return UsageError(f"{option} {value} is not possible{beside}", why, f"use {option} {'|'.join(allowed)}")


def _check_effect(plan: Plan, settings: Settings) -> None:
    quantized = [name for name in plan.components if packings(plan.moves(name))]
    idle = [name for name in settings.only if name not in quantized]
    if idle or not quantized:
        size = settings.form.group_size
        why = f"recipe {settings.rules.name} names none of its layers, or no width is a multiple of {size}"
        if settings.fit:
            why = f"a Mac of {settings.fit} GB has room for it as it is"
        raise InputError(
            f"there is nothing to quantize in {', '.join(idle or plan.components)}",
            why,
            "choose other components, another recipe or a smaller --group-size, or leave the model as it is",
        )
