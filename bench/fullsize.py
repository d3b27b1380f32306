"""Every network of a release at its published size with random weights: what a clip costs on this machine.

Times and memory do not depend on the values, so this needs no checkpoint: it says what to expect before 43 GB are
downloaded. `python -m ltx2.bench.fullsize --out receipt.json`."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ltx2.bench.stats import Timing, write_receipt
from ltx2.runtime.audio_vae import AudioAutoencoder
from ltx2.runtime.latents import AUDIO_FREQUENCIES, Grid, Latents, Scales, audio_positions, video_positions
from ltx2.runtime.load import build_network, parameter_shapes
from ltx2.runtime.machine import machine_facts
from ltx2.runtime.process import process_peak_memory
from ltx2.runtime.sampling import denoise
from ltx2.runtime.text_encoder.gemma3 import Gemma3TextEncoder
from ltx2.runtime.transformer.model import Transformer
from ltx2.runtime.video_vae.model import VideoAutoencoder
from ltx2.runtime.video_vae.tiling import Tiling, auto_tiling, decode_frames

WARMUP, REPETITIONS = 3, 9
Row = dict[str, Any]


class Suite:
    """The published sizes (fullsize.json) and the measurements on them. Each returns the receipt's rows."""

    def __init__(self) -> None:
        self.data = json.loads(resources.files(__package__).joinpath("fullsize.json").read_text())
        self.scales = Scales(**self.data["scales"])
        self.frames, self.height, self.width = self.data["latent"]

    def network(self, component: str) -> nn.Module:
        class_name, config = self.data["networks"][component]
        return random_network(class_name, config)

    def rows(self, bits: Sequence[int]) -> Iterator[Row]:
        """All measurements; the transformer in 16 bits and at every width of `bits`. Networks come and go in turn."""
        yield self.text_encoder()
        yield self.connectors()
        for width in (16, *bits):
            transformer = cast(Transformer, self.network("transformer"))
            if width < 16:
                quantize(transformer, width)
            yield self.denoise_step(transformer, "stage 1 step", 2) | {"bits": width}
            yield self.denoise_step(transformer, "stage 2 step", 1) | {"bits": width}
            del transformer
            mx.clear_cache()
        yield self.upscale()
        yield from self.decode_video()
        yield self.decode_audio()
        yield self.vocode()

    def text_encoder(self) -> Row:
        network = cast(Gemma3TextEncoder, self.network("text_encoder"))
        ids = mx.ones((1, self.data["prompt_tokens"]), mx.int32)
        return measure("text encoder, 100 tokens", lambda: list(network.hidden_states(ids, mx.ones_like(ids)))[-1])

    def connectors(self) -> Row:
        network = self.network("connectors")
        config = self.data["networks"]["connectors"][1]
        count, width = config["text_projection_in_features"] // config["caption_channels"], config["caption_channels"]
        states = [normal(1, self.data["prompt_tokens"], width).astype(mx.bfloat16) for _ in range(count)]
        mask = (mx.arange(self.data["text_tokens"]) >= self.data["text_tokens"] - self.data["prompt_tokens"])[None]
        return measure("connectors", lambda: network(iter(states), mask.astype(mx.int32)))

    def denoise_step(self, transformer: Transformer, name: str, downscale: int) -> Row:
        """One step of the sampler: the transformer's forward pass and the Euler step."""
        config = transformer.config
        audio_channels = config.audio_in_channels // AUDIO_FREQUENCIES
        size = self.frames, self.height // downscale, self.width // downscale
        grid = Grid(config.in_channels, *size, audio_channels, self.data["audio_latents"])
        text = normal(1, self.data["text_tokens"], config.caption_channels).astype(transformer.dtype)
        prepared = (
            transformer.prepare_video(text, video_positions(grid, self.data["fps"], self.scales)),
            transformer.prepare_audio(text, audio_positions(grid, self.scales)),
        )
        noise = Latents(normal(*grid.video_shape), normal(*grid.audio_shape)).to_tokens()
        row = measure(name, lambda: vars(next(denoise(transformer, noise, (0.725, 0.421875), prepared))))
        return row | {"video_tokens": grid.tokens}

    def upscale(self) -> Row:
        network = self.network("spatial_upscaler")
        latents = normal(1, self.channels, self.frames, self.height // 2, self.width // 2)
        return measure("spatial upscaler x2", lambda: network(latents))

    def decode_video(self) -> list[Row]:
        vae = cast(VideoAutoencoder, self.network("video_vae"))
        vae.pop("encoder")
        latents = normal(1, self.channels, self.frames, self.height, self.width)
        tiled = auto_tiling(vae, self.frames, self.height, self.width)

        def decode(tiling: Tiling | None) -> list[mx.array]:
            return list(decode_frames(vae, latents, tiling))

        return [
            measure("video decode, one piece", lambda: decode(None)),
            measure("video decode, tiled", lambda: decode(tiled)),
        ]

    def decode_audio(self) -> Row:
        network = cast(AudioAutoencoder, self.network("audio_vae"))
        latents = normal(1, network.config.latent_channels, self.data["audio_latents"], AUDIO_FREQUENCIES)
        return measure("audio decode", lambda: network.decode(latents))

    def vocode(self) -> Row:
        network = self.network("vocoder")
        mel = normal(1, 2, 4 * self.data["audio_latents"] - 3, 64)
        return measure("vocoder", lambda: network(mel))

    @property
    def channels(self) -> int:
        return int(self.data["networks"]["video_vae"][1]["latent_channels"])


def normal(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(prod(shape)))


def random_network(class_name: str, config: Mapping[str, Any], dtype: mx.Dtype = mx.bfloat16) -> nn.Module:
    """A network whose weights keep activations near one; tables that published files keep in float32 stay so."""
    network = build_network(class_name, config)
    parameters = []
    for index, (name, shape) in enumerate(parameter_shapes(network).items()):
        kind = mx.float32 if "scale_shift_table" in name else dtype
        if len(shape) == 1:
            ones = "norm" in name or name.endswith(".std")
            tensor = mx.ones(shape, kind) if ones else mx.zeros(shape, kind)
        else:
            scale = prod(shape[1:]) ** -0.5
            tensor = mx.random.normal(shape, dtype=kind, scale=scale, key=mx.random.key(index))
        mx.eval(tensor)
        parameters.append((name, tensor))
    network.update(tree_unflatten(parameters))
    return network


def quantize(network: nn.Module, bits: int, group_size: int = 64) -> None:
    """Quantize the linears of the transformer's blocks, block by block."""
    for block in cast(Transformer, network).transformer_blocks:
        nn.quantize(block, group_size, bits)
        mx.eval(block.parameters())


def measure(name: str, work: Callable[[], Any]) -> Row:
    """Seconds per call after warm-up, the most memory MLX held, and whether all results are finite."""
    finite = all(bool(mx.isfinite(value).all().item()) for value in _arrays(work()))
    for _ in range(WARMUP - 1):
        mx.eval(work())
    mx.clear_cache()
    mx.reset_peak_memory()
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        mx.eval(work())
        seconds.append(time.perf_counter() - start)
    return {
        "case": name,
        "bits": 16,
        "finite": finite,
        "seconds": Timing.of(seconds).to_dict(),
        "mlx_peak_bytes": mx.get_peak_memory(),
        "process_peak_bytes": process_peak_memory(),
    }


def _arrays(result: Any) -> Iterator[mx.array]:
    if isinstance(result, mx.array):
        yield result
    else:
        for part in result.values() if isinstance(result, dict) else result:
            yield from _arrays(part)


def run(bits: Sequence[int], show: Callable[[Row], None]) -> Row:
    """Measure everything, passing each row to `show`; returns the receipt."""
    suite = Suite()
    rows = []
    for row in suite.rows(bits):
        show(row)
        rows.append(row)
    return {
        "kind": "fullsize",
        "weights": "random",
        "release": suite.data["release"],
        "size": suite.data["size"],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_facts(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith("MLX_M")},
        "results": rows,
    }


def show_row(row: Row) -> None:
    """One line on stdout."""
    seconds, peak = row["seconds"], row["mlx_peak_bytes"] / 2**30
    times = f"{1000 * seconds['median']:9.1f} ms  spread {100 * seconds['spread']:3.0f} %  peak {peak:5.1f} GiB"
    sys.stdout.write(f"{row['case']:26s} {row['bits']:2d} bits {times}{'' if row['finite'] else '  NOT FINITE'}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="*", default=[], help="transformer also quantized to these widths")
    parser.add_argument("--out", type=Path, required=True, help="receipt to write")
    args = parser.parse_args()
    write_receipt(args.out, run(args.bits, show_row))


if __name__ == "__main__":
    main()
