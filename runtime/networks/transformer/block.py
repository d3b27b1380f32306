"""One transformer block: both streams attend to themselves, to the text and to each other, then feed forward."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ltx2.runtime.layers.attention import Attention, FeedForward, Keys
from ltx2.runtime.machine.bounded import queue, too_large
from ltx2.runtime.networks.transformer.config import StreamConfig, TransformerConfig
from ltx2.runtime.networks.transformer.inputs import Ropes, Text
from ltx2.runtime.networks.transformer.modulation import Rows, gated_add, rms_modulate, scale_shift
from ltx2.runtime.streams import Streams

# Where a table's rows begin: shift, scale and gate of each part.
SELF, FEED, TEXT = 0, 3, 6


@dataclass(frozen=True)
class StreamContext:
    """One stream's part of a call, the same for every block. `n` is the number of its distinct noise levels."""

    stream: StreamConfig
    text: Text
    ropes: Ropes
    modulation: mx.array  # (1, n, 6 or 9, dim): self-attention, feed-forward and perhaps attention to the text
    embedded: mx.array  # (1, n, dim) the noise levels themselves
    cross_modulation: mx.array  # (1, n, 4, dim): scales and shifts of cross-attention between the streams
    prompt_modulation: mx.array | None = None  # (1, 1, 2, dim), where the text is modulated
    cross_gate: mx.array | None = None  # (1, 1, 1, dim), from the other stream's noise level; None: no cross-attention
    index: mx.array | None = None  # (1, tokens, 1) which level each token has; None: all have the first
    attention: mx.array | None = None  # (1, 1, tokens, tokens) added to self-attention's scores
    passing: frozenset[int] = frozenset()  # blocks whose self-attention passes its values through
    idle: bool = False  # no block updates it; the other stream attends to it


