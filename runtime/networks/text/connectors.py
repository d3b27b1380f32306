"""From the text encoder's hidden states to the transformer's contexts: all layers' states are normalised and projected
together, then one small bidirectional transformer per stream mixes them with learned registers.

Two ways to normalise and project were published (`ConnectorsConfig.per_token`)."""

from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ltx2.runtime.errors import ModelFolderError
from ltx2.runtime.layers.attention import Attention, FeedForward
from ltx2.runtime.layers.linear import Linear, LinearLayer
from ltx2.runtime.layers.rope import Rope, rope_tables
from ltx2.runtime.machine.bounded import divided, evaluate
from ltx2.runtime.networks.text.config import ConnectorsConfig, Heads
from ltx2.runtime.streams import Streams

RANGE = 8.0  # one layer's states span this much after normalisation per prompt
EPS = 1e-6


def normalized(state: mx.array, valid: mx.array) -> mx.array:
    """One layer's hidden states (batch, tokens, dim) in float32, shifted by their mean and divided by their range
    over the row's `valid` (batch, tokens) tokens and all features; padding becomes 0."""
    x, keep = state.astype(mx.float32), valid[..., None]
    count = valid.sum(axis=1)[:, None, None] * x.shape[-1]
    mean = mx.where(keep, x, 0).sum(axis=(1, 2), keepdims=True) / (count + EPS)
    low = mx.where(keep, x, mx.inf).min(axis=(1, 2), keepdims=True)
    high = mx.where(keep, x, -mx.inf).max(axis=(1, 2), keepdims=True)
    return mx.where(keep, RANGE * (x - mean) / (high - low + EPS), 0)


def normalized_per_token(state: mx.array, valid: mx.array) -> mx.array:
    """One layer's hidden states (batch, tokens, dim) in float32, each token's divided by its root mean square; tokens
    that are not `valid` (batch, tokens) become 0."""
    return mx.where(valid[..., None], mx.fast.rms_norm(state.astype(mx.float32), None, EPS), 0)


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

    def __init__(self, config: ConnectorsConfig, heads: Heads) -> None:
        super().__init__()
        self.eps = config.norm_eps
        gated = config.connector_apply_gated_attention
        self.attn1 = Attention(heads.width, heads.width, heads.count, heads.dim, self.eps, gated=gated)
        self.ff = FeedForward(heads.width)

    def __call__(self, x: mx.array, rope: Rope) -> mx.array:
        """x (batch, tokens, dim) -> the same shape."""
        x = x + self.attn1(mx.fast.rms_norm(x, None, self.eps), rope=rope)
        return x + self.ff(mx.fast.rms_norm(x, None, self.eps))


class Connector(nn.Module):
    """One stream's connector: every position sees every other, registers included, so no mask leaves it."""

    def __init__(self, config: ConnectorsConfig, heads: Heads) -> None:
        super().__init__()
        self.config, self.heads = config, heads
        self.learnable_registers = mx.zeros((config.connector_num_learnable_registers, heads.width))
        self.transformer_1d_blocks = [Block(config, heads) for _ in range(config.connector_num_layers)]

    def __call__(self, features: mx.array, valid: mx.array, length: int) -> mx.array:
        """features (batch, tokens, dim), valid (batch, tokens) -> (batch, length, dim)"""
        rope = self._rope(length)
        x = fill_with_registers(features, valid, self.learnable_registers, length)
        for block in self.transformer_1d_blocks:
            x = block(x, rope)
            evaluate(x)  # before more is queued: bounds the memory
        return mx.fast.rms_norm(x, None, self.config.norm_eps)

    def _rope(self, length: int) -> Rope:
        """Rotary tables of plain indices, without the midpoints that the transformer uses."""
        positions = np.arange(length, dtype=np.float32)[None]
        reach, theta = self.config.connector_positional_embedding_max_pos, self.config.positional_embedding_theta
        return rope_tables(positions, reach, self.heads.width, self.heads.count, theta)


class TextProjection(nn.Module):
    """All hidden states of a token at once, as features for the connectors: the same for both, or for each its own."""

    def __init__(self, config: ConnectorsConfig) -> None:
        super().__init__()
        self.config = config
        inputs = config.text_projection_in_features
        if config.per_token:
            self.video_aggregate_embed = Linear(inputs, config.video.width)
            self.audio_aggregate_embed = Linear(inputs, config.audio.width)
        else:
            self.aggregate_embed = Linear(inputs, config.caption_channels, bias=False)

    def __call__(self, states: mx.array) -> tuple[mx.array, mx.array]:
        """states (batch, tokens, width of all hidden states) -> (batch, tokens, dim) for the video's connector and for
        the audio's, evaluated."""
        config = self.config
        if not config.per_token:
            features = _projected(self.aggregate_embed, states)
            return features, features
        return (
            _projected(self.video_aggregate_embed, states, config.feature_scale(config.video)),
            _projected(self.audio_aggregate_embed, states, config.feature_scale(config.audio)),
        )


def _projected(linear: LinearLayer, states: mx.array, scale: float = 1.0) -> mx.array:
    """states (batch, tokens, inputs), multiplied by `scale`, through a layer: (batch, tokens, outputs), evaluated."""
    flops = 2 * states.size * linear.weight.shape[0]
    features = divided(lambda x: linear(x if scale == 1 else x * scale), states, axis=1, flops=flops)
    evaluate(features)
    return features


class EmbeddingsConnectors(nn.Module):
    """Text projection and the connectors of both streams. Attribute names are the checkpoint's."""

    def __init__(self, config: ConnectorsConfig) -> None:
        super().__init__()
        self.config = config
        self.text_projection = TextProjection(config)
        self.video_connector = Connector(config, config.video)
        self.audio_connector = Connector(config, config.audio)

    def __call__(self, hidden_states: Iterable[mx.array], mask: mx.array) -> Streams[mx.array]:
        """The contexts (batch, T, its width) that each stream attends to.

        `hidden_states` are the text encoder's, first to last, (batch, T', dim) each: they belong to the last T' of the
        T columns of `mask` (1 = token, 0 = padding); the columns before are padding. T is a multiple of the number of
        registers. States are consumed one by one and kept in the weights' dtype only. Raises ModelFolderError when
        their number or width is not the projection's.
        """
        states, valid = self._stacked(hidden_states, mask)
        video, audio = self.text_projection(states)
        del states  # the connectors need the room
        video = self.video_connector(video, valid, mask.shape[1])
        audio = self.audio_connector(audio, valid, mask.shape[1])
        evaluate(video, audio)
        return Streams(video, audio)

    def _stacked(self, hidden_states: Iterable[mx.array], mask: mx.array) -> tuple[mx.array, mx.array]:
        """A token's normalised states side by side (batch, T', their width together), ordered (feature, layer); and
        which tokens are text (batch, T')."""
        dtype = self.video_connector.learnable_registers.dtype  # never quantized
        normalize = normalized_per_token if self.config.per_token else normalized
        layers: list[mx.array] = []
        valid = mask.astype(mx.bool_)
        for state in hidden_states:
            _fits("width of a hidden state", state.shape[-1], self.config.caption_channels)
            valid = valid[:, -state.shape[1] :]
            layers.append(normalize(state, valid).astype(dtype))
            evaluate(layers[-1])
        _fits("number of hidden states", len(layers), self.config.num_hidden_states)
        return mx.stack(layers, axis=-1).flatten(2), valid


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
