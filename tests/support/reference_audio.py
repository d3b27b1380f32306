"""diffusers' LTX-2 audio VAE and vocoder, built from tensors by their official names."""

from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKLLTX2Audio
from diffusers.pipelines.ltx2.vocoder import AntiAliasAct1d, LTX2Vocoder, LTX2VocoderWithBWE, SnakeBeta
from transformers.audio_utils import mel_filter_bank

VOCODER_RENAMES = {
    "conv_pre": "conv_in", "ups": "upsamplers", "resblocks": "resnets", "act_post": "act_out", "conv_post": "conv_out",
}  # fmt: skip


class ReferenceAudioVAE:
    """Normalised latents (1, A, t, f) <-> mel (1, 2, T, 64). Statistics apply to tokens: channel * f + frequency."""

    def __init__(self, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        """`tensors` by official names without `audio_vae.`, `config` the checkpoint's `audio_vae` section. Strict."""
        network = config["model"]["params"]["ddconfig"]
        self.mean = tensors["per_channel_statistics.mean-of-means"]
        self.std = tensors["per_channel_statistics.std-of-means"]
        module = cast(Any, AutoencoderKLLTX2Audio)(
            base_channels=network["ch"],
            ch_mult=tuple(network["ch_mult"]),
            num_res_blocks=network["num_res_blocks"],
            latent_channels=network["z_channels"],
        )
        state = {k: torch.tensor(v) for k, v in tensors.items() if not k.startswith("per_channel_statistics.")}
        # Statistics are applied here, whatever their size; a pipeline around the module reads them from its buffers.
        module.latents_mean, module.latents_std = torch.tensor(self.mean), torch.tensor(self.std)
        module.load_state_dict(
            state | {"latents_mean": module.latents_mean, "latents_std": module.latents_std}, strict=True
        )
        self.module = module

    @torch.no_grad()
    def decode(self, latents: np.ndarray) -> np.ndarray:
        _, channels, frames, _ = latents.shape
        tokens = latents.transpose(0, 2, 1, 3).reshape(1, frames, -1) * self.std + self.mean
        z = tokens.reshape(1, frames, channels, -1).transpose(0, 2, 1, 3)
        return self.module.decode(torch.tensor(z)).sample.numpy()

    @torch.no_grad()
    def encode(self, mel: np.ndarray) -> np.ndarray:
        z = self.module.encode(torch.tensor(mel)).latent_dist.mode().numpy()
        _, channels, frames, _ = z.shape
        tokens = (z.transpose(0, 2, 1, 3).reshape(1, frames, -1) - self.mean) / self.std
        return tokens.reshape(1, frames, channels, -1).transpose(0, 2, 1, 3)


class ReferenceVocoder:
    """Mel (1, 2, T, 64) -> waveform (1, 2, samples)."""

    def __init__(self, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        """`tensors` by official names without `vocoder.`, `config` the checkpoint's `vocoder` section. Strict."""
        state = {_vocoder_name(name): torch.tensor(value) for name, value in tensors.items()}
        if "bwe" not in config:
            self.module = cast(Any, LTX2Vocoder)(**_generator(config))
        else:
            stage, bwe = config["vocoder"], config["bwe"]
            self.module = cast(Any, LTX2VocoderWithBWE)(
                **_generator(stage),
                **{f"bwe_{key}": value for key, value in _generator(bwe).items()},
                filter_length=bwe["n_fft"],
                window_length=bwe["win_size"],
                num_mel_channels=bwe["num_mels"],
                **{key: bwe[key] for key in ("hop_length", "input_sampling_rate", "output_sampling_rate")},
            )
            unused = "mel_stft.stft_fn.inverse_basis"
            state[unused] = torch.zeros_like(self.module.state_dict()[unused])
        self.module.load_state_dict(state, strict=True)

    @torch.no_grad()
    def __call__(self, mel: np.ndarray) -> np.ndarray:
        return self.module(torch.tensor(mel)).numpy()


def _generator(config: dict[str, Any]) -> dict[str, Any]:
    """diffusers' arguments for one generator."""
    final = "tanh" if config.get("use_tanh_at_final", True) else "clamp"
    amp = config["resblock"] == "AMP1"
    return {
        "hidden_channels": config["upsample_initial_channel"],
        "upsample_factors": config["upsample_rates"],
        "upsample_kernel_sizes": config["upsample_kernel_sizes"],
        "resnet_kernel_sizes": config["resblock_kernel_sizes"],
        "resnet_dilations": config["resblock_dilation_sizes"],
        "act_fn": "snakebeta" if amp else "leaky_relu",
        "antialias": amp,
        "final_act_fn": final if config.get("apply_final_activation", True) else None,
        "final_bias": config.get("use_bias_at_final", True),
    }


def _vocoder_name(name: str) -> str:
    parts = [VOCODER_RENAMES.get(part, part) for part in name.split(".")]
    return ".".join(parts).replace("downsample.lowpass", "downsample")


@torch.no_grad()
def reference_activation(x: np.ndarray, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """An anti-aliased SnakeBeta of (B, C, T), by the official names of its parameters."""
    module = cast(Any, AntiAliasAct1d)(SnakeBeta(x.shape[1]))
    module.load_state_dict({_vocoder_name(k): torch.tensor(v) for k, v in tensors.items()}, strict=True)
    return module(torch.tensor(x)).numpy()


def reference_mel(sound: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """(channels, samples) -> log-mel (1, channels, T, bins), by torch's transform and transformers' filters."""
    stft, mel, rate = (config["preprocessing"][key] for key in ("stft", "mel", "audio"))
    size, window = stft["filter_length"], torch.hann_window(stft["win_length"])
    spectrum = torch.stft(
        torch.tensor(sound),
        size,
        stft["hop_length"],
        stft["win_length"],
        window,
        pad_mode="reflect",
        return_complex=True,
    )
    filters = mel_filter_bank(
        size // 2 + 1,
        mel["n_mel_channels"],
        mel["mel_fmin"],
        mel["mel_fmax"],
        rate["sampling_rate"],
        "slaney",
        "slaney",
    )
    return (spectrum.abs().mT @ torch.tensor(filters, dtype=torch.float32)).clamp(min=1e-5).log()[None].numpy()
