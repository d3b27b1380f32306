"""Vocoder: stereo log-mel spectrogram -> waveform, a HiFi-GAN generator.

Always float32: errors of 16-bit arithmetic add up over a hundred convolutions in sequence and become audible.
Weights may be 16 bit; MLX widens them where they meet the float32 signal."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from ltx2.runtime.errors import ConfigError, UnsupportedError
from ltx2.runtime.machine.bounded import evaluate
from ltx2.runtime.model.config import AS_PUBLISHED, Config

CHANNELS = 2
MEL_BINS = 64
SLOPE = 0.1  # LeakyReLU inside
FINAL_SLOPE = 0.01  # LeakyReLU before the last convolution


@dataclass(frozen=True)
class VocoderConfig(Config):
    """Checkpoint section `vocoder`."""

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"resblock": ("1",), "stereo": (True,)}

    upsample_initial_channel: int
    upsample_rates: tuple[int, ...]
    upsample_kernel_sizes: tuple[int, ...]
    resblock_kernel_sizes: tuple[int, ...]
    resblock_dilation_sizes: tuple[tuple[int, ...], ...]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """As Config.from_dict; a vocoder with a second, bandwidth-extending stage raises UnsupportedError."""
        if "bwe" in data:
            raise UnsupportedError(
                "this checkpoint's vocoder is not supported",
                "it extends the bandwidth of its sound in a second stage (vocoder.bwe), which this version lacks",
                "update ltx2, or generate with --no-audio",
            )
        return super().from_dict(data)

    def __post_init__(self) -> None:
        for sizes, per in (
            ("upsample_kernel_sizes", "upsample_rates"),
            ("resblock_dilation_sizes", "resblock_kernel_sizes"),
        ):
            if len(getattr(self, sizes)) != len(getattr(self, per)):
                raise ConfigError(
                    f"VocoderConfig: {sizes} and {per} differ in length",
                    f"{len(getattr(self, sizes))} and {len(getattr(self, per))} entries",
                    AS_PUBLISHED,
                )


class DilatedConv(nn.Conv1d):
    """Length-keeping convolution, computed as a plain one of the `dilation` interleaved signals that never meet.

    The same sums on the fast path of backends that have none for dilated convolutions. On the CPU it makes the whole
    vocoder nine times faster.
    """

    def __init__(self, channels: int, kernel: int, dilation: int) -> None:
        super().__init__(channels, channels, kernel, padding=kernel // 2)
        self._phases = dilation

    def __call__(self, x: mx.array) -> mx.array:  # (B, T, C)
        batch, frames, channels = x.shape
        x = mx.pad(x, [(0, 0), (0, -frames % self._phases), (0, 0)])
        x = x.reshape(batch, -1, self._phases, channels).swapaxes(1, 2).flatten(0, 1)
        x = super().__call__(x).reshape(batch, self._phases, -1, channels)
        return x.swapaxes(1, 2).flatten(1, 2)[:, :frames]


class ResBlock(nn.Module):
    """Residual pairs of a dilated and a plain convolution."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs1 = [DilatedConv(channels, kernel, dilation) for dilation in dilations]
        self.convs2 = [nn.Conv1d(channels, channels, kernel, padding=kernel // 2) for _ in dilations]

    def __call__(self, x: mx.array) -> mx.array:  # (B, T, C)
        for conv1, conv2 in zip(self.convs1, self.convs2, strict=True):
            y = conv1(nn.leaky_relu(x, SLOPE))
            evaluate(y)  # before more is queued: bounds the memory
            x = x + conv2(nn.leaky_relu(y, SLOPE))
            evaluate(x)
        return x


class Upsample(nn.ConvTranspose1d):
    """Transposed convolution computed as a convolution whose output channels hold the `stride` samples of each frame.

    The same sums without the zeros that a transposed convolution inserts between frames: a `stride`-th of the work, and
    the fast path of backends that have none for transposed convolutions.
    """

    def __call__(self, x: mx.array) -> mx.array:  # (B, T, C)
        channels, kernel, _ = self.weight.shape
        taps = -(-kernel // self.stride)  # frames that each sample depends on
        weight = mx.pad(self.weight, [(0, 0), (0, taps * self.stride - kernel), (0, 0)])
        weight = weight.reshape(channels, taps, self.stride, -1)[:, ::-1].transpose(2, 0, 1, 3)
        y = mx.conv1d(x, weight.reshape(self.stride * channels, taps, -1), padding=taps - 1)
        length = (x.shape[1] - 1) * self.stride + kernel - 2 * self.padding
        return y.reshape(x.shape[0], -1, channels)[:, self.padding :][:, :length] + self.bias


class Vocoder(nn.Module):
    """Upsampling stages, each followed by the mean of residual blocks of different kernel sizes."""

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.upsample_initial_channel
        self.conv_pre = nn.Conv1d(CHANNELS * MEL_BINS, width, 7, padding=3)
        self.ups: list[Upsample] = []
        self.resblocks: list[ResBlock] = []
        for rate, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
            self.ups.append(Upsample(width, width // 2, kernel, rate, padding=(kernel - rate) // 2))
            width //= 2
            sizes = zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True)
            self.resblocks += [ResBlock(width, size, dilations) for size, dilations in sizes]
        self.conv_post = nn.Conv1d(width, CHANNELS, 7, padding=3)

    @property
    def upsample_factor(self) -> int:
        """Samples per mel frame."""
        return prod(self.config.upsample_rates)

    def sample_rate(self, mel_rate: float) -> int:
        """Of the waveform, in Hz, where the spectrogram has `mel_rate` frames per second."""
        return round(mel_rate * self.upsample_factor)

    def __call__(self, mel: mx.array) -> mx.array:
        """Log-mel spectrogram (B, 2, T, 64) -> waveform (B, 2, upsample_factor * T) in [-1, 1], float32."""
        batch, _, frames, _ = mel.shape
        x = mel.astype(mx.float32).transpose(0, 2, 1, 3).reshape(batch, frames, -1)  # channel = side * 64 + bin
        x = self.conv_pre(x)
        for stage, up in enumerate(self.ups):
            x = self._mean_of_blocks(stage, up(nn.leaky_relu(x, SLOPE)))
            evaluate(x)
        x = self.conv_post(nn.leaky_relu(x, FINAL_SLOPE))
        return mx.tanh(x).transpose(0, 2, 1)

    def _mean_of_blocks(self, stage: int, x: mx.array) -> mx.array:
        count = len(self.config.resblock_kernel_sizes)
        blocks = self.resblocks[stage * count : (stage + 1) * count]
        return sum((block(x) for block in blocks[1:]), blocks[0](x)) / count


def build(config: Mapping[str, Any]) -> Vocoder:
    """The network of a checkpoint's `vocoder` section. Raises ConfigError or UnsupportedError."""
    return Vocoder(VocoderConfig.from_dict(config))
