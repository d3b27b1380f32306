"""Vocoder: stereo log-mel spectrogram -> waveform, a HiFi-GAN generator, in later releases with BigVGAN's activations.

Always float32: errors of 16-bit arithmetic add up over a hundred convolutions in sequence and become audible.
Weights may be 16 bit; MLX widens them where they meet the float32 signal."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ltx2.runtime.errors import ConfigError, UnsupportedError
from ltx2.runtime.machine.bounded import evaluate
from ltx2.runtime.model.config import AS_PUBLISHED, SUPPORTED_ONLY, Config

CHANNELS = 2
MEL_BINS = 64
SLOPE = 0.1  # LeakyReLU inside
FINAL_SLOPE = 0.01  # LeakyReLU before the last convolution
TAPS = 12  # of the filters around an anti-aliased activation
EPS = 1e-9  # of SnakeBeta


@dataclass(frozen=True)
class VocoderConfig(Config):
    """Checkpoint section `vocoder` (2.0), or one of its two generators (from 2.3 on)."""

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"stereo": (True,)}

    upsample_initial_channel: int
    upsample_rates: tuple[int, ...]
    upsample_kernel_sizes: tuple[int, ...]
    resblock_kernel_sizes: tuple[int, ...]
    resblock_dilation_sizes: tuple[tuple[int, ...], ...]
    resblock: str = "1"
    activation: str = "leaky_relu"
    use_bias_at_final: bool = True
    apply_final_activation: bool = True
    use_tanh_at_final: bool = True  # else the final activation is a clamp to [-1, 1]

    def __post_init__(self) -> None:
        if (self.resblock, self.activation) not in (("1", "leaky_relu"), ("AMP1", "snakebeta")):
            raise UnsupportedError(
                "this vocoder is not supported",
                f"this version implements no resblock = {self.resblock!r} with activation = {self.activation!r}",
                SUPPORTED_ONLY,
            )
        for sizes, per in (
            ("upsample_kernel_sizes", "upsample_rates"),
            ("resblock_dilation_sizes", "resblock_kernel_sizes"),
        ):
            if len(getattr(self, sizes)) != len(getattr(self, per)):
                raise ConfigError(
                    f"{type(self).__name__}: {sizes} and {per} differ in length",
                    f"{len(getattr(self, sizes))} and {len(getattr(self, per))} entries",
                    AS_PUBLISHED,
                )

    @property
    def antialiased(self) -> bool:
        """Whether activations are SnakeBeta at twice the rate."""
        return self.resblock == "AMP1"

    @property
    def upsample_factor(self) -> int:
        """Samples per mel frame."""
        return prod(self.upsample_rates)

    def generators(self, mel_frames: int) -> tuple[tuple["VocoderConfig", int], ...]:
        """The generators in the order they run, each with its number of mel frames."""
        return ((self, mel_frames),)


class DilatedConv(nn.Conv1d):
    """Length-keeping dilated convolution, computed as a plain one of `dilation` interleaved signals, which never mix.

    The same sums, on the fast path of backends that have none for dilated convolutions: on the CPU the whole vocoder is
    nine times faster.
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


class SnakeBeta(nn.Module):
    """x + sin(alpha x)^2 / beta per channel, as `AntiAliased` computes it; the parameters are logarithms."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = mx.zeros((channels,))
        self.beta = mx.zeros((channels,))


class Filter(nn.Module):
    """A low-pass filter over time for all channels; it comes with the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = mx.zeros((1, TAPS, 1))

    @property
    def taps(self) -> tuple[float, ...]:
        """Constants, so that one kernel holds the whole filter."""
        return tuple(np.array(self.filter.astype(mx.float32)).ravel().tolist())


