"""Audio autoencoder: stereo log-mel spectrograms (100 frames a second) <-> latents (25 a second, 16 frequencies).

A 2-D convolutional network over (time, frequency), causal in time. Computes in the dtype of its argument."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ltx2.runtime.layers.statistics import LatentStatistics
from ltx2.runtime.machine.bounded import evaluate
from ltx2.runtime.networks.audio.config import AudioVAEConfig
from ltx2.runtime.networks.audio.mel import log_mel

NORM_EPS = 1e-6


class CausalConv2d(nn.Module):
    """Convolution over (time, frequency) that sees no later time; zeros extend its input."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel)
        self._reach = kernel - 1

    def __call__(self, x: mx.array) -> mx.array:  # (B, T, F, C)
        side = self._reach // 2
        return self.conv(mx.pad(x, [(0, 0), (self._reach, 0), (side, side), (0, 0)]))


def norm_silu(x: mx.array) -> mx.array:
    """RMS norm of x (B, T, F, C) over channels, without weights, then SiLU."""
    return nn.silu(mx.fast.rms_norm(x, None, NORM_EPS))


class ResBlock(nn.Module):
    """Two convolutions added to their input: (B, T, F, C) -> (B, T, F, C'). Each is evaluated before more is queued,
    which bounds the memory: a convolution's kernels may take most of it."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = CausalConv2d(in_channels, out_channels, 3)
        self.conv2 = CausalConv2d(out_channels, out_channels, 3)
        if in_channels != out_channels:
            self.nin_shortcut = CausalConv2d(in_channels, out_channels, 1)

    def __call__(self, x: mx.array) -> mx.array:
        h = self.conv1(norm_silu(x))
        evaluate(h)
        h = self.conv2(norm_silu(h)) + (self.nin_shortcut(x) if "nin_shortcut" in self else x)
        evaluate(h)
        return h


class Downsample(nn.Module):
    """Halve time (rounding up) and frequency: (B, T, F, C) -> (B, ceil(T/2), F/2, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(mx.pad(x, [(0, 0), (2, 0), (0, 1), (0, 0)]))


class Upsample(nn.Module):
    """(B, t, f, C) -> (B, 2t-1, 2f, C): the first frame stands for a single one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv2d(channels, channels, 3)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2))[:, 1:]


class MidBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.block_2 = ResBlock(channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        return self.block_2(self.block_1(x))


class Level(nn.Module):
    """Residual blocks at one resolution, then a change of resolution, except in the last level."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int) -> None:
        super().__init__()
        self.block = [ResBlock(out_channels if i else in_channels, out_channels) for i in range(blocks)]

    def __call__(self, x: mx.array) -> mx.array:
        for block in self.block:
            x = block(x)
        for resample in ("downsample", "upsample"):
            if resample in self:
                x = self[resample](x)
        evaluate(x)  # before more is queued: bounds the memory
        return x


class Encoder(nn.Module):
    """(B, T, mel bins, 2) -> means and log variances (B, t, frequencies, 2 * latent channels)."""

    def __init__(self, config: AudioVAEConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = CausalConv2d(config.in_channels, config.ch, 3)
        finer = (config.ch, *widths[:-1])
        self.down = [Level(*sides, config.num_res_blocks) for sides in zip(finer, widths, strict=True)]
        for level, width in zip(self.down[:-1], widths, strict=False):
            level.downsample = Downsample(width)
        self.mid = MidBlock(widths[-1])
        self.conv_out = CausalConv2d(widths[-1], 2 * config.z_channels, 3)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(norm_silu(self.mid(x)))


class Decoder(nn.Module):
    """(B, t, frequencies, latent channels) -> (B, T, mel bins, 2). Level 0 is the finest, as in the encoder."""

    def __init__(self, config: AudioVAEConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = CausalConv2d(config.z_channels, widths[-1], 3)
        self.mid = MidBlock(widths[-1])
        self.up = [
            Level(coarser, width, config.num_res_blocks + 1)
            for coarser, width in zip((*widths[1:], widths[-1]), widths, strict=True)
        ]
        for level, width in zip(self.up[1:], widths[1:], strict=True):
            level.upsample = Upsample(width)
        self.conv_out = CausalConv2d(widths[0], config.out_ch, 3)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(norm_silu(x))


class AudioAutoencoder(nn.Module):
    """Encoder, decoder and latent statistics."""

    def __init__(self, config: AudioVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.per_channel_statistics = LatentStatistics(config.latent_channels, 1, config.latent_frequencies)

    def decode(self, latents: mx.array) -> mx.array:
        """Normalised latents (B, A, t, frequencies) -> log-mel spectrogram (B, 2, 4t-3, mel bins)."""
        x = self.per_channel_statistics.unnormalise(latents)
        return self.decoder(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)

    def encode(self, waveform: mx.array, frames: int | None = None) -> mx.array:
        """Sound (1, 1 or 2, samples) at `sampling_rate` -> normalised latents (1, A, t, frequencies), float32.

        t is `config.latent_frames(samples)`, or `frames`: cut there, or continued by zeros (the mean). One channel
        counts as both.
        """
        mel = log_mel(np.array(waveform[0].astype(mx.float32)), self.config)
        mel = np.broadcast_to(mel, (self.config.in_channels, *mel.shape[1:]))
        latents = self.encode_mel(mx.array(mel)[None])
        if frames is None:
            return latents
        missing = max(0, frames - latents.shape[2])
        return mx.pad(latents[:, :, :frames], [(0, 0), (0, 0), (0, missing), (0, 0)])

    def encode_mel(self, mel: mx.array) -> mx.array:
        """Log-mel spectrogram (B, 2, T, mel bins) -> means, normalised latents (B, A, ceil(T/4), frequencies)."""
        x = self.encoder(mel.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        return self.per_channel_statistics.normalise(x[:, : self.config.latent_channels])


def build(config: Mapping[str, Any]) -> AudioAutoencoder:
    """The network of a checkpoint's `audio_vae` section. Raises ConfigError or UnsupportedError."""
    return AudioAutoencoder(AudioVAEConfig.from_dict(config))
