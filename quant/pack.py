"""Packing weights into MLX's quantized storage, on the GPU where MLX has one; the files run on MLX's own kernels.

Rows are packed in blocks, so memory does not depend on the tensor, and every group by itself, so chunks of rows give
the bytes of the whole. Given E[x^2] of a layer's inputs as `weights`, errors count as they do in the layer's output."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from math import sqrt
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ltx2.convert.steps import FLOATS, Storage, to_float32
from ltx2.quant.affine import AffineSearch
from ltx2.quant.arithmetic import Arithmetic
from ltx2.quant.kinds import kind_of
from ltx2.quant.minifloat import MinifloatSearch
from ltx2.quant.on_cpu import OnCpu
from ltx2.quant.on_gpu import OnGpu, is_gpu
from ltx2.quant.search import Search
from ltx2.runtime.tensorfile import NUMPY_DTYPES, Array

# Values of a block: so many that a CPU's threads do not wait for the interpreter, and that a GPU is busy.
CPU_BLOCK, GPU_BLOCK = 1 << 19, 1 << 22
MAX_THREADS = 8
LEAST_WEIGHT = 2.0**-20  # of the largest


class Packed(NamedTuple):
    """Quantized rows: `codes` uint32 (rows, width * bits / 32); `scales` and, in affine mode, `biases`
    (rows, width / group size) in the tensor's own dtype (BF16 as uint16), or E8M0 or E4M3 scales as uint8."""

    codes: Array
    scales: Array
    biases: Array | None = None


@dataclass(frozen=True)
class Loss:
    """Summed squares of what quantizing changed and of the values themselves, both weighted if the search was;
    losses of parts add up."""

    error: float = 0.0
    norm: float = 0.0

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(self.error + other.error, self.norm + other.norm)

    @property
    def relative(self) -> float:
        """||W' - W|| / ||W||: the relative error of W's output, for inputs whose channels do not correlate."""
        return sqrt(self.error / self.norm) if self.norm else 0.0


def pack(
    rows: Array, storage: Storage, weights: Array | None = None, multiplier: float = 1.0
) -> tuple[Packed, Loss]:
    """Quantize rows (rows, width) of BF16 (as uint16 codes), float16 or float32.

    `width` is a multiple of the group size. `weights` (width,) is E[x^2] of the inputs. `multiplier`, a power of two
    that the layer's output is multiplied with, serves nvfp4: `output_multiplier` of the whole tensor's largest value.
    Raises ValueError when a value is NaN or infinite, or too large for what scales can express.
    """
    _check(rows.shape[1], storage, multiplier)
    packed, gpu = _empty(rows, storage), is_gpu()
    counted = None if weights is None else _usable(weights, rows.shape[1])

    def work(span: slice) -> Loss:
        parts, loss = _pack_block(rows[span], storage, counted, multiplier, OnGpu() if gpu else OnCpu())
        for whole, part in zip(packed, parts, strict=True):
            if whole is not None:
                whole[span] = part
        return loss

    return packed, sum(_in_threads(work, _spans(rows, GPU_BLOCK if gpu else CPU_BLOCK)), Loss())


def unpack(packed: Packed, storage: Storage, multiplier: float = 1.0) -> Array:
    """The float32 values (rows, width) that the codes stand for, by MLX's own kernel."""
    form = (storage.group_size, storage.bits, storage.mode)
    codes, scales = mx.array(packed.codes), _on_device(packed.scales)
    if packed.biases is None:
        return np.array(mx.dequantize(codes, scales, None, *form, dtype=mx.float32) * multiplier)
    biases = _on_device(packed.biases).astype(mx.float32)
    return np.array(mx.dequantize(codes, scales.astype(mx.float32), biases, *form))


