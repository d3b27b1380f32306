"""Audio VAE: against diffusers on random weights, against the demo model's golden tensors, and the
properties that sound depends on."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from ltx2.runtime.errors import ConfigError, UnsupportedError
from ltx2.runtime.files.tensors import open_tensorfile
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.audio import vae as audio_vae
from ltx2.runtime.networks.audio.vae import AudioAutoencoder, AudioVAEConfig
from ltx2.runtime.networks.load import load_network, parameter_shapes
from tests.support.golden import golden
from tests.support.official import MONOLITH, Official
from tests.support.parity import relative_l2, require
from tests.support.published import read_header

if TYPE_CHECKING:
    from tests.support.reference_audio import ReferenceAudioVAE

Figure = Callable[..., None]
CONFIG = json.loads(open_tensorfile(MONOLITH).metadata["config"])


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def log_mel(frames: int, seed: int = 0) -> np.ndarray:
    """Values in the range of real spectrograms: from silence, log(1e-5), to about 2."""
    return np.clip(3 * normal(1, 2, frames, 64, seed=seed) - 4, float(np.log(1e-5)), None)


@pytest.fixture(scope="module")
def vae(model: Path) -> AudioAutoencoder:
    return load_network(ModelFolder.open(model), "audio_vae", AudioAutoencoder)


@pytest.fixture(scope="module")
def reference_vae(official: Official) -> "ReferenceAudioVAE":
    require("torch"), require("diffusers")
    from tests.support.reference_audio import ReferenceAudioVAE

    return ReferenceAudioVAE(official.section("audio_vae."), CONFIG["audio_vae"])


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_decode_equals_diffusers(
    vae: AudioAutoencoder, reference_vae: "ReferenceAudioVAE", figure: Figure, frames: int
) -> None:
    latents = normal(1, 2, frames, 16)
    error = relative_l2(vae.decode(mx.array(latents)), reference_vae.decode(latents))
    figure(f"audio_vae.decode rel L2, {frames} latent frames", error, limit=1e-4)


@pytest.mark.parametrize("frames", [1, 4, 25])
def test_encode_equals_diffusers(
    vae: AudioAutoencoder, reference_vae: "ReferenceAudioVAE", figure: Figure, frames: int
) -> None:
    mel = log_mel(frames)
    error = relative_l2(vae.encode(mx.array(mel)), reference_vae.encode(mel))
    figure(f"audio_vae.encode rel L2, {frames} mel frames", error, limit=1e-4)


@pytest.mark.parametrize("clip", ["a", "b"])
def test_golden_spectrogram(demo_model: Path, figure: Figure, clip: str) -> None:
    folder = ModelFolder.open(demo_model)
    vae = load_network(folder, "audio_vae", AudioAutoencoder)
    mel = vae.decode(mx.array(golden(f"{clip}.stage2.audio_latent")))
    figure(f"golden {clip}: mel rel L2", relative_l2(mel, golden(f"{clip}.mel")), limit=1e-4)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 101])
def test_lengths(vae: AudioAutoencoder, frames: int) -> None:
    latents = vae.encode(mx.zeros((1, 2, frames, 64)))
    assert latents.shape == (1, 2, -(-frames // 4), 16)
    assert vae.decode(latents).shape == (1, 2, 4 * latents.shape[2] - 3, 64)


def test_time_is_causal(vae: AudioAutoencoder) -> None:
    """A clip's beginning does not depend on its end, so cutting the latents cuts the sound."""
    latents, mel = mx.array(normal(1, 2, 6, 16)), mx.array(log_mel(21))
    assert relative_l2(vae.decode(latents[:, :, :4]), vae.decode(latents)[:, :, :13]) < 1e-5
    assert relative_l2(vae.encode(mel[:, :, :13]), vae.encode(mel)[:, :, :4]) < 1e-5


def test_vae_computes_in_the_dtype_of_its_argument(vae: AudioAutoencoder) -> None:
    latents = mx.array(normal(1, 2, 3, 16))
    half = audio_vae.build(CONFIG["audio_vae"])
    half.update(tree_map(lambda p: p.astype(mx.bfloat16), vae.parameters()))
    assert half.decode(latents).dtype == mx.float32
    low = half.decode(latents.astype(mx.bfloat16))
    assert low.dtype == mx.bfloat16 and half.encode(low).dtype == mx.bfloat16
    assert relative_l2(low.astype(mx.float32), vae.decode(latents)) < 0.05


def test_sizes_come_from_the_configuration() -> None:
    config = AudioVAEConfig.from_dict(CONFIG["audio_vae"])
    assert (config.latent_channels, config.latent_frequencies, config.temporal_scale) == (2, 16, 4)
    assert (config.sample_rate, config.hop) == (16000, 160)


@pytest.mark.parametrize("header", ["ltx-2-19b", "ltx-2.3-22b", "ltx-2.5-audio-vae-bf16"])
def test_published_files_fit(header: str) -> None:
    """Every tensor has its place. Axes are compared unordered: our layout permutes them."""
    _, metadata, tensors = read_header(header)
    ours = parameter_shapes(audio_vae.build(json.loads(metadata["config"])["audio_vae"]))
    published = {
        name.removeprefix("audio_vae.").replace("mean-of-means", "mean").replace("std-of-means", "std"): shape
        for name, (_, shape) in tensors.items()
        if name.startswith("audio_vae.")
    }
    assert {name: sorted(shape) for name, shape in ours.items()} == {n: sorted(s) for n, s in published.items()}


def changed(section: str, path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG[section])
    *parents, last = path.split(".")
    inner = config
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        ("new", 1, ConfigError),
        ("model.new", 1, ConfigError),
        ("model.params.new", 1, ConfigError),
        ("model.params.ddconfig.new", 1, ConfigError),
        ("preprocessing.new", 1, ConfigError),
        ("preprocessing.stft.new", 1, ConfigError),
        ("model.params.ddconfig.ch", "32", ConfigError),
        ("model.params.ddconfig.mel_bins", 65, ConfigError),
        ("model", [], ConfigError),
        ("model.params.ddconfig.norm_type", "group", UnsupportedError),
        ("model.params.ddconfig.causality_axis", "width", UnsupportedError),
        ("model.params.ddconfig.attn_resolutions", [16], UnsupportedError),
        ("model.params.ddconfig.mid_block_add_attention", True, UnsupportedError),
        ("model.params.ddconfig.double_z", False, UnsupportedError),
        ("preprocessing.stft.causal", False, UnsupportedError),
    ],
)
def test_audio_vae_configuration_is_strict(path: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        audio_vae.build(changed("audio_vae", path, value))


@pytest.mark.parametrize("key", sorted(CONFIG["audio_vae"]))
def test_missing_keys_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        audio_vae.build({k: v for k, v in CONFIG["audio_vae"].items() if k != key})
