"""The video VAE's convolutional decoder: not causal, every temporal doubling drops its first frame."""

from math import prod

import mlx.core as mx
import mlx.nn as nn

from ltx2.runtime.machine.bounded import evaluate
from ltx2.runtime.networks.video_vae.config import ResampleStage, ResStage, VideoVAEConfig
from ltx2.runtime.networks.video_vae.layers import Border, CausalConv3d, ResBlocks, Upsample, activate


class Decoder(nn.Module):
    """Un-normalised latents (1, k+1, H/32, W/32, C) to pixels (1, 8k+1, H, W, 3), nominally in [-1, 1]."""

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        border = Border(causal=False, reflect=config.decoder_padding == "reflect")
        channels = config.decoder_channels
        self.conv_in = CausalConv3d(config.latent_channels, channels, border)
        self.up_blocks: list[ResBlocks | Upsample] = []
        for stage in config.decoder_stages:
            if isinstance(stage, ResStage):
                self.up_blocks.append(ResBlocks(channels, stage.num_layers, border))
            else:
                self.up_blocks.append(Upsample(channels, stage.multiplier, stage.stride, stage.residual, border))
                channels //= stage.multiplier
        self.conv_out = CausalConv3d(channels, 3 * config.patch_size**2, border)
        self.patch_size = config.patch_size

    def __call__(self, latents: mx.array) -> mx.array:
        x = self.conv_in(latents.astype(self.conv_in.conv.weight.dtype))
        for block in self.up_blocks:
            for layer in block.res_blocks if isinstance(block, ResBlocks) else [block]:
                x = layer(x)  # here, so that nobody holds the last layer's result: a fifth of the memory
                evaluate(x)
        x = unpatchify(self.conv_out(activate(x)), self.patch_size)
        evaluate(x)
        return x


def unpatchify(x: mx.array, patch: int) -> mx.array:
    """(B, F, h, w, 3·p·p) -> (B, F, h·p, w·p, 3); channels ordered (colour, width offset, height offset)."""
    batch, frames, height, width, _ = x.shape
    x = x.reshape(batch, frames, height, width, 3, patch, patch)
    return x.transpose(0, 1, 2, 6, 3, 5, 4).reshape(batch, frames, height * patch, width * patch, 3)


def largest_activation(config: VideoVAEConfig, frames: int, height: int, width: int) -> int:
    """Elements of the largest array that decoding a latent of this size makes."""
    channels = config.decoder_channels
    largest = (frames + 2) * (height + 2) * (width + 2) * channels
    for stage in config.decoder_stages:
        if isinstance(stage, ResampleStage):
            conv = frames * height * width * channels * prod(stage.stride) // stage.multiplier
            channels //= stage.multiplier
            frames, height, width = (n * s for n, s in zip((frames, height, width), stage.stride, strict=True))
            frames -= stage.stride[0] - 1
            largest = max(largest, conv, (frames + 2) * (height + 2) * (width + 2) * channels)
    return max(largest, frames * height * width * 3 * config.patch_size**2)
