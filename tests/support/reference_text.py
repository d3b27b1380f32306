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
    heads, head_dim = transformer["connector_num_attention_heads"], transformer["connector_attention_head_dim"]
    layers, registers = transformer["connector_num_layers"], transformer["connector_num_learnable_registers"]
    in_features = tensors["text_embedding_projection.aggregate_embed.weight"].shape[1]
    model = LTX2TextConnectors(
        caption_channels=transformer["caption_channels"],
        text_proj_in_factor=in_features // transformer["caption_channels"],
        video_connector_num_attention_heads=heads,
        video_connector_attention_head_dim=head_dim,
        video_connector_num_layers=layers,
        video_connector_num_learnable_registers=registers,
        audio_connector_num_attention_heads=heads,
        audio_connector_attention_head_dim=head_dim,
        audio_connector_num_layers=layers,
        audio_connector_num_learnable_registers=registers,
        connector_rope_base_seq_len=transformer["connector_positional_embedding_max_pos"][0],
        rope_theta=transformer["positional_embedding_theta"],
        rope_type=transformer["rope_type"],
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
