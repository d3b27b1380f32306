"""Sounds at another sample rate."""

from math import ceil, gcd

import numpy as np

from ltx2.runtime.files.tensors import Array

# The filter that networks were trained with, torchaudio's `sinc_interp_hann`: a sinc in a Hann window.
CROSSINGS, ROLLOFF = 6, 0.99  # zero crossings on either side; share of the lower rate's band that is kept
BLOCK = 1 << 15  # samples made at a time


def resample(samples: Array, rate: int, target: int) -> Array:
    """Sound (channels, n) at `rate` Hz -> (channels, ceil(n * target / rate)) at `target` Hz, float32.

    Output j is the sum over inputs m of x[m] s(t) base / rate with t = base (m / rate - j / target): base is the lower
    of both rates times ROLLOFF, s the windowed sinc, and x is 0 outside the sound. Memory beside both sounds is
    bounded. A sound at its target rate is returned as it is.
    """
    if rate == target:
        return samples.astype(np.float32, copy=False)
    rate, target = rate // gcd(rate, target), target // gcd(rate, target)
    base = min(rate, target) * ROLLOFF
    reach = ceil(CROSSINGS * rate / base)
    length = -(-samples.shape[1] * target // rate)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(samples, ((0, 0), (reach, reach + 1))), 2 * reach + 1, 1)
    made = np.empty((len(samples), length), np.float32)
    for begin in range(0, length, BLOCK):
        j = np.arange(begin, min(begin + BLOCK, length))
        nearest, phase = np.divmod(j * rate, target)  # the input at or before each output, and how far behind
        phases, which = np.unique(phase, return_inverse=True)
        t = base * (np.arange(-reach, reach + 1) / rate - phases[:, None] / (rate * target))
        weights = np.sinc(t) * np.cos(np.clip(t / CROSSINGS, -1, 1) * (np.pi / 2)) ** 2 * (base / rate)
        made[:, j] = np.einsum("cjm,jm->cj", windows[:, nearest], weights[which])
    return made
