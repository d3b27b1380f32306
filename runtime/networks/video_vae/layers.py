"""Building blocks of the video VAE, channels last: (batch, frames, height, width, channels).

Every convolution is 3x3x3 over a clip extended by one position per side (in time by copies of the edge frames), and
every normalisation is a weightless one over the channels of a position. Convolutions that are too large for this GPU
are computed in parts (runtime/machine/bounded.py)."""

from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ltx2.runtime.machine.bounded import evaluate, in_parts
from ltx2.runtime.machine.winograd import transforming
from ltx2.runtime.networks.video_vae.config import Size, Stage

NORM_EPS = 1e-8
LARGE = 1 << 26  # bytes


@dataclass(frozen=True)
class Border:
    """How a network's convolutions extend the clip: in time before it only (causal) or on both sides, in space by
    zeros or by reflection."""

    causal: bool
    reflect: bool


def activate(x: mx.array) -> mx.array:
    """Divide by the root mean square over channels (in float32 inside the kernel), then SiLU."""
    return nn.silu(mx.fast.rms_norm(x, None, NORM_EPS))


class CausalConv3d(nn.Module):
    """3x3x3 convolution that keeps the size: (1, F, H, W, inputs) -> (1, F, H, W, outputs)."""

    def __init__(self, in_channels: int, out_channels: int, border: Border) -> None:
        super().__init__()
        padding = 0 if border.reflect else (0, 1, 1)
        self.conv = nn.Conv3d(in_channels, out_channels, 3, padding=padding)
        self.border = border

    def __call__(self, x: mx.array, beside: mx.array | None = None) -> mx.array:
        """`beside`, of the result's shape, is added to it."""
        flops = 2 * self.conv.weight.size * prod(x.shape[:4])
        return in_parts(lambda part: self._frames(x, beside, part), x.shape[1], axis=1, flops=flops)

    def _frames(self, x: mx.array, beside: mx.array | None, part: slice) -> mx.array:
        """Frames `part` of the result, from the frames they depend on; beyond the clip's ends these are copies."""
        before, after = (2, 0) if self.border.causal else (1, 1)
        start, stop = part.start - before, part.stop + after
        before, after = max(0, -start), max(0, stop - x.shape[1])
        extended = _extend(x[:, max(0, start) : stop], before, after, self.border.reflect)
        if beside is None:
            return self.conv(extended)
        y = mx.conv3d(extended, self.conv.weight, padding=self.conv.padding)
        return _sum(beside[:, part], y, self.conv.bias)


@mx.compile
def _sum(beside: mx.array, y: mx.array, bias: mx.array) -> mx.array:
    return beside + (y + bias)


def _extend(x: mx.array, before: int, after: int, reflect: bool) -> mx.array:
    """x (1, F, H, W, C) with so many copies of its edge frames; with reflection, also one row and column per side."""
    first, last = x[:, :1], x[:, -1:]
    if not reflect:
        return mx.concatenate([first] * before + [x] + [last] * after, axis=1)
    # One padded copy, its edges then written in place from `x`: concatenating axis by axis takes three copies.
    y = mx.pad(x, [(0, 0), (before, after), (1, 1), (1, 1), (0, 0)])
    inner = slice(before, before + x.shape[1])
    y[:, inner, 1:-1, :1] = x[:, :, :, 1:2]
    y[:, inner, 1:-1, -1:] = x[:, :, :, -2:-1]
    y[:, inner, :1] = _reflect(x[:, :, 1:2], axis=3)
    y[:, inner, -1:] = _reflect(x[:, :, -2:-1], axis=3)
    for frame in range(before):
        y[:, frame : frame + 1] = _reflect(_reflect(first, axis=2), axis=3)
    for frame in range(inner.stop, inner.stop + after):
        y[:, frame : frame + 1] = _reflect(_reflect(last, axis=2), axis=3)
    return y


def _reflect(x: mx.array, axis: int) -> mx.array:
    """x with one more position at both ends of `axis`, mirrored without repeating the edge."""
    second, last_but_one = mx.split(x, [1, 2], axis)[1], mx.split(x, [-2, -1], axis)[1]
    return mx.concatenate([second, x, last_but_one], axis)


