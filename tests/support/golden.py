"""Golden tensors: what Lightricks' own modules computed with the demo models for the prompts `a` and `b`, with 2.5 also
for `c`, the prompt of `a` with a first and a last picture. The demo models' READMEs list the names."""

from pathlib import Path

import mlx.core as mx
import numpy as np

from ltx2.runtime.files.tensors import Array, open_tensorfile
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_network
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.sampling.latents import Grid, Scales, audio_positions, video_positions
from ltx2.runtime.streams import Streams
from tests.support.calls import inputs

FILE = open_tensorfile(Path(__file__).with_name("golden.safetensors"))
PROMPTS = {name: FILE.metadata[f"{name}.prompt"] for name in "ab"}
FILE_25 = open_tensorfile(Path(__file__).with_name("golden-2.5.safetensors"))
PROMPTS_25 = {name: FILE_25.metadata[f"{name}.prompt"] for name in "abc"}


def golden(name: str) -> Array:
    """One tensor, e.g. `a.stage1.video_latent`."""
    return FILE.array(name)


def golden_25(name: str) -> Array:
    """One tensor of the 2.5 demo model, e.g. `c.stage1.video_latent`."""
    return FILE_25.array(name)


def golden_velocity(folder: ModelFolder) -> tuple[Array, Array]:
    """Velocities of golden prompt a at sigma 0.725, computed in float32."""
    network = load_network(folder, "transformer", Transformer)
    network.set_dtype(mx.float32)
    noise = Streams(mx.array(golden("a.stage1.video")), mx.array(golden("a.stage1.audio")))
    (_, channels, frames, height, width), (_, audio_channels, audio_frames, _) = (n.shape for n in noise.values())
    grid = Grid(channels, frames, height, width, audio_channels, audio_frames)
    scales = Scales(spatial=32, temporal=8, audio_hop=0.01, audio_temporal=4)
    contexts = Streams(*(mx.array(golden(f"a.{name}_context")) for name in ("video", "audio")))
    positions = Streams(video_positions(grid, 24.0, scales), audio_positions(grid, scales))
    tokens = grid.segments.zip(noise).map(lambda pair: pair[0].to_tokens(pair[1]))
    velocity = network(inputs(network, tokens, contexts, positions, 0.725))
    video, audio = (np.array(values) for values in velocity.values())
    return video, audio
