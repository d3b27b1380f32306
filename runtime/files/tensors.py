"""safetensors files with numpy only: headers, tensors on demand (mapped, or read by byte ranges), and writing files
whose header is known before their data.

The safetensors library only checks files here: it maps them whole, and data that is used once would fill the memory."""

import json
import mmap
import os
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from ltx2.runtime.errors import CheckpointError, Ltx2Error, UnsupportedError, reason
from ltx2.runtime.files.atomic import Claim, write_file
from ltx2.runtime.files.foreign import foreign_kind
from ltx2.runtime.files.paths import open_regular
from ltx2.runtime.files.ranges import RangeReader

# All dtypes of the format. numpy has no bfloat16 or float8: their codes are unsigned integers of the same width.
NUMPY_DTYPES: Mapping[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "|u1", "F8_E5M2": "|u1", "F8_E8M0": "|u1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1",
    "BOOL": "|b1",
}  # fmt: skip
ITEM_BYTES = {dtype: int(name[2:]) for dtype, name in NUMPY_DTYPES.items()}
FLOATS = {"bf16": "BF16", "f16": "F16", "f32": "F32"}  # float types of weights: in --dtype -> in safetensors
# The dtypes in model folders -> their names in mlx.core.
MLX_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "U32": "uint32", "U8": "uint8"}
SUFFIX = ".safetensors"
FORMAT = "format"  # metadata's key: what a file of ours says that it holds
HEADER_BYTES = 4 << 20  # the longest that is read: 80,000 tensors, in 3 s and 300 MB; published ones have 1.5 MB

Array = np.ndarray[Any, np.dtype[Any]]
Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> safetensors dtype, shape; in the order of the data


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: safetensors dtype name, shape, and its byte range from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file's header. `array` and `rows` read data on demand."""

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    size: int = 0

    @cached_property
    def _map(self) -> mmap.mmap:
        with self.path.open("rb") as f:
            mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.madvise(mmap.MADV_SEQUENTIAL)  # longer read-ahead
        return mapped

    def array(self, name: str) -> Array:
        """The tensor as a read-only memory map of its shape; BF16 and FP8 as their codes (see NUMPY_DTYPES).

        Raises UnsupportedError for another dtype, CheckpointError where the file does not hold it.
        """
        info, dtype = self.tensors[name], self.numpy_dtype(name)
        try:
            return np.frombuffer(self._map, dtype, prod(info.shape), info.start).reshape(info.shape)
        except ValueError as error:  # shorter than when it was opened, or a shape beyond numpy's limits
            raise CheckpointError(
                f"tensor {name} of {self.path.name} cannot be read", str(error), "check that nothing writes the file"
            ) from error

    @cached_property
    def reader(self) -> RangeReader:
        """The file's bytes by range, for data that is read once."""
        return RangeReader(self.path)

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop) of axis 0, (stop - start, ...), in memory of their own. Raises what `array` and reading
        raise."""
        info = self.tensors[name]
        row = info.nbytes // max(1, info.shape[0])
        raw = self.reader.read(info.start + start * row, info.start + stop * row)
        return self.typed(name, raw, (stop - start, *info.shape[1:]))

    def typed(self, name: str, raw: Array, shape: tuple[int, ...]) -> Array:
        """Bytes (n,) of a tensor, or of some of its rows, as values of this shape. Raises as `numpy_dtype`."""
        return raw.view(self.numpy_dtype(name)).reshape(shape)

    def own_name(self, name: str) -> str:
        """A tensor's name as the file spells it."""
        return name

    def numpy_dtype(self, name: str) -> np.dtype[Any]:
        """The dtype of a tensor's values in numpy. Raises UnsupportedError for one that NUMPY_DTYPES lacks."""
        dtype = self.tensors[name].dtype
        if dtype not in NUMPY_DTYPES:
            raise UnsupportedError(
                f"tensor {name} of {self.path.name} cannot be read",
                f"its dtype is {dtype}",
                f"use a file with {', '.join(NUMPY_DTYPES)}",
            )
        return np.dtype(NUMPY_DTYPES[dtype])


