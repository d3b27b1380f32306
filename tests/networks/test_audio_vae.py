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
from ltx2.runtime.media.sound import resample
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.audio import vae as audio_vae
from ltx2.runtime.networks.audio.config import AudioVAEConfig
from ltx2.runtime.networks.audio.mel import log_mel
from ltx2.runtime.networks.audio.vae import AudioAutoencoder
from ltx2.runtime.networks.load import load_network, parameter_shapes
from tests.support.golden import golden, golden_25
from tests.support.official import MONOLITH, Official
from tests.support.parity import relative_l2, require
from tests.support.published import read_header

if TYPE_CHECKING:
    from tests.support.reference_audio import ReferenceAudioVAE

Figure = Callable[..., None]
CONFIG = json.loads(open_tensorfile(MONOLITH).metadata["config"])


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def spectrogram(frames: int, seed: int = 0) -> np.ndarray:
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
    mel = spectrogram(frames)
    error = relative_l2(vae.encode_mel(mx.array(mel)), reference_vae.encode(mel))
    figure(f"audio_vae.encode rel L2, {frames} mel frames", error, limit=1e-4)


def tones(seconds: float) -> np.ndarray:
    """Two channels at 16 kHz: a tone with overtones and noise, and another with silence behind it."""
    time = np.arange(round(seconds * 16000)) / 16000
    left = sum(np.sin(2 * np.pi * 220 * n * time) / n for n in (1, 2, 3, 30)) / 4 + 0.01 * normal(len(time))
    right = np.where(time < seconds / 2, 0.3 * np.sin(2 * np.pi * 880 * time), 0)
    return np.stack([left, right]).astype(np.float32)


@pytest.mark.parametrize("seconds", [0.07, 0.5, 1])
def test_spectrogram_equals_torch(seconds: float, figure: Figure) -> None:
    require("torch"), require("diffusers"), require("transformers")
    from tests.support.reference_audio import reference_mel

    sound, config = tones(seconds), CONFIG["audio_vae"]
    ours = log_mel(sound, AudioVAEConfig.from_dict(config))
    theirs = reference_mel(sound, config)[0]
    assert ours.dtype == np.float32 and ours.shape == (2, round(seconds * 100) + 1, 64)
    assert theirs.min() == pytest.approx(np.log(1e-5)) and theirs.max() > 0  # silence, and what is loud
    figure(f"log-mel of {seconds} s rel L2", relative_l2(ours, theirs), limit=1e-4)


def test_sound_is_encoded_as_torch_and_diffusers_do(
    vae: AudioAutoencoder, reference_vae: "ReferenceAudioVAE", figure: Figure
) -> None:
    from tests.support.reference_audio import reference_mel

    sound = tones(0.5)
    theirs = reference_vae.encode(reference_mel(sound, CONFIG["audio_vae"]))
    figure("audio_vae.encode rel L2, 0.5 s", relative_l2(vae.encode(mx.array(sound)[None]), theirs), limit=1e-4)


@pytest.mark.parametrize("samples", [1600, 15999, 16000, 16160])
def test_lengths_of_encoded_sound(vae: AudioAutoencoder, samples: int) -> None:
    """By itself, cut, and with the mean behind it."""
    sound = mx.array(tones(samples / 16000)[None])
    latents = vae.encode(sound)
    count = -(-(samples // 160 + 1) // 4)
    assert latents.shape == (1, 2, count, 16) and vae.config.latent_frames(samples) == count
    np.testing.assert_array_equal(vae.encode(sound, count - 1), latents[:, :, :-1])
    longer = np.array(vae.encode(sound, count + 3))
    np.testing.assert_array_equal(longer[:, :, :-3], latents)
    assert not longer[:, :, -3:].any()


def test_one_channel_counts_as_both(vae: AudioAutoencoder) -> None:
    sound = mx.array(tones(0.1)[:1])
    np.testing.assert_array_equal(vae.encode(sound[None]), vae.encode(mx.concatenate([sound, sound])[None]))


def test_encoding_is_float32_whatever_the_weights(vae: AudioAutoencoder) -> None:
    half = audio_vae.build(CONFIG["audio_vae"])
    half.update(tree_map(lambda p: p.astype(mx.bfloat16), vae.parameters()))
    sound = mx.array(tones(0.1)[None])
    assert half.encode(sound).dtype == mx.float32
    assert relative_l2(half.encode(sound), vae.encode(sound)) < 0.05


@pytest.mark.parametrize(("given", "rate"), [(golden, 24000), (golden_25, 48000)], ids=["2.0", "2.5"])
def test_a_sound_has_the_spectrogram_it_was_made_from(given: Callable[[str], np.ndarray], rate: int) -> None:
    """As well as a tiny vocoder can: the loudest bin of every frame is the same."""
    made, sound = given("a.mel")[0], resample(given("a.audio"), rate, 16000)
    again = log_mel(sound, AudioVAEConfig.from_dict(CONFIG["audio_vae"]))[:, : made.shape[1]]
    assert (again.argmax(-1) == made.argmax(-1)).all() and relative_l2(again, made) < 0.25


@pytest.mark.parametrize(
    "changes",
    [{"ch_mult": [1, 1, 2]}, {"ch_mult": [2, 1]}, {"ch_mult": [1, 2, 2, 4], "num_res_blocks": 1}, {"z_channels": 3}],
    ids=str,
)
def test_structure_comes_from_the_configuration(changes: dict[str, Any], figure: Figure) -> None:
    require("torch"), require("diffusers")
    from tests.support.reference_audio import ReferenceAudioVAE
    from tests.support.reference_vae import load_official, random_tensors

    config = copy.deepcopy(CONFIG["audio_vae"])
    config["model"]["params"]["ddconfig"] |= {"ch": 8} | changes
    network = audio_vae.build(config)
    tensors = random_tensors(network, seed=1)
    load_official(network, tensors)
    reference, mel = ReferenceAudioVAE(tensors, config), spectrogram(9)
    latents = reference.encode(mel)
    figure(f"audio VAE {changes}: encode rel L2", relative_l2(network.encode_mel(mx.array(mel)), latents), limit=1e-4)
    ours, theirs = network.decode(mx.array(latents)), reference.decode(latents)
    frames = min(ours.shape[2], theirs.shape[2])  # diffusers cuts and pads for a scale of 4
    assert ours.shape[2] == (latents.shape[2] - 1) * network.config.temporal_scale + 1
    decoded = relative_l2(ours[:, :, :frames], theirs[:, :, :frames])
    figure(f"audio VAE {changes}: decode rel L2", decoded, limit=1e-4)


@pytest.mark.parametrize("clip", ["a", "b"])
def test_golden_spectrogram(demo_model: Path, figure: Figure, clip: str) -> None:
    folder = ModelFolder.open(demo_model)
    vae = load_network(folder, "audio_vae", AudioAutoencoder)
    mel = vae.decode(mx.array(golden(f"{clip}.stage2.audio_latent")))
    figure(f"golden {clip}: mel rel L2", relative_l2(mel, golden(f"{clip}.mel")), limit=1e-4)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 101])