class Side:
    """One stream in one block: its layers and its tables, with the modulation of this call."""

    def __init__(self, block: "TransformerBlock", context: StreamContext) -> None:
        self.context, self._block, self._eps = context, block, block.eps
        # Unlike all other tables this one holds (scale, shift) pairs: audio-to-video, then video-to-audio.
        self._cross_table = block[f"scale_shift_table_a2v_ca_{context.stream.name}"]
        self._rows = Rows(self._own("scale_shift_table"), context.modulation)

    def _own(self, name: str) -> Any:
        return self._block[self.context.stream.prefix + name]

    def _modulated(self, x: mx.array, part: int) -> mx.array:
        """x (1, tokens, dim) normalised, scaled and shifted for a part."""
        return rms_modulate(x, self._rows.scale(part + 1), self._rows[part], self._eps, self.context.index)

    def _add(self, x: mx.array, update: mx.array, part: int) -> mx.array:
        """x (1, tokens, dim) with a part's update, through its gate."""
        return gated_add(x, update, self._rows[part + 2], self.context.index)

    def attend(self, x: mx.array, number: int) -> mx.array:
        """Self-attention in block `number`, then attention to the text: (1, tokens, dim) -> the same."""
        context, attn1 = self.context, self._own("attn1")
        if context.idle:
            return x
        given = self._modulated(x, SELF)
        if number in context.passing:
            update = attn1.passed(given)
        else:
            update = attn1(given, rope=context.ropes.own, mask=context.attention)
        x = self._add(x, update, SELF)
        modulates = context.prompt_modulation is not None
        given = self._modulated(x, TEXT) if modulates else mx.fast.rms_norm(x, None, self._eps)
        update = self._own("attn2")(given, context.text.keys(number, self._text_keys))
        return self._add(x, update, TEXT) if modulates else x + update

    def _text_keys(self, text: mx.array) -> Keys:
        """Keys and values of the text (1, text tokens, dim)."""
        if self.context.prompt_modulation is not None:
            rows = Rows(self._own("prompt_scale_shift_table"), self.context.prompt_modulation)
            text = scale_shift(text, rows.scale(1), rows[0])
        return self._own("attn2").keys_of(text)

    def offers(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """The stream (1, tokens, dim) modulated for audio-to-video, and for video-to-audio cross-attention."""
        rows, x = Rows(self._cross_table[:4], self.context.cross_modulation), mx.fast.rms_norm(x, None, self._eps)
        a2v, v2a = (scale_shift(x, rows.scale(i), rows[i + 1], self.context.index) for i in (0, 2))
        return a2v, v2a

    def receive(self, x: mx.array, queries: mx.array, keys: mx.array, other: "Side") -> mx.array:
        """x (1, tokens, dim) with what its `queries` find in the other stream's `keys`, both modulated."""
        context = self.context
        if context.idle or context.cross_gate is None:
            return x
        update = self._block[context.stream.incoming](queries, keys, context.ropes.cross, other.context.ropes.cross)
        return gated_add(x, update, Rows(self._cross_table[4:], context.cross_gate)[0])

    def feed(self, x: mx.array) -> mx.array:
        """The feed-forward network: (1, tokens, dim) -> the same."""
        return x if self.context.idle else self._add(x, self._own("ff")(self._modulated(x, FEED)), FEED)


class TransformerBlock(nn.Module):
    """Attribute names are the checkpoint's; `attn*` and `ff` are the video stream's, `audio_*` the audio stream's."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = eps = config.norm_eps
        gated = config.apply_gated_attention
        for stream, other in ((config.video, config.audio), (config.audio, config.video)):
            prefix, dim = stream.prefix, stream.dim
            self[f"{prefix}attn1"] = Attention(dim, dim, stream.heads, stream.head_dim, eps, gated=gated)
            self[f"{prefix}attn2"] = Attention(dim, stream.text_dim, stream.heads, stream.head_dim, eps, gated=gated)
            self[f"{prefix}ff"] = FeedForward(dim, stream.ff_bias)
            self[f"{prefix}scale_shift_table"] = mx.zeros((config.modulation_rows, dim))
            if config.cross_attention_adaln:
                self[f"{prefix}prompt_scale_shift_table"] = mx.zeros((2, stream.text_dim))
            # Cross-attention between the streams runs at the audio stream's width in both directions.
            heads, head_dim = config.audio.heads, config.audio.head_dim
            self[stream.incoming] = Attention(dim, other.dim, heads, head_dim, eps, gated=gated)
            self[f"scale_shift_table_a2v_ca_{stream.name}"] = mx.zeros((5, dim))

    def __call__(self, x: Streams[mx.array], contexts: Streams[StreamContext], number: int = 0) -> Streams[mx.array]:
        """The streams that are there, each (1, tokens, dim), updated by this block, the transformer's `number`-th."""
        sides = contexts.map(lambda context: Side(self, context))
        x = sides.map(lambda side, x: side.attend(x, number), x)
        self._hand_over(x)
        x = self._exchange(x, sides)
        self._hand_over(x)
        return sides.map(Side.feed, x)

    def _hand_over(self, x: Streams[mx.array]) -> None:
        """Hand the work so far to the device where a whole block is too much at once."""
        first = next(x.values())  # the video, or the audio alone
        if too_large(4 * first.size * (6 * first.shape[2] + first.shape[1])):  # self-attention and feed-forward network
            queue(*x.values())

    def _exchange(self, x: Streams[mx.array], sides: Streams[Side]) -> Streams[mx.array]:
        """Cross-attention in both directions, each from the streams as they were before either update."""
        both = sides.zip(x)
        if both.video is None or both.audio is None:
            return x
        (video_side, seen), (audio_side, heard) = both.video, both.audio
        (seen_a2v, seen_v2a), (heard_a2v, heard_v2a) = video_side.offers(seen), audio_side.offers(heard)
        return Streams(
            video_side.receive(seen, seen_a2v, heard_a2v, audio_side),
            audio_side.receive(heard, heard_v2a, seen_v2a, video_side),
        )
