"""Ways to share a phase's work between machines."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import mlx.core as mx

from ltx2.runtime.distributed.guidance import SharedPasses
from ltx2.runtime.distributed.machines import Machines
from ltx2.runtime.distributed.sequence import shared_tokens
from ltx2.runtime.distributed.tiles import shared_tiles
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.networks.video_vae.frames import Spread, one_by_one
from ltx2.runtime.sampling.denoise import Denoiser
from ltx2.runtime.sampling.state import StreamState
from ltx2.runtime.streams import Streams

GUIDANCE, SEQUENCE, TILES, NONE = "guidance", "sequence", "tiles", "none"


def of_stage(size: int, passes: int, tokens: int, wanted: str | None = None) -> str:
    """How `size` machines share a stage of so many passes per step and video tokens: by passes if each machine gets
    one, else by tokens. `wanted` decides, where there is something to share."""
    if size == 1:
        return NONE
    chosen = wanted or (GUIDANCE if passes >= size else SEQUENCE)
    possible = {GUIDANCE: passes > 1, SEQUENCE: tokens >= size}
    return chosen if possible.get(chosen, False) else NONE


def of_tiles(size: int, tiles: int, wanted: str | None = None) -> str:
    """How `size` machines share the decoding of so many tiles."""
    return TILES if size > 1 and tiles > 1 and wanted != NONE else NONE


@contextmanager
def shared_denoiser(
    machines: Machines,
    split: str,
    transformer: Transformer,
    contexts: Mapping[str, Streams[mx.array]],
    states: Streams[StreamState],
    keep: Collection[str] = (),
) -> Iterator[Denoiser]:
    """A stage's denoiser (see `Denoiser`), of this machine alone or shared as `split` says."""
    if split == GUIDANCE:
        yield SharedPasses(machines, transformer, contexts, states, keep)
    elif split == SEQUENCE:
        with shared_tokens(machines, transformer):
            yield Denoiser(transformer, contexts, states, keep)
    else:
        yield Denoiser(transformer, contexts, states, keep)


def spread(machines: Machines, split: str) -> Spread:
    """How tiles are decoded."""
    return partial(shared_tiles, machines) if split == TILES else one_by_one
