"""Audio VAE and vocoder: against diffusers on random weights, against the demo model's golden tensors, and the
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
from ltx2.runtime.networks.audio import vocoder
from ltx2.runtime.networks.audio.vae import AudioAutoencoder, AudioVAEConfig
from ltx2.runtime.networks.audio.vocoder import Vocoder
from ltx2.runtime.networks.load import load_network, parameter_shapes
from tests.support.golden import golden
from tests.support.official import MONOLITH, Official
from tests.support.parity import relative_l2, require
from tests.support.published import read_header

if TYPE_CHECKING:
    from tests.support.reference_audio import ReferenceAudioVAE, ReferenceVocoder

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
def voice(model: Path) -> Vocoder:
    return load_network(ModelFolder.open(model), "vocoder", Vocoder)


@pytest.fixture(scope="module")
def reference_vae(official: Official) -> "ReferenceAudioVAE":
    require("torch"), require("diffusers")
    from tests.support.reference_audio import ReferenceAudioVAE

    return ReferenceAudioVAE(official.section("audio_vae."), CONFIG["audio_vae"])


@pytest.fixture(scope="module")
def reference_vocoder(official: Official) -> "ReferenceVocoder":
    require("torch"), require("diffusers")
    from tests.support.reference_audio import ReferenceVocoder

    return ReferenceVocoder(official.section("vocoder."), CONFIG["vocoder"])


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


def test_vocoder_equals_diffusers(voice: Vocoder, reference_vocoder: "ReferenceVocoder", figure: Figure) -> None:
    mel = log_mel(9)
    ours, theirs = np.array(voice(mx.array(mel))), reference_vocoder(mel)
    assert relative_l2(reference_vocoder(log_mel(9, seed=1)), theirs) > 0.1  # the sound depends on the spectrogram
    figure("vocoder rel L2", relative_l2(ours, theirs), limit=1e-4)


@pytest.mark.parametrize("clip", ["a", "b"])
def test_golden_spectrogram_and_sound(demo_model: Path, figure: Figure, clip: str) -> None:
    folder = ModelFolder.open(demo_model)
    vae = load_network(folder, "audio_vae", AudioAutoencoder)
    mel = vae.decode(mx.array(golden(f"{clip}.stage2.audio_latent")))
    figure(f"golden {clip}: mel rel L2", relative_l2(mel, golden(f"{clip}.mel")), limit=1e-4)
    sound = load_network(folder, "vocoder", Vocoder)(mel)
    figure(f"golden {clip}: sound rel L2", relative_l2(sound[0], golden(f"{clip}.audio")), limit=1e-4)


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


def test_vocoder_computes_in_float32_whatever_the_weights(voice: Vocoder) -> None:
    rounded, half = vocoder.build(CONFIG["vocoder"]), vocoder.build(CONFIG["vocoder"])
    half.update(tree_map(lambda p: p.astype(mx.bfloat16), voice.parameters()))
    rounded.update(tree_map(lambda p: p.astype(mx.float32), half.parameters()))
    mel = mx.array(log_mel(5)).astype(mx.bfloat16)
    sound = half(mel)
    assert sound.dtype == mx.float32 and sound.shape == (1, 2, 5 * 240)
    assert relative_l2(sound, rounded(mel.astype(mx.float32))) < 1e-6  # nothing but the weights was rounded
    assert relative_l2(sound, voice(mel)) < 0.02


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


def test_sizes_come_from_the_configuration(voice: Vocoder) -> None:
    config = AudioVAEConfig.from_dict(CONFIG["audio_vae"])
    assert (config.latent_channels, config.latent_frequencies, config.temporal_scale) == (2, 16, 4)
    assert (config.sample_rate, config.hop) == (16000, 160)
    assert voice.upsample_factor == 240
    assert voice.sample_rate(config.sample_rate / config.hop) == 24000


@pytest.mark.parametrize("component", ["audio_vae", "vocoder"])
def test_published_checkpoint_fits(component: str) -> None:
    """Every tensor of the 19B checkpoint has its place. Axes are compared unordered: our layout permutes them."""
    _, metadata, tensors = read_header("ltx-2-19b")
    build = {"audio_vae": audio_vae.build, "vocoder": vocoder.build}[component]
    ours = parameter_shapes(build(json.loads(metadata["config"])[component]))
    published = {
        name.removeprefix(f"{component}.").replace("mean-of-means", "mean").replace("std-of-means", "std"): shape
        for name, (_, shape) in tensors.items()
        if name.startswith(f"{component}.")
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


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        ("activation", "snakebeta", ConfigError),
        ("use_tanh_at_final", False, ConfigError),
        ("upsample_rates", [6, 5], ConfigError),
        ("resblock_dilation_sizes", [[1, 3, 5]], ConfigError),
        ("upsample_initial_channel", 64.5, ConfigError),
        ("resblock", "AMP1", UnsupportedError),
        ("stereo", False, UnsupportedError),
    ],
)
def test_vocoder_configuration_is_strict(path: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        vocoder.build(changed("vocoder", path, value))


def test_bandwidth_extension_is_refused_with_a_way_out() -> None:
    with pytest.raises(UnsupportedError, match="bandwidth") as caught:
        vocoder.build({"vocoder": CONFIG["vocoder"], "bwe": {"hop_length": 80}})
    assert "--no-audio" in caught.value.fix


@pytest.mark.parametrize(("section", "build"), [("audio_vae", audio_vae.build), ("vocoder", vocoder.build)])
def test_missing_keys_are_refused(section: str, build: Callable[..., object]) -> None:
    for key in CONFIG[section]:
        config = {k: v for k, v in CONFIG[section].items() if k != key}
        if key in ("resblock", "stereo"):
            build(config)  # a constant; checked where it is written
        else:
            with pytest.raises(ConfigError, match=key):
                build(config)
