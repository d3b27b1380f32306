"""One transformer block: both streams attend to themselves, to the text and to each other, then feed forward."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ltx2.runtime.layers.attention import Attention, FeedForward
from ltx2.runtime.layers.rope import Rope
from ltx2.runtime.machine.bounded import queue, too_large
from ltx2.runtime.networks.transformer.config import TransformerConfig
from ltx2.runtime.networks.transformer.modulation import add_table, gated_add, rms_modulate


@dataclass(frozen=True)
class StreamContext:
    """What one stream (video or audio) brings to every block of one denoise step."""

    text: mx.array  # (batch, text tokens, dim)
    rope: Rope
    cross_rope: Rope  # time only, for audio-video cross-attention
    modulation: mx.array  # (batch, tokens or 1, 6, dim): self-attention and feed-forward
    cross_modulation: mx.array  # (batch, tokens or 1, 4, dim): scales and shifts of cross-attention
    cross_gate: mx.array  # (batch, 1, 1, dim), from the other stream's noise level


class TransformerBlock(nn.Module):
    """Attribute names are the checkpoint's; `attn*` and `ff` are the video stream's, `audio_*` the audio stream's."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        video, audio, eps = config.video_dim, config.audio_dim, config.norm_eps
        heads, head_dim = config.num_attention_heads, config.attention_head_dim
        audio_heads, audio_head_dim = config.audio_num_attention_heads, config.audio_attention_head_dim
        self.eps = eps
        self.attn1 = Attention(video, video, heads, head_dim, eps)
        self.attn2 = Attention(video, config.cross_attention_dim, heads, head_dim, eps)
        self.ff = FeedForward(video)
        self.audio_attn1 = Attention(audio, audio, audio_heads, audio_head_dim, eps)
        self.audio_attn2 = Attention(audio, config.audio_cross_attention_dim, audio_heads, audio_head_dim, eps)
        self.audio_ff = FeedForward(audio)
        # Cross-attention between the streams runs at the audio stream's width in both directions.
        self.audio_to_video_attn = Attention(video, audio, audio_heads, audio_head_dim, eps)
        self.video_to_audio_attn = Attention(audio, video, audio_heads, audio_head_dim, eps)
        self.scale_shift_table = mx.zeros((6, video))
        self.audio_scale_shift_table = mx.zeros((6, audio))
        self.scale_shift_table_a2v_ca_video = mx.zeros((5, video))
        self.scale_shift_table_a2v_ca_audio = mx.zeros((5, audio))

    def __call__(
        self, x: mx.array, y: mx.array, video: StreamContext, audio: StreamContext
    ) -> tuple[mx.array, mx.array]:
        """x (batch, video tokens, video_dim), y (batch, audio tokens, audio_dim) -> both, updated."""
        rows_x = add_table(self.scale_shift_table, video.modulation)
        rows_y = add_table(self.audio_scale_shift_table, audio.modulation)
        x = self._attend(x, video, rows_x, self.attn1, self.attn2)
        y = self._attend(y, audio, rows_y, self.audio_attn1, self.audio_attn2)
        self._hand_over(x, y)
        x, y = self._exchange(x, y, video, audio)
        self._hand_over(x, y)
        return self._feed(x, rows_x, self.ff), self._feed(y, rows_y, self.audio_ff)

    def _hand_over(self, x: mx.array, y: mx.array) -> None:
        """What is computed so far goes to the device where a whole block is too much at once."""
        _, tokens, dim = x.shape
        if too_large(4 * x.size * (6 * dim + tokens)):  # the video's self-attention and feed-forward network
            queue(x, y)

    def _attend(
        self, x: mx.array, stream: StreamContext, rows: list[mx.array], own: Attention, text: Attention
    ) -> mx.array:
        """Self-attention, then attention to the text."""
        shift, scale, gate = rows[:3]
        x = gated_add(x, own(rms_modulate(x, scale, shift, self.eps), rope=stream.rope), gate)
        return x + text(mx.fast.rms_norm(x, None, self.eps), stream.text)

    def _exchange(
        self, x: mx.array, y: mx.array, video: StreamContext, audio: StreamContext
    ) -> tuple[mx.array, mx.array]:
        """Cross-attention in both directions, each from the streams as they were before either update."""
        # Unlike all other tables these hold (scale, shift) pairs: audio-to-video, then video-to-audio.
        a2v_scale_x, a2v_shift_x, v2a_scale_x, v2a_shift_x = add_table(
            self.scale_shift_table_a2v_ca_video[:4], video.cross_modulation
        )
        a2v_scale_y, a2v_shift_y, v2a_scale_y, v2a_shift_y = add_table(
            self.scale_shift_table_a2v_ca_audio[:4], audio.cross_modulation
        )
        (gate_x,) = add_table(self.scale_shift_table_a2v_ca_video[4:], video.cross_gate)
        (gate_y,) = add_table(self.scale_shift_table_a2v_ca_audio[4:], audio.cross_gate)
        to_video = self.audio_to_video_attn(
            rms_modulate(x, a2v_scale_x, a2v_shift_x, self.eps),
            rms_modulate(y, a2v_scale_y, a2v_shift_y, self.eps),
            video.cross_rope,
            audio.cross_rope,
        )
        to_audio = self.video_to_audio_attn(
            rms_modulate(y, v2a_scale_y, v2a_shift_y, self.eps),
            rms_modulate(x, v2a_scale_x, v2a_shift_x, self.eps),
            audio.cross_rope,
            video.cross_rope,
        )
        return gated_add(x, to_video, gate_x), gated_add(y, to_audio, gate_y)

    def _feed(self, x: mx.array, rows: list[mx.array], feed_forward: FeedForward) -> mx.array:
        shift, scale, gate = rows[3:6]
        return gated_add(x, feed_forward(rms_modulate(x, scale, shift, self.eps)), gate)
