"""The real files' headers (tests/headers/*.json): sparse files of full size without data, so that the code under test
reads them as it would read the published ones.

A header file maps published file names to their sizes (null: unknown) and says how many bytes of data they hold.
Tensors are [dtype, *shape] by name; `{0-47}` and `{to_k,to_q}` in a name stand for each of these. `like` takes the
tensors of other header files over, with a prefix, and the first one's metadata; `without` leaves some of these out, and
`quantized` stores some of their layers in another format. `<N characters>` in the metadata stands for N characters."""

import json
import re
import struct
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

BRACES = re.compile(r"\{([^{}]*)\}")
HEADERS = Path(__file__).parent / "headers"
MONOLITH = "ltx-2-19b"
SPATIAL = "ltx-2-spatial-upscaler-x2-1.0"
TEMPORAL = "ltx-2-temporal-upscaler-x2-1.0"
LORA = "ltx-2-19b-distilled-lora-384"
GEMMA = tuple(f"gemma-3-12b-it-{n}" for n in range(1, 6))
# In the order in which the safetensors library lays tensors out, with their bytes per value.
SIZES = {"F64": 8, "F32": 4, "U32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}
# Line ends and quotes in the licence text, by its length: escaped in JSON, so they count twice in the file's size.
ESCAPED = {21426: 420, 21427: 420, 34561: 622, 34562: 623}
COMFY_QUANT = 72  # bytes of JSON
Spec = tuple[str, tuple[int, ...]]
Tensors = dict[str, Spec]


def expand(pattern: str) -> Iterator[str]:
    """All names that a pattern stands for: `{a,b}` is each of its parts, `{0-3}` each of these numbers."""
    match = BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    for part in match[1].split(","):
        numbers = re.fullmatch(r"(\d+)-(\d+)", part)
        for value in range(int(numbers[1]), int(numbers[2]) + 1) if numbers else (part,):
            yield from expand(f"{pattern[: match.start()]}{value}{pattern[match.end() :]}")


def header_names() -> list[str]:
    """All header files but the shards of Gemma."""
    return sorted(path.stem for path in HEADERS.glob("*.json") if not path.stem.startswith("gemma-3"))


def read_header(name: str) -> tuple[dict[str, int | None], dict[str, str], Tensors]:
    """Published file names with their sizes, metadata and tensors of one header file."""
    return _data(name)["files"], _metadata(name), dict(_tensors(name))


def data_bytes(name: str) -> int:
    """Bytes of data in one of the header file's published files."""
    return int(_data(name)["bytes"])


@cache
def _data(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((HEADERS / f"{name}.json").read_text())
    return data


def _metadata(name: str) -> dict[str, str]:
    data = _data(name)
    own = {key: _text(key, value) for key, value in data.get("metadata", {}).items()}
    metadata = own or _metadata(next(iter(data["like"])))
    quantized = data.get("quantized", {})
    if quantized.get("format") in ("float8_e4m3fn", "nvfp4"):
        layers = sorted(chain(*map(expand, quantized["layers"])))
        record = {"format_version": "1.0", "layers": {layer: {"format": quantized["format"]} for layer in layers}}
        metadata |= {"_quantization_metadata": json.dumps(record)}
    return metadata


@cache
def _tensors(name: str) -> Tensors:
    data = _data(name)
    tensors: Tensors = {}
    for other, prefix in data.get("like", {}).items():
        tensors |= {prefix + key: spec for key, spec in _tensors(other).items()}
    for key in chain(*map(expand, data.get("without", ()))):
        del tensors[key]
    for pattern, (dtype, *shape) in data.get("tensors", {}).items():
        tensors |= dict.fromkeys(expand(pattern), (dtype, tuple(shape)))
    for layer in chain(*map(expand, data.get("quantized", {}).get("layers", ()))):
        tensors |= quantized_layer(layer, data["quantized"]["format"], tensors[f"{layer}.weight"][1])
    return tensors


def quantized_layer(layer: str, kind: str, shape: tuple[int, ...]) -> Tensors:
    """The tensors of a linear layer of this shape as the quantized files store it."""
    rows, columns = shape
    scalar: Spec = ("F32", ())
    specs: dict[str, Tensors] = {
        "float8_e4m3fn": {"weight": ("F8_E4M3", shape), "weight_scale": scalar, "input_scale": scalar},
        "nvfp4": {
            "weight": ("U8", (rows, columns // 2)), "weight_scale": ("F8_E4M3", (rows, columns // 16)),
            "weight_scale_2": scalar, "input_scale": scalar,
        },
        "int8": {
            "weight": ("I8", shape), "weight_scale": ("F32", (rows, 1)), "comfy_quant": ("U8", (COMFY_QUANT,)),
        },
    }  # fmt: skip
    return {f"{layer}.{part}": spec for part, spec in specs[kind].items()}


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        return json.dumps(value, separators=(",", ":") if key == "gemma_config" else None)
    match = re.fullmatch(r"<(\d+) characters>", value)
    if match is None:
        return value
    length = int(match[1])
    escaped = ESCAPED.get(length, 0)
    return "\n" * escaped + "x" * (length - escaped)


def write_sparse(path: Path, tensors: Tensors, metadata: dict[str, str]) -> Path:
    """A safetensors file of full apparent size whose data are a hole."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name in sorted(tensors, key=lambda n: (list(SIZES).index(tensors[n][0]), n)):
        dtype, shape = tensors[name]
        end = offset + SIZES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + offset)
    return path


def write_published(folder: Path, name: str) -> list[Path]:
    """The sparse look-alikes of one header file's published files."""
    files, metadata, tensors = read_header(name)
    return [write_sparse(folder / file, tensors, metadata) for file in files]


def write_gemma(folder: Path, renamed: Iterable[tuple[str, str]] = ()) -> Path:
    """The published Gemma folder: five shards, index and configuration. `renamed` are (pattern, replacement) pairs for
    the tensors' names."""
    folder.mkdir()
    where: dict[str, str] = {}
    for shard in GEMMA:
        files, metadata, tensors = read_header(shard)
        for pattern, replacement in renamed:
            tensors = {re.sub(pattern, replacement, name): spec for name, spec in tensors.items()}
        for file in files:
            write_sparse(folder / file, tensors, metadata)
            where |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_bytes((HEADERS / "gemma-3-12b-it-config.json").read_bytes())
    return folder


def write_upscaler(path: Path, width: int) -> Path:
    """A sparse spatial upscaler with other numbers of channels than the published 1024; 768: 560 MB."""
    _, metadata, tensors = read_header(SPATIAL)
    channels = {1024: width, 4096: 4 * width}
    other = {n: (dtype, tuple(channels.get(d, d) for d in shape)) for n, (dtype, shape) in tensors.items()}
    config = json.loads(metadata["config"]) | {"mid_channels": width}
    return write_sparse(path, other, {"config": json.dumps(config)})