def open_tensorfile(path: Path) -> TensorFile:
    """Read a safetensors header.

    Raises CheckpointError where there is no file, for files that the safetensors library rejects, for duplicate names
    and for headers of more than HEADER_BYTES. Errors name other formats; for weights it is UnsupportedError.
    """
    try:
        with open_regular(path) as f:
            length = _header_length(f)
            with safe_open(path, framework="numpy"):
                pass
            header = json.loads(f.read(length), object_pairs_hook=_no_duplicates)
            metadata = header.pop("__metadata__", None) or {}
            tensors = {name: _tensor_info(name, entry, 8 + length) for name, entry in header.items()}
            return TensorFile(path, metadata, tensors, os.fstat(f.fileno()).st_size)
    # LookupError and TypeError: the file changed while it was read.
    except (SafetensorError, ValueError, LookupError, TypeError) as error:
        if (foreign := foreign_kind(path)) is not None:
            what, why, fix, kind = foreign
            raise kind(f"{path.name} {what}", why, fix) from error
        raise CheckpointError(
            f"{path.name} is not a valid safetensors file",
            reason(error),
            "download it again; an interrupted download leaves a truncated file",
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}", reason(error), "check the path and its permissions") from error


def is_kind(path: Path, kind: str) -> bool:
    """Whether a file is safetensors and says that it holds this `kind` of ours."""
    try:
        return open_tensorfile(path).metadata.get(FORMAT) == kind
    except (OSError, Ltx2Error):
        return False


def _header_length(f: BinaryIO) -> int:
    start = f.read(8)
    if len(start) < 8:
        raise ValueError(f"it has {len(start)} bytes, and its header's length alone takes 8")
    (length,) = struct.unpack("<Q", start)
    if length > HEADER_BYTES:
        raise ValueError(f"its header is said to have {length} bytes, and at most {HEADER_BYTES >> 20} MiB are read")
    return int(length)


def _tensor_info(name: str, entry: Any, base: int) -> TensorInfo:
    """An entry of the header; the safetensors library also accepts a list of the three values."""
    keys = ("dtype", "shape", "data_offsets")
    dtype, shape, (start, end) = entry if isinstance(entry, list) else (entry[key] for key in keys)
    if not isinstance(dtype, str):
        raise ValueError(f"the dtype of {name!r} is not a name")
    return TensorInfo(name, dtype, tuple(shape), base + start, base + end)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {twice!r} occurs twice in the header")
    return result


@dataclass(frozen=True)
class FileRecord:
    """A file in manifests and journals: base name, size in bytes, SHA-256."""

    name: str
    size: int
    sha256: str


def bf16_to_f32(codes: Array) -> Array:
    """bfloat16 codes (uint16) of any shape to float32, exact."""
    return (codes.astype(np.uint32) << 16).view(np.float32)


def to_float32(values: Array, dtype: str) -> Array:
    """Values of a safetensors float dtype (BF16 as codes) of any shape to float32, exact."""
    return bf16_to_f32(values) if dtype == "BF16" else values.astype(np.float32, copy=False)


def f32_to_bf16(values: Array) -> Array:
    """float32 of any shape to bfloat16 codes (uint16), rounding half to even; NaN stays NaN."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Size in bytes of a tensor's data."""
    return item_bytes(dtype) * prod(shape)


def item_bytes(dtype: str) -> int:
    """Size in bytes of one value."""
    return ITEM_BYTES[dtype]


def file_header(layout: Layout, metadata: Mapping[str, str]) -> bytes:
    """The bytes of a file before the first tensor's data. Same layout, same bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in layout.items():
        end = offset + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data start 8-byte aligned, as the safetensors library writes them
    return struct.pack("<Q", len(text)) + text


def write_tensorfile(
    path: Path, tensors: Mapping[str, tuple[str, Array]], metadata: Mapping[str, str], claim: Claim | None = None
) -> None:
    """Write tensors (dtype, values of any shape as in NUMPY_DTYPES); the file gets its name when it is complete."""
    layout = {name: (dtype, values.shape) for name, (dtype, values) in tensors.items()}
    write_file(path, [file_header(layout, metadata), *(raw_bytes(values) for _, values in tensors.values())], claim)


def raw_bytes(values: Array) -> memoryview:
    """The bytes of an array of any shape, in C order."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
