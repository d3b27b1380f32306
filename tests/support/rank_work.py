"""What one of several processes, a rank of MLX's ring, computes by itself and together with the others. It needs no
model, and is small."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map_with_path

from ltx2.runtime.distributed.guidance import SharedPasses
from ltx2.runtime.distributed.machines import Machines, join
from ltx2.runtime.distributed.sequence import shared_tokens
from ltx2.runtime.distributed.tiles import shared_tiles
from ltx2.runtime.networks.transformer.config import TransformerConfig
from ltx2.runtime.networks.transformer.inputs import Levels, Skips, StreamInput
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.networks.video_vae.frames import blended, one_by_one
from ltx2.runtime.networks.video_vae.tiles import Intervals, spatial_spans, temporal_spans
from ltx2.runtime.sampling.denoise import Denoiser
from ltx2.runtime.sampling.guidance import APART, NEGATIVE, PERTURBED, TEXT, Guidance, passes
from ltx2.runtime.sampling.latents import Grid, Scales
from ltx2.runtime.sampling.state import begin_states
from ltx2.runtime.streams import Streams

CONFIG = TransformerConfig(
    num_layers=2, num_attention_heads=4, attention_head_dim=16, audio_num_attention_heads=2,
    audio_attention_head_dim=16, in_channels=8, out_channels=8, cross_attention_dim=64, audio_cross_attention_dim=32,
    caption_channels=48, positional_embedding_max_pos=(20, 2048, 2048), audio_positional_embedding_max_pos=(20,),
    audio_in_channels=32, audio_out_channels=32, apply_gated_attention=True, use_keyframes_abs_pos_embedding=True,
)  # fmt: skip
SCALES = Scales(spatial=32, temporal=8, audio_hop=0.01, audio_temporal=4)
GRID = Grid(8, 3, 3, 3, audio_channels=2, audio_frames=5)  # 27 video tokens: no two or four machines have as many


def drawn(name: str, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(sum(name.encode())))


def network() -> Transformer:
    made = Transformer(CONFIG)
    made.update(tree_map_with_path(lambda name, p: 0.1 * drawn(name, *p.shape).astype(p.dtype), made.parameters()))
    return made


def exchanges(machines: Machines) -> Iterator[tuple[str, bool]]:
    """Values that come through an exchange as they were."""
    rank, size = machines.rank, machines.size
    yield (
        "everyone",
        machines.everyone({"rank": rank, "long": "x" * rank}) == [{"rank": r, "long": "x" * r} for r in range(size)],
    )
    sent = {name: drawn(name, 3, 2).astype(getattr(mx, name)) for name in ("float32", "bfloat16", "float16")}
    sent |= {"zero": mx.array([-0.0, float("inf")]), "numbers": mx.array([1, -2, 3])}
    message, found = machines.told({"phase": "a", "step": 3}, sent) if machines.leads else machines.told()
    same = [found[name].dtype == x.dtype and _bytes(found[name]) == _bytes(x) for name, x in sent.items()]
    yield "told", message == {"phase": "a", "step": 3} and all(same)
    yield "counted", machines.sent_bytes > 0 and machines.seconds > 0


def _bytes(x: mx.array) -> bytes:
    return np.array(x.view(mx.uint8)).tobytes()


def guided(machines: Machines) -> Iterator[tuple[str, bool]]:
    """x0s of a step's passes: bit for bit, whatever their number, also where a stream is idle."""
    states = begin_states(GRID, 24.0, SCALES)
    contexts = {name: Streams(drawn(name, 1, 6, 48), drawn(f"{name}a", 1, 6, 48)) for name in (TEXT, NEGATIVE)}
    both = network(), contexts, states
    alone, shared = Denoiser(*both), SharedPasses(machines, *both)
    x = states.map(lambda state: drawn("x", *state.clean.shape))
    frozen = Streams(False, False)
    rules = {
        "four": Streams(Guidance(3, 1, 3, blocks=(1,)), Guidance(7, 1, 3, blocks=(1,))),
        "three": Streams(Guidance(3, 0, 3), Guidance(7, 0, 3)),
        "one": Streams(Guidance(), Guidance()),
        "idle": Streams(Guidance(3, skip=1), Guidance(7)),
    }
    for name, rule in rules.items():
        calls = passes(rule, frozen, step=1)
        own, found = alone.run(x, 0.7, calls), shared.run(x, 0.7, calls)
        assert list(own) == list(found) == list(calls), calls
        pairs = [(a, b) for call in calls for a, b in zip(own[call].values(), found[call].values(), strict=True)]
        yield name, all(mx.array_equal(a, b).item() for a, b in pairs)
    yield "names", {TEXT, NEGATIVE, PERTURBED, APART} == set(passes(rules["four"], frozen))
    yield "nothing", shared.run(x, 0.7, {}) == {}


