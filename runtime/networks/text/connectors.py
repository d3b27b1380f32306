"""From the text encoder's hidden states to what the transformer attends to: all layers' states are normalised and
projected together, then one small bidirectional transformer per stream mixes them with learned registers."""

from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ltx2.runtime.errors import ModelFolderError
from ltx2.runtime.layers.attention import Attention, FeedForward
from ltx2.runtime.layers.rope import Rope, rope_tables
from ltx2.runtime.machine.bounded import divided, evaluate
from ltx2.runtime.networks.text.config import ConnectorsConfig

RANGE = 8.0  # one layer's states span this much after normalisation
EPS = 1e-6


def normalized(state: mx.array, valid: mx.array) -> mx.array:
    """One layer's hidden states (batch, tokens, dim) in float32, shifted by their mean and divided by their range
    over the row's `valid` (batch, tokens) tokens and all features; padding becomes 0 (MODEL.md 1.4)."""
    x, keep = state.astype(mx.float32), valid[..., None]
    count = valid.sum(axis=1)[:, None, None] * x.shape[-1]
    mean = mx.where(keep, x, 0).sum(axis=(1, 2), keepdims=True) / (count + EPS)
    low = mx.where(keep, x, mx.inf).min(axis=(1, 2), keepdims=True)
    high = mx.where(keep, x, -mx.inf).max(axis=(1, 2), keepdims=True)
    return mx.where(keep, RANGE * (x - mean) / (high - low + EPS), 0)


def fill_with_registers(features: mx.array, valid: mx.array, registers: mx.array, length: int) -> mx.array:
    """Rows of `length`: the `valid` (batch, tokens) features (batch, tokens, dim) first, in order, then at every
    other position p the register p mod n of `registers` (n, dim)."""
    tokens = mx.arange(valid.shape[1])
    order = mx.argsort(mx.where(valid, tokens, tokens + valid.shape[1]), axis=1)
    front = mx.take_along_axis(features, order[..., None], axis=1)
    front = mx.pad(front, [(0, 0), (0, length - front.shape[1]), (0, 0)])
    tiled = mx.tile(registers, (length // registers.shape[0], 1))
    is_text = mx.arange(length)[None, :] < valid.sum(axis=1, keepdims=True)
    return mx.where(is_text[..., None], front, tiled[None])


class Block(nn.Module):
    """Self-attention and feed-forward network, each after a norm without weight."""

    def __init__(self, config: ConnectorsConfig) -> None:
        super().__init__()
        dim, eps = config.dim, config.norm_eps
        self.eps = eps
        self.attn1 = Attention(dim, dim, config.connector_num_attention_heads, config.connector_attention_head_dim, eps)
        self.ff = FeedForward(dim)

    def __call__(self, x: mx.array, rope: Rope) -> mx.array:
        """x (batch, tokens, dim) -> the same shape."""
        x = x + self.attn1(mx.fast.rms_norm(x, None, self.eps), rope=rope)
        return x + self.ff(mx.fast.rms_norm(x, None, self.eps))


class Connector(nn.Module):
    """One stream's connector: every position sees every other, registers included, so no mask leaves it."""

    def __init__(self, config: ConnectorsConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.learnable_registers = mx.zeros((config.connector_num_learnable_registers, config.dim))
        self.transformer_1d_blocks = [Block(config) for _ in range(config.connector_num_layers)]

    def __call__(self, features: mx.array, valid: mx.array, rope: Rope) -> mx.array:
        """features (batch, tokens, dim), valid (batch, tokens) -> (batch, positions of `rope`, dim)"""
        x = fill_with_registers(features, valid, self.learnable_registers, rope.cos.shape[1])
        for block in self.transformer_1d_blocks:
            x = block(x, rope)
            evaluate(x)  # before more is queued: bounds the memory
        return mx.fast.rms_norm(x, None, self.eps)


class TextProjection(nn.Module):
    """All hidden states of a token at once, as features both connectors share."""

    def __init__(self, config: ConnectorsConfig) -> None:
        super().__init__()
        self.aggregate_embed = nn.Linear(config.text_projection_in_features, config.caption_channels, bias=False)


class EmbeddingsConnectors(nn.Module):
    """Text projection and the connectors of both streams. Attribute names are the checkpoint's."""

    def __init__(self, config: ConnectorsConfig) -> None:
        super().__init__()
        self.config = config
        self.text_projection = TextProjection(config)
        self.video_connector = Connector(config)
        self.audio_connector = Connector(config)

    def __call__(self, hidden_states: Iterable[mx.array], mask: mx.array) -> tuple[mx.array, mx.array]:
        """Video and audio context, both (batch, T, dim).

        `hidden_states` are the text encoder's, first to last, (batch, T', dim) each: the last T' of the T columns of
        `mask` (1 = token, 0 = padding), where the columns before are padding. T is a multiple of the number of
        registers. States are consumed one by one and kept in the weights' dtype only. Raises ModelFolderError when
        they are not what the projection was made for.
        """
        features, valid = self._project(hidden_states, mask)
        rope = self._rope(mask.shape[1])
        video = self.video_connector(features, valid, rope)
        audio = self.audio_connector(features, valid, rope)
        evaluate(video, audio)
        return video, audio

    def _project(self, hidden_states: Iterable[mx.array], mask: mx.array) -> tuple[mx.array, mx.array]:
        """Features (batch, T', dim) and which of their tokens are text (batch, T')."""
        dtype = self.video_connector.learnable_registers.dtype  # never quantized
        layers: list[mx.array] = []
        valid = mask.astype(mx.bool_)
        for state in hidden_states:
            _fits("width of a hidden state", state.shape[-1], self.config.caption_channels)
            valid = valid[:, -state.shape[1] :]
            layers.append(normalized(state, valid).astype(dtype))
            evaluate(layers[-1])
        _fits("number of hidden states", len(layers), self.config.num_hidden_states)
        stacked = mx.stack(layers, axis=-1).flatten(2)  # feature-major, layer-minor
        layers.clear()
        aggregate, flops = self.text_projection.aggregate_embed, 2 * stacked.size * self.config.caption_channels
        features = divided(aggregate, stacked, axis=1, flops=flops)
        evaluate(features)
        return features, valid

    def _rope(self, length: int) -> Rope:
        """Positions are plain indices here, without the midpoints the transformer uses."""
        config = self.config
        return rope_tables(
            np.arange(length, dtype=np.float32)[None],
            config.connector_positional_embedding_max_pos,
            config.dim,
            config.connector_num_attention_heads,
            config.positional_embedding_theta,
        )


def _fits(what: str, given: int, needed: int) -> None:
    if given != needed:
        raise ModelFolderError(
            "the text encoder does not fit the connectors",
            f"{what}: {given}, where {needed} is needed",
            "convert the checkpoint together with the text encoder it was trained with",
        )


def build(config: Mapping[str, Any]) -> EmbeddingsConnectors:
    """Uninitialised connectors from the component's config.json."""
    return EmbeddingsConnectors(ConnectorsConfig.from_dict(config))
