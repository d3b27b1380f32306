"""Vocoder with bandwidth extension: a first generator makes sound of 8 kHz bandwidth; a second one adds the higher
frequencies, from that sound's spectrogram. Always float32, as the vocoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ltx2.runtime.errors import ConfigError
from ltx2.runtime.machine.bounded import evaluate
from ltx2.runtime.model.config import AS_PUBLISHED, Config
from ltx2.runtime.networks.audio.vocoder import CHANNELS, MEL_BINS, Generator, Vocoder, VocoderConfig

FLOOR = 1e-5  # of mel magnitudes, before their logarithm
ROLLOFF, REACH = 0.99, 6  # of the windowed sinc that the first sound is resampled with; zero crossings on either side


@dataclass(frozen=True, kw_only=True)
class ExtensionConfig(VocoderConfig):
    """Section `bwe`: the second generator, and its spectrogram."""

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {**VocoderConfig.FIXED, "num_mels": (MEL_BINS,)}

    input_sampling_rate: int  # Hz
    output_sampling_rate: int
    hop_length: int  # samples per mel frame, at the input's rate
    n_fft: int
    win_size: int

    @property
    def ratio(self) -> int:
        """Output samples per sample of the first generator."""
        return self.output_sampling_rate // self.input_sampling_rate

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.upsample_factor * self.input_sampling_rate != self.hop_length * self.output_sampling_rate:
            self._reject(f"{self.upsample_factor} samples per frame do not make {self.output_sampling_rate} Hz")
        if self.output_sampling_rate % self.input_sampling_rate:
            self._reject(f"{self.output_sampling_rate} Hz is no multiple of {self.input_sampling_rate} Hz")
        if not self.hop_length <= self.win_size == self.n_fft:
            self._reject(f"windows of {self.win_size} samples, {self.hop_length} apart, do not fit {self.n_fft} points")

    def _reject(self, why: str) -> None:
        raise ConfigError("ExtensionConfig: the sizes do not fit each other", why, AS_PUBLISHED)


@dataclass(frozen=True)
class ExtendedVocoderConfig(Config):
    """Checkpoint section `vocoder` from 2.3 on."""

    vocoder: VocoderConfig
    bwe: ExtensionConfig

    def generators(self, mel_frames: int) -> tuple[tuple[VocoderConfig, int], ...]:
        """The generators in the order they run, each with its number of mel frames."""
        samples = self.vocoder.upsample_factor * mel_frames
        return (self.vocoder, mel_frames), (self.bwe, -(-samples // self.bwe.hop_length))


def vocoder_config(config: Mapping[str, Any]) -> VocoderConfig | ExtendedVocoderConfig:
    """The configuration of a `vocoder` section of any release. Raises ConfigError or UnsupportedError."""
    return (ExtendedVocoderConfig if "bwe" in config else VocoderConfig).from_dict(config)


class Stft(nn.Module):
    """Magnitudes of a short-time Fourier transform: (N, samples) -> (N, frames, n_fft / 2 + 1).

    A frame ends with the last sample of its hop, so that it depends on no later one. The windowed sines and cosines
    come with the checkpoint.
    """

    def __init__(self, config: ExtensionConfig) -> None:
        super().__init__()
        self.forward_basis = mx.zeros((config.n_fft + 2, config.n_fft, 1))
        self._hop = config.hop_length

    def __call__(self, waveform: mx.array) -> mx.array:
        past = self.forward_basis.shape[1] - self._hop
        x = mx.conv1d(mx.pad(waveform, [(0, 0), (past, 0)])[..., None], self.forward_basis, stride=self._hop)
        real, imaginary = mx.split(x, 2, axis=-1)
        return mx.sqrt(mx.square(real) + mx.square(imaginary))


class MelStft(nn.Module):
    """Log-mel spectrogram: (N, samples) -> (N, frames, 64), natural logarithms."""

    def __init__(self, config: ExtensionConfig) -> None:
        super().__init__()
        self.mel_basis = mx.zeros((MEL_BINS, config.n_fft // 2 + 1))
        self.stft_fn = Stft(config)

    def __call__(self, waveform: mx.array) -> mx.array:
        mel = self.stft_fn(waveform) @ self.mel_basis.astype(mx.float32).T
        return mx.log(mx.maximum(mel, FLOOR))


class VocoderWithBWE(Vocoder):
    """Both generators; the names are the checkpoint's."""

    def __init__(self, config: ExtendedVocoderConfig) -> None:
        super().__init__()
        self.config = config
        self.vocoder = Generator(config.vocoder)
        self.bwe_generator = Generator(config.bwe)
        self.mel_stft = MelStft(config.bwe)

    def sample_rate(self, mel_rate: float) -> int:
        return self.vocoder.sample_rate(mel_rate) * self.config.bwe.ratio

    def __call__(self, mel: mx.array) -> mx.array:
        """(B, 2, T, 64) -> (B, 2, samples) in [-1, 1]."""
        ratio = self.config.bwe.ratio
        narrow = self.vocoder(mel)
        length = narrow.shape[-1]
        narrow = mx.pad(narrow, [(0, 0), (0, 0), (0, -length % self.config.bwe.hop_length)])
        evaluate(narrow)
        mel = mx.unflatten(self.mel_stft(narrow.flatten(0, 1)), 0, (-1, CHANNELS))
        wide = self.bwe_generator(mel) + resampled(narrow, ratio)
        return mx.clip(wide, -1, 1)[..., : length * ratio]


def resampled(waveform: mx.array, ratio: int) -> mx.array:
    """(B, 2, samples) -> (B, 2, ratio * samples), by a Hann-windowed sinc; edges are repeated.

    Sample ratio * n + p is the sum over d of taps[p + ratio * d] * waveform[n + reach - d]: a transposed convolution,
    written as a convolution whose channels are the `ratio` samples of each n.
    """
    reach = ceil(REACH / ROLLOFF)
    time = (np.arange((2 * reach + 1) * ratio) / ratio - reach) * ROLLOFF
    window = np.cos(np.clip(time, -REACH, REACH) * np.pi / REACH / 2) ** 2
    taps = np.sinc(time) * window * ROLLOFF  # beyond the last zero crossing the window is zero
    kernel = taps.reshape(-1, ratio)[::-1].T[..., None]  # (ratio, 2 * reach + 1, 1)
    x = mx.pad(waveform.flatten(0, 1)[..., None], [(0, 0), (reach, reach), (0, 0)], mode="edge")
    y = mx.conv1d(x, mx.array(kernel.astype(np.float32)))
    return y.reshape(*waveform.shape[:-1], -1)


def build(config: Mapping[str, Any]) -> VocoderWithBWE:
    """The network of a checkpoint's `vocoder` section. Raises ConfigError or UnsupportedError."""
    return VocoderWithBWE(ExtendedVocoderConfig.from_dict(config))
