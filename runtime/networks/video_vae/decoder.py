"""The video VAE's convolutional decoder: not causal, every temporal doubling drops its first frame. For a clip, and for
a single frame."""

from functools import cache
from math import prod

import mlx.core as mx
import mlx.nn as nn

from ltx2.runtime.machine.bounded import evaluate
from ltx2.runtime.networks.video_vae.config import Tower
from ltx2.runtime.networks.video_vae.layers import (
    Border,
    CausalConv3d,
    ResBlock,
    ResBlocks,
    Upsample,
    activate,
    added,
    apply,
    depth_to_space,
    settled,
)


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


class StillDecoder(nn.Module):
    """Decodes a single latent frame as `Decoder` does: un-normalised latents (1, H/32, W/32, C) to one picture
    (1, H, W, 3), nominally in [-1, 1]. It takes a third of the operations, and waits for large arrays only.

    Copies of the edge frames extend a clip at both ends, so the three taps over time of every kernel see the same
    frame: their sum is made once. The first copy of a doubled frame would be dropped, so it is not computed.

    Takes the decoder's weights one after the other, so that they are never all in memory beside the sums."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.conv_in = _StillConvolution(decoder.conv_in)
        self.layers: list[_StillResBlock | _StillUpsample] = []
        for block in decoder.up_blocks:
            if isinstance(block, Upsample):
                self.layers.append(_StillUpsample(block))
            else:
                self.layers += [_StillResBlock(inner) for inner in block.res_blocks]
        self.conv_out = _StillConvolution(decoder.conv_out)
        self.patch_size = decoder.patch_size

    def __call__(self, latents: mx.array) -> mx.array:
        x = self.conv_in(latents.astype(self.conv_in.weight.dtype))
        for layer in self.layers:
            x = settled(layer(x))
        return unpatchify(self.conv_out(activate(x))[:, None], self.patch_size)[:, 0]


class _StillConvolution(nn.Module):
    """The 3x3x3 convolution `source` for a single frame: 3x3, with the same border, (1, H, W, inputs) -> (1, H, W,
    outputs). Where `source` makes several `copies` of a frame, this one makes the last alone; `within` is the rest of
    its stride."""

    def __init__(self, source: CausalConv3d, copies: int = 1, within: int = 1) -> None:
        super().__init__()
        weight, bias = source.conv.pop("weight"), source.conv.pop("bias")
        # Outputs are ordered (channel, copy, place within the stride).
        kept = weight.reshape(-1, copies, within, *weight.shape[1:])[:, -1].reshape(-1, *weight.shape[1:])
        taps = (kept[:, tap].astype(mx.float32) for tap in range(kept.shape[1]))
        self.weight = sum(taps, mx.array(0.0)).astype(weight.dtype)
        self.bias = bias.reshape(-1, copies, within)[:, -1].reshape(-1)
        self.reflect = source.border.reflect
        mx.eval(self.weight, self.bias)

    def __call__(self, x: mx.array) -> mx.array:
        if self.reflect:
            x = mx.take(mx.take(x, _mirrored(x.shape[1]), axis=1), _mirrored(x.shape[2]), axis=2)
            return mx.conv2d(x, self.weight) + self.bias
        return mx.conv2d(x, self.weight, padding=1) + self.bias


@cache
def _mirrored(length: int) -> mx.array:
    """Indices along an axis (length + 2,): both ends mirror without repeating the edge; a single position is copied."""
    return mx.array([min(1, length - 1), *range(length), max(0, length - 2)])


class _StillResBlock(nn.Module):
    def __init__(self, source: ResBlock) -> None:
        super().__init__()
        self.conv1, self.conv2 = _StillConvolution(source.conv1), _StillConvolution(source.conv2)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.conv2(activate(settled(self.conv1(activate(x)))))


class _StillUpsample(nn.Module):
    def __init__(self, source: Upsample) -> None:
        super().__init__()
        self.copies, *self.stride = source.stride
        self.conv = _StillConvolution(source.conv, self.copies, prod(self.stride))
        self.residual = source.residual

    def __call__(self, x: mx.array) -> mx.array:
        y = self._enlarged(self.conv(x))
        if not self.residual:
            return y
        within = prod(self.stride)
        last = x.reshape(*x.shape[:-1], -1, self.copies, within)[..., -1, :]
        skip = self._enlarged(last.reshape(*x.shape[:-1], -1))
        return added(y, skip)

    def _enlarged(self, x: mx.array) -> mx.array:
        """Depth-to-space of a picture (1, H, W, C)."""
        height, width = self.stride
        return depth_to_space(x[:, None], (1, height, width))[:, 0]
