"""Configuration of the audio-video transformer: the `transformer` section of a checkpoint's metadata."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ltx2.runtime.errors import UnsupportedError
from ltx2.runtime.model.config import SUPPORTED_ONLY, Config, Repeats
from ltx2.runtime.streams import Streams


@dataclass(frozen=True)
class StreamConfig:
    """One stream's part in the transformer: names and widths of its layers."""

    name: str  # video, audio
    prefix: str  # of the names of its layers
    incoming: str  # name of its cross-attention to the other stream
    gate: str  # name of the network that makes the gate of this cross-attention
    heads: int
    head_dim: int
    in_channels: int
    out_channels: int
    text_dim: int  # of the text as the blocks attend to it
    context_dim: int  # of the text that `Transformer.project` is given
    ff_bias: bool
    max_positions: tuple[float, ...]  # seconds, pixel rows, pixel columns; seconds

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class TransformerConfig(Config):
    """Widths and constants of AVTransformer3DModel. Widths are heads * head_dim."""

    num_layers: Repeats
    num_attention_heads: int
    attention_head_dim: int
    audio_num_attention_heads: int
    audio_attention_head_dim: int
    in_channels: int
    out_channels: int
    cross_attention_dim: int
    audio_cross_attention_dim: int
    caption_channels: int
    positional_embedding_max_pos: tuple[float, ...]
    audio_positional_embedding_max_pos: tuple[float, ...]
    audio_in_channels: int = 128
    audio_out_channels: int = 128
    norm_eps: float = 1e-6
    positional_embedding_theta: float = 10000.0
    timestep_scale_multiplier: float = 1000.0
    av_ca_timestep_scale_multiplier: float = 1.0
    apply_gated_attention: bool = False
    cross_attention_adaln: bool = False  # noise levels also modulate attention to the text
    use_prompt_adaln_single: bool = True  # and the text itself, not only by a table
    ff_bias: bool = True  # of the video's feed-forward network
    use_keyframes_abs_pos_embedding: bool = False
    # The text is projected here, or before the connectors: four keys for one choice.
    caption_projection_first_linear: bool = True
    caption_projection_second_linear: bool = True
    caption_proj_input_norm: bool = True
    caption_proj_before_connector: bool = False

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "_class_name": ("AVTransformer3DModel",),
        "activation_fn": ("gelu-approximate",),
        "attention_bias": (True,),
        "attention_type": ("default",),
        "double_self_attention": (False,),
        "norm_elementwise_affine": (False,),
        "num_vector_embeds": (None,),
        "only_cross_attention": (False,),
        "cross_attention_norm": (True,),
        "upcast_attention": (False,),
        "use_linear_projection": (False,),
        "qk_norm": ("rms_norm",),
        "standardization_norm": ("rms_norm",),
        "positional_embedding_type": ("rope",),
        "causal_temporal_positioning": (True,),
        "use_audio_video_cross_attention": (True,),
        "share_ff": (False,),
        "av_cross_ada_norm": (True,),
        "use_embeddings_connector": (True,),
        "use_middle_indices_grid": (True,),
        "rope_type": ("split",),
        "frequencies_precision": ("float64",),
    }
    IGNORED: ClassVar[frozenset[str]] = frozenset(
        {
            "dropout", "norm_num_groups", "num_embeds_ada_norm",
            # Read by the connectors.
            "connector_attention_head_dim", "connector_num_attention_heads", "connector_num_layers",
            "connector_positional_embedding_max_pos", "connector_num_learnable_registers", "connector_norm_output",
            "connector_apply_gated_attention", "connector_ff_bias", "connector_learnable_registers_std",
            "audio_connector_attention_head_dim", "audio_connector_num_attention_heads", "text_encoder_norm_type",
        }
    )  # fmt: skip

    def __post_init__(self) -> None:
        before = self.caption_proj_before_connector
        here = self.caption_projection_first_linear, self.caption_projection_second_linear, self.caption_proj_input_norm
        if before in here:
            raise UnsupportedError(
                "TransformerConfig: the caption_proj keys contradict each other",
                "text is projected before the connectors, or by the transformer with a norm and two linear layers",
                SUPPORTED_ONLY,
            )

    @property
    def video(self) -> StreamConfig:
        return StreamConfig(
            name="video", prefix="", incoming="audio_to_video_attn", gate="av_ca_a2v_gate_adaln_single",
            heads=self.num_attention_heads, head_dim=self.attention_head_dim,
            in_channels=self.in_channels, out_channels=self.out_channels,
            text_dim=self.cross_attention_dim, context_dim=self._context_dim(self.cross_attention_dim),
            ff_bias=self.ff_bias, max_positions=self.positional_embedding_max_pos,
        )  # fmt: skip

    @property
    def audio(self) -> StreamConfig:
        return StreamConfig(
            name="audio", prefix="audio_", incoming="video_to_audio_attn", gate="av_ca_v2a_gate_adaln_single",
            heads=self.audio_num_attention_heads, head_dim=self.audio_attention_head_dim,
            in_channels=self.audio_in_channels, out_channels=self.audio_out_channels,
            text_dim=self.audio_cross_attention_dim, context_dim=self._context_dim(self.audio_cross_attention_dim),
            ff_bias=True, max_positions=self.audio_positional_embedding_max_pos,
        )  # fmt: skip

    @property
    def context_dims(self) -> Streams[int]:
        """Widths of the contexts that `Transformer.project` is given."""
        return Streams(self.video.context_dim, self.audio.context_dim)

    def _context_dim(self, text_dim: int) -> int:
        return text_dim if self.caption_proj_before_connector else self.caption_channels

    @property
    def modulation_rows(self) -> int:
        """Vectors per noise level in a block: shift, scale and gate of all but the cross-attention of streams."""
        return 9 if self.cross_attention_adaln else 6

    @property
    def modulates_text(self) -> bool:
        """Whether the noise level modulates the text, so that its keys and values change with every step."""
        return self.cross_attention_adaln and self.use_prompt_adaln_single

    @property
    def cross_max_pos(self) -> tuple[float, ...]:
        """Time range of audio-video cross-attention: the longer of the two streams' own."""
        return (max(self.positional_embedding_max_pos[0], self.audio_positional_embedding_max_pos[0]),)
