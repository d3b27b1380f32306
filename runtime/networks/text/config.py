"""Configurations of the text path: Gemma 3's language model, with the key names that transformers and mlx-lm share,
and the connectors. Kept apart from the networks so that converting needs no MLX."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ltx2.runtime.errors import ConfigError, UnsupportedError
from ltx2.runtime.model.config import AS_PUBLISHED, Config, Repeats


@dataclass(frozen=True)
class Gemma3Config(Config):
    """Gemma3ForCausalLM. Every `sliding_window_pattern`-th layer sees the whole text, the others a window."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: Repeats
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    query_pre_attn_scalar: float
    sliding_window: int  # tokens, the query's own included
    sliding_window_pattern: int
    rms_norm_eps: float
    rope_theta: float  # layers that see the whole text
    rope_local_base_freq: float  # layers with a window
    rope_scaling: dict[str, Any] | None  # layers that see the whole text

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "model_type": ("gemma3_text",),
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "attn_logit_softcapping": (None,),
        "tie_word_embeddings": (True,),
        "use_bidirectional_attention": (False, None),
    }
    IGNORED: ClassVar[frozenset[str]] = frozenset(
        {
            "architectures", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
            "final_logit_softcapping",  # logits are not computed here
        }
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Raises UnsupportedError for a scaling other than a linear one."""
        assert self.rope_scale > 0

    @property
    def rope_scale(self) -> float:
        """Factor on the positions of layers that see the whole text.

        Raises UnsupportedError for a scaling other than a linear one.
        """
        scaling = self.rope_scaling or {}
        # Older transformers wrote the kind as "type".
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "default":
            return 1.0
        factor = scaling.get("factor")
        if kind != "linear" or not isinstance(factor, int | float) or not 1 <= factor < 1e6:
            raise UnsupportedError(
                f"Gemma3Config: rope_scaling = {scaling!r} is not supported",
                "this version implements linear scaling by a factor only",
                "use the Gemma 3 text encoder the checkpoint was trained with",
            )
        return 1.0 / factor

    def is_global(self, layer: int) -> bool:
        """Whether the layer (counted from 0) sees the whole text."""
        return (layer + 1) % self.sliding_window_pattern == 0


@dataclass(frozen=True)
class ConnectorsConfig(Config):
    """Text projection and embedding connectors. `select` takes the keys from a checkpoint's `transformer` section."""

    connector_num_attention_heads: int
    connector_attention_head_dim: int
    connector_num_layers: Repeats
    connector_num_learnable_registers: int
    connector_positional_embedding_max_pos: tuple[float]
    caption_channels: int  # width of one hidden state, and of the projection of them all
    text_projection_in_features: int  # our own key, from the tensor: caption_channels * hidden states
    norm_eps: float = 1e-6
    positional_embedding_theta: float = 10000.0

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "connector_norm_output": (True,),
        "rope_type": ("split",),
        "frequencies_precision": ("float64",),
        # Later releases switch these on.
        "connector_apply_gated_attention": (False,),
        "caption_projection_first_linear": (True,),
        "caption_projection_second_linear": (True,),
        "caption_proj_input_norm": (True,),
        "caption_proj_before_connector": (False,),
    }
    IGNORED: ClassVar[frozenset[str]] = frozenset({"connector_learnable_registers_std"})  # initialisation

    # What of a `transformer` section concerns the connectors; by prefix, so that keys of later releases are judged
    # by this class instead of being left behind.
    SECTION_KEYS: ClassVar[frozenset[str]] = frozenset(
        {"norm_eps", "positional_embedding_theta", "rope_type", "frequencies_precision"}
    )
    SECTION_PREFIXES: ClassVar[tuple[str, ...]] = ("connector_", "audio_connector_", "caption_", "text_encoder_")

    @classmethod
    def select(cls, transformer: Mapping[str, Any]) -> dict[str, Any]:
        """The connectors' part of a checkpoint's `transformer` section: config.json but for the projection's width."""
        return {
            key: value
            for key, value in transformer.items()
            if key in cls.SECTION_KEYS or key.startswith(cls.SECTION_PREFIXES)
        }

    def __post_init__(self) -> None:
        """Raises ConfigError when the widths contradict each other."""
        if self.dim != self.caption_channels or self.text_projection_in_features % self.caption_channels:
            raise ConfigError(
                "ConnectorsConfig: widths do not fit together",
                f"connectors of width {self.dim} are given text features of width {self.caption_channels}, "
                f"projected from {self.text_projection_in_features}",
                AS_PUBLISHED,
            )

    @property
    def dim(self) -> int:
        return self.connector_num_attention_heads * self.connector_attention_head_dim

    @property
    def num_hidden_states(self) -> int:
        """Hidden states of the text encoder that are projected together."""
        return self.text_projection_in_features // self.caption_channels
