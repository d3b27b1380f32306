"""MLX's peak memory for every network at its published size, over several shapes, free and under memory limits: what
the memory plan's formulas are fitted to and tested against. Values do not matter, so weights are zeros.

`python -m ltx2.bench.memory --out receipt.json` takes some minutes and a GPU with 48 GB."""

import argparse
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ltx2.bench.speed.stats import write_receipt
from ltx2.runtime.machine.facts import machine_facts
from ltx2.runtime.networks.audio.vae import AudioAutoencoder
from ltx2.runtime.networks.load import build_network
from ltx2.runtime.networks.text.connectors import EmbeddingsConnectors
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.networks.video_vae.frames import decode_frames
from ltx2.runtime.networks.video_vae.model import VideoAutoencoder
from ltx2.runtime.networks.video_vae.tiles import Tiling, tilings
from ltx2.runtime.sampling.denoise import Course, Denoiser, begin, denoise
from ltx2.runtime.sampling.guidance import NEUTRAL, TEXT
from ltx2.runtime.sampling.latents import AUDIO_FREQUENCIES, Grid, Scales
from ltx2.runtime.sampling.noise import Seeded
from ltx2.runtime.sampling.samplers import SAMPLERS
from ltx2.runtime.sampling.state import begin_states
from ltx2.runtime.streams import Streams

DATA = json.loads(resources.files("ltx2.bench.random").joinpath("fullsize.json").read_text())
CALLS = 3  # the first one also compiles
TINY = 16 << 20  # a limit below any need
BITS = (16, 8, 4)
LATENTS = ((2, 8, 8), (16, 8, 12), (16, 16, 24), (31, 16, 24), (16, 22, 40), (61, 32, 18))
PIECES = ((2, 8, 8), (4, 16, 24), (8, 8, 8), (11, 24, 14), (16, 12, 18), (16, 16, 24))
TILED = ((16, 16, 24), (16, 22, 40))
SIGMAS = (0.9, 0.7, 0.4, 0.2)
Row = dict[str, Any]
Work = Callable[[], Any]


def network(name: str, bits: int = 16, *, read: bool = True) -> nn.Module:
    """Zeros in bf16, tables in float32; without the encoders, which nothing decodes with."""
    class_name, config = DATA["networks"][name]
    built = build_network(class_name, config)
    built.pop("encoder", None)
    for block in built["transformer_blocks"] if bits < 16 else []:
        nn.quantize(block, 64, bits)
    parameters = cast(list[tuple[str, mx.array]], tree_flatten(built.parameters()))
    built.update(tree_unflatten([(name, _zeros(name, value)) for name, value in parameters]))
    if read:
        mx.eval(built.parameters())
    return built


def _zeros(name: str, like: mx.array) -> mx.array:
    kept = like.dtype == mx.uint32 or "scale_shift_table" in name
    return mx.zeros(like.shape, like.dtype if kept else mx.bfloat16)


def measure(row: Row, work: Work, weights: int, limit: int | None = None) -> Row:
    """`limit`: bytes beside what there is before the work."""
    peaks, seconds = [], []
    for _ in range(CALLS):
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        usual = mx.set_memory_limit(before + limit) if limit is not None else None
        started = time.perf_counter()
        work()
        seconds.append(round(time.perf_counter() - started, 4))
        peaks.append(mx.get_peak_memory())
        if usual is not None:
            mx.set_memory_limit(usual)
    said = {"limit_bytes": None if limit is None else before + limit, "weight_bytes": weights}
    return row | said | {"peak_bytes": peaks, "seconds": seconds}


def both(row: Row, work: Work, weights: int) -> Iterator[Row]:
    """Free, and with as little as possible."""
    for limit in (None, TINY):
        yield measure(row, work, weights, limit)


def text() -> Iterator[Row]:
    for tokens in (20, 100, 1024):
        yield measure({"case": "text encoder", "tokens": tokens}, partial(_encode, tokens), 0)
    connectors = network("connectors")
    weights, length = mx.get_active_memory(), DATA["text_tokens"]
    for tokens in (20, 100, 1024):
        mask = (mx.arange(length) >= length - tokens)[None].astype(mx.int32)
        yield from both({"case": "connectors", "tokens": tokens}, partial(_connect, connectors, mask, tokens), weights)


