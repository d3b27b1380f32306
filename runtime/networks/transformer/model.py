"""The audio-video diffusion transformer: predicts the velocity of video and audio tokens at given noise levels.

Notable: two streams of different width joined by cross-attention in every block; per-token noise levels; text reaches
the blocks through small projections; positions are seconds and pixels, not indices."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from ltx2.runtime.layers.attention import gelu_tanh
from ltx2.runtime.layers.rope import Positions, Rope, rope_tables
from ltx2.runtime.machine.bounded import queue
from ltx2.runtime.networks.transformer.block import StreamContext, TransformerBlock
from ltx2.runtime.networks.transformer.config import TransformerConfig
from ltx2.runtime.networks.transformer.modulation import AdaLayerNormSingle


@dataclass(frozen=True)
class Prepared:
    """What stays the same over the steps of one stage, for one stream."""

    text: mx.array  # (batch, text tokens, dim), projected
    rope: Rope
    cross_rope: Rope


@dataclass(frozen=True)
class StreamInput:
    """One stream at one denoise step."""

    tokens: mx.array  # (batch, tokens, channels)
    timesteps: mx.array  # (batch, tokens) noise level per token, or (batch, 1) where all share one; float32
    sigma: mx.array  # (batch, 1) the step's noise level; 0 for a stream that is kept as it is


class CaptionProjection(nn.Module):
    """Text features to a stream's width."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def __call__(self, text: mx.array) -> mx.array:
        return self.linear_2(gelu_tanh(self.linear_1(text)))


class Supply(Protocol):
    """Where the blocks' weights come from, if they are not in memory all the time."""

    def ready(self, index: int) -> None:
        """Called before a block is used."""

    def queued(self, index: int, results: tuple[mx.array, mx.array]) -> None:
        """Called when the block's work is handed to the device; `results` depend on all of it."""


