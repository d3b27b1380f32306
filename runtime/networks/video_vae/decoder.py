"""The video VAE's convolutional decoder: not causal, every temporal doubling drops its first frame."""

import mlx.core as mx
import mlx.nn as nn

from ltx2.runtime.machine.bounded import evaluate
from ltx2.runtime.networks.video_vae.config import Tower
from ltx2.runtime.networks.video_vae.layers import Border, CausalConv3d, ResBlocks, Upsample, activate, apply


class Decoder(nn.Module):
    """Un-normalised latents (1, k+1, H/32, W/32, C) to pixels (1, 8k+1, H, W, 3), nominally in [-1, 1]."""

    def __init__(self, tower: Tower, patch_size: int) -> None:
        super().__init__()
        border = Border(causal=False, reflect=tower.reflect)
        self.conv_in = CausalConv3d(tower.inputs, tower.width, border)
        self.up_blocks = [
            Upsample(stage, border) if stage.stride else ResBlocks(stage.outputs, stage.layers, border)
            for stage in tower.stages
        ]
        self.conv_out = CausalConv3d(tower.stages[-1].outputs, tower.outputs, border)
        self.patch_size = patch_size

    def __call__(self, latents: mx.array) -> mx.array:
        x = apply(self.conv_in, self.up_blocks, latents.astype(self.conv_in.conv.weight.dtype))
        x = unpatchify(self.conv_out(activate(x)), self.patch_size)
        evaluate(x)
        return x


def unpatchify(x: mx.array, patch: int) -> mx.array:
    """(B, F, h, w, 3·p·p) -> (B, F, h·p, w·p, 3); channels ordered (colour, width offset, height offset)."""
    batch, frames, height, width, _ = x.shape
    x = x.reshape(batch, frames, height, width, 3, patch, patch)
    return x.transpose(0, 1, 2, 6, 3, 5, 4).reshape(batch, frames, height * patch, width * patch, 3)
