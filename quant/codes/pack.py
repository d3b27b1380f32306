"""Packing weights into MLX's quantized storage, on the GPU if MLX has one; the files run on MLX's own kernels.

Rows are packed in blocks, so memory does not depend on the tensor's size, and every group by itself, so chunks of rows
give the bytes of the whole. With statistics of a layer's inputs, errors count as they do in the layer's output."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from math import sqrt
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ltx2.quant.codes.affine import AffineSearch
from ltx2.quant.codes.arithmetic import Arithmetic, Values
from ltx2.quant.codes.inputs import Columns, Inputs
from ltx2.quant.codes.minifloat import MinifloatSearch
from ltx2.quant.codes.on_cpu import OnCpu
from ltx2.quant.codes.on_gpu import OnGpu, is_gpu
from ltx2.quant.codes.search import Search
from ltx2.runtime.files.tensors import FLOATS, NUMPY_DTYPES, Array, to_float32
from ltx2.runtime.model.forms import Form

# Values of a block: enough that a CPU's threads do not wait for the interpreter, and that a GPU is busy.
CPU_BLOCK, GPU_BLOCK = 1 << 19, 1 << 23
MAX_THREADS = 8


class Packed(NamedTuple):
    """Quantized rows: `codes` uint32 (rows, width * bits / 32); `scales` and, in affine mode, `biases`
    (rows, width / group size) in the tensor's own dtype (BF16 as uint16), or E8M0 or E4M3 scales as uint8. `drift`, if
    the inputs' mean is known, is (W - W') E[x], float32 (rows,): the layer's own bias must make up for it."""

    codes: Array
    scales: Array
    biases: Array | None = None
    drift: Array | None = None


@dataclass(frozen=True)
class Loss:
    """Summed squares of the errors and of the values, weighted as in the layer's output if its inputs are known. The
    losses of parts add up."""

    error: float = 0.0
    norm: float = 0.0

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(self.error + other.error, self.norm + other.norm)

    @property
    def relative(self) -> float:
        """||W' - W|| / ||W||: the relative error of W's output, for inputs whose channels do not correlate and, without
        statistics, have one size."""
        return sqrt(self.error / self.norm) if self.norm else 0.0


Begun = Callable[[], tuple[Packed, Loss]]  # waits for what was begun


def pack(rows: Array, form: Form, inputs: Inputs | None = None, multiplier: float = 1.0) -> tuple[Packed, Loss]:
    """Quantize rows (rows, width) of BF16 (as uint16 codes), float16 or float32.

    `width` is a multiple of the group size. `multiplier`, a power of two that multiplies the layer's output, is for
    nvfp4: `output_multiplier` of the whole tensor's largest value. Raises ValueError when a value is NaN, infinite, or
    too large for a scale.
    """
    return begin_packing(rows, form, inputs, multiplier)()


def begin_packing(rows: Array, form: Form, inputs: Inputs | None = None, multiplier: float = 1.0) -> Begun:
    """Begin what `pack` does, of rows (rows, width). Until the result is asked for, a GPU works on the first block,
    threads work on all."""
    check_form(rows.shape[1], form, multiplier)
    columns = None if inputs is None else inputs.columns(rows.shape[1])
    gpu = is_gpu()
    begin = partial(_begin_block, form=form, columns=columns, multiplier=multiplier, on=OnGpu() if gpu else OnCpu())
    blocks = _blocks(rows, GPU_BLOCK if gpu else CPU_BLOCK)
    begun: Iterable[Begun] = _one_ahead(begin, blocks) if gpu else _in_threads(begin, blocks)
    return lambda: _joined([finish() for finish in begun])


def _joined(blocks: Sequence[tuple[Packed, Loss]]) -> tuple[Packed, Loss]:
    if len(blocks) == 1:
        return blocks[0]
    parts = zip(*(packed for packed, _ in blocks), strict=True)
    codes, scales, *others = (None if part[0] is None else np.concatenate(part) for part in parts)
    assert codes is not None and scales is not None, "a block has both"
    packed = Packed(codes, scales, *others)
    return packed, sum((loss for _, loss in blocks), Loss())


def unpack(packed: Packed, form: Form, multiplier: float = 1.0) -> Array:
    """The float32 values (rows, width) that the codes stand for, by MLX's own kernel."""
    sizes = (form.group_size, form.bits, form.mode)
    codes, scales = mx.array(packed.codes), _on_device(packed.scales)
    if packed.biases is None:
        return np.array(mx.dequantize(codes, scales, None, *sizes, dtype=mx.float32) * multiplier)
    biases = _on_device(packed.biases).astype(mx.float32)
    return np.array(mx.dequantize(codes, scales.astype(mx.float32), biases, *sizes))


