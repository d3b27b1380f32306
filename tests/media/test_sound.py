"""Sounds from files."""

from math import ceil, gcd

import numpy as np
import pytest

from ltx2.runtime.media.sound import resample
from tests.support.parity import relative_l2, require


def reference(samples: np.ndarray, rate: int, target: int) -> np.ndarray:
    """The published filter as a bank of one strided convolution per phase, as torchaudio lays it out."""
    torch = require("torch")
    divisor = gcd(rate, target)
    rate, target = rate // divisor, target // divisor
    base = 0.99 * min(rate, target)
    width = ceil(6 * rate / base)
    index = torch.arange(-width, width + rate, dtype=torch.float64) / rate
    t = ((torch.arange(target, dtype=torch.float64) / -target)[:, None] + index).mul(base).clamp(-6, 6)
    bank = torch.sinc(t) * torch.cos(t * torch.pi / 12) ** 2 * base / rate
    padded = torch.nn.functional.pad(torch.tensor(samples)[:, None].double(), (width, width + rate))
    made = torch.conv1d(padded, bank[:, None], stride=rate).transpose(1, 2).flatten(1)
    return made[:, : ceil(samples.shape[1] * target / rate)].numpy()


@pytest.mark.parametrize(
    ("rate", "target"), [(48000, 16000), (44100, 16000), (24000, 16000), (8000, 16000), (22050, 16000), (1001, 1000)]
)
@pytest.mark.parametrize("length", [1, 7, 3001])
def test_resampling_is_the_published_filter(rate: int, target: int, length: int) -> None:
    samples = np.random.default_rng(length).standard_normal((2, length)).astype(np.float32)
    made = resample(samples, rate, target)
    assert made.dtype == np.float32 and made.shape == (2, ceil(length * target / rate))
    assert relative_l2(made, reference(samples, rate, target)) < 1e-6


def test_many_samples_are_made_as_few(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = np.random.default_rng(0).standard_normal((1, 5000)).astype(np.float32)
    whole = resample(samples, 44100, 16000)
    monkeypatch.setattr("ltx2.runtime.media.sound.BLOCK", 37)
    np.testing.assert_allclose(resample(samples, 44100, 16000), whole, atol=1e-6)


def test_a_sound_at_its_target_rate_is_not_touched() -> None:
    samples = np.random.default_rng(0).standard_normal((1, 50)).astype(np.float32)
    assert resample(samples, 16000, 16000) is samples