def sequence(machines: Machines) -> Iterator[tuple[str, float]]:
    """Largest differences of velocities, relative to the largest value: of a plain call, and of one with all that is
    given by token."""
    made, states = network(), begin_states(GRID, 24.0, SCALES)
    ropes = made.ropes(states.map(lambda state: state.positions))
    texts = made.project(Streams(drawn("v", 1, 6, 48), drawn("a", 1, 6, 48)))
    plain = states.named(
        lambda name, state: StreamInput(
            drawn(name, *state.clean.shape), Levels(mx.array([0.7]), None, 0.7), texts.get(name), ropes.get(name)
        )
    )
    tokens, video = GRID.tokens, plain.video
    assert video is not None
    index = mx.array(np.arange(tokens, dtype=np.int32) % 2)
    given = StreamInput(
        video.tokens,
        Levels(mx.array([0.0, 0.7]), index, 0.7),
        video.text,
        video.ropes,
        marked=(index == 0).astype(mx.float32)[None, :, None],
        attention=mx.where(drawn("mask", 1, 1, tokens, tokens) > 1, -1e4, 0.0),
    )
    cases = {
        "plain": (plain, Skips()),
        "by token": (Streams(given, plain.audio), Skips()),
        "perturbed": (plain, Skips(values=Streams(frozenset([1]), frozenset()))),
        "apart": (plain, Skips(exchange=True)),
        "idle picture": (plain, Skips(idle=Streams(True, False))),
        "no sound": (Streams(plain.video), Skips()),
    }
    for name, (inputs, skips) in cases.items():
        alone = made(inputs, skips)
        with shared_tokens(machines, made):
            shared = made(inputs, skips)
        assert dict(alone.items()).keys() == dict(shared.items()).keys(), name
        yield name, max(_difference(a, b) for a, b in zip(alone.values(), shared.values(), strict=True))
    assert made.around is None, "what was shared is not any more"


def _difference(a: mx.array, b: mx.array) -> float:
    return float(np.abs(np.array(a - b)).max() / np.abs(np.array(a)).max())


def tiles(machines: Machines) -> Iterator[tuple[str, bool]]:
    """Frames of clips of so many tiles over time and width."""
    for latents, width in ((3, 2), (9, 2), (9, 5)):
        times = temporal_spans(Intervals(latents, 4, 1), 8)
        rows, columns = spatial_spans(Intervals(2, 2, 0), 2), spatial_spans(Intervals(width, 2, 1), 2)
        places = [(time, row, column) for time in times for row in rows for column in columns]
        decoded = list[tuple[slice, ...]]()

        def decode(*where: slice, done: list[tuple[slice, ...]] = decoded) -> mx.array:
            time, row, column = where
            done.append(where)
            shape = ((time.stop - time.start - 1) * 8 + 1, (row.stop - row.start) * 2, (column.stop - column.start) * 2)
            return drawn(str(where), *shape, 3).astype(mx.bfloat16)

        found = []
        for spread in (lambda p, d: shared_tiles(machines, p, d), one_by_one):
            decoded.clear()
            made = spread(places, decode)
            found.append(list(blended(times, rows, columns, lambda *_, made=made: next(made), iter)))
            if spread is not one_by_one:
                fair = len(decoded) == len(range(machines.rank, len(places), machines.size))
        yield f"{len(places)} tiles", fair and all(map(mx.array_equal, *found))


def results() -> dict[str, dict[str, Any]]:
    """By part and case, of this rank."""
    mx.set_default_device(mx.cpu)
    machines = join(os.environ, lambda error: sys.exit(str(error)))
    return {part.__name__: dict(part(machines)) for part in (exchanges, guided, sequence, tiles)}