def settled(x: mx.array) -> mx.array:
    """`x`, evaluated if it is large: that frees its inputs before anything else is queued."""
    if x.nbytes >= LARGE:
        evaluate(x)
    return x


class ResBlock(nn.Module):
    """Two normalised, activated convolutions added to their input."""

    def __init__(self, channels: int, border: Border) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(channels, channels, border)
        self.conv2 = CausalConv3d(channels, channels, border)

    def __call__(self, x: mx.array) -> mx.array:
        y = settled(self.conv1(activate(x)))
        y = settled(activate(y))  # under the same name: nobody holds the convolution's result
        return self.conv2(y, x)


class ResBlocks(nn.Module):
    """Residual blocks at one size."""

    def __init__(self, channels: int, layers: int, border: Border) -> None:
        super().__init__()
        self.res_blocks = [ResBlock(channels, border) for _ in range(layers)]


class Downsample(nn.Module):
    """Divide the size by `stride`: convolution and space-to-depth, plus space-to-depth averaged over channel groups."""

    def __init__(self, stage: Stage, border: Border) -> None:
        super().__init__()
        assert stage.stride is not None
        self.conv = CausalConv3d(stage.inputs, stage.outputs // prod(stage.stride), border)
        self.stride = stage.stride
        self.out_channels = stage.outputs

    def __call__(self, x: mx.array) -> mx.array:
        if self.stride[0] > 1:
            x = mx.concatenate([x[:, :1], x], axis=1)  # the first latent frame stands for one frame only
        skip = space_to_depth(x, self.stride)
        skip = skip.reshape(*skip.shape[:-1], self.out_channels, -1).mean(axis=-1)
        return space_to_depth(self.conv(x), self.stride) + skip


def added(y: mx.array, skip: mx.array) -> mx.array:
    """y (..., n·C) + skip (..., C), whose whole block of channels repeats n times."""
    return (y.reshape(*skip.shape[:-1], -1, skip.shape[-1]) + skip[..., None, :]).reshape(y.shape)


class Upsample(nn.Module):
    """Multiply the size by a stride: convolution and depth-to-space, plus, where residual, the input's depth-to-space
    with its channels repeated to the new width."""

    def __init__(self, stage: Stage, border: Border) -> None:
        super().__init__()
        assert stage.stride is not None
        self.conv = CausalConv3d(stage.inputs, stage.outputs * prod(stage.stride), border)
        self.stride = stage.stride
        self.residual = stage.residual

    def __call__(self, x: mx.array) -> mx.array:
        y = depth_to_space(self.conv(x), self.stride)
        if self.residual:
            y = added(y, depth_to_space(x, self.stride))
        if self.stride[0] > 1:
            y = y[:, 1:]  # the first latent frame stands for one frame only
        return y


def apply(first: CausalConv3d, blocks: list[Any], x: mx.array) -> mx.array:
    """A convolution, then residual blocks and changes of size: (1, F, H, W, C) in and out. Each is evaluated, and only
    this function holds the last one's result, which is a fifth of the memory."""
    layers = [layer for block in blocks for layer in (block.res_blocks if isinstance(block, ResBlocks) else [block])]
    for layer in [first, *layers]:
        with transforming(*x.shape[2:4]):
            x = layer(x)
            evaluate(x)
    return x


def space_to_depth(x: mx.array, stride: Size) -> mx.array:
    """(B, F, H, W, C) -> (B, F/t, H/h, W/w, C·t·h·w); channels ordered (channel, t, h, w)."""
    batch, frames, height, width, channels = x.shape
    t, h, w = stride
    x = x.reshape(batch, frames // t, t, height // h, h, width // w, w, channels)
    return x.transpose(0, 1, 3, 5, 7, 2, 4, 6).reshape(batch, frames // t, height // h, width // w, -1)


def depth_to_space(x: mx.array, stride: Size) -> mx.array:
    """(B, F, H, W, C·t·h·w) -> (B, F·t, H·h, W·w, C); channels ordered (channel, t, h, w)."""
    batch, frames, height, width, _ = x.shape
    t, h, w = stride
    x = x.reshape(batch, frames, height, width, -1, t, h, w)
    return x.transpose(0, 1, 5, 2, 6, 3, 7, 4).reshape(batch, frames * t, height * h, width * w, -1)
