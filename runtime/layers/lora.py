"""LoRA factors beside the weights of linear layers, never fused into them: so they act on packed, rotated and streamed
weights as on plain ones, which stay what they were."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from ltx2.runtime.layers.linear import Factors, LinearLayer
from ltx2.runtime.model.loras import Change
from ltx2.runtime.model.names import DOWN, UP


def attach(network: nn.Module, changes: Mapping[str, Sequence[tuple[float, Change]]], prefix: str = "") -> int:
    """Let changes, each with its strength, act on the linear layers whose path in `changes` is `prefix` and that in the
    network, in place of those that do; returns how many layers have some. Factors are in memory when this returns.

    A layer's factors become one pair in its float type; strengths and scales are multiplied into `up`, in float32.
    """
    files: dict[Path, dict[str, mx.array]] = {}

    def values(change: Change, part: str) -> mx.array:
        file, tensor = change.parts[part]
        if file.path not in files:
            files[file.path] = cast(dict[str, mx.array], mx.load(str(file.path)))
        return files[file.path][tensor.name]

    count = 0
    for path, layer in network.named_modules():
        if isinstance(layer, LinearLayer):
            found = changes.get(f"{prefix}{path}", ())
            read = [(values(change, DOWN), values(change, UP), strength * change.scale) for strength, change in found]
            mx.eval([pair[:2] for pair in read])  # reading is no part of what the device is given
            layer.factors = _joined(read, layer.dtype) if read else None
            count += bool(read)
    return count


def detach(network: nn.Module) -> None:
    """The network's layers are again as they were."""
    attach(network, {})


def _joined(pairs: Sequence[tuple[mx.array, mx.array, float]], dtype: mx.Dtype) -> Factors:
    """Of down (rank, inputs), up (outputs, rank) and scale: factors of their products' sum."""
    downs = [down.astype(dtype) for down, _, _ in pairs]
    ups = [(up.astype(mx.float32) * scale).astype(dtype) for _, up, scale in pairs]
    factors = Factors(mx.concatenate(downs), mx.concatenate(ups, axis=1))
    mx.eval(factors.down, factors.up)
    return factors
