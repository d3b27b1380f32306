"""GGUF files: headers read here, within bounds; values of quantized tensors by the `gguf` package.

A row of a quantized tensor is a row of blocks of bytes. Rows are decoded to float32 as they pass by."""

import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ltx2.convert.tensors.codes import Codes
from ltx2.convert.tensors.steps import Reshape, Spec, Step, from_float32
from ltx2.runtime.errors import CheckpointError, UnsupportedError, reason
from ltx2.runtime.files.paths import open_regular
from ltx2.runtime.files.tensors import FLOATS, NUMPY_DTYPES, Array, TensorFile, TensorInfo, to_float32

MAGIC = b"GGUF"
VERSIONS = (2, 3)
HEADER_BYTES = 64 << 20  # the longest that is read; the tokenizer of Gemma 3 takes about 6 MB of it
DIMENSIONS = 8
NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9  # the other types of values
FLAT = "keyframes_abs_pos_embedding"  # published with a first dimension of 1, which the format leaves out
AGAIN = "download it again; an interrupted download leaves a truncated file"


@dataclass(frozen=True)
class GgufFile(TensorFile):
    """A GGUF file's header. A quantized tensor has its GGML type as dtype (`Q4_K`), and the shape of its values.

    `metadata` has the texts, `values` everything, lists too. `own_names` are the file's names of tensors that have
    another one here; `shifted` are those stored with 1 added."""

    values: Mapping[str, Any] = field(default_factory=dict)
    own_names: Mapping[str, str] = field(default_factory=dict)
    shifted: frozenset[str] = frozenset()

    @property
    def architecture(self) -> str | None:
        return self.metadata.get("general.architecture")

    @cached_property
    def block_types(self) -> list[str]:
        """The GGML types of its quantized tensors, the most frequent first."""
        dtypes = [tensor.dtype for tensor in self.tensors.values() if tensor.dtype not in NUMPY_DTYPES]
        return sorted(set(dtypes), key=lambda dtype: (-dtypes.count(dtype), dtype))

    def own_name(self, name: str) -> str:
        return self.own_names.get(name, name)

    def typed(self, name: str, raw: Array, shape: tuple[int, ...]) -> Array:
        if self.tensors[name].dtype in NUMPY_DTYPES:
            return super().typed(name, raw, shape)
        return raw.view(np.uint8).reshape(*shape[:-1], -1)

    def steps(self, name: str) -> list[Step]:
        """The steps from a tensor's decoded values to the published ones."""
        shape = self.values.get(f"comfy.gguf.orig_shape.{self.own_name(name)}") or self.tensors[name].shape
        found: list[Step] = [Subtract()] if name in self.shifted else []
        if name.endswith(FLAT) and len(shape) == 1:
            shape = (1, *shape)
        return found + ([Reshape(tuple(shape))] if tuple(shape) != self.tensors[name].shape else [])


@dataclass(frozen=True)
class Subtract(Step):
    """Take off the 1 that was added to the weights of norms, in float32."""

    def __str__(self) -> str:
        return "add(-1)"

    def spec(self, spec: Spec) -> Spec:
        return Spec(spec.shape, "F32")

    def rows(self, rows: Array, spec: Spec, start: int) -> Array:
        return to_float32(rows, spec.dtype) - np.float32(1)


@dataclass(frozen=True)
class Blocks(Codes):
    """Values in GGML's blocks; MLX has no such codes."""

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.tensor.dtype.lower()

    def shape(self, spec: Spec) -> tuple[int, ...]:
        return spec.shape

    def decoded(self, rows: Array, spec: Spec, start: int, dtype: str) -> Array:
        values = decoder(self.tensor.dtype)(np.ascontiguousarray(rows))
        if not np.isfinite(values).all():
            what = f"tensor {self.file.own_name(self.tensor.name)} of {self.file.path.name} holds values not a number"
            raise CheckpointError(what, "a scale of its blocks is not a number", "download it again")
        return from_float32(values, FLOATS[dtype])


