"""diffusers' diffusion video decoder of LTX-2.5, built from a checkpoint's configuration and tensors by their official
names, with the noise handed in."""

from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers.models.autoencoders import ltx2_diffusion_decoder as diffusers

RENAMES = (
    ("per_channel_statistics.mean-of-means", "latents_mean"),
    ("per_channel_statistics.std-of-means", "latents_std"),
    (".attn.proj.", ".attn.to_out.0."),
    (".q_norm.", ".norm_q."),
    (".k_norm.", ".norm_k."),
    ("t_embedder.mlp.0.", "t_embedder.timestep_embedder.linear_1."),
    ("t_embedder.mlp.2.", "t_embedder.timestep_embedder.linear_2."),
)


def reference_diffusion_decoder(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> Any:
    """`config` is the checkpoint's `vae` section. Strict."""
    d = config["decoder"]
    strides, divisors = zip(*d["upsamples"], strict=True)
    times, heights, _ = (int(np.prod(axis)) for axis in zip(*strides, strict=True))
    module: Any = diffusers.LTX2VideoDiffusionDecoderModel(
        latent_channels=d["in_channels"],
        patch_size=d["patch_size"],
        decoder_head_dim=d["head_dim"],
        decoder_stage_channels=d["stage_channels"],
        decoder_stage_depths=d["stage_depths"],
        decoder_stage_kernels=d["stage_kernels"][:-1],
        decoder_upsample_strides=strides,
        decoder_upsample_channel_reductions=divisors,
        decoder_stage5_kernel=d["stage_kernels"][-1],
        decoder_timestep_scale_multiplier=d["timestep_scale_multiplier"],
        decoder_model_output_type=config["model_output_type"],
        decoder_num_inference_steps=d["default_num_inference_steps"],
        spatial_compression_ratio=heights * d["patch_size"],
        temporal_compression_ratio=times,
    )
    weights = {}
    for name, value in tensors.items():
        for old, new in RENAMES:
            name = name.replace(old, new)
        if ".attn.qkv." in name:
            for part, third in zip("qkv", np.split(value, 3), strict=True):
                weights[name.replace("qkv", f"to_{part}")] = torch.tensor(third)
        elif not name.startswith("encoder."):
            weights[name] = torch.tensor(value)
    module.load_state_dict(weights, strict=True)
    return module.eval()


def decoded(module: Any, latents: np.ndarray, noise: np.ndarray, steps: int) -> np.ndarray:
    """Normalised latents (1, C, f, h, w) and noise (1, 3, F, H, W) -> (F, H, W, 3) in one piece."""
    mean, std = (v.view(1, -1, 1, 1, 1) for v in (module.latents_mean, module.latents_std))

    def given(shape: tuple[int, ...], **_: Any) -> torch.Tensor:
        assert shape == noise.shape
        return torch.tensor(noise)

    with torch.no_grad(), patch.object(diffusers, "randn_tensor", given):
        sample = module.decode(torch.tensor(latents) * std + mean, num_inference_steps=steps).sample
    return sample[0].permute(1, 2, 3, 0).numpy()
