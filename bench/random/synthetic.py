"""Checkpoints of random values in the published layout, of any number of transformer blocks: what converting is
timed on. Names and shapes are the networks' own, read backwards through the published names."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ltx2.bench.random.published import published
from ltx2.convert.names import rules
from ltx2.runtime.files.tensors import Array, file_header, tensor_bytes
from ltx2.runtime.networks.load import build_network, parameter_shapes

COMPONENTS = ("transformer", "audio_vae", "vocoder")  # the latter two have all kinds of kernels
ORDER = ("F32", "BF16", "F8_E4M3")  # of a file, each part sorted by name
POOL_BYTES = 64 << 20
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def write_checkpoint(path: Path, blocks: int, fp8: bool) -> None:
    """A checkpoint with `blocks` transformer blocks and what makes sound, which holds all kinds of kernels; with `fp8`,
    the blocks' linears are scaled codes."""
    tensors, config = checkpoint_tensors(blocks)
    tensors = dict(_scaled(tensors)) if fp8 else tensors
    order = sorted(tensors, key=lambda name: (ORDER.index(tensors[name][0]), name))
    _write(path, {name: tensors[name] for name in order}, {"config": json.dumps(config)})


def checkpoint_tensors(blocks: int) -> tuple[Tensors, dict[str, Any]]:
    """Names, dtypes and shapes of the tensors, and the configuration."""
    tensors: Tensors = {}
    config: dict[str, Any] = {}
    for component in COMPONENTS:
        name, values = published()["networks"][component]
        config[component] = values | ({"num_layers": blocks} if component == "transformer" else {})
        for key, shape in parameter_shapes(build_network(name, config[component])).items():
            dtype = "F32" if "scale_shift_table" in key else "BF16"
            tensors[rules.published(component, key)] = dtype, rules.published_shape(component, key, shape)
    return tensors, config


def _scaled(tensors: Tensors) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    for name, (dtype, shape) in tensors.items():
        if "transformer_blocks." in name and name.endswith(".weight") and len(shape) == 2:
            yield name, ("F8_E4M3", shape)
            yield f"{name}_scale", ("F32", ())
            yield f"{name.removesuffix('weight')}input_scale", ("F32", ())
        else:
            yield name, (dtype, shape)


def _write(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    pools = _pools()
    with path.open("wb") as f:
        f.write(file_header(tensors, metadata))
        for name, (dtype, shape) in tensors.items():
            f.writelines(_values(pools[dtype], tensor_bytes(dtype, shape), len(name)))


def _pools() -> dict[str, Array]:
    """Random values as bytes: weights of a usual size, FP8 codes without NaN, small positive factors."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(POOL_BYTES // 2, np.float32) * np.float32(0.02)
    codes = rng.integers(0, 256, POOL_BYTES, np.uint8)
    codes[codes & 127 == 127] = 0
    factors = rng.random(POOL_BYTES // 64, np.float32) + np.float32(0.5)
    bf16 = (weights.view(np.uint32) >> 16).astype(np.uint16)
    return {"BF16": bf16.view(np.uint8), "F8_E4M3": codes, "F32": (factors / 100).view(np.uint8)}


def _values(pool: Array, size: int, start: int) -> Iterator[memoryview]:
    """`size` bytes from a place of the pool on, round and round."""
    place = 64 * start
    while size:
        part = pool[place : place + size]
        yield part.data
        size -= len(part)
        place = 0
