"""diffusers' LTX-2 transformer built from a checkpoint in the official layout, as the independent implementation."""

import re
from typing import Any, cast

import numpy as np
import torch
from diffusers import LTX2VideoTransformer3DModel

PREFIX = "model.diffusion_model."
RENAMES = (
    (r"^patchify_proj\.", "proj_in."),
    (r"^audio_patchify_proj\.", "audio_proj_in."),
    (r"^adaln_single\.", "time_embed."),
    (r"^audio_adaln_single\.", "audio_time_embed."),
    (r"^(audio_)?prompt_adaln_single\.", r"\1prompt_adaln."),
    (r"^av_ca_(video|audio)_scale_shift_adaln_single\.", r"av_cross_attn_\1_scale_shift."),
    (r"^av_ca_a2v_gate_adaln_single\.", "av_cross_attn_video_a2v_gate."),
    (r"^av_ca_v2a_gate_adaln_single\.", "av_cross_attn_audio_v2a_gate."),
    (r"\.scale_shift_table_a2v_ca_(video|audio)$", r".\1_a2v_cross_attn_scale_shift_table"),
    (r"\.q_norm\.", ".norm_q."),
    (r"\.k_norm\.", ".norm_k."),
)


def diffusers_name(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def reference_transformer(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> LTX2VideoTransformer3DModel:
    """`tensors` by official names, `config` the checkpoint's `transformer` section. Strict."""
    module = cast(Any, LTX2VideoTransformer3DModel)(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        num_attention_heads=config["num_attention_heads"],
        attention_head_dim=config["attention_head_dim"],
        cross_attention_dim=config["cross_attention_dim"],
        audio_in_channels=config["audio_in_channels"],
        audio_out_channels=config["audio_out_channels"],
        audio_num_attention_heads=config["audio_num_attention_heads"],
        audio_attention_head_dim=config["audio_attention_head_dim"],
        audio_cross_attention_dim=config["audio_cross_attention_dim"],
        num_layers=config["num_layers"],
        caption_channels=config["caption_channels"],
        rope_type="split",
        gated_attn=config.get("apply_gated_attention", False),
        audio_gated_attn=config.get("apply_gated_attention", False),
        cross_attn_mod=config.get("cross_attention_adaln", False),
        audio_cross_attn_mod=config.get("cross_attention_adaln", False),
        use_prompt_adaln_single=config.get("use_prompt_adaln_single", True),
        use_prompt_embeddings=not config.get("caption_proj_before_connector", False),
        ff_bias=config.get("ff_bias", True),
        use_keyframes_abs_pos_embedding=config.get("use_keyframes_abs_pos_embedding", False),
        perturbed_attn=True,
    )
    weights = {
        diffusers_name(name.removeprefix(PREFIX)): torch.from_numpy(value)
        for name, value in tensors.items()
        if name.startswith(PREFIX) and "embeddings_connector" not in name
    }
    module.load_state_dict(weights, strict=True)
    return cast(LTX2VideoTransformer3DModel, module.eval())
