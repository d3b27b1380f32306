"""Latent upscalers: twice (or 3/2) the height and width, or twice the frames, of un-normalised video latents.

Group normalisation sees the whole clip, so latents are never tiled here. Inside, channels last."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, prod
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from ltx2.runtime.errors import UnsupportedError
from ltx2.runtime.machine.bounded import evaluate, in_parts
from ltx2.runtime.model.config import Config, Repeats
from ltx2.runtime.networks.video_vae.layers import depth_to_space

GROUPS = 32
CHANNELS = 32  # that are computed together: kernels for GPUs need multiples of 16
# Scale of the rational resampler -> factor up, then factor down.
RATIONAL_SCALES: Mapping[float, tuple[int, int]] = {0.75: (3, 4), 1.5: (3, 2), 2.0: (2, 1), 4.0: (4, 1)}
BINOMIAL = (1, 4, 6, 4, 1)


@dataclass(frozen=True)
class UpsamplerConfig(Config):
    """The flat configuration in an upscaler file's metadata (class LatentUpsampler)."""

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"_class_name": ("LatentUpsampler",), "dims": (3,)}

    in_channels: int = 128
    mid_channels: int = 512
    num_blocks_per_stage: Repeats = 4
    spatial_upsample: bool = True
    temporal_upsample: bool = False
    spatial_scale: float = 2.0  # read by the rational resampler only
    rational_resampler: bool = False  # without effect when upsampling over time

    def __post_init__(self) -> None:
        if not (self.spatial_upsample or self.temporal_upsample):
            self._reject("it enlarges neither space nor time")
        if self.mid_channels % GROUPS:
            self._reject(f"mid_channels = {self.mid_channels} is no multiple of {GROUPS}")
        if self.rational and self.spatial_scale not in RATIONAL_SCALES:
            self._reject(f"spatial_scale = {self.spatial_scale} is none of {', '.join(map(str, RATIONAL_SCALES))}")

    @property
    def rational(self) -> bool:
        return self.rational_resampler and not self.temporal_upsample

    @property
    def factors(self) -> tuple[int, int]:
        """The factors of height and width: up, then down."""
        if not self.spatial_upsample:
            return 1, 1
        return RATIONAL_SCALES[self.spatial_scale] if self.rational else (2, 1)

    def enlarged(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The size of the latents made of latents of this size."""
        up, down = self.factors
        frames = 2 * frames - 1 if self.temporal_upsample else frames
        return frames, -(-height * up // down), -(-width * up // down)

    def _reject(self, why: str) -> None:
        raise UnsupportedError(
            "this latent upscaler is not supported", why, "use a published LTX-2 upscaler of a supported release"
        )


class PaddedConv3d(nn.Conv3d):
    """3x3x3 convolution over a clip extended by zeros, (1, f, h, w, inputs) -> (1, f, h, w, outputs). Where it is too
    large for this GPU, some output channels at a time: that computes nothing twice."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        outputs, flops = self.weight.shape[0], 2 * self.weight.size * prod(x.shape[:4])
        together = gcd(outputs, CHANNELS)

        def some(part: slice) -> mx.array:
            kernels = self.weight[part.start * together : part.stop * together]
            return mx.conv3d(x, kernels, padding=self.padding)

        y: mx.array = in_parts(some, outputs // together, axis=4, flops=flops) + self.bias
        return y


class ResBlock(nn.Module):
    """Two normalised 3x3x3 convolutions; the second activation follows the addition of the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = PaddedConv3d(channels, channels)
        self.norm1 = _norm(channels)
        self.conv2 = PaddedConv3d(channels, channels)
        self.norm2 = _norm(channels)

    def __call__(self, x: mx.array) -> mx.array:
        y = nn.silu(self.norm1(self.conv1(x)))
        return nn.silu(self.norm2(self.conv2(y)) + x)


class RationalResampler(nn.Module):
    """Resize pictures, (N, H, W, C) -> (N, H * up/down, W * up/down, C): pixel shuffle, then a blur that keeps every
    `down`-th pixel."""

    def __init__(self, channels: int, up: int, down: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels * up * up, 3, padding=1)
        self._up, self._down = up, down

    def __call__(self, x: mx.array) -> mx.array:
        x = _shuffle(self.conv(x), self._up)
        return x if self._down == 1 else _blur(x, self._down)


class LatentUpsampler(nn.Module):
    """Un-normalised latents (1, C, f, h, w) to larger ones: (f, 2h, 2w), (f, ceil(3h/2), ceil(3w/2)) or (2f-1, h, w).

    Computes in the weights' dtype and returns the input's."""

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        mid = config.mid_channels
        self.initial_conv = PaddedConv3d(config.in_channels, mid)
        self.initial_norm = _norm(mid)
        self.res_blocks = [ResBlock(mid) for _ in range(config.num_blocks_per_stage)]
        self.upsampler: RationalResampler | list[nn.Module] = _upsampler(config)
        self.post_upsample_res_blocks = [ResBlock(mid) for _ in range(config.num_blocks_per_stage)]
        self.final_conv = PaddedConv3d(mid, config.in_channels)

    def __call__(self, latents: mx.array) -> mx.array:
        x = latents.transpose(0, 2, 3, 4, 1).astype(self.initial_conv.weight.dtype)
        x = nn.silu(self.initial_norm(self.initial_conv(x)))
        for block in self.res_blocks:
            x = block(x)
            evaluate(x)  # before more is queued: bounds the memory
        x = self._resample(x)
        for block in self.post_upsample_res_blocks:
            x = block(x)
            evaluate(x)
        return self.final_conv(x).transpose(0, 4, 1, 2, 3).astype(latents.dtype)

    def _resample(self, x: mx.array) -> mx.array:
        """(1, f, h, w, C) -> the new size."""
        if self.config.temporal_upsample:
            spatial, _ = self.config.factors
            # The first latent stands for one frame: only the second of its two is kept.
            return depth_to_space(self.upsampler[0](x), (2, spatial, spatial))[:, 1:]
        pictures = []
        for i in range(x.shape[1]):  # one at a time: in between they are up to nine times as large
            picture = x[0, i : i + 1]
            if isinstance(self.upsampler, RationalResampler):
                pictures.append(self.upsampler(picture))
            else:
                pictures.append(_shuffle(self.upsampler[0](picture), 2))
            evaluate(pictures[-1])
        return mx.concatenate(pictures)[None]


def _upsampler(config: UpsamplerConfig) -> RationalResampler | list[nn.Module]:
    mid = config.mid_channels
    if config.rational:
        return RationalResampler(mid, *config.factors)
    if config.temporal_upsample:
        return [PaddedConv3d(mid, mid * (8 if config.spatial_upsample else 2))]
    return [nn.Conv2d(mid, mid * 4, 3, padding=1)]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, pytorch_compatible=True)


def _shuffle(x: mx.array, factor: int) -> mx.array:
    """(N, H, W, C·factor²) -> (N, H·factor, W·factor, C); channels ordered (channel, row, column)."""
    return depth_to_space(x[None], (1, factor, factor))[0]


def _blur(x: mx.array, stride: int) -> mx.array:
    """Each channel of (N, H, W, C) filtered by the 5x5 binomial kernel over zeros beyond the edge."""
    line = mx.array(BINOMIAL, x.dtype) / sum(BINOMIAL)
    kernel = mx.broadcast_to((line[:, None] * line)[None, :, :, None], (x.shape[-1], 5, 5, 1))
    return mx.conv2d(x, kernel, stride, len(BINOMIAL) // 2, groups=x.shape[-1])


def build(config: Mapping[str, Any]) -> LatentUpsampler:
    """From an upscaler file's metadata. Raises ConfigError or UnsupportedError for one we cannot compute."""
    return LatentUpsampler(UpsamplerConfig.from_dict(config))