def test_lengths(vae: AudioAutoencoder, frames: int) -> None:
    latents = vae.encode_mel(mx.zeros((1, 2, frames, 64)))
    assert latents.shape == (1, 2, -(-frames // 4), 16)
    assert vae.decode(latents).shape == (1, 2, 4 * latents.shape[2] - 3, 64)


def test_time_is_causal(vae: AudioAutoencoder) -> None:
    """A clip's beginning does not depend on its end, so cutting the latents cuts the sound."""
    latents, mel = mx.array(normal(1, 2, 6, 16)), mx.array(spectrogram(21))
    assert relative_l2(vae.decode(latents[:, :, :4]), vae.decode(latents)[:, :, :13]) < 1e-5
    assert relative_l2(vae.encode_mel(mel[:, :, :13]), vae.encode_mel(mel)[:, :, :4]) < 1e-5


def test_vae_computes_in_the_dtype_of_its_argument(vae: AudioAutoencoder) -> None:
    latents = mx.array(normal(1, 2, 3, 16))
    half = audio_vae.build(CONFIG["audio_vae"])
    half.update(tree_map(lambda p: p.astype(mx.bfloat16), vae.parameters()))
    assert half.decode(latents).dtype == mx.float32
    low = half.decode(latents.astype(mx.bfloat16))
    assert low.dtype == mx.bfloat16 and half.encode_mel(low).dtype == mx.bfloat16
    assert relative_l2(low.astype(mx.float32), vae.decode(latents)) < 0.05


def test_sizes_come_from_the_configuration() -> None:
    config = AudioVAEConfig.from_dict(CONFIG["audio_vae"])
    assert (config.latent_channels, config.latent_frequencies, config.temporal_scale) == (2, 16, 4)
    assert (config.sampling_rate, config.hop_length) == (16000, 160)


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


def changed(path: str, value: Any) -> dict[str, Any]:
    """The configuration with another value at a path of keys; `...` deletes the key."""
    config: dict[str, Any] = copy.deepcopy(CONFIG["audio_vae"])
    *parents, last = path.split(".")
    inner = config
    for key in parents:
        inner = inner[key]
    inner[last] = value
    if value is ...:
        del inner[last]
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
        ("preprocessing.audio.stereo", False, UnsupportedError),
        ("preprocessing.audio.sampling_rate", 24000, ConfigError),  # the model says 16000
        ("preprocessing.mel.n_mel_channels", 80, ConfigError),
        ("preprocessing.stft.win_length", 2048, ConfigError),
        ("other", {"ch": 32}, ConfigError),
    ],
)
def test_audio_vae_configuration_is_strict(path: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        audio_vae.build(changed(path, value))


@pytest.mark.parametrize("path", ["model.params.ddconfig.ch", "model.params.ddconfig.ch_mult", "preprocessing"])
def test_missing_keys_are_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="hop_length" if path == "preprocessing" else path.split(".")[-1]):
        audio_vae.build(changed(path, ...))


def test_a_file_that_does_not_describe_spectrograms_makes_them_as_published() -> None:
    config = copy.deepcopy(CONFIG["audio_vae"])
    del config["preprocessing"]["mel"], config["preprocessing"]["stft"]["filter_length"]
    assert AudioVAEConfig.from_dict(config) == AudioVAEConfig.from_dict(CONFIG["audio_vae"])
