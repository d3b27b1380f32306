"""Published network sizes with random weights: what a step costs on this machine, without any checkpoint.

Times and memory do not depend on the values, so this says what a clip will cost before 43 GB are downloaded."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ltx2.bench.stats import Timing, write_receipt
from ltx2.runtime.latents import AUDIO_FREQUENCIES, Grid, Latents, Scales, audio_positions, video_positions
from ltx2.runtime.load import build_network, parameter_shapes
from ltx2.runtime.machine import machine_facts, process_peak_memory
from ltx2.runtime.sampling import denoise
from ltx2.runtime.transformer.model import Transformer

TEXT_TOKENS = 1024
REPETITIONS = 7


def random_network(class_name: str, config: dict[str, Any], dtype: mx.Dtype = mx.bfloat16) -> nn.Module:
    """A network whose weights keep activations near one; tables that published files keep in float32 stay so."""
    network = build_network(class_name, config)
    parameters = []
    for index, (name, shape) in enumerate(parameter_shapes(network).items()):
        key = mx.random.key(index)
        kind = mx.float32 if "scale_shift_table" in name else dtype
        if len(shape) == 1:
            ones = "norm" in name or name.endswith(".std")
            tensor = mx.ones(shape, kind) if ones else mx.zeros(shape, kind)
        else:
            tensor = mx.random.normal(shape, dtype=kind, scale=prod(shape[1:]) ** -0.5, key=key)
        mx.eval(tensor)
        parameters.append((name, tensor))
    network.update(tree_unflatten(parameters))
    return network


def quantize(network: nn.Module, bits: int, group_size: int = 64) -> None:
    """Quantize the linears of the transformer's blocks, as `ltx2 quantize` does."""
    nn.quantize(
        network,
        group_size,
        bits,
        class_predicate=lambda path, module: path.startswith("transformer_blocks.") and isinstance(module, nn.Linear),
    )
    mx.eval(network.parameters())


def timed(work: Callable[[], Any], repetitions: int = REPETITIONS) -> dict[str, Any]:
    """Seconds per call after one warm-up, and the most memory MLX held."""
    work()
    mx.clear_cache()
    mx.reset_peak_memory()
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": Timing.of(seconds).to_dict(),
        "mlx_peak_bytes": mx.get_peak_memory(),
        "process_peak_bytes": process_peak_memory(),
    }


def denoise_case(transformer: Transformer, case: dict[str, Any]) -> dict[str, Any]:
    """One denoise step at the case's size: the transformer's forward and the Euler step."""
    config = transformer.config
    scales = Scales(**case["scales"])
    frames, height, width = case["latent"]
    audio_channels = config.audio_in_channels // AUDIO_FREQUENCIES
    grid = Grid(config.in_channels, frames, height, width, audio_channels, case["audio_latents"])
    text = mx.random.normal((1, TEXT_TOKENS, config.caption_channels), key=mx.random.key(1)).astype(transformer.dtype)
    prepared = (
        transformer.prepare_video(text, video_positions(grid, case["fps"], scales)),
        transformer.prepare_audio(text, audio_positions(grid, scales)),
    )
    video = mx.random.normal(grid.video_shape, key=mx.random.key(2))
    noise = Latents(video, mx.random.normal(grid.audio_shape, key=mx.random.key(3))).to_tokens()
    mx.eval(text, noise.video, noise.audio, [tuple(p.rope) + tuple(p.cross_rope) + (p.text,) for p in prepared])

    def step() -> Latents:
        return next(denoise(transformer, noise, (0.725, 0.421875), prepared))

    result = step()
    finite = bool(mx.isfinite(result.video).all().item() and mx.isfinite(result.audio).all().item())
    return {"case": case["name"], "video_tokens": grid.tokens, "finite": finite, **timed(step)}


def decode_case(config: dict[str, Any], case: dict[str, Any]) -> list[dict[str, Any]]:
    """Video VAE decode of the case's latents, in one piece and tiled as the pipeline does."""
    from ltx2.runtime.video_vae.model import VideoAutoencoder
    from ltx2.runtime.video_vae.tiling import auto_tiling, decode_frames

    vae = random_network("CausalVideoAutoencoder", config)
    assert isinstance(vae, VideoAutoencoder)
    frames, height, width = case["latent"]
    latents = mx.random.normal((1, vae.latent_channels, frames, height, width), key=mx.random.key(4))
    scales = case["scales"]
    pixels = (height * scales["spatial"], width * scales["spatial"], (frames - 1) * scales["temporal"] + 1)
    results = []
    for name, tiling in (("untiled", None), ("tiled", auto_tiling(*pixels))):

        def decode(tiling: Any = tiling) -> bool:
            finite = True
            for group in decode_frames(vae, latents, tiling):
                finite &= bool(mx.isfinite(group).all().item())
            return finite

        results.append({"case": f"video VAE decode, {name}", "finite": decode(), **timed(decode, 3)})
    return results


def run(bits: Sequence[int], sizes: Sequence[str]) -> dict[str, Any]:
    """All cases; returns the receipt."""
    cases = json.loads(resources.files(__package__).joinpath("fullsize.json").read_text())
    results: list[dict[str, Any]] = []
    chosen = [case for case in cases["cases"] if not sizes or case["name"] in sizes]
    for width in (16, *bits):
        transformer = random_network("AVTransformer3DModel", cases["transformer"])
        assert isinstance(transformer, Transformer)
        if width < 16:
            quantize(transformer, width)
        results += [{"bits": width, **denoise_case(transformer, case)} for case in chosen]
        del transformer
        mx.clear_cache()
    for case in chosen:
        if case["decode"]:
            results += [{"bits": 16, **row} for row in decode_case(cases["vae"], case)]
    return {
        "kind": "fullsize",
        "weights": "random",
        "release": cases["release"],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_facts(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith("MLX_M")},
        "results": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="*", default=[], help="also quantized to these widths")
    parser.add_argument("--case", nargs="*", default=[], help="only these cases")
    parser.add_argument("--out", type=Path, required=True, help="receipt to write")
    args = parser.parse_args()
    receipt = run(args.bits, args.case)
    write_receipt(args.out, receipt)
    for row in receipt["results"]:
        seconds = row["seconds"]
        sys.stdout.write(
            f"{row['bits']:2d} bits  {row['case']:28s} {1000 * seconds['median']:8.1f} ms  spread "
            f"{100 * seconds['spread']:4.1f} %  peak {row['mlx_peak_bytes'] / 2**30:6.1f} GiB  finite {row['finite']}\n"
        )


if __name__ == "__main__":
    main()
