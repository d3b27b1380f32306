"""diffusers' LTX-2 audio VAE and vocoder, built from tensors by their official names."""

from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKLLTX2Audio
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

VOCODER_RENAMES = {"conv_pre": "conv_in", "ups": "upsamplers", "resblocks": "resnets", "conv_post": "conv_out"}


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
        statistics = {"latents_mean": torch.tensor(self.mean), "latents_std": torch.tensor(self.std)}
        module.load_state_dict(state | statistics, strict=True)
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
        module = cast(Any, LTX2Vocoder)(
            hidden_channels=config["upsample_initial_channel"],
            upsample_factors=config["upsample_rates"],
            upsample_kernel_sizes=config["upsample_kernel_sizes"],
            resnet_kernel_sizes=config["resblock_kernel_sizes"],
            resnet_dilations=config["resblock_dilation_sizes"],
        )
        state = {_vocoder_name(name): torch.tensor(value) for name, value in tensors.items()}
        module.load_state_dict(state, strict=True)
        self.module = module

    @torch.no_grad()
    def __call__(self, mel: np.ndarray) -> np.ndarray:
        return self.module(torch.tensor(mel)).numpy()


def _vocoder_name(name: str) -> str:
    first, _, rest = name.partition(".")
    return f"{VOCODER_RENAMES[first]}.{rest}"