def bias_correction(
    rows: Array, packed: Packed, storage: Storage, mean: Array, multiplier: float = 1.0
) -> Array:
    """(W - W') E[x], float32 (rows,): what to add to the layer's bias so that quantizing leaves its mean output.

    `mean` (width,) is E[x] of the layer's inputs.
    """
    change = to_float32(rows, _dtype(rows)) - unpack(packed, storage, multiplier)
    columns = np.ascontiguousarray(change.T) * mean.astype(np.float64)[:, None]
    return np.add.reduce(columns, axis=0).astype(np.float32)  # column by column: an order that is ours


def _check(width: int, storage: Storage, multiplier: float) -> None:
    if width % storage.group_size:
        raise ValueError(f"width {width} is no multiple of the group size {storage.group_size}")
    if multiplier != 1 and not kind_of(storage).multiplied:
        raise ValueError(f"{storage.mode} has no output multiplier")


def _usable(weights: Array, width: int) -> Array:
    """Weights as float32; columns that saw (almost) no input still count a little."""
    counted = weights.astype(np.float32)
    if counted.shape != (width,) or not np.isfinite(counted).all() or (counted < 0).any():
        raise ValueError(f"weights are not {width} finite numbers of at least 0")
    return np.maximum(counted, counted.max() * LEAST_WEIGHT) if counted.any() else np.ones_like(counted)


def _empty(rows: Array, storage: Storage) -> Packed:
    count, width = rows.shape
    shape = (count, width // storage.group_size)
    codes = np.empty((count, width * storage.bits // 32), np.uint32)
    if not kind_of(storage).biased:
        return Packed(codes, np.empty(shape, np.uint8))
    return Packed(codes, np.empty(shape, rows.dtype), np.empty(shape, rows.dtype))


def _spans(rows: Array, values: int) -> list[slice]:
    count, width = rows.shape
    step = max(1, values // width)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _pack_block(
    rows: Array, storage: Storage, weights: Array | None, multiplier: float, on: Arithmetic
) -> tuple[Packed, Loss]:
    search = _search(rows, storage, weights, multiplier, on)
    with np.errstate(all="ignore"):  # what is not finite shows in the errors
        fit = search.best()
        scale, bias, errors = (on.numpy(part) for part in fit)
        if np.isnan(errors).any():
            raise ValueError(_what_is_wrong(rows))
        norms = on.numpy(search.norms())
        codes = on.numpy(on.words(search.codes(fit), storage.bits))
    loss = Loss(_total(errors) * multiplier**2, _total(norms) * multiplier**2)
    return Packed(*(part.reshape(len(rows), -1) for part in (codes, *search.stored(scale, bias)))), loss


def _search(rows: Array, storage: Storage, weights: Array | None, multiplier: float, on: Arithmetic) -> Search:
    block = on.block(rows, storage.group_size, 1 / multiplier)
    counts = () if weights is None else (on.tiled(weights, len(rows), storage.group_size),)
    if kind_of(storage).biased:
        return AffineSearch(on, block, counts, storage.bits, _dtype(rows))
    return MinifloatSearch(on, block, counts, storage)


def _dtype(rows: Array) -> str:
    return next(name for name in FLOATS.values() if NUMPY_DTYPES[name] == rows.dtype)


def _what_is_wrong(rows: Array) -> str:
    if np.isfinite(to_float32(rows, _dtype(rows))).all():
        return "its values spread too far for what a scale can express"
    return "it holds NaN or infinite values"


def _on_device(values: Array) -> mx.array:
    array = mx.array(values)
    return array.view(mx.bfloat16) if values.dtype == np.uint16 else array


def _total(values: Array) -> float:
    return float(values.sum(dtype=np.float64))


def _in_threads(work: Callable[[slice], Loss], spans: Sequence[slice]) -> Iterable[Loss]:
    """numpy's loops release the interpreter's lock. MLX works in one thread: functions that it compiled in another one
    abort the process when that ends."""
    return map(work, spans) if is_gpu() or len(spans) == 1 else _workers().map(work, spans)


@cache
def _workers() -> ThreadPoolExecutor:
    """Threads that live as long as the process: their buffers are used again."""
    return ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), "ltx2-pack")