def _encode(tokens: int) -> None:
    """Weights are read layer by layer, as `generate` does it."""
    ids = mx.ones((1, tokens), mx.int32)
    encoder = cast(Any, network("text_encoder", read=False))
    mx.eval(list(encoder.hidden_states(ids, mx.ones_like(ids), release=True)))


def _connect(connectors: nn.Module, mask: mx.array, tokens: int) -> None:
    config = cast(EmbeddingsConnectors, connectors).config
    states = [mx.zeros((1, tokens, config.caption_channels), mx.bfloat16) for _ in range(config.num_hidden_states)]
    mx.eval(states)
    connectors(states, mask)


def steps(bits: int) -> Iterator[Row]:
    transformer = cast(Transformer, network("transformer", bits))
    weights = mx.get_active_memory()
    for latent in LATENTS if bits == BITS[0] else LATENTS[1:3]:
        audio = round(((latent[0] - 1) * 8 + 1) / DATA["fps"] * 25)
        row = {"case": "denoise step", "bits": bits, "latent": latent, "audio_latents": audio}
        work = partial(_step, transformer, Grid(128, *latent, 8, audio))
        yield measure(row, work, weights)
        if bits == BITS[0] and latent in LATENTS[1:4]:
            yield measure(row, work, weights, TINY)


def _step(transformer: Transformer, grid: Grid) -> None:
    text = mx.zeros((1, DATA["text_tokens"], transformer.config.caption_channels), mx.bfloat16)
    states = begin_states(grid, DATA["fps"], Scales(**DATA["scales"]))
    course, noise = Course(1, SIGMAS, SAMPLERS["euler"], Streams(NEUTRAL, NEUTRAL)), Seeded(0)
    denoiser = Denoiser(transformer, {TEXT: Streams(text, text)}, states)
    for _ in denoise(denoiser, course, noise, begin(course, states, noise)):
        pass


def _apply(function: Callable[[mx.array], mx.array], argument: mx.array) -> None:
    mx.eval(function(argument))


def upscaler() -> Iterator[Row]:
    net = network("spatial_upscaler")
    weights = mx.get_active_memory()
    for latent in (*LATENTS[:2], (31, 8, 12), (16, 11, 20), (61, 16, 9)):
        latents = mx.zeros((1, 128, *latent))
        yield from both({"case": "upscaler", "latent": latent}, partial(_apply, net, latents), weights)


def video() -> Iterator[Row]:
    vae = cast(VideoAutoencoder, network("video_vae"))
    weights = mx.get_active_memory()
    for latent in PIECES:
        row: Row = {"case": "video decode", "latent": latent, "tiling": None}
        yield from both(row, partial(_frames, vae, latent, None), weights)
    for latent in TILED:
        for tiling in tilings(vae, latent)[:4]:
            sizes = None if tiling is None else list(vars(tiling).values())
            row = {"case": "video decode", "latent": latent, "tiling": sizes}
            yield measure(row, partial(_frames, vae, latent, tiling), weights)


def _frames(vae: VideoAutoencoder, latent: tuple[int, int, int], tiling: Tiling | None) -> None:
    for _ in decode_frames(vae, mx.zeros((1, 128, *latent)), tiling):
        pass


def audio() -> Iterator[Row]:
    decode = cast(AudioAutoencoder, network("audio_vae")).decode
    weights = mx.get_active_memory()
    for count in (9, 126, 251, 501):
        latents = mx.zeros((1, 8, count, AUDIO_FREQUENCIES))
        row = {"case": "audio decode", "audio_latents": count}
        yield from both(row, partial(_apply, decode, latents), weights)
    del decode
    vocoder = network("vocoder")
    weights = mx.get_active_memory()
    for count in (9, 126, 251, 501):
        mel = mx.zeros((1, 2, 4 * count - 3, 64))
        yield from both({"case": "vocoder", "audio_latents": count}, partial(_apply, vocoder, mel), weights)


def rows() -> Iterator[Row]:
    """All measurements; networks come and go in turn."""
    yield from text()
    for bits in BITS:
        yield from steps(bits)
    yield from upscaler()
    yield from video()
    yield from audio()


def run(results: list[Row]) -> Row:
    return {
        "kind": "memory",
        "weights": "zeros",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_facts(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith("MLX_M")},
        "results": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="receipt to write")
    args = parser.parse_args()
    results: list[Row] = []
    for row in rows():  # written after every row: a machine that is taken away leaves what it has measured
        results.append(row)
        write_receipt(args.out, run(results))


if __name__ == "__main__":
    main()
