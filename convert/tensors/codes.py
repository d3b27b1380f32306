"""Weights published as codes with scales: FP8 (E4M3), MXFP8, NVFP4, int8 and MLX's own. They are decoded, or kept as
they are in MLX's layout.

    FP8, int8   float32(code) * scale; rotated rows of int8 are turned back first, which is exact
    MXFP8       float32(code) * block scale
    NVFP4       (float32(code) * block scale) * tensor scale: the first product is exact, the second rounds
    MLX         float32(code) * scale + bias

FP8 and NVFP4 are decoded by one lookup for every two codes, in a table of all pairs, rounded. Codes that stand in a
model folder already (U32) are decoded too."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar

import numpy as np

from ltx2.convert.tensors.steps import Spec, from_float32
from ltx2.runtime.errors import CheckpointError, NumericsError
from ltx2.runtime.files.tensors import FLOATS, NUMPY_DTYPES, Array, TensorFile, TensorInfo, to_float32
from ltx2.runtime.model.forms import Form
from ltx2.runtime.model.hadamard import rotated_rows

TILE_ROWS, TILE_COLUMNS = 128, 4  # NVFP4 files hold the block scales in tiles of this size
OFFSET = np.uint8(128)  # turns signed bytes into unsigned ones and back: flips the first bit
CACHED = 1 << 18  # bytes worked on at a time, so that they stay in the processor's cache
DAMAGED = "download it again; if that does not help, the published file itself is damaged"


def _e4m3() -> Array:
    """(256,) the values of all codes: sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7F and 0xFF are NaN."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    values = np.where(exponent, np.ldexp(8.0 + mantissa, exponent - 10), np.ldexp(1.0 * mantissa, -9))
    values[code & 127 == 127] = np.nan
    return np.copysign(values, np.where(code < 128, 1.0, -1.0)).astype(np.float32)


E4M3 = _e4m3()
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@dataclass(frozen=True)
class Scale:
    """A tensor of factors for a weight's values: one for all, or one for each row."""

    file: TensorFile
    tensor: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        """() or (rows,); some files say (1,) or (rows, 1)."""
        return () if self.tensor.shape in ((), (1,), (1, 1)) else self.tensor.shape[:1]

    @cached_property
    def values(self) -> Array:
        """The factors, of `shape`, float32. Raises CheckpointError when one is not finite."""
        stored = np.array(self.file.array(self.tensor.name))
        values = to_float32(stored, self.tensor.dtype).reshape(self.shape)
        if not np.isfinite(values).all():
            raise _not_a_number(self.file, self.tensor, "a scale that is")
        return values


@dataclass(frozen=True)
class BlockScales:
    """Scales of 16 values each (NVFP4: E4M3 codes) or 32 (MXFP8: E8M0, `exponents`), of `shape` (rows, columns): in
    tiles as NVIDIA's libraries store them, or row by row as MLX reads them. Raises CheckpointError when one is NaN."""

    file: TensorFile
    tensor: TensorInfo
    shape: tuple[int, int]
    tiled: bool = True
    exponents: bool = False

    def rows(self, start: int, stop: int) -> Array:
        """Rows [start, stop) in order, (stop - start, columns)."""
        stored = self.file.array(self.tensor.name)
        if not self.tiled:
            return self._checked(stored[start:stop])
        first = start - start % TILE_ROWS
        return self._checked(untiled(stored[first : stop + -stop % TILE_ROWS])[start - first : stop - first])

    def whole(self, stored: Array) -> Array:
        """The tensor as it is stored -> all rows in order, (rows, columns)."""
        return self._checked(untiled(stored) if self.tiled else stored)

    def _checked(self, scales: Array) -> Array:
        """Rows in order without what fills up the last tiles."""
        scales = np.ascontiguousarray(scales[: self.shape[0], : self.shape[1]])
        if (scales == 255).any() if self.exponents else _holds_nan(scales):
            raise _not_a_number(self.file, self.tensor, "block scales that are")
        return scales