@cache
def decoder(name: str) -> Callable[[Array], Array]:
    """The function from rows of blocks (n, bytes) to float32 (n, values). Raises UnsupportedError for a type that the
    package does not decode."""
    import gguf  # takes a second, and few need it

    kind = gguf.GGMLQuantizationType[name]

    def decode(rows: Array) -> Array:
        return gguf.quants.dequantize(rows, kind)

    try:
        decode(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8))
    except NotImplementedError as error:
        raise UnsupportedError(
            f"{name} values cannot be decoded", str(error), "use a GGUF of another type, such as Q8_0, or a bf16 file"
        ) from error
    return decode


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do: with the letters and a version."""
    try:
        with open_regular(path) as file:
            head = file.read(8)
            return head[:4] == MAGIC and head[4:] != bytes(4)  # else the length of a safetensors header
    except OSError:
        return False  # its reader says what is wrong


def open_gguf(path: Path) -> GgufFile:
    """Read a GGUF header. Raises CheckpointError for a malformed or truncated file, UnsupportedError for one part of
    several."""
    try:
        with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            size = len(mapped)
            header = _Header(mapped[:HEADER_BYTES])
        if header.number("<I") not in VERSIONS:
            raise ValueError("it is of another version than 2 and 3, or big-endian")
        count, pairs = header.number("<Q"), header.number("<Q")
        values = {header.text(): header.value() for _ in range(header.checked(pairs))}
        if values.get("split.count", 1) != 1:
            raise UnsupportedError(
                f"{path.name} is one part of {values['split.count']}",
                "a GGUF in several files is one file cut into pieces",
                "put them together: llama-gguf-split --merge FIRST-PART OUT.gguf",
            )
        entries = [header.tensor() for _ in range(header.checked(count))]
        alignment = values.get("general.alignment", 32)
        base = header.position + -header.position % alignment
        tensors = {name: _tensor_info(name, shape, kind, base + start) for name, shape, kind, start in entries}
        if len(tensors) != count:
            raise ValueError("a tensor's name occurs twice")
        longest = max((tensor.end for tensor in tensors.values()), default=0)
        if longest > size:
            raise ValueError(f"it has {size} bytes, and its tensors end at byte {longest}")
    except (ValueError, LookupError, TypeError, ZeroDivisionError, struct.error) as error:
        raise CheckpointError(f"{path.name} is not a valid GGUF file", reason(error), AGAIN) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}", reason(error), "check the path and its permissions") from error
    metadata = {key: value for key, value in values.items() if isinstance(value, str)}
    return GgufFile(path, metadata, tensors, size, values)


class _Header:
    """A header's bytes, read in order. Raises ValueError or struct.error where they end too early."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, len(MAGIC)

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.position)
        self.position += struct.calcsize(form)
        return value

    def checked(self, count: int) -> int:
        """The number of things that follow, each of at least one byte."""
        if count > len(self.data) - self.position:
            raise ValueError(f"its header announces {count} things and ends before them")
        return count

    def text(self) -> str:
        length = self.checked(self.number("<Q"))
        self.position += length
        return self.data[self.position - length : self.position].decode()

    def value(self) -> Any:
        kind = self.number("<I")
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(NUMBERS[kind])
        of, count = self.number("<I"), self.checked(self.number("<Q"))
        if of == STRING:
            return [self.text() for _ in range(count)]
        values = np.frombuffer(self.data, np.dtype(NUMBERS[of].replace("?", "b1")), count, self.position)
        self.position += values.nbytes
        return values.tolist()

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape (stored with the innermost dimension first), GGML type, place behind the header."""
        name, dimensions = self.text(), self.number("<I")
        if not 0 < dimensions <= DIMENSIONS:
            raise ValueError(f"tensor {name!r} is said to have {dimensions} dimensions")
        shape = tuple(reversed([self.number("<Q") for _ in range(dimensions)]))
        return name, shape, self.number("<I"), self.number("<Q")


def _tensor_info(name: str, shape: tuple[int, ...], kind: int, start: int) -> TensorInfo:
    dtype, values, size = _ggml_type(kind)
    if shape[-1] % values:
        raise ValueError(f"rows of {name!r} are no whole blocks of {dtype}")
    return TensorInfo(name, dtype, shape, start, start + prod(shape) // values * size)


@cache
def _ggml_type(kind: int) -> tuple[str, int, int]:
    """Name, and values and bytes of a block."""
    import gguf

    found = gguf.GGMLQuantizationType(kind)  # raises ValueError
    return found.name, *gguf.GGML_QUANT_SIZES[found]
