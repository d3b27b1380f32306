"""A call's video tokens dealt out to machines. Each computes its own, and attends to the keys and values of all: they
are gathered in self-attention, and where the sound attends to the picture.

The sound is small, and every machine computes it. Results are those of one machine up to rounding: kernels may sum in
another order for fewer rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import mlx.core as mx

from ltx2.runtime.distributed.machines import Machines
from ltx2.runtime.layers.attention import Keys
from ltx2.runtime.layers.rope import Rope
from ltx2.runtime.networks.transformer.inputs import Ropes, Skips, StreamInput
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.streams import Streams


@contextmanager
def shared_tokens(machines: Machines, transformer: Transformer) -> Iterator[None]:
    """Share the transformer's calls inside. They must have a picture, of at least as many tokens as there are
    machines."""
    attentions = [
        attention
        for block in transformer.transformer_blocks
        for attention in (block[f"{transformer.config.video.prefix}attn1"], block[transformer.config.audio.incoming])
    ]

    def call(network: Transformer, inputs: Streams[StreamInput], skips: Skips) -> Streams[mx.array]:
        video = inputs.video
        assert video is not None, "a stage without a picture is not shared"
        total = video.tokens.shape[1]
        for attention in attentions:
            attention.gathered = partial(_gathered, machines, total)
        found = network.velocities(Streams(_part(video, machines.share(total)), inputs.audio), skips)
        # One machine's sound on all, so that GPUs that round differently do not drift apart.
        return Streams(
            None if found.video is None else machines.joined(found.video, 1, total),
            None if found.audio is None else machines.stack(found.audio)[0],
        )

    before, transformer.around = transformer.around, call
    try:
        yield
    finally:
        transformer.around = before
        for attention in attentions:
            attention.gathered = None


def _gathered(machines: Machines, total: int, own: Keys) -> Keys:
    """The keys and values of all machines' tokens, from this one's `own`."""
    return Keys(*machines.joined(mx.stack(list(own)), 3, total))


def _part(given: StreamInput, part: slice) -> StreamInput:
    """The input for some of a stream's tokens."""
    index, mask = given.levels.index, given.attention
    own, cross, positions = given.ropes.own, given.ropes.cross, given.ropes.positions
    return replace(
        given,
        tokens=given.tokens[:, part],
        levels=replace(given.levels, index=None if index is None else index[part]),
        ropes=Ropes(_rope(own, part), _rope(cross, part), positions[:, part]),
        marked=None if given.marked is None else given.marked[:, part],
        attention=mask if mask is None or mask.shape[2] == 1 else mask[:, :, part],
    )


def _rope(rope: Rope, part: slice) -> Rope:
    return Rope(rope.cos[:, part], rope.sin[:, part])
