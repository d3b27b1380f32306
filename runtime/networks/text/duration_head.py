"""The duration head: how long the clip that a prompt describes should be, from the connectors' contexts. One learned
query attends to all tokens of both streams; two linear layers turn the result into a logarithm of seconds.

Computed in float32 whatever the weights: the result is rounded to frames."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from ltx2.runtime.errors import ConfigError
from ltx2.runtime.layers.attention import gelu_tanh
from ltx2.runtime.layers.checks import check_finite
from ltx2.runtime.layers.linear import Linear
from ltx2.runtime.machine.bounded import evaluate
from ltx2.runtime.model.config import AS_PUBLISHED, Config
from ltx2.runtime.streams import Streams

MOST = 50.0  # of the logarithm: exp of it is still finite, and longer than any clip


@dataclass(frozen=True)
class DurationHeadConfig(Config):
    """The widths of both streams' contexts, from the transformer's section of the file, and the head's own."""

    cross_attention_dim: int
    audio_cross_attention_dim: int
    pooler_hidden_dim: int = 256
    num_pooler_heads: int = 4
    mlp_hidden: int = 256

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"num_queries": (1,)}

    def __post_init__(self) -> None:
        """Raises ConfigError when the heads do not divide the width."""
        if self.pooler_hidden_dim % self.num_pooler_heads:
            raise ConfigError(
                "DurationHeadConfig: widths do not fit together",
                f"{self.num_pooler_heads} heads do not divide a width of {self.pooler_hidden_dim}",
                AS_PUBLISHED,
            )


class CrossAttention(nn.Module):
    """Plain multi-head attention; the three input projections are one matrix (3 * dim, dim), queries first."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = mx.zeros((3 * dim, dim))
        self.in_proj_bias = mx.zeros((3 * dim,))
        self.out_proj = Linear(dim, dim)

    def __call__(self, query: mx.array, tokens: mx.array) -> mx.array:
        """query (batch, 1, dim), tokens (batch, tokens, dim) -> (batch, 1, dim)"""
        weights, biases = mx.split(self.in_proj_weight, 3), mx.split(self.in_proj_bias, 3)
        projected = (x @ w.T + b for x, w, b in zip((query, tokens, tokens), weights, biases, strict=True))
        q, k, v = (x.reshape(*x.shape[:2], self.heads, -1).transpose(0, 2, 1, 3) for x in projected)
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
        return self.out_proj(out.transpose(0, 2, 1, 3).flatten(2))


class AttentionPooler(nn.Module):
    """One learned query attends to all tokens."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.query_tokens = mx.zeros((1, dim))
        self.cross_attn = CrossAttention(dim, heads)

    def __call__(self, tokens: mx.array) -> mx.array:
        """tokens (batch, tokens, dim) -> (batch, dim)"""
        query = mx.broadcast_to(self.query_tokens.astype(tokens.dtype), (tokens.shape[0], 1, tokens.shape[2]))
        return self.cross_attn(query, tokens)[:, 0]


class DurationHead(nn.Module):
    """Attribute names are the checkpoint's."""

    def __init__(self, config: DurationHeadConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.pooler_hidden_dim
        self.video_input_proj = Linear(config.cross_attention_dim, dim)
        self.video_modality_emb = mx.zeros((dim,))
        self.audio_input_proj = Linear(config.audio_cross_attention_dim, dim)
        self.audio_modality_emb = mx.zeros((dim,))
        self.attention_pooler = AttentionPooler(dim, config.num_pooler_heads)
        self.mlp_hidden = Linear(dim, config.mlp_hidden)
        self.mlp_out = Linear(config.mlp_hidden, 1)

    def seconds(self, contexts: Streams[mx.array]) -> float:
        """The clip's length, from one prompt's contexts (1, tokens, dim) of both streams or one of them.

        Raises NumericsError where it is not finite.
        """
        projections = Streams(self.video_input_proj, self.audio_input_proj)
        embeddings = Streams(self.video_modality_emb, self.audio_modality_emb)
        tokens: list[mx.array] = []
        for x, (project, embedding) in contexts.zip(projections.zip(embeddings)).values():
            tokens.append(project(x.astype(mx.float32)) + embedding)
            evaluate(tokens[-1])  # before the other is queued: bounds the memory
        pooled = self.attention_pooler(mx.concatenate(tokens, axis=1))
        logarithm = self.mlp_out(gelu_tanh(self.mlp_hidden(pooled)))
        evaluate(logarithm)
        check_finite(logarithm, "the predicted seconds")
        return float(mx.exp(mx.minimum(logarithm, MOST)))


@dataclass(frozen=True)
class Duration:
    """A predicted length. `clamped`: the `seconds` were outside of the bounds."""

    seconds: float
    frames: int
    clamped: bool


def duration(seconds: float, fps: float, least: float = 1.0, most: float = 20.0, step: int = 8) -> Duration:
    """The clip's number of frames, `step` * k + 1, for a predicted length and between `least` and `most` seconds.

    seconds * fps is rounded half to even, clamped to the bounds in frames, then rounded down to the grid, or up where
    that is below the lower bound and the next number is not above the upper one.
    """
    low, high = round(least * fps), round(most * fps)
    wanted = round(seconds * fps)
    clamped = min(max(wanted, low), high)
    frames = max(0, clamped - 1) // step * step + 1
    if frames < low and frames + step <= high:
        frames += step
    return Duration(seconds, frames, clamped != wanted)


def build(config: Mapping[str, Any]) -> DurationHead:
    """An uninitialised head from the component's config.json."""
    return DurationHead(DurationHeadConfig.from_dict(config))
