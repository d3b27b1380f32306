"""LoRAs in a loaded network. Factors act beside a weight that is packed, or is read in every step, and what is stored
stays what it was. To a plain weight that stays in memory they are added: then they cost no step anything, and take no
memory.

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
    """Let changes, each with its strength, act on the linear layers whose path in `changes` is `prefix` and that in the
    network, in place of factors that do; returns how many layers have some. Factors are in memory when this returns.

    A layer's factors become one pair in its float type; strengths and scales are multiplied into `up`, in float32.
    Plain layers whose path `settles` have them added to their weights for good.
    """
    files: dict[Path, dict[str, mx.array]] = {}

    def values(change: Change, part: str) -> mx.array:
        file, tensor = change.parts[part]
        if tensor.name not in files.get(file.path, {}):
            files[file.path] = cast(dict[str, mx.array], mx.load(str(file.path)))
        return files[file.path].pop(tensor.name)  # what is read and used is held no longer

    count = 0
    for path, layer in network.named_modules():
        if isinstance(layer, LinearLayer):
            found = changes.get(f"{prefix}{path}", ())
            read = [(values(change, DOWN), values(change, UP), strength * change.scale) for strength, change in found]
            mx.eval([pair[:2] for pair in read])  # reading is no part of what the device is given
            layer.release()
            if read:
                layer.take(*_joined(read))
                mx.eval(layer.factors)
                if isinstance(layer, Linear) and settles(path):
                    layer.settle()
            count += bool(read)
    return count


def detach(network: nn.Module) -> None:
    """The network's layers are again as they were."""
    attach(network, {})


def _joined(pairs: Sequence[tuple[mx.array, mx.array, float]]) -> tuple[mx.array, mx.array]:
    """Of down (rank, inputs), up (outputs, rank) and scale: down and up of their products' sum, float32."""
    downs = [down.astype(mx.float32) for down, _, _ in pairs]
    return mx.concatenate(downs), mx.concatenate([up.astype(mx.float32) * scale for _, up, scale in pairs], axis=1)
