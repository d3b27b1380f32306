"""diffusers' LTX-2 video VAE and latent upsampler, built from tensors by their official names, and random tensors by
those names for structures the demo checkpoint does not have."""

import re
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from diffusers import AutoencoderKLLTX2Video
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

from ltx2.runtime.networks.load import parameter_shapes
from tests.support.official import random_values

UNUSED = ("per_channel_statistics.channel", "per_channel_statistics.mean-of-stds")
KINDS = {"space": "spatial", "time": "temporal", "all": "spatiotemporal"}


def diffusers_name(name: str) -> str:
    """Even blocks of the checkpoint are residual, odd ones resample; diffusers counts pairs and a middle block."""
    name = name.replace("per_channel_statistics.mean-of-means", "latents_mean")
    name = name.replace("per_channel_statistics.std-of-means", "latents_std")
    name = re.sub(r"^encoder\.down_blocks\.8\.res_blocks", "encoder.mid_block.resnets", name)
    name = re.sub(r"^decoder\.up_blocks\.0\.res_blocks", "decoder.mid_block.resnets", name)

    def paired(match: re.Match[str]) -> str:
        side, index, rest = match[1], int(match[2]), match[3]
        pair = index // 2 if side == "down" or index % 2 else index // 2 - 1
        kind = "resnets" if rest == "res_blocks" else f"{side}samplers.0.conv"
        return f"{side}_blocks.{pair}.{kind}"

    return re.sub(r"(down|up)_blocks\.(\d+)\.(res_blocks|conv)(?=\.)", paired, name)


def reference_video_vae(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> Any:
    """`tensors` by official names without `vae.`, `config` the checkpoint's `vae` section. Strict."""
    encoder, decoder = config["encoder_blocks"], config["decoder_blocks"]
    widths, width = [], config["encoder_base_channels"]
    for _, params in encoder[1::2]:
        width *= params["multiplier"]
        widths.append(width)
    kinds = [KINDS[name.split("_")[1]] for name, _ in encoder[1::2]]
    factors = [params["multiplier"] for _, params in decoder[1::2]]
    # diffusers starts a stage from the width before its resampling, listed from the output to the input
    decoder_widths = [config["decoder_base_channels"] * int(np.prod(factors[: i + 1])) for i in range(len(factors))]
    module: Any = AutoencoderKLLTX2Video(
        latent_channels=config["latent_channels"],
        block_out_channels=widths,
        down_block_types=["LTX2VideoDownBlock3D"] * len(widths),
        decoder_block_out_channels=decoder_widths,
        layers_per_block=[params["num_layers"] for _, params in encoder[::2]],
        decoder_layers_per_block=[params["num_layers"] for _, params in decoder[::2]],
        spatio_temporal_scaling=[True] * len(widths),
        decoder_spatio_temporal_scaling=[True] * len(factors),
        decoder_inject_noise=[False] * (len(factors) + 1),
        downsample_type=kinds,
        upsample_type=[KINDS[name.split("_")[1]] for name, _ in reversed(decoder[1::2])],
        upsample_residual=[params.get("residual", False) for _, params in decoder[1::2]],
        upsample_factor=factors,
        decoder_causal=False,
        spatial_compression_ratio=config["patch_size"] * 2 ** sum(kind != "temporal" for kind in kinds),
        temporal_compression_ratio=2 ** sum(kind != "spatial" for kind in kinds),
        encoder_spatial_padding_mode=config.get("spatial_padding_mode", "zeros"),
        decoder_spatial_padding_mode=config.get("spatial_padding_mode", "reflect"),
    )
    weights = {
        diffusers_name(name): torch.tensor(value) for name, value in tensors.items() if not name.startswith(UNUSED)
    }
    module.load_state_dict(weights, strict=True)
    return module.eval()


def reference_upsampler(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> Any:
    """`config` is the upscaler file's flat configuration. Strict."""
    module: Any = LTX2LatentUpsamplerModel(
        in_channels=config["in_channels"],
        mid_channels=config["mid_channels"],
        num_blocks_per_stage=config["num_blocks_per_stage"],
        spatial_upsample=config["spatial_upsample"],
        temporal_upsample=config["temporal_upsample"],
        rational_spatial_scale=config.get("spatial_scale", 2.0),
        use_rational_resampler=config.get("rational_resampler", False),
    )
    buffers = {name: value for name, value in module.state_dict().items() if name.endswith("blur_down.kernel")}
    weights = {name: torch.tensor(value) for name, value in tensors.items()}
    module.load_state_dict(buffers | weights, strict=True)
    return module.eval()


def random_tensors(network: nn.Module, seed: int) -> dict[str, np.ndarray]:
    """Random values for `network` by official names, in PyTorch's layout."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in sorted(parameter_shapes(network).items()):
        name = re.sub(r"^(per_channel_statistics)\.(mean|std)$", r"\1.\2-of-means", name)
        if len(shape) > 1:
            shape = (shape[0], shape[-1], *shape[1:-1])
        tensors[name] = random_values(name, shape, rng)
    return tensors


def load_official(network: nn.Module, tensors: dict[str, np.ndarray]) -> None:
    """Into our layout: channels last."""
    weights = [
        (
            re.sub(r"^(per_channel_statistics)\.(mean|std)-of-means$", r"\1.\2", name),
            mx.array(np.ascontiguousarray(np.moveaxis(value, 1, -1) if value.ndim > 1 else value)),
        )
        for name, value in tensors.items()
        if not name.startswith(UNUSED) and not name.endswith("blur_down.kernel")
    ]
    network.load_weights(weights, strict=True)
    network.eval()
