"""A model folder of the published sizes whose weights are holes in sparse files: headers and configurations only."""

import json
import shutil
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ltx2.bench.random.model import random_folder
from ltx2.runtime.files.tensors import FileRecord
from ltx2.runtime.model.layout import ComponentRecord, Manifest
from ltx2.runtime.networks.load import build_network

DTYPES = {mx.float32: "F32", mx.bfloat16: "BF16", mx.uint32: "U32"}
WIDTHS = {"F32": 4, "BF16": 2, "U32": 4}


def write_sparse_model(path: Path, tokenizer: Path, bits: int = 16) -> Path:
    """All networks of the oldest release in bf16, the transformer's blocks at `bits`; `tokenizer` is a folder with the
    text encoder's."""
    published = random_folder("ltx-2-distilled")
    components = {}
    for name in published.manifest.components:
        class_name, config = published.record(name).cls, published.config(name)
        packed = {"group_size": 64, "bits": bits, "mode": "affine"} if name == "transformer" and bits < 16 else None
        folder = path / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config | ({"quantization": packed} if packed else {})))
        size = _write_holes(folder / "model.safetensors", _tensors(class_name, config, packed))
        files = (FileRecord("config.json", 0, "0" * 64), FileRecord("model.safetensors", size, "0" * 64))
        components[name] = ComponentRecord(class_name, files, "bf16", packed)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, path / "text_encoder")
    (path / "ltx2.json").write_text(Manifest("2.0", "distilled", "0.0", components).to_json())
    return path


def _tensors(class_name: str, config: Mapping[str, Any], packed: Mapping[str, Any] | None) -> dict[str, Any]:
    """Name -> (dtype, shape) as a conversion writes them."""
    network = build_network(class_name, config)
    if packed:
        for block in network["transformer_blocks"]:
            nn.quantize(block, packed["group_size"], packed["bits"])
    found = {}
    for name, value in cast(list[tuple[str, mx.array]], tree_flatten(network.parameters())):
        dtype = DTYPES[value.dtype]
        keeps = dtype == "U32" or "scale_shift_table" in name
        found[name] = (dtype if keeps else "BF16", value.shape)
    return found


def _write_holes(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + prod(shape) * WIDTHS[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return 8 + len(text) + end
