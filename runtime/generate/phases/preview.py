"""A look at the clip while it is made."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ltx2.runtime.memory import activations, cpu, metal
from ltx2.runtime.memory.activations import Activations
from ltx2.runtime.memory.plan import on_cpu, on_metal, uses_cpu
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_network
from ltx2.runtime.networks.video_vae.config import VideoVAEConfig
from ltx2.runtime.networks.video_vae.decoder import StillDecoder
from ltx2.runtime.networks.video_vae.frames import to_levels
from ltx2.runtime.networks.video_vae.model import VideoAutoencoder
from ltx2.runtime.sampling.latents import Grid

SIDE = 256  # pixels, of the longer side at most


class Preview(nn.Module):
    """Decodes the latent frame in a clip's middle, by itself: it becomes one frame, which takes a fraction of the time
    of the eight that it would become among others, and looks like the seventh of them (29 to 31 dB on the demo model,
    where latents that are averaged first look like nothing)."""

    def __init__(self, vae: VideoAutoencoder) -> None:
        """Takes the decoder's weights from `vae`."""
        super().__init__()
        self.statistics = vae.per_channel_statistics
        self.decoder = StillDecoder(vae.decoder)

    @classmethod
    def load(cls, folder: ModelFolder) -> "Preview":
        return cls(load_network(folder, "video_vae", VideoAutoencoder))

    def __call__(self, latents: mx.array) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Normalised latents (1, C, F, H, W) to a picture (h, w, 3)."""
        middle = latents.shape[2] // 2
        frame = self.statistics.unnormalise(latents[:, :, middle : middle + 1])
        (picture,) = to_levels(_reduced(self.decoder(frame[:, :, 0].transpose(0, 2, 3, 1))))
        return picture


def _reduced(frames: mx.array) -> mx.array:
    """(n, H, W, 3) with whole numbers of pixels averaged into one."""
    count, height, width, channels = frames.shape
    factor = -(-max(height, width) // SIDE)
    height, width = height // factor, width // factor
    cut = frames[:, : height * factor, : width * factor].astype(mx.float32)
    return cut.reshape(count, height, factor, width, factor, channels).mean((2, 4))


def preview_weights(config: VideoVAEConfig, itemsize: int) -> int:
    """Bytes of its weights."""
    layers = config.decoder.convolutions((1, 1, 1), still=True)
    return itemsize * sum(c.times * (cpu.TAPS_2D * c.inputs + 1) * c.outputs for c in layers)


def preview_memory(config: VideoVAEConfig, grid: Grid, itemsize: int) -> Activations:
    """Memory of a preview beside its weights, while it is made or used."""
    size = grid.height, grid.width
    used = activations.decode_still(config, size, itemsize, uses_cpu())
    used = used.beside(on_metal(metal.decode_still(config, size, itemsize)))
    used = used.beside(on_cpu(cpu.decode_video(config, itemsize, cpu.TAPS_2D)))
    return activations.still_weights(config, itemsize).or_then(used)
