"""Vocoders of all releases: against diffusers on random weights, and what sound depends on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

from ltx2.runtime.errors import ConfigError, UnsupportedError
from ltx2.runtime.files.tensors import open_tensorfile
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.audio import bandwidth, vocoder
from ltx2.runtime.networks.audio.bandwidth import VocoderWithBWE, resampled, vocoder_config
from ltx2.runtime.networks.audio.vocoder import AntiAliased, Vocoder
from ltx2.runtime.networks.load import load_network, parameter_shapes
from tests.support.golden import golden, golden_25
from tests.support.official import MONOLITH, Official, random_values
from tests.support.parity import relative_l2, require
from tests.support.published import read_header

if TYPE_CHECKING:
    from tests.support.reference_audio import ReferenceVocoder

Figure = Callable[..., None]
CONFIG = json.loads(open_tensorfile(MONOLITH).metadata["config"])["vocoder"]
AMP: dict[str, Any] = {
    "resblock": "AMP1", "resblock_kernel_sizes": [3, 7, 11], "resblock_dilation_sizes": [[1, 3, 5]] * 3, "stereo": True,
    "use_tanh_at_final": False, "activation": "snakebeta", "use_bias_at_final": False,
}  # fmt: skip
# The published structure at small widths and rates: 20 samples a frame, and 30 for each 10 of these.
EXTENDED: dict[str, Any] = {
    "vocoder": AMP | {
        "upsample_initial_channel": 32, "upsample_rates": [5, 2, 2], "upsample_kernel_sizes": [11, 4, 4],
    },
    "bwe": AMP | {
        "upsample_initial_channel": 16, "upsample_rates": [6, 5], "upsample_kernel_sizes": [12, 11],
        "apply_final_activation": False, "input_sampling_rate": 2000, "output_sampling_rate": 6000, "hop_length": 10,
        "n_fft": 64, "win_size": 64, "num_mels": 64,
    },
}  # fmt: skip


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def log_mel(frames: int, seed: int = 0) -> np.ndarray:
    """Values in the range of real spectrograms: from silence, log(1e-5), to about 2."""
    return np.clip(3 * normal(1, 2, frames, 64, seed=seed) - 4, float(np.log(1e-5)), None)


def official_tensors(network: nn.Module, seed: int = 0) -> dict[str, np.ndarray]:
    """Random values by official names, in PyTorch's layout. As published, the filters of a kind are the same in all
    layers, and symmetric."""
    rng = np.random.default_rng(seed)
    halves = {side: abs(random_values("filter", (1, 1, 6), rng)) for side in ("upsample", "lowpass")}
    filters = {side: np.concatenate([h, h[..., ::-1]], axis=-1) / (2 * h.sum()) for side, h in halves.items()}
    tensors = {}
    for name, shape in sorted(parameter_shapes(network).items()):
        if name.endswith(".filter"):
            tensors[name] = filters[name.split(".")[-2]]
        elif ".ups." in f".{name}" and len(shape) == 3:
            tensors[name] = 2 * random_values(name, shape, rng).transpose(2, 0, 1)
        elif len(shape) == 3:
            tensors[name] = random_values(name, shape, rng).transpose(0, 2, 1)
        else:
            tensors[name] = random_values(name, shape, rng)
        if name.endswith("mel_basis"):
            tensors[name] = abs(tensors[name])
    return tensors


def fill(network: nn.Module, tensors: dict[str, np.ndarray]) -> None:
    def ours(name: str, value: np.ndarray) -> mx.array:
        if value.ndim == 3:
            value = value.transpose((1, 2, 0) if ".ups." in f".{name}" else (0, 2, 1))
        return mx.array(np.ascontiguousarray(value))

    network.load_weights([(name, ours(name, value)) for name, value in tensors.items()], strict=True)


@pytest.fixture(scope="module")
def voice(model: Path) -> Vocoder:
    return load_network(ModelFolder.open(model), "vocoder", Vocoder)


@pytest.fixture(scope="module")
def extended() -> VocoderWithBWE:
    network = bandwidth.build(EXTENDED)
    fill(network, official_tensors(network))
    return network


def reference_vocoder(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> "ReferenceVocoder":
    require("torch"), require("diffusers")
    from tests.support.reference_audio import ReferenceVocoder

    return ReferenceVocoder(tensors, config)


def test_equals_diffusers(voice: Vocoder, official: Official, figure: Figure) -> None:
    reference, mel = reference_vocoder(official.section("vocoder."), CONFIG), log_mel(9)
    ours, theirs = np.array(voice(mx.array(mel))), reference(mel)
    assert relative_l2(reference(log_mel(9, seed=1)), theirs) > 0.1  # the sound depends on the spectrogram
    figure("vocoder rel L2", relative_l2(ours, theirs), limit=1e-4)


@pytest.mark.parametrize(
    ("final", "most"),
    [
        ({"use_tanh_at_final": False}, 1),  # as published: a clamp
        ({"use_tanh_at_final": True}, 1),
        ({"apply_final_activation": False}, np.inf),
        ({"use_bias_at_final": True}, 1),
    ],
    ids=str,
)
def test_bandwidth_extension_equals_diffusers(final: dict[str, bool], most: float, figure: Figure) -> None:
    """With every final activation of the first generator. It comes before the spectrogram and the resampled sound."""
    config = EXTENDED | {"vocoder": EXTENDED["vocoder"] | final}
    network = bandwidth.build(config)
    tensors = official_tensors(network)
    for part, loudness in {"vocoder": 0.2, "bwe_generator": 0.02}.items():  # signals grow from block to block
        tensors[f"{part}.conv_post.weight"] *= loudness
    fill(network, tensors)
    mel = log_mel(9)
    narrow = np.array(network.vocoder(mx.array(mel)))
    assert 0.9 < abs(narrow).max() <= most and (most == 1 or abs(narrow).max() > 1)
    theirs = reference_vocoder(tensors, config)(mel)
    assert theirs.shape == (1, 2, 9 * 20 * 3) and 0.05 < abs(theirs).mean() < 0.9
    figure(f"vocoder with bandwidth extension {final} rel L2", relative_l2(network(mx.array(mel)), theirs), limit=1e-4)


@pytest.mark.parametrize("frames", [1, 2, 3, 20])
def test_antialiased_activation_equals_diffusers(frames: int, figure: Figure) -> None:
    """Also where the signal is shorter than the filters."""
    require("torch"), require("diffusers")
    from tests.support.reference_audio import reference_activation

    layer, x = AntiAliased(5), normal(2, 5, frames)
    tensors = official_tensors(layer)
    fill(layer, tensors)
    theirs = reference_activation(x, tensors).transpose(0, 2, 1)
    error = relative_l2(layer(mx.array(x.transpose(0, 2, 1))), theirs)
    figure(f"anti-aliased activation, {frames} frames, rel L2", error, limit=1e-5)


@pytest.mark.parametrize("clip", ["a", "b"])
def test_golden_sound(demo_model: Path, figure: Figure, clip: str) -> None:
    sound = load_network(ModelFolder.open(demo_model), "vocoder", Vocoder)(mx.array(golden(f"{clip}.mel")))
    figure(f"golden {clip}: sound rel L2", relative_l2(sound[0], golden(f"{clip}.audio")), limit=1e-4)


@pytest.mark.parametrize("clip", ["a", "b", "c"])
def test_golden_sound_at_48_khz(demo_25: Path, figure: Figure, clip: str) -> None:
    network = load_network(ModelFolder.open(demo_25), "vocoder", Vocoder)
    sound = network(mx.array(golden_25(f"{clip}.mel")))
    assert network.sample_rate(100) == 48000
    figure(f"golden 2.5 {clip}: sound rel L2", relative_l2(sound[0], golden_25(f"{clip}.audio")), limit=1e-4)


def test_a_tone_is_resampled_to_itself() -> None:
    time = np.arange(600) / 200
    tones = [np.sin(2 * np.pi * 11 * time), np.cos(2 * np.pi * 60 * time)]
    sound = resampled(mx.array(np.stack(tones)[None].astype(np.float32)), 3)
    time = np.arange(1800) / 600
    want = np.stack([np.sin(2 * np.pi * 11 * time), np.cos(2 * np.pi * 60 * time)])
    assert np.abs(np.array(sound[0]) - want)[:, 30:-30].max() < 0.01


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_every_frame_makes_its_samples(frames: int) -> None:
    """Also where the second generator's frames do not divide the first one's samples."""
    odd = {"upsample_rates": [5, 2], "upsample_kernel_sizes": [11, 4]}
    bwe = {"hop_length": 8, "upsample_rates": [6, 4], "upsample_kernel_sizes": [12, 8]}
    network = bandwidth.build({"vocoder": EXTENDED["vocoder"] | odd, "bwe": EXTENDED["bwe"] | bwe})
    fill(network, official_tensors(network))
    assert network(mx.array(log_mel(frames))).shape == (1, 2, frames * 10 * 3)
    assert [count for _, count in network.config.generators(frames)] == [frames, -(-frames * 10 // 8)]


@pytest.mark.parametrize(("config", "factor"), [(CONFIG, 240), (EXTENDED, 60)], ids=["2.0", "from 2.3 on"])
def test_computes_in_float32_whatever_the_weights(config: dict[str, Any], factor: int) -> None:
    def build() -> Vocoder:
        return (bandwidth.build if "bwe" in config else vocoder.build)(config)

    full, rounded, half = build(), build(), build()
    fill(full, official_tensors(full))
    half.update(tree_map(lambda p: p.astype(mx.bfloat16), full.parameters()))
    rounded.update(tree_map(lambda p: p.astype(mx.float32), half.parameters()))
    mel = mx.array(log_mel(5)).astype(mx.bfloat16)
    sound = half(mel)
    assert sound.dtype == mx.float32 and sound.shape == (1, 2, 5 * factor)
    assert relative_l2(sound, rounded(mel.astype(mx.float32))) < 1e-6  # nothing but the weights was rounded
    assert relative_l2(sound, full(mel)) < 0.1


@pytest.mark.parametrize(("kernel", "stride"), [(16, 6), (15, 5), (8, 2), (4, 4), (3, 4), (5, 1), (11, 4)])
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_upsampling_is_the_transposed_convolution(kernel: int, stride: int, frames: int) -> None:
    padding = max(kernel - stride, 0) // 2
    layer = vocoder.Upsample(6, 3, kernel, stride, padding=padding)
    layer.bias = mx.array(normal(3))
    x = mx.array(normal(2, frames, 6))
    assert relative_l2(layer(x), mx.conv_transpose1d(x, layer.weight, stride, padding) + layer.bias) < 1e-6


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (3, 5), (7, 3), (11, 5)])
@pytest.mark.parametrize("frames", [1, 5, 16])
def test_interleaved_is_the_dilated_convolution(kernel: int, dilation: int, frames: int) -> None:
    layer = vocoder.DilatedConv(4, kernel, dilation)
    layer.bias = mx.array(normal(4))
    x = mx.array(normal(2, frames, 4))
    plain = mx.conv1d(x, layer.weight, padding=dilation * (kernel // 2), dilation=dilation)
    assert relative_l2(layer(x), plain + layer.bias) < 1e-6


def test_sample_rate_follows_from_the_configuration(voice: Vocoder, extended: VocoderWithBWE) -> None:
    assert voice.sample_rate(16000 / 160) == 24000
    assert extended.sample_rate(100) == 6000


@pytest.mark.parametrize("header", ["ltx-2-19b", "ltx-2.3-22b", "ltx-2.5-audio-vae-bf16"])
def test_published_files_fit(header: str) -> None:
    """Every tensor has its place. Axes are compared unordered: our layout permutes them."""
    _, metadata, tensors = read_header(header)
    config = json.loads(metadata["config"])["vocoder"]
    ours = parameter_shapes((bandwidth if "bwe" in config else vocoder).build(config))
    published = {
        name.removeprefix("vocoder."): shape
        for name, (_, shape) in tensors.items()
        if name.startswith("vocoder.") and not name.endswith("inverse_basis")
    }
    assert {name: sorted(shape) for name, shape in ours.items()} == {n: sorted(s) for n, s in published.items()}
    assert vocoder_config(config).generators(501)[-1][1] == (1002 if "bwe" in config else 501)


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("new", True, ConfigError),
        ("use_tanh_at_final", "yes", ConfigError),
        ("upsample_rates", [6, 5], ConfigError),
        ("resblock_dilation_sizes", [[1, 3, 5]], ConfigError),
        ("upsample_initial_channel", 64.5, ConfigError),
        ("resblock", "AMP1", UnsupportedError),
        ("activation", "snake", UnsupportedError),
        ("stereo", False, UnsupportedError),
    ],
)
def test_configuration_is_strict(key: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        vocoder.build(CONFIG | {key: value})


@pytest.mark.parametrize(
    ("part", "key", "value", "error"),
    [
        ("bwe", "new", 1, ConfigError),
        ("bwe", "hop_length", 20, ConfigError),
        ("bwe", "output_sampling_rate", 5000, ConfigError),
        ("bwe", "win_size", 32, ConfigError),
        ("bwe", "num_mels", 80, UnsupportedError),
        ("bwe", "activation", "snake", UnsupportedError),
        ("vocoder", "hop_length", 10, ConfigError),
    ],
)
def test_extended_configuration_is_strict(part: str, key: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        bandwidth.build(EXTENDED | {part: EXTENDED[part] | {key: value}})
    with pytest.raises(ConfigError, match="third"):
        bandwidth.build(EXTENDED | {"third": {}})


@pytest.mark.parametrize("key", sorted(CONFIG.keys() - {"resblock", "stereo"}))
def test_missing_keys_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        vocoder.build({k: v for k, v in CONFIG.items() if k != key})
