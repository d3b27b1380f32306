"""Configurations of the text path: Gemma's language models, with the key names that transformers and mlx-lm share, and
the connectors. Kept apart from the networks so that converting needs no MLX."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar, NamedTuple

from ltx2.runtime.errors import ConfigError, UnsupportedError
from ltx2.runtime.model.config import AS_PUBLISHED, Config, Repeats

NO_EFFECT = frozenset(
    {
        "architectures", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
        "final_logit_softcapping",  # logits are not computed here
    }
)  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"  # the whole text before a token, or a window of it


@dataclass(frozen=True)
class Heads:
    """Attention heads of one width."""

    count: int
    dim: int

    @property
    def width(self) -> int:
        return self.count * self.dim


@dataclass(frozen=True)
class GemmaConfig(Config):
    """The keys that all of Gemma's language models have. A layer sees the whole text before a token, or a window."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: Repeats
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    sliding_window: int  # tokens, the query's own included
    rms_norm_eps: float

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "tie_word_embeddings": (True,),
    }
    IGNORED: ClassVar[frozenset[str]] = NO_EFFECT

    def is_global(self, layer: int) -> bool:
        """Whether the layer (counted from 0) sees the whole text."""
        raise NotImplementedError

    def query_heads(self, layer: int) -> Heads:
        return Heads(self.num_attention_heads, self.head_dim)

    def key_heads(self, layer: int) -> Heads:
        """Heads of keys and of values."""
        return Heads(self.num_key_value_heads, self.head_dim)

    def shares_values(self, layer: int) -> bool:
        """Whether the layer's values are its keys before their norm, so that values have no projection."""
        return False


@dataclass(frozen=True)
class Gemma3Config(GemmaConfig):
    """Gemma3ForCausalLM. Every `sliding_window_pattern`-th layer sees the whole text."""

    query_pre_attn_scalar: float
    sliding_window_pattern: int
    rope_theta: float  # layers that see the whole text
    rope_local_base_freq: float  # layers with a window
    rope_scaling: dict[str, Any] | None  # layers that see the whole text

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **GemmaConfig.FIXED,
        "model_type": ("gemma3_text",),
        "attn_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
    }

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
        return (layer + 1) % self.sliding_window_pattern == 0


class Rotation(NamedTuple):
    """Rotary embedding of one kind of layer: the first `share` of each head's pairs of dimensions rotate."""

    theta: float
    share: float


@dataclass(frozen=True)
class Gemma4Config(GemmaConfig):
    """Gemma4UnifiedForCausalLM: wider heads, and fewer of them for keys, in the layers that see the whole text."""

    layer_types: Any  # FULL or SLIDING, for each layer
    rope_parameters: dict[str, Any]  # by kind of layer
    global_head_dim: int
    num_global_key_value_heads: int | None = None
    attention_k_eq_v: bool = False  # layers that see the whole text have no projection for values

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **GemmaConfig.FIXED,
        "model_type": ("gemma4_text",),
        # Other members of the family have experts, inputs per layer, layers that share keys.
        "enable_moe_block": (False,),
        "hidden_size_per_layer_input": (0, None),
        "num_kv_shared_layers": (0,),
        "use_bidirectional_attention": ("vision", None),  # "vision": none between the tokens of a text
    }
    IGNORED: ClassVar[frozenset[str]] = NO_EFFECT | {
        "moe_intermediate_size", "num_experts", "top_k_experts",  # without experts
        "use_double_wide_mlp",  # without layers that share keys
        "vocab_size_per_layer_input",  # without inputs per layer
    }  # fmt: skip

    def __post_init__(self) -> None:
        """Raises ConfigError for `layer_types` that do not describe the layers, UnsupportedError for another rotary
        embedding."""
        kinds = self.layer_types
        if not isinstance(kinds, tuple) or len(kinds) != self.num_hidden_layers or set(kinds) - {FULL, SLIDING}:
            raise ConfigError(
                f"Gemma4Config: layer_types = {kinds!r}",
                f"it must say {FULL} or {SLIDING} for each of the {self.num_hidden_layers} layers",
                AS_PUBLISHED,
            )
        for layer in range(self.num_hidden_layers):
            self.rotation(layer)

    def is_global(self, layer: int) -> bool:
        return bool(self.layer_types[layer] == FULL)

    def query_heads(self, layer: int) -> Heads:
        return Heads(self.num_attention_heads, self.global_head_dim if self.is_global(layer) else self.head_dim)

    def key_heads(self, layer: int) -> Heads:
        fewer = self.num_global_key_value_heads if self.shares_values(layer) else None
        return Heads(fewer or self.num_key_value_heads, self.query_heads(layer).dim)

    def shares_values(self, layer: int) -> bool:
        return self.attention_k_eq_v and self.is_global(layer)

    def rotation(self, layer: int) -> Rotation:
        """Raises UnsupportedError for a rotary embedding this code does not implement."""
        number = int | float
        match self.rope_parameters.get(self.layer_types[layer]):
            case {"rope_type": "default", "rope_theta": theta, **rest} if not rest and isinstance(theta, number):
                found = Rotation(float(theta), 1.0)
            case {"rope_type": "proportional", "rope_theta": theta, "partial_rotary_factor": share, **rest} if (
                not rest and isinstance(theta, number) and isinstance(share, number)
            ):
                found = Rotation(float(theta), float(share))
            case _:
                found = Rotation(0.0, 0.0)
        if not (1 <= found.theta < 1e12 and 0 < found.share <= 1):
            raise UnsupportedError(
                f"Gemma4Config: rope_parameters = {self.rope_parameters!r} is not supported",
                "this version implements the rope_types default and proportional, for both kinds of layers",
                "use the text encoder that was published with the release",
            )
        return found


