"""Writing safetensors files: a header that is known before the data, so that tensors can be written as they come."""

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ltx2.runtime.files.ranges import write_file
from ltx2.runtime.files.tensors import NUMPY_DTYPES, Array

Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> safetensors dtype, shape; in the order of the data


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Size in bytes of a tensor's data."""
    return np.dtype(NUMPY_DTYPES[dtype]).itemsize * prod(shape)


def file_header(layout: Layout, metadata: Mapping[str, str]) -> bytes:
    """What stands in the file before the first tensor's data. Same layout, same bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in layout.items():
        end = offset + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data start 8-byte aligned, as the safetensors library writes them
    return struct.pack("<Q", len(text)) + text


def write_tensorfile(path: Path, tensors: Mapping[str, tuple[str, Array]], metadata: Mapping[str, str]) -> None:
    """Write tensors (dtype, values as in NUMPY_DTYPES), which appear under the file's name only when complete."""
    layout = {name: (dtype, values.shape) for name, (dtype, values) in tensors.items()}
    write_file(path, [file_header(layout, metadata), *(raw_bytes(values) for _, values in tensors.values())])


def raw_bytes(values: Array) -> memoryview:
    """An array's bytes in C order."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
