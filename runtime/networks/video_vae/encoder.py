"""The video VAE's encoder: causal in time, so that one image encodes like the first frame of a clip."""

import mlx.core as mx
import mlx.nn as nn

from ltx2.runtime.networks.video_vae.config import Tower
from ltx2.runtime.networks.video_vae.layers import Border, CausalConv3d, Downsample, ResBlocks, activate, apply


class Encoder(nn.Module):
    """Pixels (1, 8k+1, H, W, 3) in [-1, 1] to un-normalised latents (1, k+1, H/32, W/32, C)."""

    def __init__(self, tower: Tower, patch_size: int) -> None:
        super().__init__()
        border = Border(causal=True, reflect=tower.reflect)
        self.conv_in = CausalConv3d(tower.inputs, tower.width, border)
        self.down_blocks = [
            Downsample(stage, border) if stage.stride else ResBlocks(stage.outputs, stage.layers, border)
            for stage in tower.stages
        ]
        self.conv_out = CausalConv3d(tower.stages[-1].outputs, tower.outputs, border)
        self.patch_size = patch_size

    def __call__(self, pixels: mx.array) -> mx.array:
        x = apply(self.conv_in, self.down_blocks, patchify(pixels, self.patch_size))
        return self.conv_out(activate(x))[..., :-1]  # means; the latents are never sampled


def patchify(x: mx.array, patch: int) -> mx.array:
    """(B, F, H, W, 3) -> (B, F, H/p, W/p, 3·p·p); channels ordered (colour, width offset, height offset)."""
    batch, frames, height, width, colours = x.shape
    x = x.reshape(batch, frames, height // patch, patch, width // patch, patch, colours)
    return x.transpose(0, 1, 2, 4, 6, 5, 3).reshape(batch, frames, height // patch, width // patch, -1)
