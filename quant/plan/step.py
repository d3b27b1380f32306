"""Quantization as the last step of a plan entry."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from threading import Lock

import numpy as np

from ltx2.convert.output.pieces import values_of
from ltx2.convert.plan.entries import Move, packed_layers
from ltx2.convert.tensors.steps import Packing, Parts, Spec, from_float32
from ltx2.quant.codes.correlations import Feedback
from ltx2.quant.codes.gptq import pack_in_turn
from ltx2.quant.codes.inputs import Inputs
from ltx2.quant.codes.methods import GPTQ, SEARCH
from ltx2.quant.codes.minifloat import output_multiplier
from ltx2.quant.codes.on_gpu import is_gpu
from ltx2.quant.codes.pack import GPU_BLOCK, Loss, Packed, begin_packing
from ltx2.quant.measure.replay import Replay
from ltx2.quant.measure.statistics import Statistics
from ltx2.runtime.errors import CheckpointError
from ltx2.runtime.files.tensors import Array, bf16_to_f32, to_float32
from ltx2.runtime.model.forms import Form

MULTIPLIER = "weight_scale"  # the last name part of an output multiplier
BIAS = "bias"  # of a layer's own bias, which is not one of a group's
# Bytes of a piece for GPTQ on a GPU: it goes through a layer's columns one by one, and a GPU, limited by launches,
# needs for all rows nearly the time of a few. A CPU takes as many rows as its caches hold.
WHOLE = 1 << 30
# At this width GPTQ takes as long as a search; its time grows with the width, on a CPU and (calculated) on a GPU.
GPTQ_WIDTH = 256
SHORT = 12  # digits of a hash that tell files apart


class Tally:
    """The rows of a tensor that were packed and their loss, counted by several threads."""

    def __init__(self) -> None:
        self.rows, self.loss = 0, Loss()
        self._lock = Lock()

    def add(self, rows: int, loss: Loss) -> None:
        """Count some more rows."""
        with self._lock:
            self.rows += rows
            self.loss += loss

    def covers(self, move: Move) -> bool:
        """Whether all of the tensor was counted: a continued run packs only the rest of one."""
        return self.rows == move.spec.shape[0]


class Multiplier(Mapping[str, Array]):
    """The output multiplier of a tensor as one of its parts; computed when it is first used, by a pass over the
    tensor."""

    def __init__(self, make: Callable[[], float]) -> None:
        self._make = make
        self._value: float | None = None
        self._lock = Lock()

    @property
    def value(self) -> float:
        """The multiplier, a power of two."""
        with self._lock:
            if self._value is None:
                self._value = self._make()
            return self._value

    def __getitem__(self, part: str) -> Array:
        if part != MULTIPLIER:
            raise KeyError(part)
        return np.array(self.value, np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter((MULTIPLIER,))

    def __len__(self) -> int:
        return 1


@dataclass(frozen=True)
class Known:
    """For packing a layer: statistics of its inputs, read when they are used, and the bias that makes up for the change
    of its mean output. With a `replay`, codes are chosen by GPTQ."""

    statistics: Statistics
    component: str
    layer: str
    bias: Move | None
    replay: Replay | None = None

    @property
    def width(self) -> int:
        """How many inputs the layer has."""
        return self.statistics.layers[self.component, self.layer]

    def inputs(self) -> Inputs:
        """The statistics. Raises InputError for invalid values."""
        found = self.statistics.inputs(self.component, self.layer, biased=self.bias is not None)
        assert found is not None, "this is made for layers that have statistics"
        return found

    def feedback(self, form: Form) -> Feedback | None:
        """For GPTQ, else None. Raises InputError for recorded calls of another model."""
        if self.replay is None:
            return None
        return self.replay.feedback(self.layer, form, biased=self.bias is not None)

    def corrected(self, drift: Array, start: int) -> Array:
        """The bias (rows,) from row `start` on plus `drift` (rows,), rounded to its own dtype."""
        assert self.bias is not None, "without a bias no drift is computed"
        values = to_float32(self._bias[start : start + len(drift)], self.bias.spec.dtype)
        return from_float32(values + drift, self.bias.spec.dtype)

    @cached_property
    def _bias(self) -> Array:
        assert self.bias is not None
        return np.concatenate(list(values_of(self.bias)))


@dataclass(frozen=True)
class Quantize(Packing):
    """Codes and scales in place of a weight. `name` is the source tensor's, for errors; `multiplier`: for modes that
    have one. With statistics of the layer's inputs, its bias is one of the parts."""

    to: Form
    name: str
    multiplier: Multiplier | None = field(default=None, compare=False)
    known: Known | None = field(default=None, compare=False)
    tally: Tally = field(default_factory=Tally, compare=False)

    def __str__(self) -> str:
        known = f",stats={self.known.statistics.record.sha256[:SHORT]}" if self.known else ""
        rotation = f",rotation={self.form.rotation}" if self.form.rotation else ""
        method = f",{self.method}" if self.method != SEARCH else ""
        return f"quantize({self.form.bits},{self.form.group_size},{self.form.mode}{rotation}{method}{known})"

    @property
    def method(self) -> str:
        """How codes are chosen."""
        return GPTQ if self.known and self.known.replay else SEARCH

    @property
    def form(self) -> Form:
        return self.to

    @property
    def main_thread(self) -> bool:
        return True  # functions that MLX compiled in another thread abort the process when that ends

    @property
    def effort(self) -> float:
        return self.known.width / GPTQ_WIDTH if self.known and self.method == GPTQ else 1.0

    @property
    def piece_bytes(self) -> int:
        if not is_gpu():
            return 0
        return WHOLE if self.method == GPTQ else GPU_BLOCK * 2  # of 16 bits

    def absorbed(self) -> Mapping[str, Spec]:
        return {BIAS: self.known.bias.spec} if self.known and self.known.bias else {}

    def constants(self) -> Mapping[str, Array]:
        return {} if self.multiplier is None else self.multiplier

    def specs(self, spec: Spec) -> Mapping[str, Spec]:
        """Codes are a stream of bits in uint32; affine scales and biases have the weight's dtype."""
        rows, width = spec.shape
        codes = Spec((rows, width * self.form.bits // 32), "U32")
        groups, biased = (rows, width // self.form.group_size), self.form.biased
        parts = {"weight": codes, "scales": Spec(groups, spec.dtype if biased else "U8")}
        if biased:
            parts["biases"] = parts["scales"]
        parts |= self.absorbed()
        return parts if self.multiplier is None else parts | {MULTIPLIER: Spec((), "F32")}

    def rows(self, rows: Array, spec: Spec, start: int) -> Mapping[str, Array]:
        """The parts of rows (rows, width), by name. Raises as `begin`."""
        return self.begin(rows, spec, start)()

    def begin(self, rows: Array, spec: Spec, start: int) -> Parts:
        """Begin to pack rows (rows, width). Raises CheckpointError, now or when the parts are asked for, if a value is
        not finite or cannot be represented."""
        multiplier = 1.0 if self.multiplier is None else self.multiplier.value
        with self._named_errors():
            if self.known and (feedback := self.known.feedback(self.form)):
                found = pack_in_turn(rows, self.form, feedback, multiplier)
                return lambda: self._counted(*found, start)
            begun = begin_packing(rows, self.form, self.known.inputs() if self.known else None, multiplier)

        def finish() -> Mapping[str, Array]:
            with self._named_errors():
                return self._counted(*begun(), start)

        return finish

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            what, fix = f"{self.name} cannot be quantized", "use the checkpoint as published"
            raise CheckpointError(what, str(error), fix) from error

    def _counted(self, packed: Packed, loss: Loss, start: int) -> Mapping[str, Array]:
        """The parts (rows, ...) from row `start` on, after counting their loss."""
        self.tally.add(len(packed.codes), loss)
        parts = {"weight": packed.codes, "scales": packed.scales}
        if packed.biases is not None:
            parts["biases"] = packed.biases
        if self.known and packed.drift is not None:
            parts[BIAS] = self.known.corrected(packed.drift, start)
        return parts


def quantized(move: Move, form: Form, known: Known | None = None, multiplier: float | None = None) -> Move:
    """The move with its weight quantized; `multiplier`: of a tensor that was packed before."""
    made = None
    if form.multiplied:
        made = Multiplier(lambda: output_multiplier(_largest(move)) if multiplier is None else multiplier)
    return replace(move, packing=Quantize(form, move.tensor.name, made, known))


def _largest(move: Move) -> float:
    """The largest absolute value of the tensor before packing."""
    return max(_largest_of(rows) for rows in values_of(move))


def _largest_of(rows: Array) -> float:
    """Of rows (rows, width) as stored."""
    if rows.dtype == np.uint16:  # bfloat16: codes without sign are in the order of their values
        return float(bf16_to_f32((rows & np.uint16(0x7FFF)).max(initial=0, keepdims=True).reshape(1))[0])
    return float(np.abs(rows).max(initial=0))


def packings(moves: Iterable[Move]) -> dict[str, tuple[Move, Quantize]]:
    """The quantized layers among a component's tensors, in natural order."""
    layers = packed_layers(moves)
    return {layer: (m, m.packing) for layer, m in layers.items() if isinstance(m.packing, Quantize)}
