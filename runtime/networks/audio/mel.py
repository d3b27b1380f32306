"""From sound to the log-mel spectrograms that the audio VAE encodes, in numpy: transforms are exact on every machine,
and take milliseconds."""

from typing import Any

import numpy as np

from ltx2.runtime.networks.audio.config import AudioVAEConfig

Array = np.ndarray[Any, np.dtype[Any]]
FLOOR = 1e-5  # of magnitudes, before their logarithm
BLOCK = 512  # frames at a time


def log_mel(sound: Array, config: AudioVAEConfig) -> Array:
    """float (channels, samples) -> (channels, samples // hop_length + 1, mel bins), float32, natural logarithms.

    Magnitudes of Hann-windowed frames, the first centred at the first sample; the ends are mirrored.
    """
    size, window = config.filter_length, np.zeros(config.filter_length)
    start = (size - config.win_length) // 2
    window[start : start + config.win_length] = np.hanning(config.win_length + 1)[:-1]
    filters = _filters(config.sampling_rate, size, config.n_mel_channels, (config.mel_fmin, config.mel_fmax))
    padded = np.pad(sound, ((0, 0), (size // 2, size // 2)), mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, size, axis=1)[:, :: config.hop_length]
    mel = np.empty((*frames.shape[:2], config.n_mel_channels), np.float32)
    for begin in range(0, frames.shape[1], BLOCK):
        part = slice(begin, begin + BLOCK)
        mel[:, part] = np.log(np.maximum(np.abs(np.fft.rfft(frames[:, part] * window)) @ filters, FLOOR))
    return mel


def _filters(rate: int, size: int, bins: int, limits: tuple[float, float]) -> Array:
    """Triangles over frequency, evenly spaced on Slaney's mel scale and of one area: (size // 2 + 1, bins), float64."""
    low, high = _mel(np.array(limits))
    edges = _hertz(np.linspace(low, high, bins + 2))
    widths = np.diff(edges)
    frequencies = np.linspace(0, rate // 2, size // 2 + 1)[:, None]
    rising, falling = (frequencies - edges[:-2]) / widths[:-1], (edges[2:] - frequencies) / widths[1:]
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])


def _mel(hertz: Array) -> Array:
    """Slaney's mel scale: linear up to 1000 Hz, which is 15; then 27 steps for each factor of 6.4."""
    return np.where(hertz < 1000, 3 * hertz / 200, 15 + 27 * np.log(np.maximum(hertz, 1000) / 1000) / np.log(6.4))


def _hertz(mel: Array) -> Array:
    return np.where(mel < 15, 200 * mel / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))
