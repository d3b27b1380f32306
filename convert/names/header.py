"""The headers of published files (headers/*.json), for plans before a download.

A header file maps published file names to their sizes (null: unknown) and has the number of bytes of their data.
Tensors are [dtype, *shape] by name; `{0-47}` and `{to_k,to_q}` in a name stand for each of these. `like` takes over the
tensors of other header files, with a prefix, and the first one's metadata; `without` leaves some of them out, and
`quantized` stores some of their layers in another format. `<N characters>` in the metadata stands for N characters."""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ltx2.runtime.errors import InputError
from ltx2.runtime.files.tensors import Array, TensorFile, TensorInfo, tensor_bytes

HEADERS = Path(__file__).parent / "headers"
BRACES = re.compile(r"\{([^{}]*)\}")
BLOCK = re.compile(r"(?:^|\.)transformer_blocks\.(\d+)\.")
NONE = range(0)
# ComfyUI's mark beside int8 codes, as it writes it.
INT8_MARK = b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}'
# Line ends and quotes in the licence text by its length: JSON escapes them, so they count twice in the file's size.
ESCAPED = {21426: 420, 21427: 420, 34561: 622, 34562: 623}
Spec = tuple[str, tuple[int, ...]]
Tensors = dict[str, Spec]


def expand(pattern: str, skip: range = NONE) -> Iterator[str]:
    """All names of a pattern: `{a,b}` is each of its parts, `{0-3}` each of these numbers. Transformer blocks whose
    number is in `skip` are left out."""
    match = BRACES.search(pattern)
    if match is None:
        if not (skip and (block := BLOCK.search(pattern)) and int(block[1]) in skip):
            yield pattern
        return
    before, after = pattern[: match.start()], pattern[match.end() :]
    for part in match[1].split(","):
        numbers = re.fullmatch(r"(\d+)-(\d+)", part)
        values = range(int(numbers[1]), int(numbers[2]) + 1) if numbers else (part,)
        for value in values:
            if not (numbers and value in skip and before.endswith("transformer_blocks.")):
                yield from expand(f"{before}{value}{after}", skip)


def read_header(name: str, skip: range = NONE) -> tuple[dict[str, int | None], dict[str, str], Tensors]:
    """One header file: published file names with their sizes, metadata, and tensors, without the transformer blocks
    whose number is in `skip`."""
    return header_data(name)["files"], _metadata(name), dict(_tensors(name, skip))


def header_of(file: str) -> str:
    """The name of a published file's header file. Raises InputError where there is none."""
    if file not in _names():
        raise InputError(f"{file} is not known before it is downloaded", "its header is not at hand", "download it")
    return _names()[file]


class DescribedFile(TensorFile):
    """A published file's header without its data, but for the marks beside int8 codes, which are all the same."""

    def array(self, name: str) -> Array:
        assert name.endswith(".comfy_quant"), "the one kind of tensor that plans read"
        return np.frombuffer(INT8_MARK, np.uint8)


def described_file(header: str, skip: range = NONE) -> TensorFile:
    """A published file as its header describes it."""
    _, metadata, tensors = read_header(header, skip)
    infos, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + tensor_bytes(dtype, shape)
        infos[name] = TensorInfo(name, dtype, shape, start, end)
    return DescribedFile(Path(f"{header}.safetensors"), metadata, infos)


@cache
def _names() -> Mapping[str, str]:
    """Published file -> name of its header file."""
    return {file: path.stem for path in HEADERS.glob("*.json") for file in header_data(path.stem).get("files", ())}


@cache
def header_data(name: str) -> dict[str, Any]:
    """A header file's content."""
    data: dict[str, Any] = json.loads((HEADERS / f"{name}.json").read_text())
    return data


def _metadata(name: str) -> dict[str, str]:
    data = header_data(name)
    own = {key: _text(key, value) for key, value in data.get("metadata", {}).items()}
    metadata = own or _metadata(next(iter(data["like"])))
    quantized = data.get("quantized", {})
    if quantized.get("format") in ("float8_e4m3fn", "nvfp4"):
        layers = sorted(chain(*map(expand, quantized["layers"])))
        record = {"format_version": "1.0", "layers": {layer: {"format": quantized["format"]} for layer in layers}}
        metadata |= {"_quantization_metadata": json.dumps(record)}
    return metadata


@cache
def _tensors(name: str, skip: range) -> Tensors:
    data = header_data(name)
    tensors: Tensors = {}

    def names(patterns: Iterator[str]) -> Iterator[str]:
        return (found for pattern in patterns for found in expand(pattern, skip))

    for other, prefix in data.get("like", {}).items():
        tensors |= {prefix + key: spec for key, spec in _tensors(other, skip).items()}
    for key in names(iter(data.get("without", ()))):
        del tensors[key]
    for pattern, (dtype, *shape) in data.get("tensors", {}).items():
        tensors |= dict.fromkeys(expand(pattern, skip), (dtype, tuple(shape)))
    for layer in names(iter(data.get("quantized", {}).get("layers", ()))):
        tensors |= quantized_layer(layer, data["quantized"]["format"], tensors[f"{layer}.weight"][1])
    return tensors


def quantized_layer(layer: str, kind: str, shape: tuple[int, ...]) -> Tensors:
    """The tensors of a linear layer (outputs, inputs) in the published quantized files."""
    rows, columns = shape
    scalar: Spec = ("F32", ())
    specs: dict[str, Tensors] = {
        "float8_e4m3fn": {"weight": ("F8_E4M3", shape), "weight_scale": scalar, "input_scale": scalar},
        "nvfp4": {
            "weight": ("U8", (rows, columns // 2)), "weight_scale": ("F8_E4M3", (rows, columns // 16)),
            "weight_scale_2": scalar, "input_scale": scalar,
        },
        "int8": {
            "weight": ("I8", shape), "weight_scale": ("F32", (rows, 1)), "comfy_quant": ("U8", (len(INT8_MARK),)),
        },
    }  # fmt: skip
    return {f"{layer}.{part}": spec for part, spec in specs[kind].items()}


def _text(key: str, value: Any) -> str:
    """A value of a file's metadata."""
    if not isinstance(value, str):
        return json.dumps(value, separators=(",", ":") if key == "gemma_config" else None)
    match = re.fullmatch(r"<(\d+) characters>", value)
    if match is None:
        return value
    length = int(match[1])
    escaped = ESCAPED.get(length, 0)
    return "\n" * escaped + "x" * (length - escaped)
