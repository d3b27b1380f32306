"""The text path's official counterparts: transformers' Gemma 3 and diffusers' connectors with given weights."""

from typing import Any

import numpy as np
import torch
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from transformers import Gemma3TextConfig, Gemma3TextModel

Array = np.ndarray[Any, np.dtype[Any]]

CONNECTOR_NAMES = (
    ("model.diffusion_model.video_embeddings_connector.", "video_connector."),
    ("model.diffusion_model.audio_embeddings_connector.", "audio_connector."),
    ("text_embedding_projection.aggregate_embed.", "text_proj_in."),
    ("text_embedding_projection.video_aggregate_embed.", "video_text_proj_in."),
    ("text_embedding_projection.audio_aggregate_embed.", "audio_text_proj_in."),
    ("transformer_1d_blocks.", "transformer_blocks."),
    (".q_norm.", ".norm_q."),
    (".k_norm.", ".norm_k."),
)


def gemma(config: dict[str, Any], tensors: dict[str, Array]) -> Gemma3TextModel:
    """`tensors` by the names of a published Gemma folder; other tensors are passed over."""
    model = Gemma3TextModel(Gemma3TextConfig(**config)).eval()
    prefix = "language_model.model."
    weights = {k.removeprefix(prefix): torch.tensor(v) for k, v in tensors.items() if k.startswith(prefix)}
    model.load_state_dict(weights, strict=True)
    return model


@torch.no_grad()
def gemma_states(model: Gemma3TextModel, ids: Array, mask: Array) -> list[Array]:
    """All hidden states, as the pipelines collect them."""
    out = model(torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True)
    return [state.numpy() for state in out.hidden_states]


def connectors(transformer: dict[str, Any], tensors: dict[str, Array]) -> LTX2TextConnectors:
    """From a checkpoint's `transformer` section and its tensors by their official names."""
    layers, registers = transformer["connector_num_layers"], transformer["connector_num_learnable_registers"]
    per_stream = bool(transformer.get("caption_proj_before_connector"))
    streams: dict[str, Any] = {}
    for stream, prefix in (("video", ""), ("audio", "audio_" if per_stream else "")):
        heads, dim = (transformer[f"{prefix}connector_{k}"] for k in ("num_attention_heads", "attention_head_dim"))
        streams |= {
            f"{stream}_connector_num_attention_heads": heads,
            f"{stream}_connector_attention_head_dim": dim,
            f"{stream}_connector_num_layers": layers,
            f"{stream}_connector_num_learnable_registers": registers,
            f"{stream}_gated_attn": bool(transformer.get("connector_apply_gated_attention")),
            f"{stream}_hidden_dim": heads * dim,
        }
    (in_features,) = {v.shape[1] for k, v in tensors.items() if k.endswith("aggregate_embed.weight")}
    model = LTX2TextConnectors(
        caption_channels=transformer["caption_channels"],
        text_proj_in_factor=in_features // transformer["caption_channels"],
        connector_rope_base_seq_len=transformer["connector_positional_embedding_max_pos"][0],
        rope_theta=transformer["positional_embedding_theta"],
        rope_type=transformer["rope_type"],
        per_modality_projections=per_stream,
        proj_bias=per_stream,
        **streams,
    ).eval()
    weights = {}
    for name, value in tensors.items():
        if "embeddings_connector" in name or "text_embedding_projection" in name:
            for old, new in CONNECTOR_NAMES:
                name = name.replace(old, new)
            weights[name] = torch.tensor(value)
    model.load_state_dict(weights, strict=True)
    return model


@torch.no_grad()
def contexts(model: LTX2TextConnectors, states: list[Array], mask: Array) -> tuple[Array, Array]:
    """Video and audio context from left-padded hidden states."""
    stacked = torch.stack([torch.tensor(state) for state in states], dim=-1)
    video, audio, _ = model(stacked, torch.tensor(mask))
    return video.numpy(), audio.numpy()
