"""LoRAs added to the weights of a plan's transformer, before anything is packed: the model is as fast as without them.
Generating with the same LoRAs unfused gives the same clip, to the rounding of the weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

from ltx2.convert.plan.entries import Entry, Move, Plan, decoded, kept_layers, parameters
from ltx2.convert.tensors.keep import Dequantize
from ltx2.convert.tensors.steps import SPELLINGS, Cast, Spec, Step, from_float32
from ltx2.runtime.errors import InputError
from ltx2.runtime.files.tensors import FLOATS, Array, TensorFile, to_float32
from ltx2.runtime.model.layout import TRANSFORMER, Fused
from ltx2.runtime.model.loras import Change, Lora, LoraUse


@dataclass(frozen=True)
class Fuse(Step):
    """Add changes, each with its strength, in float32, and round once to `dtype` (as in --dtype)."""

    changes: tuple[tuple[float, Change], ...]
    bias: bool
    dtype: str

    def __str__(self) -> str:
        files = (next(iter(change.parts.values()))[0].path.name for _, change in self.changes)
        named = (f"{name}:{strength:g}" for name, (strength, _) in zip(files, self.changes, strict=True))
        return f"fuse({','.join(named)})"

    @property
    def names(self) -> tuple[str, ...]:
        return str(self), f"cast({self.dtype})"

    def spec(self, spec: Spec) -> Spec:
        return Spec(spec.shape, FLOATS[self.dtype])

    def rows(self, rows: Array, spec: Spec, start: int) -> Array:
        """Rows (n, inputs) of the weight, or a part (n,) of the bias, changed; the same shape."""
        total, stop = to_float32(rows, spec.dtype).copy(), start + len(rows)
        for strength, change in self.changes:
            total += strength * (change.bias()[start:stop] if self.bias else change.rows(start, stop))
        return from_float32(total, FLOATS[self.dtype])


def fuse(plan: Plan, uses: Sequence[LoraUse], dtype: str | None) -> Plan:
    """The plan with LoRAs fused into its transformer, each with its first strength; layers that stayed codes become
    `dtype`, or bf16.

    Raises InputError where there is no transformer, and for a LoRA that does not fit it.
    """
    if not uses:
        return plan
    if TRANSFORMER not in plan.components:
        have = ", ".join(plan.components) or "nothing"
        raise InputError("there is nothing to fuse a LoRA into", f"the sources hold {have}", "add the transformer")
    wanted = {key: spec.shape for key, spec in parameters(plan.moves(TRANSFORMER)).items()}
    changes: dict[str, list[tuple[float, Change]]] = {}
    files: dict[Path, TensorFile] = {}
    for use in uses:
        if not isfinite(use.strength(1)):
            raise InputError(f"{use.path.name} cannot be fused", f"its strength is {use.strength(1)}", "give a number")
        lora = Lora.open(use.path)
        lora.check(wanted, plan.release)
        for path, change in lora.applied().items():
            changes.setdefault(path, []).append((use.strength(1), change))
            files |= {file.path: file for file, _ in change.parts.values()}
    codes = {layer: "f32" for layer in kept_layers(plan) if layer[0] == TRANSFORMER and layer[1] in changes}
    plan = decoded(plan, codes)
    entries = tuple(_fused(entry, changes, dtype) for entry in plan.entries)
    fused = tuple(Fused(use.path.name, use.strength(1)) for use in uses)
    components = dict(plan.components) | {TRANSFORMER: replace(plan.components[TRANSFORMER], fused=fused)}
    return replace(plan, entries=entries, components=components, sources=(*plan.sources, *files.values()))


def _fused(entry: Entry, changes: Mapping[str, list[tuple[float, Change]]], dtype: str | None) -> Entry:
    if not isinstance(entry, Move) or entry.component != TRANSFORMER:
        return entry
    part = entry.key.rpartition(".")[2]
    found = [(s, c) for s, c in changes.get(entry.layer, ()) if part in c.parameters()]
    if not found:
        return entry
    casts = [step.dtype for step in entry.steps if isinstance(step, Cast)]
    stored = casts[-1] if casts else SPELLINGS.get(entry.tensor.dtype, "bf16")
    steps = [
        replace(step, dtype="f32") if isinstance(step, Dequantize) else step
        for step in entry.steps
        if not isinstance(step, Cast)
    ]
    return replace(entry, steps=(*steps, Fuse(tuple(found), part == "bias", dtype or stored)))