def check_form(width: int, form: Form, multiplier: float) -> None:
    """Raises ValueError if rows of this width cannot be stored in this form."""
    if width % form.group_size:
        raise ValueError(f"width {width} is no multiple of the group size {form.group_size}")
    if multiplier != 1 and not form.multiplied:
        raise ValueError(f"{form.mode} has no output multiplier")


def _blocks(rows: Array, values: int) -> list[Array]:
    """Rows (rows, width) in parts of about so many values."""
    count, width = rows.shape
    step = max(1, values // width)
    return [rows[start : start + step] for start in range(0, count, step)]


def _begin_block(rows: Array, form: Form, columns: Columns | None, multiplier: float, on: Arithmetic) -> Begun:
    """Begin to pack all of the rows (rows, width)."""

    def tiled(counts: Array | None) -> tuple[Values, ...]:
        return () if counts is None else (on.tiled(counts, len(rows), form.group_size),)

    errors_count, values_count, means = columns or (None, None, None)
    block = on.block(rows, form.group_size, 1 / multiplier)
    search = search_of(block, form, tiled(errors_count), dtype_of(rows), on)
    with np.errstate(all="ignore"):  # what is not finite shows in the errors
        fit = search.best()
        words = on.words(search.codes(fit), form.bits)
        norms = on.squares(block, *tiled(values_count))  # the search's own weights are not valid any more
        drifts = () if means is None else (search.drift(fit, *tiled(means)),)
    on.begin(*fit, words, norms, *drifts)

    def finish() -> tuple[Packed, Loss]:
        scale, bias, errors, codes, sizes, *drift = (on.numpy(part) for part in (*fit, words, norms, *drifts))
        if np.isnan(errors).any():
            raise ValueError(what_is_wrong(rows))
        loss = Loss(
            float(errors.sum(dtype=np.float64)) * multiplier**2, float(sizes.sum(dtype=np.float64)) * multiplier**2
        )
        scales, *biases = (part.reshape(len(rows), -1) for part in search.stored(scale, bias))
        made_up = _row_sums(drift[0], len(rows)) * np.float32(multiplier) if drift else None
        return Packed(codes.reshape(len(rows), -1), scales, biases[0] if biases else None, made_up), loss

    return finish


def search_of(block: Values, form: Form, weights: tuple[Values, ...], dtype: str, on: Arithmetic) -> Search:
    """The search for the scales of a block's groups (group size, groups); scales that are floats are stored in
    `dtype`."""
    if form.biased:
        return AffineSearch(on, block, weights, form.bits, dtype)
    return MinifloatSearch(on, block, weights, form)


def _row_sums(values: Array, rows: int) -> Array:
    """Groups' values (rows * groups,) added up by row, one after the other in float64: (rows,)."""
    columns = np.ascontiguousarray(values.reshape(rows, -1).T, np.float64)
    return np.add.accumulate(columns, axis=0)[-1].astype(np.float32)


def dtype_of(rows: Array) -> str:
    """The safetensors dtype of rows of any shape, before packing."""
    return next(name for name in FLOATS.values() if NUMPY_DTYPES[name] == rows.dtype)


def what_is_wrong(rows: Array) -> str:
    """Why rows (rows, width) cannot be packed."""
    if np.isfinite(to_float32(rows, dtype_of(rows))).all():
        return "its values spread too far for what a scale can express"
    return "it holds NaN or infinite values"


def _on_device(values: Array) -> mx.array:
    """An array of any shape; uint16 is BF16."""
    array = mx.array(values)
    return array.view(mx.bfloat16) if values.dtype == np.uint16 else array


def _one_ahead(begin: Callable[[Array], Begun], blocks: Sequence[Array]) -> Iterator[Begun]:
    """Blocks (rows, width), each begun before the last one is waited for; the first one now. In this thread: functions
    that MLX compiled in another thread abort the process when that ends."""
    first = begin(blocks[0])

    def each(begun: Begun) -> Iterator[Begun]:
        for block in blocks[1:]:
            following = begin(block)
            yield begun
            begun = following
        yield begun

    return each(first)


def _in_threads(begin: Callable[[Array], Begun], blocks: Sequence[Array]) -> list[Begun]:
    """All blocks (rows, width), begun now: numpy's loops release the interpreter's lock."""

    def at_once(block: Array) -> tuple[Packed, Loss]:
        return begin(block)()

    return [_workers().submit(at_once, block).result for block in blocks]


@cache
def _workers() -> ThreadPoolExecutor:
    """Threads that live as long as the process, so that their buffers are used again."""
    return ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), "ltx2-pack")