def untiled(scales: Array) -> Array:
    """Block scales (rows, columns) in whole tiles as a file has them -> the same shape, row by row.

    Tiles of 128 x 4 follow each other along the columns. Value number (4 * b + a) * 4 + c of a tile is its row
    32 * a + b, column c.
    """
    tiles = scales.reshape(-1, scales.shape[1] // TILE_COLUMNS, 32, TILE_ROWS // 32, TILE_COLUMNS)
    return tiles.transpose(0, 3, 2, 1, 4).reshape(scales.shape)


def tiled_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """The shape of block scales of `shape` filled up to whole tiles."""
    return shape[0] + -shape[0] % TILE_ROWS, shape[1] + -shape[1] % TILE_COLUMNS


@dataclass(frozen=True)
class Codes(ABC):
    """The codes of one tensor, and what belongs to them."""

    file: TensorFile
    tensor: TensorInfo

    kind: ClassVar[str]

    @abstractmethod
    def shape(self, spec: Spec) -> tuple[int, ...]:
        """The shape of the values that codes of this spec stand for."""

    @abstractmethod
    def decoded(self, rows: Array, spec: Spec, start: int, dtype: str) -> Array:
        """Rows of codes (n, ...), the first of which is row `start`, as values, each rounded once to `dtype` (as in
        --dtype).

        Raises CheckpointError for codes and scales that are NaN, NumericsError for values beyond F16.
        """


@dataclass(frozen=True)
class MlxCodes(Codes):
    """Codes that MLX can multiply; without `scale` it is 1."""

    scale: Scale | None

    multiplied: ClassVar[bool] = True  # MLX multiplies a layer's output by `scale`; a missing one is stored as 1
    dtype: ClassVar[str] = "BF16"  # the float type that the layer computes in

    @property
    @abstractmethod
    def form(self) -> Form:
        """How MLX is to read the codes."""

    @property
    def blocks(self) -> BlockScales | None:
        """The scales of groups of values, where they are not stored as MLX reads them."""
        return None

    def shape(self, spec: Spec) -> tuple[int, ...]:
        return (*spec.shape[:-1], spec.shape[-1] * spec.itemsize * 8 // self.form.bits) if spec.shape else ()

    @property
    def width(self) -> int:
        """The number of values in a row."""
        return self.shape(Spec(self.tensor.shape, self.tensor.dtype))[-1]

    def factors(self, start: int, stop: int) -> Array:
        """The scale: (), or (stop - start, 1) where rows have their own."""
        values = np.ones((), np.float32) if self.scale is None else self.scale.values
        return values[start:stop, None] if values.ndim else values

    def decoded(self, rows: Array, spec: Spec, start: int, dtype: str) -> Array:
        codes, stored = np.ascontiguousarray(rows).view(np.uint8), spec.dtype == "U32"
        factors = self.factors(start, start + (len(rows) if rows.ndim else 1))
        table = self._table(float(factors), dtype, stored) if factors.ndim == 0 and codes.size % 2 == 0 else None
        if table is None:
            values = from_float32(np.asarray(self._unscaled(codes, stored, start) * factors), FLOATS[dtype])
        else:
            values = self._looked_up(codes, table, start).view(NUMPY_DTYPES[FLOATS[dtype]])
        return values.reshape(self.shape(Spec(rows.shape, spec.dtype)))

    @abstractmethod
    def words(self, rows: Array) -> Array:
        """Published rows (n, bytes) as MLX reads them, (n, words) uint32. Raises CheckpointError for NaN codes."""

    @staticmethod
    def _table(factor: float, dtype: str, stored: bool) -> Array | None:
        """(n,) the values of every pair of codes as one unsigned integer; None where values are computed: always, or
        because some do not fit `dtype`."""
        return None

    def _looked_up(self, codes: Array, table: Array, start: int) -> Array:
        """The table's entry for every two codes, in order, of any shape."""
        raise NotImplementedError

    @abstractmethod
    def _unscaled(self, codes: Array, stored: bool, start: int) -> Array:
        """Codes (n, bytes) as values before the scale, (n, values) float32; `stored`: they are in MLX's order. Tables
        hold exactly these, scaled."""


@dataclass(frozen=True)
class Fp8(MlxCodes):
    """One code per byte, E4M3."""

    kind = "fp8"

    @property
    def form(self) -> Form:
        return Form(8, 32, "mxfp8")

    def words(self, rows: Array) -> Array:
        return self._checked(np.ascontiguousarray(rows)).view(np.uint32)

    @staticmethod
    def _table(factor: float, dtype: str, stored: bool) -> Array | None:
        return _fp8_table(factor, dtype)

    def _looked_up(self, codes: Array, table: Array, start: int) -> Array:
        index = self._checked(codes).reshape(-1).view(np.uint16)
        pairs = np.empty(len(index), table.dtype)
        for part in _parts(len(index), table.itemsize):
            np.take(table, index[part], out=pairs[part], mode="clip")  # `raise` would copy `out`
        return pairs

    def _unscaled(self, codes: Array, stored: bool, start: int) -> Array:
        return E4M3[self._checked(codes)]

    def _checked(self, codes: Array) -> Array:
        if _holds_nan(codes):
            raise _not_a_number(self.file, self.tensor, "codes that are")
        return codes


@dataclass(frozen=True)
class Mxfp8(Fp8):
    """One code per byte, E4M3; every 32 values of a row share a scale, a power of two."""

    exponents: BlockScales

    kind = "mxfp8"
    multiplied = False

    @property
    def blocks(self) -> BlockScales:
        return self.exponents

    @staticmethod
    def _table(factor: float, dtype: str, stored: bool) -> Array | None:
        return None

    def _unscaled(self, codes: Array, stored: bool, start: int) -> Array:
        powers = np.ldexp(np.float32(1), self.blocks.rows(start, start + len(codes)).astype(np.int32) - 127)
        values = E4M3[self._checked(codes)].reshape(*powers.shape, self.form.group_size) * powers[..., None]
        return values.reshape(codes.shape)


@dataclass(frozen=True)
class Affine(MlxCodes):
    """MLX's codes of a few bits, in words, with a scale and a bias for every group of a row's values."""

    packed: Form
    scales: tuple[TensorFile, TensorInfo]
    biases: tuple[TensorFile, TensorInfo]

    kind = "affine"
    multiplied = False

    @property
    def form(self) -> Form:
        return self.packed

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.scales[1].dtype

    def words(self, rows: Array) -> Array:
        return rows

    def _unscaled(self, codes: Array, stored: bool, start: int) -> Array:
        bits = np.unpackbits(codes.reshape(len(codes), -1), axis=1, bitorder="little").reshape(-1, self.form.bits)
        values = (bits @ (1 << np.arange(self.form.bits))).astype(np.float32)
        scales, biases = (
            to_float32(file.rows(tensor.name, start, start + len(codes)), tensor.dtype)
            for file, tensor in (self.scales, self.biases)
        )
        values = values.reshape(*scales.shape, self.form.group_size) * scales[..., None] + biases[..., None]
        return values.reshape(len(codes), -1)


@dataclass(frozen=True)
class Int8(MlxCodes):
    """One signed integer per byte; rows are rotated where the form says so. Plus 128 they are MLX's affine codes with a
    bias of -128 and a scale of 1; all groups share these two, and no file holds them."""

    packed: Form

    kind = "int8"

    @property
    def form(self) -> Form:
        return self.packed

    def words(self, rows: Array) -> Array:
        return (np.ascontiguousarray(rows).view(np.uint8) ^ OFFSET).view(np.uint32)

    def _unscaled(self, codes: Array, stored: bool, start: int) -> Array:
        values = (codes ^ OFFSET if stored else codes).view(np.int8).astype(np.float32)
        size = self.form.rotation
        return rotated_rows(values, size, self.form.hadamard) if size else values


@dataclass(frozen=True)
class Nvfp4(MlxCodes):
    """Two codes (E2M1) per byte; the first is in the high bits as published, in the low bits for MLX. Every 16
    values of a row share a block scale."""

    tiles: BlockScales

    kind = "nvfp4"

    @property
    def form(self) -> Form:
        return Form(4, 16, "nvfp4")

    @property
    def blocks(self) -> BlockScales:
        return self.tiles

    def words(self, rows: Array) -> Array:
        codes = np.ascontiguousarray(rows).reshape(-1)
        swapped = np.empty_like(codes)
        for part in _parts(len(codes), 1):
            np.bitwise_or(codes[part] << 4, codes[part] >> 4, out=swapped[part])
        return swapped.reshape(rows.shape).view(np.uint32)

    @staticmethod
    def _table(factor: float, dtype: str, stored: bool) -> Array | None:
        return _nvfp4_table(factor, dtype, stored)

    def _looked_up(self, codes: Array, table: Array, start: int) -> Array:
        blocks = self.blocks.rows(start, start + len(codes))
        pairs = np.empty(codes.shape, table.dtype)
        for part in _parts(len(codes), pairs.itemsize * codes.shape[1]):
            repeated = (blocks[part] * np.uint64(0x0101010101010101)).view(np.uint8)  # once for each of 8 bytes
            np.take(table, repeated.astype(np.uint16) << 8 | codes[part], out=pairs[part], mode="clip")
        return pairs

    def _unscaled(self, codes: Array, stored: bool, start: int) -> Array:
        nibbles = np.stack((codes & 15, codes >> 4) if stored else (codes >> 4, codes & 15), axis=-1)
        blocks = E4M3[self.blocks.rows(start, start + len(codes))]
        values = E2M1[nibbles].reshape(*blocks.shape, self.form.group_size) * blocks[..., None]
        return values.reshape(len(codes), -1)


@lru_cache(maxsize=8)  # of the tensors being worked on; one may take several calls
def _fp8_table(factor: float, dtype: str) -> Array | None:
    """(65536,) the values of both codes for every two bytes, read as a little-endian uint16."""
    values = _rounded(E4M3 * np.float32(factor), dtype)
    return None if values is None else _integers(np.stack([np.tile(values, 256), np.repeat(values, 256)], axis=1))


@lru_cache(maxsize=8)
def _nvfp4_table(factor: float, dtype: str, stored: bool) -> Array | None:
    """(65536,) the values of both codes for every byte, plus 256 times their block scale's code."""
    first, second = np.tile(E2M1, 16), np.repeat(E2M1, 16)
    codes = np.stack([first, second] if stored else [second, first], axis=1)
    values = _rounded(E4M3[:, None, None] * codes * np.float32(factor), dtype)
    return None if values is None else _integers(values.reshape(-1, 2))


def _rounded(values: Array, dtype: str) -> Array | None:
    """float32 of any shape in `dtype`; None when some do not fit."""
    try:
        return from_float32(values, FLOATS[dtype])
    except NumericsError:
        return None


def _integers(pairs: Array) -> Array:
    """(n, 2) values as (n,) integers, which are looked up faster."""
    return np.ascontiguousarray(pairs).view(f"<u{2 * pairs.itemsize}").reshape(-1)


def _parts(length: int, itemsize: int) -> Iterator[slice]:
    """Slices of `length` items that stay in the processor's cache."""
    step = max(1, CACHED // itemsize)
    return (slice(start, start + step) for start in range(0, length, step))


def _holds_nan(codes: Array) -> bool:
    """Whether some E4M3 code, in an array of any shape, is NaN."""
    flat = codes.reshape(-1)
    return any((flat[part] & 127).max() == 127 for part in _parts(len(flat), 1))


def _not_a_number(file: TensorFile, tensor: TensorInfo, what: str) -> CheckpointError:
    return CheckpointError(
        f"tensor {tensor.name} of {file.path.name} holds {what} not a number",
        "no published file has any: they would turn the whole picture into noise",
        DAMAGED,
    )