class Transformer(nn.Module):
    """AVTransformer3DModel. Attribute names are the checkpoint's."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        video, audio = config.video_dim, config.audio_dim
        self.patchify_proj = nn.Linear(config.in_channels, video)
        self.audio_patchify_proj = nn.Linear(config.audio_in_channels, audio)
        self.caption_projection = CaptionProjection(config.caption_channels, video)
        self.audio_caption_projection = CaptionProjection(config.caption_channels, audio)
        self.adaln_single = AdaLayerNormSingle(video, 6)
        self.audio_adaln_single = AdaLayerNormSingle(audio, 6)
        self.av_ca_video_scale_shift_adaln_single = AdaLayerNormSingle(video, 4)
        self.av_ca_audio_scale_shift_adaln_single = AdaLayerNormSingle(audio, 4)
        self.av_ca_a2v_gate_adaln_single = AdaLayerNormSingle(video, 1)
        self.av_ca_v2a_gate_adaln_single = AdaLayerNormSingle(audio, 1)
        self.transformer_blocks = [TransformerBlock(config) for _ in range(config.num_layers)]
        self.scale_shift_table = mx.zeros((2, video))
        self.audio_scale_shift_table = mx.zeros((2, audio))
        self.proj_out = nn.Linear(video, config.out_channels)
        self.audio_proj_out = nn.Linear(audio, config.audio_out_channels)
        self.supply: Supply | None = None

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype the streams are computed in."""
        return self.patchify_proj.bias.dtype  # a weight may be packed into integers

    def prepare_video(self, text: mx.array, positions: Positions) -> Prepared:
        """text (batch, tokens, caption_channels); positions (3, tokens): seconds, pixel rows, pixel columns."""
        config = self.config
        return Prepared(
            self.caption_projection(text.astype(self.dtype)),
            self._rope(positions, config.positional_embedding_max_pos, config.video_dim, config.num_attention_heads),
            self._rope(positions[:1], config.cross_max_pos, config.audio_dim, config.audio_num_attention_heads),
        )

    def prepare_audio(self, text: mx.array, positions: Positions) -> Prepared:
        """text (batch, tokens, caption_channels); positions (1, tokens): seconds."""
        config = self.config
        dim, heads = config.audio_dim, config.audio_num_attention_heads
        return Prepared(
            self.audio_caption_projection(text.astype(self.dtype)),
            self._rope(positions, config.audio_positional_embedding_max_pos, dim, heads),
            self._rope(positions, config.cross_max_pos, dim, heads),
        )

    def _rope(self, positions: Positions, max_positions: tuple[float, ...], dim: int, heads: int) -> Rope:
        return rope_tables(positions, max_positions, dim, heads, self.config.positional_embedding_theta)

    def __call__(
        self, video: StreamInput, audio: StreamInput, video_prepared: Prepared, audio_prepared: Prepared
    ) -> tuple[mx.array, mx.array]:
        """Velocities of both streams, shaped as their tokens, in the transformer's dtype."""
        video_context, video_embedded = self._video_context(video, audio, video_prepared)
        audio_context, audio_embedded = self._audio_context(audio, video, audio_prepared)
        x = self.patchify_proj(video.tokens.astype(self.dtype))
        y = self.audio_patchify_proj(audio.tokens.astype(self.dtype))
        for index, block in enumerate(self.transformer_blocks):
            if self.supply is not None:
                self.supply.ready(index)
            x, y = block(x, y, video_context, audio_context)
            queue(x, y)  # one block at a time, no waiting here
            if self.supply is not None:
                self.supply.queued(index, (x, y))
        eps = self.config.norm_eps
        x = self.proj_out(_output_norm(x, self.scale_shift_table, video_embedded, eps))
        y = self.audio_proj_out(_output_norm(y, self.audio_scale_shift_table, audio_embedded, eps))
        return x, y

    def _video_context(
        self, own: StreamInput, other: StreamInput, prepared: Prepared
    ) -> tuple[StreamContext, mx.array]:
        modulation, embedded = self.adaln_single(self._scaled(own.timesteps))
        cross, _ = self.av_ca_video_scale_shift_adaln_single(self._scaled(own.timesteps))
        gate, _ = self.av_ca_a2v_gate_adaln_single(self._gate_scaled(other.sigma))
        return _context(prepared, modulation, cross, gate), embedded

    def _audio_context(
        self, own: StreamInput, other: StreamInput, prepared: Prepared
    ) -> tuple[StreamContext, mx.array]:
        modulation, embedded = self.audio_adaln_single(self._scaled(own.timesteps))
        cross, _ = self.av_ca_audio_scale_shift_adaln_single(self._scaled(own.timesteps))
        gate, _ = self.av_ca_v2a_gate_adaln_single(self._gate_scaled(other.sigma))
        return _context(prepared, modulation, cross, gate), embedded

    def _scaled(self, timesteps: mx.array) -> mx.array:
        return timesteps * self.config.timestep_scale_multiplier

    def _gate_scaled(self, sigma: mx.array) -> mx.array:
        # The gate's own multiplier is relative to the timestep multiplier, both 1000 in published checkpoints.
        return sigma * self.config.av_ca_timestep_scale_multiplier


def _context(prepared: Prepared, modulation: mx.array, cross: mx.array, gate: mx.array) -> StreamContext:
    return StreamContext(prepared.text, prepared.rope, prepared.cross_rope, modulation, cross, gate)


def _output_norm(x: mx.array, table: mx.array, embedded: mx.array, eps: float) -> mx.array:
    """LayerNorm(x) * (1 + scale) + shift, with (shift, scale) = table + embedded timestep."""
    total = (table + embedded.astype(mx.float32)[:, :, None]).astype(x.dtype)
    shift, scale = total[:, :, 0], total[:, :, 1]
    return mx.fast.layer_norm(x, None, None, eps) * (1 + scale) + shift


def build(config: Mapping[str, Any]) -> Transformer:
    """From the component's config.json."""
    return Transformer(TransformerConfig.from_dict(config))
