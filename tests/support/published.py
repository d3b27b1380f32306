"""Sparse files of full size without data but for the marks beside int8 codes, with the published files' headers: the
code under test reads them as it would read the published ones."""

import json
import re
import struct
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

from ltx2.convert.names.header import HEADERS as HEADERS
from ltx2.convert.names.header import INT8_MARK, header_data
from ltx2.convert.names.header import Tensors as Tensors
from ltx2.convert.names.header import read_header as read_header

MONOLITH = "ltx-2-19b"
SPATIAL = "ltx-2-spatial-upscaler-x2-1.0"
TEMPORAL = "ltx-2-temporal-upscaler-x2-1.0"
LORA = "ltx-2-19b-distilled-lora-384"
GEMMA = tuple(f"gemma-3-12b-it-{n}" for n in range(1, 6))
# In the order in which the safetensors library lays tensors out, with their bytes per value.
SIZES = {"F64": 8, "F32": 4, "U32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}


def header_names() -> list[str]:
    """All header files but the shards of Gemma."""
    return sorted(path.stem for path in HEADERS.glob("*.json") if not path.stem.startswith("gemma-3"))


def data_bytes(name: str) -> int:
    """Bytes of data in one of the header file's published files."""
    return int(header_data(name)["bytes"])


def write_sparse(path: Path, tensors: Tensors, metadata: dict[str, str]) -> Path:
    """A safetensors file of full apparent size whose data are a hole, but for the marks beside int8 codes."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    order = {dtype: place for place, dtype in enumerate(SIZES)}
    for name in sorted(tensors, key=lambda n: (order[tensors[n][0]], n)):
        dtype, shape = tensors[name]
        end = offset + SIZES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + offset)
        for name, (_, shape) in tensors.items():
            if name.endswith("comfy_quant") and shape == (len(INT8_MARK),):
                f.seek(8 + len(text) + header[name]["data_offsets"][0])
                f.write(INT8_MARK)
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