def gemma_config(data: Mapping[str, Any]) -> GemmaConfig:
    """The text encoder's configuration from its config.json. Raises what `Config.from_dict` raises."""
    newer = data.get("model_type") in Gemma4Config.FIXED["model_type"]
    return Gemma4Config.from_dict(data) if newer else Gemma3Config.from_dict(data)


# Stated together by releases that normalise features per token and project them for each stream by itself.
PER_TOKEN = {
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_proj_input_norm": False,
    "caption_projection_second_linear": False,
}


@dataclass(frozen=True)
class ConnectorsConfig(Config):
    """Text projection and embedding connectors. `select` takes the keys from a checkpoint's `transformer` section."""

    connector_num_attention_heads: int
    connector_attention_head_dim: int
    connector_num_layers: Repeats
    connector_num_learnable_registers: int
    connector_positional_embedding_max_pos: tuple[float]
    caption_channels: int  # width of one hidden state of the text encoder
    text_projection_in_features: int  # our own key, from the tensor: caption_channels * hidden states
    audio_connector_num_attention_heads: int | None = None  # None: as the video's
    audio_connector_attention_head_dim: int | None = None
    connector_apply_gated_attention: bool = False
    caption_proj_before_connector: bool | None = None
    caption_projection_first_linear: bool | None = None
    caption_proj_input_norm: bool | None = None
    caption_projection_second_linear: bool | None = None
    text_encoder_norm_type: str | None = None
    norm_eps: float = 1e-6
    positional_embedding_theta: float = 10000.0

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "connector_norm_output": (True,),
        "rope_type": ("split",),
        "frequencies_precision": ("float64",),
    }
    IGNORED: ClassVar[frozenset[str]] = frozenset({"connector_learnable_registers_std"})  # initialisation

    # The keys of a `transformer` section that are the connectors'. Prefixes, so that this class also judges the keys of
    # later releases.
    SECTION_KEYS: ClassVar[frozenset[str]] = frozenset(
        {"norm_eps", "positional_embedding_theta", "rope_type", "frequencies_precision"}
    )
    SECTION_PREFIXES: ClassVar[tuple[str, ...]] = ("connector_", "audio_connector_", "caption_", "text_encoder_")

    @classmethod
    def select(cls, transformer: Mapping[str, Any]) -> dict[str, Any]:
        """The connectors' part of a checkpoint's `transformer` section: config.json without the projection's width."""
        return {
            key: value
            for key, value in transformer.items()
            if key in cls.SECTION_KEYS or key.startswith(cls.SECTION_PREFIXES)
        }

    def __post_init__(self) -> None:
        """Raises UnsupportedError for a projection of the text that was never published, ConfigError when the widths
        contradict each other."""
        given = {key: getattr(self, key) for key in PER_TOKEN}
        normed = self.text_encoder_norm_type in (("PER_TOKEN_RMS", None) if self.per_token else (None,))
        if (given != PER_TOKEN and set(given.values()) != {None}) or not normed:
            said = ", ".join(f"{key} = {value}" for key, value in given.items())
            raise UnsupportedError(
                "ConnectorsConfig: this projection of the text is not supported",
                f"it says {said}, text_encoder_norm_type = {self.text_encoder_norm_type}; known are all of "
                f"{', '.join(f'{key} = {value}' for key, value in PER_TOKEN.items())}, or none of these",
                AS_PUBLISHED,
            )
        shared = not self.per_token and {self.video.width, self.audio.width} != {self.caption_channels}
        if shared or self.text_projection_in_features % self.caption_channels:
            raise ConfigError(
                "ConnectorsConfig: widths do not fit together",
                f"connectors of width {self.video.width} and {self.audio.width} are given text features of width "
                f"{self.caption_channels}, projected from {self.text_projection_in_features}",
                AS_PUBLISHED,
            )

    @property
    def per_token(self) -> bool:
        """Whether each token's states are normalised by themselves and projected for each stream by itself; else they
        are normalised per prompt, and both streams get the same features."""
        return self.caption_proj_before_connector is True

    @property
    def video(self) -> Heads:
        return Heads(self.connector_num_attention_heads, self.connector_attention_head_dim)

    @property
    def audio(self) -> Heads:
        return Heads(
            self.audio_connector_num_attention_heads or self.video.count,
            self.audio_connector_attention_head_dim or self.video.dim,
        )

    def feature_scale(self, heads: Heads) -> float:
        """Factor on a stream's features before they are projected per token."""
        return sqrt(heads.width / self.caption_channels)

    @property
    def num_hidden_states(self) -> int:
        """Hidden states of the text encoder that are projected together."""
        return self.text_projection_in_features // self.caption_channels
