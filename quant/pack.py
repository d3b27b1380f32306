"""Affine group quantization in MLX's storage format, in numpy so that every machine writes the same bytes.

`group_size` consecutive values of a row share a scale and a bias: value ~ scale * code + bias. Two things differ
from mx.quantize, at no cost in the model's size or speed: codes are computed against scale and bias *as stored*
(rounded to the tensor's dtype), and below 8 bits the range is searched for the smallest squared error. Blocks are
kept transposed, (group_size, groups), so that every step is elementwise over groups: fast in numpy, and without
sums whose order a library chooses."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import sqrt

import numpy as np

from ltx2.convert.steps import from_float32, to_float32
from ltx2.runtime.tensorfile import NUMPY_DTYPES, Array

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
DTYPES = ("BF16", "F16", "F32")  # what can be quantized; scales and biases are stored in the same

# Ranges tried, as the kept fractions of the (lower, upper) half of a group's range. Chosen for the error they reach
# on Gaussian, uniform and heavy-tailed weights with groups of 32, 64 and 128; at 8 bits none beats the full range.
RANGES: Mapping[int, tuple[tuple[float, float], ...]] = {
    2: ((0.6, 0.6), (0.5, 0.8), (0.8, 0.5), (0.75, 0.75)),
    3: ((0.85, 0.85), (0.8, 0.95), (0.95, 0.8), (0.95, 0.95)),
    4: ((0.97, 0.97), (0.91, 1.0), (1.0, 0.94), (0.94, 0.97), (1.0, 0.91)),
    5: ((1.0, 1.0), (0.97, 1.0), (1.0, 0.97)),
    6: ((1.0, 1.0), (0.97, 1.0), (1.0, 0.97)),
    8: ((1.0, 1.0),),
}

# Values a thread works on at a time. Smaller blocks stay in the cache but make threads wait for the interpreter: on 16
# cores 2**18 gave 0.15 GB/s with 8 threads, 2**20 gave 0.34, and 16 threads less than 8.
BLOCK_VALUES = 1 << 20
MAX_THREADS = 8


@dataclass(frozen=True)
class Affine:
    """How one tensor is stored: bits per code, values per group."""

    bits: int
    group_size: int


@dataclass(frozen=True)
class Packed:
    """Quantized rows: `codes` uint32 (rows, width * bits / 32); `scales` and `biases` (rows, width / group_size) in
    the tensor's own dtype (BF16 as uint16)."""

    codes: Array
    scales: Array
    biases: Array


@dataclass(frozen=True)
class Loss:
    """Summed squares of what quantizing changed and of the values themselves; losses of parts add up."""

    error: float = 0.0
    norm: float = 0.0

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(self.error + other.error, self.norm + other.norm)

    @property
    def relative(self) -> float:
        """||W' - W|| / ||W||: the relative error of W's output for inputs without structure (white noise)."""
        return sqrt(self.error / self.norm) if self.norm else 0.0


