"""A look at the clip while it is made."""

from typing import Any

import mlx.core as mx
import numpy as np

from ltx2.runtime.memory import activations, cpu
from ltx2.runtime.memory.activations import Activations
from ltx2.runtime.memory.plan import on_cpu, uses_cpu
from ltx2.runtime.networks.load import read_weights
from ltx2.runtime.networks.video_vae.config import VideoVAEConfig
from ltx2.runtime.networks.video_vae.frames import to_levels
from ltx2.runtime.networks.video_vae.model import VideoAutoencoder
from ltx2.runtime.networks.video_vae.tiles import Tiles
from ltx2.runtime.sampling.latents import Grid

SIDE = 256  # pixels, of the longer side at most
LEAST = 2  # latent rows and columns that are decoded


class Preview:
    """Decodes the latent frame in a clip's middle, by itself: it becomes one frame, which takes a fraction of the time
    of the eight that it would become among others, and looks like the seventh of them (29 to 31 dB on the demo model,
    where latents that are averaged first look like nothing)."""

    def __init__(self, vae: VideoAutoencoder) -> None:
        self.vae = vae
        read_weights(vae.decoder)

    def __call__(self, latents: mx.array) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Normalised latents (1, C, F, H, W) to a picture (h, w, 3)."""
        middle = latents.shape[2] // 2
        latents = latents[:, :, middle : middle + 1]
        # A single row or column cannot be extended by reflection: it is decoded twice, and one of both is kept.
        rows, columns = (LEAST // min(LEAST, size) for size in latents.shape[3:])
        frames = self.vae.decode(mx.repeat(mx.repeat(latents, rows, 3), columns, 4))
        (frame,) = to_levels(_reduced(frames[:, : frames.shape[1] // rows, : frames.shape[2] // columns]))
        return frame


def _reduced(frames: mx.array) -> mx.array:
    """(n, H, W, 3) with whole numbers of pixels averaged into one."""
    count, height, width, channels = frames.shape
    factor = -(-max(height, width) // SIDE)
    height, width = height // factor, width // factor
    cut = frames[:, : height * factor, : width * factor].astype(mx.float32)
    return cut.reshape(count, height, factor, width, factor, channels).mean((2, 4))


def preview_memory(config: VideoVAEConfig, grid: Grid, itemsize: int) -> Activations:
    """What a preview takes beside the decoder's weights."""
    frame = Tiles((1, max(LEAST, grid.height), max(LEAST, grid.width)), None, config)
    used = activations.decode_video(config, frame, itemsize, uses_cpu())
    return used.beside(on_cpu(cpu.decode_video(config, itemsize)))
