"""A clip's tiles dealt out to machines, which decode one each at a time: the frames are those of one machine."""

from collections.abc import Iterator, Sequence
from math import prod

import mlx.core as mx

from ltx2.runtime.distributed.machines import Machines
from ltx2.runtime.networks.video_vae.frames import Decode, Place


def shared_tiles(machines: Machines, places: Sequence[Place], decode: Decode) -> Iterator[mx.array]:
    """The tiles at these places in order, (F, H, W, 3) each, on all machines. Memory holds one tile per machine."""
    dtype = None
    for start in range(0, len(places), machines.size):
        turn = places[start : start + machines.size]
        shapes = [(*(span.target.stop - span.target.start for span in place), 3) for place in turn]
        mine = turn[machines.rank] if machines.rank < len(turn) else None
        own = mx.zeros((0,)) if mine is None else decode(*(span.source for span in mine)).reshape(-1)
        if dtype is None:  # a machine may have no tile at all to know it from
            dtype = getattr(mx, machines.everyone(str(own.dtype))[0].rpartition(".")[2])
        own = mx.pad(own.astype(dtype), (0, max(map(prod, shapes)) - own.size))
        for tile, shape in zip(machines.stack(own), shapes, strict=False):
            yield tile[: prod(shape)].reshape(shape)
