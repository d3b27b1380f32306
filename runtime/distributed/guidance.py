"""A guided step's passes dealt out to machines: one exchange of x0s, and the same bits as on one."""

from collections.abc import Mapping
from itertools import islice
from typing import Any

import mlx.core as mx

from ltx2.runtime.distributed.machines import Machines
from ltx2.runtime.sampling.denoise import Denoiser
from ltx2.runtime.sampling.guidance import Pass
from ltx2.runtime.sampling.samplers import Tokens
from ltx2.runtime.streams import Streams


class SharedPasses(Denoiser):
    """A denoiser that deals the calls of a step out to several machines; a machine without a call in the last turn
    waits. Arguments are the denoiser's.

    All machines go on from the same x0s. GPUs that round differently make slightly different tokens; steps towards a
    common x0 keep that from growing."""

    def __init__(self, machines: Machines, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._machines = machines

    def run(self, x: Tokens, sigma: float, calls: Mapping[str, Pass]) -> dict[str, Tokens]:
        """x0s of all calls by name, on all machines."""
        if not calls:
            return {}
        size, rank = self._machines.size, self._machines.rank
        idle = next(iter(calls.values())).skips.idle
        awake = Streams(**{name: tokens for name, tokens in x.items() if not getattr(idle, name)})
        own = [_flat(self(x, sigma, calls[name])) for name in islice(calls, rank, None, size)]
        turns = -(-len(calls) // size)
        own += [mx.zeros_like(_flat(awake))] * (turns - len(own))
        found = self._machines.stack(mx.stack(own))
        places = (divmod(number, size) for number in range(len(calls)))
        return {name: _like(found[rank, turn], awake) for name, (turn, rank) in zip(calls, places, strict=True)}


def _flat(x: Tokens) -> mx.array:
    """All streams' values in a row, (values,)."""
    return mx.concatenate([tokens.reshape(-1) for tokens in x.values()])


def _like(values: mx.array, shapes: Tokens) -> Tokens:
    """Inverse of `_flat`: streams shaped as `shapes` from values (values,)."""
    end, found = 0, {}
    for name, tokens in shapes.items():
        start, end = end, end + tokens.size
        found[name] = values[start:end].reshape(tokens.shape)
    return Streams(**found)
