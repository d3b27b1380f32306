"""LoRAs in a loaded network. Their factors act beside a weight that is packed, or is read in every step. They are added
to a plain weight that stays in memory: then they take neither time in a step nor memory.

Beside a weight they are not cheap where tokens are few: of rank 384, as the distilled LoRA's, they take a fifth of the
operations of a layer 4096 wide."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from ltx2.runtime.layers.linear import Linear, LinearLayer
from ltx2.runtime.model.loras import Change
from ltx2.runtime.model.names import DOWN, UP


def attach(
    network: nn.Module,
    changes: Mapping[str, Sequence[tuple[float, Change]]],
    prefix: str = "",
    settles: Callable[[str], bool] = lambda path: False,
) -> int:
    """Let changes, each with its strength, act on a network's linear layers, in place of earlier ones (no changes:
    none act any more). A layer's key in `changes` is `prefix` and its path in the network. Returns how many layers have
    some; their factors are in memory then.

    A layer's factors become one pair in its float type; strengths and scales are multiplied into `up`, in float32.
    Plain layers whose path `settles` get them added to their weights for good.
    """
    files: dict[Path, dict[str, mx.array]] = {}

    def values(change: Change, part: str) -> mx.array:
        file, tensor = change.parts[part]
        if tensor.name not in files.get(file.path, {}):
            files[file.path] = cast(dict[str, mx.array], mx.load(str(file.path)))
        return files[file.path].pop(tensor.name)  # so that it is freed after use

    count = 0
    for path, layer in network.named_modules():
        if isinstance(layer, LinearLayer):
            found = changes.get(f"{prefix}{path}", ())
            read = [(values(change, DOWN), values(change, UP), strength * change.scale) for strength, change in found]
            mx.eval([pair[:2] for pair in read])  # so that the device does not wait for the disk
            layer.release()
            if read:
                layer.take(*_joined(read))
                mx.eval(layer.factors)
                if isinstance(layer, Linear) and settles(path):
                    layer.settle()
            count += bool(read)
    return count


def _joined(pairs: Sequence[tuple[mx.array, mx.array, float]]) -> tuple[mx.array, mx.array]:
    """Several changes of one layer as one: from down (rank, inputs), up (outputs, rank) and scale of each to down and
    up of the sum of their products, float32."""
    downs = [down.astype(mx.float32) for down, _, _ in pairs]
    return mx.concatenate(downs), mx.concatenate([up.astype(mx.float32) * scale for _, up, scale in pairs], axis=1)
