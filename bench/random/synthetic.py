"""Checkpoints of random values in the published layout, of any number of transformer blocks: what converting is
timed on. Names and shapes are the networks' own, read backwards through the published names."""

import json
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ltx2.bench.random.published import published
from ltx2.runtime.files.tensors import Array
from ltx2.runtime.networks.load import build_network, parameter_shapes

# Prefix of each component's names, and how names and their parts are published.
PREFIXES = {"transformer": "model.diffusion_model.", "audio_vae": "audio_vae.", "vocoder": "vocoder."}
PUBLISHED = (
    (".to_out.", ".to_out.0."), ("ff.proj_in.", "ff.net.0.proj."), ("ff.proj_out.", "ff.net.2."),
    ("per_channel_statistics.mean", "per_channel_statistics.mean-of-means"),
    ("per_channel_statistics.std", "per_channel_statistics.std-of-means"),
)  # fmt: skip
LINEARS = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight", ".net.0.proj.weight", ".net.2.weight")
SIZES = {"F32": 4, "BF16": 2, "F8_E4M3": 1}  # files are in this order, each part sorted by name
POOL_BYTES = 64 << 20
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def write_checkpoint(path: Path, blocks: int, fp8: bool) -> None:
    """A checkpoint with `blocks` transformer blocks and what makes sound, which holds all kinds of kernels; with `fp8`,
    the blocks' linears are scaled codes."""
    tensors, config = checkpoint_tensors(blocks)
    tensors = dict(_scaled(tensors)) if fp8 else tensors
    order = sorted(tensors, key=lambda name: (list(SIZES).index(tensors[name][0]), name))
    _write(path, {name: tensors[name] for name in order}, {"config": json.dumps(config)})


def checkpoint_tensors(blocks: int) -> tuple[Tensors, dict[str, Any]]:
    """Names, dtypes and shapes of the tensors, and the configuration."""
    tensors: Tensors = {}
    config: dict[str, Any] = {}
    for component, prefix in PREFIXES.items():
        name, values = networks()[component]
        config[component] = values | ({"num_layers": blocks} if component == "transformer" else {})
        tensors |= _published(prefix, parameter_shapes(build_network(name, config[component])))
    return tensors, config


def networks() -> dict[str, Any]:
    """Class and configuration of every published network by component."""
    return dict(published()["networks"])


def _published(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Names and shapes as in the published file; kernels have their input channels second there."""
    tensors: Tensors = {}
    for name, shape in shapes.items():
        for ours, theirs in PUBLISHED:
            name = name.replace(ours, theirs)
        kernel = (shape[0], shape[-1], *shape[1:-1]) if len(shape) > 2 else shape
        if name.startswith("ups.") and len(shape) == 3:  # transposed convolutions have them first
            kernel = (shape[2], shape[0], shape[1])
        tensors[prefix + name] = ("F32" if "scale_shift_table" in name else "BF16", kernel)
    return tensors


def _scaled(tensors: Tensors) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    for name, (dtype, shape) in tensors.items():
        if "transformer_blocks." in name and name.endswith(LINEARS):
            yield name, ("F8_E4M3", shape)
            yield f"{name}_scale", ("F32", ())
            yield f"{name.removesuffix('weight')}input_scale", ("F32", ())
        else:
            yield name, (dtype, shape)


def _write(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + SIZES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    pools = _pools()
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, (dtype, shape) in tensors.items():
            f.writelines(_values(pools[dtype], SIZES[dtype] * prod(shape), len(name)))


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
