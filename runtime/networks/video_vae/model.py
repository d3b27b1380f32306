"""The video autoencoder: pixels to normalised latents and back, one piece of a clip at a time (see frames.py)."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ltx2.runtime.errors import InputError
from ltx2.runtime.networks.video_vae.config import MAX_ELEMENTS, VideoVAEConfig
from ltx2.runtime.networks.video_vae.decoder import Decoder
from ltx2.runtime.networks.video_vae.encode import VideoCoder


class VideoAutoencoder(VideoCoder):
    """Encoder, convolutional decoder and latent statistics."""

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__(config.tower, config.patch_size)
        self.config = config
        self.decoder = Decoder(config.decoder, config.patch_size)

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