def quantize_rows(values: Array, dtype: str, affine: Affine) -> tuple[Packed, Loss]:
    """Quantize values (rows, width) given as they are stored: `dtype` BF16 (as uint16 codes), F16 or F32.

    `width` is a multiple of the group size. Groups are independent: chunks of rows give the same bytes as the whole.
    Raises ValueError when a value is NaN, infinite, or too large for its group's scale.
    """
    rows, width = values.shape
    groups = values.reshape(-1, affine.group_size)
    codes = np.empty((len(groups), affine.group_size * affine.bits // 32), np.uint32)
    scales = np.empty(len(groups), NUMPY_DTYPES[dtype])
    biases = np.empty_like(scales)

    def work(span: range) -> Loss:
        buffers = np.empty((4, span.step * affine.group_size), np.float32)
        loss = Loss()
        with np.errstate(over="ignore", invalid="ignore"):  # checked where it matters
            for start in span:
                part = slice(start, min(start + span.step, span.stop))
                block = _Block(groups[part], dtype, affine, buffers)
                fit = block.fit()
                codes[part] = block.pack(fit)
                scales[part], biases[part] = from_float32(fit.scale, dtype), from_float32(fit.bias, dtype)
                loss += Loss(float(fit.error.sum()), block.norm())
        return loss

    spans = _spans(len(groups), BLOCK_VALUES // affine.group_size)
    losses = _in_threads(work, spans)
    shape = (rows, width // affine.group_size)
    packed = Packed(codes.reshape(rows, -1), scales.reshape(shape), biases.reshape(shape))
    return packed, sum(losses, Loss())


def dequantize_rows(packed: Packed, dtype: str, affine: Affine) -> Array:
    """The float32 values (rows, width) that the codes stand for: scale * code + bias."""
    bits = affine.bits
    octets = np.zeros((packed.codes.size * 4 // bits, 8), np.uint8)
    octets[:, :bits] = np.ascontiguousarray(packed.codes).view(np.uint8).reshape(-1, bits)
    shifts = (np.arange(8) * bits).astype(np.uint64)
    codes = octets.view("<u8") >> shifts & np.uint64(2**bits - 1)
    grouped = codes.astype(np.float32).reshape(-1, affine.group_size)
    scales, biases = (to_float32(a, dtype).reshape(-1, 1) for a in (packed.scales, packed.biases))
    values: Array = (grouped * scales + biases).reshape(len(packed.codes), -1)
    return values


@dataclass(frozen=True)
class _Fit:
    """Scales and biases of a block's groups (float32, exactly as stored) and the squared errors they lead to."""

    scale: Array
    bias: Array
    error: Array

    def better_of(self, other: "_Fit") -> "_Fit":
        """Per group the fit with the smaller error; one that is not a number loses."""
        better = other.error < self.error
        return _Fit(
            np.where(better, other.scale, self.scale),
            np.where(better, other.bias, self.bias),
            np.where(better, other.error, self.error),
        )


class _Block:
    """A block of groups in reused buffers: x holds its values, q codes, t and u are scratch."""

    def __init__(self, groups: Array, dtype: str, affine: Affine, buffers: Array) -> None:
        self.dtype, self.affine = dtype, affine
        self.top = np.float32(2**affine.bits - 1)
        self.x, self.t, self.q, self.u = buffers[:, : groups.size].reshape(4, affine.group_size, -1)
        if dtype == "BF16":
            wide = self.x.view(np.uint32)
            np.copyto(wide, groups.T)
            np.left_shift(wide, 16, out=wide)
        else:
            np.copyto(self.x, groups.T)

    def fit(self) -> _Fit:
        """Search scales and biases. Raises ValueError where none can be stored."""
        low, high = np.minimum.reduce(self.x, axis=0), np.maximum.reduce(self.x, axis=0)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError("it holds NaN or infinite values")
        low += np.float32(0)  # -0 becomes +0: which of the two a minimum returns is not defined
        best = self._search(low, high)
        if not (np.isfinite(best.scale).all() and np.isfinite(best.bias).all()):
            raise ValueError("its values spread too far for a scale of the same dtype")
        return best

    def pack(self, fit: _Fit) -> Array:
        """The codes (groups, group_size * bits / 32) as uint32: each row a little-endian stream of bits."""
        bits = self.affine.bits
        self._assign(fit.scale, fit.bias)
        codes = self.u.view(np.uint32)
        np.copyto(codes, self.q, casting="unsafe")
        pairs = codes[0::2] | codes[1::2] << np.uint32(bits)
        fours = (pairs[0::2] | pairs[1::2] << np.uint32(2 * bits)).astype(np.uint64)
        eights = (fours[0::2] | fours[1::2] << np.uint64(4 * bits)).astype("<u8")  # eight codes fill `bits` bytes
        octets = np.ascontiguousarray(eights.T).view(np.uint8).reshape(-1, 8)
        return octets[:, :bits].reshape(codes.shape[1], -1).view("<u4")

    def norm(self) -> float:
        """The sum of all squared values."""
        return float(_sum(np.multiply(self.x, self.x, out=self.u)).sum())

    def _search(self, low: Array, high: Array) -> _Fit:
        half = (high - low) / 2
        center = low + half
        fits = (
            self._evaluate((lower + upper) * half / self.top, center - lower * half)
            for lower, upper in np.array(RANGES[self.affine.bits], np.float32)
        )
        best = next(fits)
        for fit in fits:
            best = best.better_of(fit)
        return best if self.affine.bits == 8 else best.better_of(self._refit(best))

    def _evaluate(self, scale: Array, bias: Array) -> _Fit:
        """Round scale and bias to what is stored and measure the error of the codes they give."""
        scale, bias = _rounded(scale, self.dtype), _rounded(bias, self.dtype)
        scale = np.where(scale > 0, scale, np.float32(1))  # a constant group: its codes are 0 with any scale
        self._assign(scale, bias)
        np.subtract(self.t, self.q, out=self.t)
        np.multiply(self.t, self.t, out=self.t)
        return _Fit(scale, bias, _sum(self.t) * np.square(scale, dtype=np.float64))

    def _assign(self, scale: Array, bias: Array) -> None:
        """t = (x - bias) / scale; q = the nearest code."""
        np.subtract(self.x, bias, out=self.t)
        np.divide(self.t, scale, out=self.t)
        np.rint(self.t, out=self.q)
        np.clip(self.q, np.float32(0), self.top, out=self.q)

    def _refit(self, fit: _Fit) -> _Fit:
        """Least squares: the scale and bias that suit the codes of `fit` best."""
        self._assign(fit.scale, fit.bias)
        qq = _sum(np.multiply(self.q, self.q, out=self.u))
        qt = _sum(np.multiply(self.q, self.t, out=self.u))
        q, t = _sum(self.q), _sum(self.t)
        n = self.affine.group_size
        slope = (n * qt - q * t) / np.maximum(n * qq - q * q, 1)
        scale = _rounded((fit.scale * slope).astype(np.float32), self.dtype)
        bias = fit.bias + (fit.scale * t - scale * q) / n
        return self._evaluate(scale, bias.astype(np.float32))


def _sum(values: Array) -> Array:
    """Sums over axis 0 (a power of two long) as float64, by halving in place: an order of additions that is ours."""
    half = len(values) // 2
    while half:
        np.add(values[:half], values[half : 2 * half], out=values[:half])
        half //= 2
    return values[0].astype(np.float64)


def _rounded(values: Array, dtype: str) -> Array:
    """float32 values rounded to what `dtype` can store."""
    if dtype != "BF16":
        return values.astype(NUMPY_DTYPES[dtype]).astype(np.float32)
    bits = values.view(np.uint32)
    rounded: Array = (bits + (0x7FFF + (bits >> 16 & 1))) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def _spans(count: int, step: int) -> list[range]:
    """The starts of blocks of `step` groups, in one range per thread."""
    share = -(-count // min(MAX_THREADS, os.cpu_count() or 1))
    share += -share % step
    return [range(start, min(start + share, count), step) for start in range(0, count, share)]


def _in_threads(work: Callable[[range], Loss], spans: list[range]) -> list[Loss]:
    if len(spans) == 1:
        return [work(spans[0])]
    with ThreadPoolExecutor(len(spans)) as pool:  # numpy's loops release the interpreter lock
        return list(pool.map(work, spans))
