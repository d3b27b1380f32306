"""The audio-video diffusion transformer: predicts the velocity of video and audio tokens at given noise levels.

Notable: cross-attention in every block joins two streams of different width; every token may have its own noise level;
text reaches the blocks through small projections; positions are seconds and pixels, not indices."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from ltx2.runtime.layers.attention import gelu_tanh
from ltx2.runtime.layers.linear import Linear
from ltx2.runtime.layers.rope import Positions, rope_tables
from ltx2.runtime.machine.bounded import queue
from ltx2.runtime.networks.transformer.block import StreamContext, TransformerBlock
from ltx2.runtime.networks.transformer.config import StreamConfig, TransformerConfig
from ltx2.runtime.networks.transformer.inputs import NOTHING, Levels, Ropes, Skips, StreamInput, Text
from ltx2.runtime.networks.transformer.modulation import AdaLayerNormSingle, Rows, scale_shift
from ltx2.runtime.streams import Streams


class CaptionProjection(nn.Module):
    """Text features to a stream's width."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = Linear(text_dim, dim)
        self.linear_2 = Linear(dim, dim)

    def __call__(self, text: mx.array) -> mx.array:
        """(1, text tokens, text_dim) -> (1, text tokens, dim)"""
        return self.linear_2(gelu_tanh(self.linear_1(text)))


class Supply(Protocol):
    """Where the blocks' weights come from, if they are not in memory all the time."""

    def ready(self, index: int) -> None:
        """Called before a block is used."""

    def queued(self, index: int, results: Sequence[mx.array]) -> None:
        """Called when the block's work is handed to the device; `results` depend on all of it."""


