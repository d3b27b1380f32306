"""The video autoencoder: pixels to normalised latents and back, one piece of a clip at a time (see frames.py)."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ltx2.runtime.errors import InputError
from ltx2.runtime.layers.statistics import LatentStatistics
from ltx2.runtime.networks.video_vae.config import VideoVAEConfig
from ltx2.runtime.networks.video_vae.decoder import Decoder
from ltx2.runtime.networks.video_vae.encoder import Encoder

MAX_ELEMENTS = 2**31 - 1  # GPU kernels index with 32 bits: beyond it the tail of an array is garbage


class VideoAutoencoder(nn.Module):
    """Encoder, decoder and latent statistics. Latents are (1, C, f, h, w) with f = (F - 1) / 8 + 1 for F frames."""

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder, config.patch_size)
        self.decoder = Decoder(config.decoder, config.patch_size)
        self.per_channel_statistics = LatentStatistics(config.latent_channels, 1, 1, 1)

    @property
    def spatial_scale(self) -> int:
        """Pixels per latent along height and width."""
        return self.config.spatial_scale

    @property
    def temporal_scale(self) -> int:
        """Frames per latent; the first latent stands for one frame."""
        return self.config.temporal_scale

    def encode(self, pixels: mx.array) -> mx.array:
        """(1, 3, F, H, W) in [-1, 1] -> normalised latents (1, C, f, h, w), float32.

        Frames after the last 8k+1 are left out. Raises InputError when H or W is no multiple of 32.
        """
        *_, frames, height, width = pixels.shape
        if height % self.spatial_scale or width % self.spatial_scale:
            raise InputError(
                f"a picture of {width}x{height} cannot be encoded",
                f"width and height must be multiples of {self.spatial_scale}",
                "resize or crop it first",
            )
        kept = frames - (frames - 1) % self.temporal_scale
        x = pixels[:, :, :kept].transpose(0, 2, 3, 4, 1)
        latents = self.encoder(x.astype(self.encoder.conv_in.conv.weight.dtype))
        return self.per_channel_statistics.normalise(latents.transpose(0, 4, 1, 2, 3).astype(mx.float32))

    def decode(self, latents: mx.array) -> mx.array:
        """Normalised latents (1, C, f, h, w) -> (F, H, W, 3), nominally in [-1, 1], in the weights' dtype, untiled.

        Raises InputError for latents too large, or too small, to be decoded in one piece.
        """
        self._check_size(*latents.shape[2:])
        x = self.per_channel_statistics.unnormalise(latents)
        return self.decoder(x.transpose(0, 2, 3, 4, 1))[0]

    def _check_size(self, frames: int, height: int, width: int) -> None:
        scale = self.spatial_scale
        what = f"{(frames - 1) * self.temporal_scale + 1} frames of {width * scale}x{height * scale}"
        if min(height, width) * scale < self.config.smallest_side:
            raise InputError(
                f"{what} cannot be decoded",
                "the decoder extends pictures by reflection, which needs two latent rows and columns",
                f"choose a width and height of at least {self.config.smallest_side}",
            )
        elements = self.config.decoder.largest_array((frames, height, width))
        if elements > MAX_ELEMENTS:
            raise InputError(
                f"{what} cannot be decoded in one piece",
                f"an array of {elements:,} elements is beyond the {MAX_ELEMENTS:,} that GPU kernels can index",
                "decode in tiles",
            )


def build(config: Mapping[str, Any]) -> VideoAutoencoder:
    """From the checkpoint's `vae` section. Raises ConfigError or UnsupportedError for one we cannot compute."""
    return VideoAutoencoder(VideoVAEConfig.from_dict(config))
