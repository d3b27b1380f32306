"""Distances of two results: numbers, pictures, sounds. numpy only."""

from dataclasses import dataclass
from math import inf, log10, sqrt

import numpy as np

from ltx2.runtime.files.tensors import Array

WHITE = 255  # the largest value of a picture
WINDOW, HOP = 2048, 512  # samples: 85 ms every 21 ms at 24 kHz
FLOOR = 1e-10  # share of a full-scale sine's power that counts as silence: -100 dB


@dataclass(frozen=True)
class Difference:
    """Sums over the values of a reference and of another array; those of several pairs add up."""

    error: float = 0.0  # of squares of other - reference
    reference: float = 0.0  # of squares
    other: float = 0.0
    product: float = 0.0  # of reference * other

    @classmethod
    def between(cls, reference: Array, other: Array) -> "Difference":
        """Of two arrays of any common shape. Raises ValueError where sizes differ."""
        a, b = (np.asarray(values, np.float64).reshape(-1) for values in (reference, other))
        if a.shape != b.shape:
            raise ValueError(f"{a.size} values cannot be compared with {b.size}")
        c = b - a
        return cls(float(c @ c), float(a @ a), float(b @ b), float(a @ b))

    def __add__(self, more: "Difference") -> "Difference":
        return Difference(
            self.error + more.error,
            self.reference + more.reference,
            self.other + more.other,
            self.product + more.product,
        )

    @property
    def relative(self) -> float:
        """||other - reference|| / ||reference||"""
        if not self.reference:
            return inf if self.error else 0.0
        return sqrt(self.error / self.reference)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two; 1 where both are zero."""
        if not self.reference or not self.other:
            return 1.0 if self.reference == self.other else 0.0
        return self.product / sqrt(self.reference * self.other)


def psnr(reference: Array, frames: Array) -> float:
    """Peak signal-to-noise ratio in dB of frames, uint8 (F, H, W, 3): 10 log10(255^2 / mean squared error) over all
    values of the clip; infinite where nothing differs. Raises ValueError where shapes differ."""
    if reference.shape != frames.shape:
        raise ValueError(f"frames {reference.shape} cannot be compared with {frames.shape}")
    pairs = zip(reference, frames, strict=True)  # one by one: a long clip has gigabytes
    squares = sum(float(np.square(b.astype(np.float64) - a).sum()) for a, b in pairs)
    return 10 * log10(WHITE**2 * reference.size / squares) if squares else inf


def log_spectral_distance(reference: Array, sound: Array) -> float:
    """Distance in dB of two sounds, (channels, samples), full scale 1: the mean over frames and channels of the root
    mean square over frequencies of 10 log10 P - 10 log10 P', with the power spectra P and P' of frames of WINDOW
    samples under a Hann window. Powers below FLOOR count as FLOOR. Raises ValueError where shapes differ.

    Gray and Markel, Distance Measures for Speech Processing, IEEE Trans. ASSP 24 (1976)."""
    if reference.shape != sound.shape:
        raise ValueError(f"sounds {reference.shape} cannot be compared with {sound.shape}")
    distances = [
        np.sqrt(np.square(_decibels(a) - _decibels(b)).mean(axis=-1)) for a, b in zip(reference, sound, strict=True)
    ]
    return float(np.mean(distances))


def _decibels(samples: Array) -> Array:
    """(samples,) -> (frames, frequencies); a sine at full scale has 0 dB at its frequency."""
    samples = np.pad(samples.astype(np.float64), (0, max(0, WINDOW - len(samples))))
    frames = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::HOP]
    window = np.hanning(WINDOW)
    amplitudes = np.abs(np.fft.rfft(frames * window)) * 2 / window.sum()
    return 10 * np.log10(np.maximum(np.square(amplitudes), FLOOR))