class AntiAliased(nn.Module):
    """SnakeBeta at twice the rate, (B, T, C) -> (B, T, C); a filter removes the frequencies above the rate's limit.

    A filter is a sum of shifted slices in one kernel, which is faster than a convolution per channel. The even and the
    odd samples at twice the rate are two arrays, so that kernels read contiguous memory.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.act = SnakeBeta(channels)
        self.upsample = Filter()
        self.downsample = nn.Module()
        self.downsample.lowpass = Filter()

    def __call__(self, x: mx.array) -> mx.array:
        scales, taps = _scales(self.act.alpha, self.act.beta), self.upsample.taps
        x = mx.concatenate([x[:, :1]] * 3 + [x] + [x[:, -1:]] * 3, axis=1)
        even, odd = _snake(x[:, :-1], *scales, taps[::-2]), _snake(x[:, 1:], *scales, taps[-2::-2])
        first, last = even[:, :1], odd[:, -1:]
        even = mx.concatenate([first] * 2 + [even] + [last] * 3, axis=1)
        odd = mx.concatenate([first] * 3 + [odd] + [last] * 2, axis=1)
        return _decimated(even, odd, self.downsample.lowpass.taps)


@mx.compile
def _scales(alpha: mx.array, beta: mx.array) -> tuple[mx.array, mx.array]:
    """alpha and 1 / beta of SnakeBeta, each (C,), in float32."""
    return mx.exp(alpha.astype(mx.float32)), 1 / (mx.exp(beta.astype(mx.float32)) + EPS)


@mx.compile
def _snake(x: mx.array, alpha: mx.array, scale: mx.array, taps: tuple[float, ...]) -> mx.array:
    """Every second sample at twice the rate: padded (B, T + 5, C) -> SnakeBeta of them, (B, T, C).

    The even or the odd ones of a transposed convolution of stride 2, without the zeros that it would multiply."""
    y = _sum([part * (2 * tap) for part, tap in zip(_shifts(x, len(taps)), taps, strict=True)])
    return y + scale * mx.square(mx.sin(alpha * y))


@mx.compile
def _decimated(even: mx.array, odd: mx.array, taps: tuple[float, ...]) -> mx.array:
    """At half the rate: even and odd samples, padded, each (B, T + 5, C) -> (B, T, C)."""
    parts = _shifts(odd, TAPS // 2) + _shifts(even, TAPS // 2)
    return _sum([part * tap for part, tap in zip(parts, taps[::2] + taps[1::2], strict=True)])


def _shifts(x: mx.array, count: int) -> list[mx.array]:
    """Views of (B, T + count - 1, C) that begin one frame later each, (B, T, C)."""
    length = x.shape[1] - count + 1
    return [x[:, i : i + length] for i in range(count)]


def _sum(terms: list[mx.array]) -> mx.array:
    """The sum of arrays of one shape, by halves: one after the other would be too deep for one kernel."""
    half = len(terms) // 2
    return _sum(terms[:half]) + _sum(terms[half:]) if half else terms[0]


class ResBlock(nn.Module):
    """Residual pairs of a dilated and a plain convolution, each after an activation: (B, T, C) -> (B, T, C)."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...], antialiased: bool = False) -> None:
        super().__init__()
        self.convs1 = [DilatedConv(channels, kernel, dilation) for dilation in dilations]
        self.convs2 = [nn.Conv1d(channels, channels, kernel, padding=kernel // 2) for _ in dilations]
        if antialiased:
            self.acts1 = [AntiAliased(channels) for _ in dilations]
            self.acts2 = [AntiAliased(channels) for _ in dilations]

    def __call__(self, x: mx.array) -> mx.array:  # (B, T, C)
        for i, (conv1, conv2) in enumerate(zip(self.convs1, self.convs2, strict=True)):
            y = conv1(self.acts1[i](x) if "acts1" in self else nn.leaky_relu(x, SLOPE))
            evaluate(y)  # before more is queued: bounds the memory
            x = x + conv2(self.acts2[i](y) if "acts2" in self else nn.leaky_relu(y, SLOPE))
            evaluate(x)
        return x


class Upsample(nn.ConvTranspose1d):
    """Transposed convolution, (B, T, C) -> (B, samples, C'), computed as a convolution whose output channels hold the
    `stride` samples of each frame.

    The same sums without the zeros that a transposed convolution inserts between frames: a `stride`-th of the work, on
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
    """From a log-mel spectrogram to a waveform, in one generator or in two."""

    def sample_rate(self, mel_rate: float) -> int:
        """The waveform's rate in Hz, for a spectrogram of `mel_rate` frames per second."""
        raise NotImplementedError

    def __call__(self, mel: mx.array) -> mx.array:
        """Log-mel spectrogram (B, 2, T, 64) -> waveform (B, 2, samples), float32."""
        raise NotImplementedError


class Generator(Vocoder):
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
            self.resblocks += [ResBlock(width, size, dilations, config.antialiased) for size, dilations in sizes]
        if config.antialiased:
            self.act_post = AntiAliased(width)
        self.conv_post = nn.Conv1d(width, CHANNELS, 7, padding=3, bias=config.use_bias_at_final)

    def sample_rate(self, mel_rate: float) -> int:
        return round(mel_rate * self.config.upsample_factor)

    def __call__(self, mel: mx.array) -> mx.array:
        """(B, 2, T, 64) -> (B, 2, upsample_factor * T), in [-1, 1] unless the final activation is left out."""
        config, (batch, _, frames, _) = self.config, mel.shape
        x = mel.astype(mx.float32).transpose(0, 2, 1, 3).reshape(batch, frames, -1)  # channel = side * 64 + bin
        x = self.conv_pre(x)
        for stage, up in enumerate(self.ups):
            x = self._mean_of_blocks(stage, up(x if config.antialiased else nn.leaky_relu(x, SLOPE)))
            evaluate(x)
        x = self.conv_post(self.act_post(x) if config.antialiased else nn.leaky_relu(x, FINAL_SLOPE))
        if config.apply_final_activation:
            x = mx.tanh(x) if config.use_tanh_at_final else mx.clip(x, -1, 1)
        return x.transpose(0, 2, 1)

    def _mean_of_blocks(self, stage: int, x: mx.array) -> mx.array:
        """The mean of a stage's residual blocks of x (B, T, C): (B, T, C)."""
        count = len(self.config.resblock_kernel_sizes)
        blocks = self.resblocks[stage * count : (stage + 1) * count]
        return sum((block(x) for block in blocks[1:]), blocks[0](x)) / count


def build(config: Mapping[str, Any]) -> Generator:
    """The network of a checkpoint's `vocoder` section. Raises ConfigError or UnsupportedError."""
    return Generator(VocoderConfig.from_dict(config))
