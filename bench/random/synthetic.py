"""Checkpoints of random values with the published names and shapes, and any number of transformer blocks: what
converting is timed on."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ltx2.convert.fetch.catalogue import catalogue
from ltx2.convert.names.header import described_file, header_of
from ltx2.runtime.files.tensors import Array, TensorFile, file_header

SECTIONS = ("transformer", "audio_vae", "vocoder")  # of the configuration; they have all kinds of kernels
PREFIXES = ("model.diffusion_model.", "audio_vae.", "vocoder.")  # of their tensors
CONNECTOR = "_connector."
POOL_BYTES = 64 << 20


def write_checkpoint(path: Path, blocks: int, bits: int) -> None:
    """The oldest release's checkpoint of 16 or 8 bits: `blocks` transformer blocks and what makes sound."""
    file = checkpoint(blocks, bits)
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in file.tensors.items()}
    pools = _pools()
    with path.open("wb") as f:
        f.write(file_header(layout, file.metadata))
        for name, tensor in file.tensors.items():
            f.writelines(_values(pools[tensor.dtype], tensor.nbytes, len(name)))


def checkpoint(blocks: int, bits: int) -> TensorFile:
    """The header of what `write_checkpoint` writes."""
    published = next(p for p in catalogue().published.values() if p.bits == bits)
    whole = described_file(header_of(published.name), range(blocks, 1 << 16))
    config = json.loads(whole.metadata["config"])
    config = {name: config[name] for name in SECTIONS}
    config["transformer"]["num_layers"] = blocks
    names = (name for name in whole.tensors if name.startswith(PREFIXES) and CONNECTOR not in name)
    return TensorFile(
        whole.path, {**whole.metadata, "config": json.dumps(config)}, {name: whole.tensors[name] for name in names}
    )


def _pools() -> dict[str, Array]:
    """Random values as bytes (n,) by dtype: weights of a usual size, FP8 codes without NaN, small positive factors."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(POOL_BYTES // 2, np.float32) * np.float32(0.02)
    codes = rng.integers(0, 256, POOL_BYTES, np.uint8)
    codes[codes & 127 == 127] = 0
    factors = rng.random(POOL_BYTES // 64, np.float32) + np.float32(0.5)
    bf16 = (weights.view(np.uint32) >> 16).astype(np.uint16)
    return {"BF16": bf16.view(np.uint8), "F8_E4M3": codes, "F32": (factors / 100).view(np.uint8)}


def _values(pool: Array, size: int, start: int) -> Iterator[memoryview]:
    """`size` bytes of a pool (n,) from byte 64 * start on, round and round."""
    place = 64 * start
    while size:
        part = pool[place : place + size]
        yield part.data
        size -= len(part)
        place = 0
