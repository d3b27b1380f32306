"""safetensors files with numpy only: read headers, map tensors, and write a file as a stream of row chunks.

Memory stays bounded whatever the file's size: tensors are memory-mapped for reading, and a file's header is known
before its data, so output is written (and hashed) chunk by chunk under a temporary name."""

import hashlib
import json
import mmap
import os
import struct
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from io import FileIO
from math import prod
from pathlib import Path
from types import EllipsisType
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from ltx2.runtime.errors import CheckpointError, UnsupportedError
from ltx2.runtime.paths import open_regular

# numpy has no bfloat16 or float8: their codes travel as unsigned integers of the same width.
NUMPY_DTYPES: Mapping[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "|u1", "F8_E5M2": "|u1", "F8_E8M0": "|u1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1",
    "BOOL": "|b1",
}  # fmt: skip
HEADER_BYTES = 4 << 20  # the longest that is read: 80,000 tensors take 3 s and 300 MB; published ones have 1.5 MB
SYNC_BYTES = 256 << 20  # written data reach the disk in portions, so that no single sync takes long
CHUNK_BYTES = 16 << 20  # rows are grouped into chunks of about this size

Array = np.ndarray[Any, np.dtype[Any]]


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
    """A safetensors file's header. Data are read on demand with `array`."""

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    size: int = field(default=0)

    @cached_property
    def _map(self) -> mmap.mmap:
        with self.path.open("rb") as f:
            mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.madvise(mmap.MADV_SEQUENTIAL)  # longer read-ahead
        return mapped

    def array(self, name: str) -> Array:
        """The tensor as a read-only memory map; BF16 and FP8 as their integer codes (see NUMPY_DTYPES).

        Raises UnsupportedError for a dtype that no published file uses.
        """
        info = self.tensors[name]
        if info.dtype not in NUMPY_DTYPES:
            raise UnsupportedError(
                f"tensor {name} of {self.path.name} cannot be read",
                f"its dtype is {info.dtype}",
                f"use a file with {', '.join(NUMPY_DTYPES)}",
            )
        dtype = np.dtype(NUMPY_DTYPES[info.dtype])
        try:
            return np.frombuffer(self._map, dtype, prod(info.shape), info.start).reshape(info.shape)
        except ValueError as error:  # shorter than when it was opened, or a shape beyond numpy's limits
            raise CheckpointError(
                f"tensor {name} of {self.path.name} cannot be read", str(error), "check that nothing writes the file"
            ) from error

    def release(self, name: str) -> None:
        """Give the tensor's mapped pages back; reading it again maps them anew. Call it after streaming past."""
        info = self.tensors[name]
        start = info.start - info.start % mmap.PAGESIZE
        if info.end > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, info.end - start)


def open_tensorfile(path: Path) -> TensorFile:
    """Read a safetensors header.

    Raises CheckpointError for what the safetensors library rejects, for duplicate names, for a header of more than
    HEADER_BYTES, and for what is no file.
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
    except (SafetensorError, ValueError, LookupError, TypeError) as error:  # the last two: it changed meanwhile
        raise CheckpointError(
            f"{path.name} is not a valid safetensors file",
            str(error),
            "download it again; an interrupted download leaves a truncated file",
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}", str(error), "check the path and its permissions") from error


def _header_length(f: BinaryIO) -> int:
    start = f.read(8)
    if len(start) < 8:
        raise ValueError(f"it has {len(start)} bytes, and its header's length alone takes 8")
    (length,) = struct.unpack("<Q", start)
    if length > HEADER_BYTES:
        raise ValueError(f"its header is said to have {length} bytes, and at most {HEADER_BYTES >> 20} MiB are read")
    return int(length)


def _tensor_info(name: str, entry: Any, base: int) -> TensorInfo:
    """An entry of the header; the library also reads one that is a list of the three values."""
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
class Output:
    """One tensor to write. `chunks` yields its bytes in order, as C-contiguous arrays."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Array]]

    @property
    def nbytes(self) -> int:
        return np.dtype(NUMPY_DTYPES[self.dtype]).itemsize * prod(self.shape)


@dataclass(frozen=True)
class FileRecord:
    """A file as manifests and journals record it: base name, size in bytes, SHA-256."""

    name: str
    size: int
    sha256: str


Writing = Generator[int, None, FileRecord]  # yields bytes written, returns the record of the finished file


def write_tensorfile(path: Path, outputs: Sequence[Output], metadata: Mapping[str, str]) -> Writing:
    """Stream `outputs` into `path`, yielding the bytes written after each chunk; returns its FileRecord.

    The file appears under its name only when complete and synced. Same outputs, same bytes.
    """
    return (yield from write_blocks(path, _file_blocks(outputs, metadata)))


def write_blocks(path: Path, blocks: Iterable[bytes | memoryview]) -> Writing:
    """Write any file as `write_tensorfile` does: hashed, synced, and under its name only when complete."""
    partial = path.with_name(path.name + ".partial")
    digest = hashlib.sha256()
    size = synced = 0
    with partial.open("wb", buffering=0) as f, ThreadPoolExecutor(1) as hasher:
        for block in blocks:
            hashed = hasher.submit(digest.update, block)
            _write_all(f, block)
            hashed.result()
            size += len(block)
            if size - synced >= SYNC_BYTES:
                os.fsync(f.fileno())
                synced = size
            yield len(block)
        os.fsync(f.fileno())
    partial.replace(path)
    return FileRecord(path.name, size, digest.hexdigest())


def _write_all(f: FileIO, block: bytes | memoryview) -> None:
    rest = memoryview(block)
    while rest:
        rest = rest[f.write(rest) :]


def tensorfile_size(outputs: Sequence[Output], metadata: Mapping[str, str]) -> int:
    """Size in bytes of the file that `write_tensorfile` would write."""
    return len(_header(outputs, metadata)) + sum(out.nbytes for out in outputs)


def _header(outputs: Sequence[Output], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for out in outputs:
        header[out.key] = {"dtype": out.dtype, "shape": list(out.shape), "data_offsets": [offset, offset + out.nbytes]}
        offset += out.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data start 8-byte aligned, as the safetensors library writes them
    return struct.pack("<Q", len(text)) + text


def _file_blocks(outputs: Sequence[Output], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    yield _header(outputs, metadata)
    for out in outputs:
        written = 0
        for chunk in out.chunks():
            block = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
            written += block.nbytes
            yield block
        if written != out.nbytes:
            raise RuntimeError(f"{out.key}: {written} bytes produced, {out.nbytes} declared")


def row_chunks(shape: tuple[int, ...], itemsize: int) -> Iterator[slice | EllipsisType]:
    """Slices of axis 0 that hold about CHUNK_BYTES each; `...` for a scalar, which has no axis to slice."""
    if not shape:
        yield ...
        return
    rows = max(1, CHUNK_BYTES // max(1, itemsize * prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield slice(start, min(shape[0], start + rows))


def read_blocks(path: Path) -> Iterator[bytes]:
    """A file's bytes in blocks of CHUNK_BYTES."""
    with path.open("rb", buffering=0) as f:
        while block := f.read(CHUNK_BYTES):
            yield block


def bf16_to_f32(codes: Array) -> Array:
    """bfloat16 codes (uint16) to float32, exact."""
    return (codes.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: Array) -> Array:
    """float32 to bfloat16 codes (uint16), rounding half to even; NaN stays NaN."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