class Transformer(nn.Module):
    """AVTransformer3DModel. Attribute names are the checkpoint's. A hook `around` is called in place of the network;
    it calls `velocities`."""

    around: "Callable[[Transformer, Streams[StreamInput], Skips], Streams[mx.array]] | None" = None

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self._streams = Streams(config.video, config.audio)
        for stream in self._streams.values():
            prefix, dim = stream.prefix, stream.dim
            self[f"{prefix}patchify_proj"] = Linear(stream.in_channels, dim)
            if not config.caption_proj_before_connector:
                self[f"{prefix}caption_projection"] = CaptionProjection(stream.context_dim, stream.text_dim)
            self[f"{prefix}adaln_single"] = AdaLayerNormSingle(dim, config.modulation_rows)
            if config.modulates_text:
                self[f"{prefix}prompt_adaln_single"] = AdaLayerNormSingle(stream.text_dim, 2)
            self[f"av_ca_{stream.name}_scale_shift_adaln_single"] = AdaLayerNormSingle(dim, 4)
            self[stream.gate] = AdaLayerNormSingle(dim, 1)
            self[f"{prefix}scale_shift_table"] = mx.zeros((2, dim))
            self[f"{prefix}proj_out"] = Linear(dim, stream.out_channels)
        if config.use_keyframes_abs_pos_embedding:
            self.keyframes_abs_pos_embedding = mx.zeros((1, config.video.dim))
        self.transformer_blocks = [TransformerBlock(config) for _ in range(config.num_layers)]
        self.supply: Supply | None = None
        self.loras: frozenset[tuple[Path, float]] = frozenset()  # those on its layers, with their strengths

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype the streams are computed in."""
        return self.patchify_proj.bias.dtype  # a weight may be packed into integers

    def ropes(self, positions: Streams[Positions]) -> Streams[Ropes]:
        """Rotary tables of tokens at these positions: (3, tokens) seconds, pixel rows and pixel columns of the video,
        (1, tokens) seconds of the audio."""
        config = self.config
        theta, audio = config.positional_embedding_theta, config.audio

        def tables(stream: StreamConfig, at: Positions) -> Ropes:
            return Ropes(
                rope_tables(at, stream.max_positions, stream.dim, stream.heads, theta),
                rope_tables(at[:1], config.cross_max_pos, audio.dim, audio.heads, theta),
                at,
            )

        return self._streams.map(tables, positions)

    def project(self, contexts: Streams[mx.array], kept: bool = False) -> Streams[Text]:
        """Text as the blocks attend to it: contexts (1, text tokens, context_dim) -> (1, text tokens, text_dim)."""

        def projected(stream: StreamConfig, context: mx.array) -> Text:
            text, layer = context.astype(self.dtype), self.get(f"{stream.prefix}caption_projection")
            return Text(text if layer is None else layer(text), context, kept)

        return self._streams.map(projected, contexts)

    def __call__(self, inputs: Streams[StreamInput], skips: Skips = NOTHING) -> Streams[mx.array]:
        """As `velocities`."""
        return self.velocities(inputs, skips) if self.around is None else self.around(self, inputs, skips)

    def velocities(self, inputs: Streams[StreamInput], skips: Skips = NOTHING) -> Streams[mx.array]:
        """Velocities (1, tokens, channels) in the transformer's dtype, of the streams that are there and not idle."""
        video, audio = inputs.video, inputs.audio
        contexts = Streams(
            None if video is None else self._context(self.config.video, video, audio, skips),
            None if audio is None else self._context(self.config.audio, audio, video, skips),
        )
        x = self._streams.map(self._embed, inputs)
        for index, block in enumerate(self.transformer_blocks):
            if self.supply is not None:
                self.supply.ready(index)
            x = block(x, contexts, index)
            queue(*x.values())  # one block at a time, no waiting here
            if self.supply is not None:
                self.supply.queued(index, tuple(x.values()))
        awake = Streams(**{name: context for name, context in contexts.items() if not context.idle})
        return x.map(self._velocity, awake)

    def _context(
        self, stream: StreamConfig, own: StreamInput, other: StreamInput | None, skips: Skips
    ) -> StreamContext:
        config, levels = self.config, own.levels
        timesteps = levels.values[None] * config.timestep_scale_multiplier
        modulation, embedded = self[f"{stream.prefix}adaln_single"](timesteps)
        cross, _ = self[f"av_ca_{stream.name}_scale_shift_adaln_single"](timesteps)
        prompt = self._prompt_modulation(stream, levels)
        gate = None
        if other is not None and not skips.exchange:
            # The gate's own multiplier is relative to the timestep multiplier, both 1000 in published checkpoints.
            gate, _ = self[stream.gate](_sigma(other.levels) * config.av_ca_timestep_scale_multiplier)
        return StreamContext(
            stream,
            own.text.at(levels.sigma if config.modulates_text else None),
            own.ropes,
            modulation,
            embedded,
            cross,
            prompt,
            gate,
            index=None if levels.index is None or levels.values.size == 1 else levels.index[None, :, None],
            attention=None if own.attention is None else own.attention.astype(self.dtype),
            passing=getattr(skips.values, stream.name) or frozenset(),
            idle=bool(getattr(skips.idle, stream.name)),
        )

    def _prompt_modulation(self, stream: StreamConfig, levels: Levels) -> mx.array | None:
        """The noise level's part of the text's shift and scale, (1, 1, 2, text_dim); None: blocks have no tables for
        it."""
        if not self.config.cross_attention_adaln:
            return None
        if not self.config.modulates_text:
            return mx.zeros((1, 1, 2, stream.text_dim), self.dtype)
        network = self[f"{stream.prefix}prompt_adaln_single"]
        modulation: mx.array = network(_sigma(levels) * self.config.timestep_scale_multiplier)[0]
        return modulation

    def _embed(self, stream: StreamConfig, given: StreamInput) -> mx.array:
        """Tokens at the stream's width: (1, tokens, channels) -> (1, tokens, dim)."""
        x: mx.array = self[f"{stream.prefix}patchify_proj"](given.tokens.astype(self.dtype))
        if stream.name == "video" and given.marked is not None and self.config.use_keyframes_abs_pos_embedding:
            x = mx.where(given.marked > 0, x + self.keyframes_abs_pos_embedding.astype(x.dtype), x)
        return x

    def _velocity(self, x: mx.array, context: StreamContext) -> mx.array:
        """x (1, tokens, dim) -> (1, tokens, channels), projected from LayerNorm(x) * (1 + scale) + shift with
        (shift, scale) = table + embedded noise level."""
        prefix = context.stream.prefix
        rows = Rows(self[f"{prefix}scale_shift_table"], context.embedded[:, :, None])
        x = mx.fast.layer_norm(x, None, None, self.config.norm_eps)
        shift, scale, index = rows[0], rows.scale(1), context.index
        x = x * scale + shift if index is None else scale_shift(x, scale, shift, index)
        velocity: mx.array = self[f"{prefix}proj_out"](x)
        return velocity


def _sigma(levels: Levels) -> mx.array:
    """(1, 1) float32"""
    return mx.array([[levels.sigma]], mx.float32)


def build(config: Mapping[str, Any]) -> Transformer:
    """From the component's config.json."""
    return Transformer(TransformerConfig.from_dict(config))
