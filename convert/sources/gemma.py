"""The configuration of Gemma's language model alone, as our own encoder, transformers and mlx-lm read it, from the
spelling of any transformers release."""

from collections.abc import Mapping
from typing import Any

from ltx2.runtime.errors import CheckpointError
from ltx2.runtime.model.origin import GEMMA_VERSION

# Published files leave out what equals transformers' defaults for Gemma 3.
DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 262208,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
# Training, generation and bookkeeping: nothing the network computes depends on them.
DROPPED = frozenset(
    {
        "_name_or_path", "_sliding_window_pattern", "attention_dropout", "cache_implementation",
        "chunk_size_feed_forward", "dtype", "id2label", "initializer_range", "is_encoder_decoder", "label2id",
        "output_attentions", "output_hidden_states", "problem_type", "return_dict", "torch_dtype",
        "transformers_version", "use_cache",
    }
)  # fmt: skip
# A multimodal configuration states these for the whole model.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def text_config(source: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the language model in a Gemma 3 folder's config.json, or in the metadata of a text encoder
    file (Gemma 4); multimodal or text-only.

    Keys this function does not know are kept, so that the strict configuration class judges them. Raises
    CheckpointError when the model is neither or its layers cannot be described.
    """
    own = _language_model(source)
    given = {key: value for key, value in own.items() if key not in DROPPED}
    given |= {key: source[key] for key in TOKEN_IDS if source.get(key) is not None}
    if GEMMA_VERSION in source:  # of a model fine-tuned for a release, which brings its own text encoder
        fixed = {"architectures": ["Gemma4UnifiedForCausalLM"], "model_type": "gemma4_text"}
        return given | fixed | {GEMMA_VERSION: source[GEMMA_VERSION]}
    rope = _rope(given.pop("rope_parameters", None))
    pattern = _pattern(given.pop("layer_types", None))
    return {
        **DEFAULTS,
        **given,
        **rope,
        **pattern,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "tie_word_embeddings": given.get("tie_word_embeddings", True),
    }


def _language_model(source: Mapping[str, Any]) -> Mapping[str, Any]:
    kind = source.get("model_type")
    if kind in ("gemma3", "gemma4_unified") and isinstance(source.get("text_config"), Mapping):
        return dict(source["text_config"])
    if kind == "gemma3_text":
        return source
    raise _refused(f"its model_type is {kind!r}, not a Gemma's")


def _rope(parameters: Any) -> dict[str, Any]:
    """transformers 5's `rope_parameters`, per kind of layer, in the keys of older releases."""
    if not parameters:
        return {}
    given = parameters if isinstance(parameters, Mapping) else {}
    whole, window = given.get("full_attention"), given.get("sliding_attention")
    refused = _refused(f"rope_parameters = {parameters!r} is not what Gemma 3 uses")
    if not (isinstance(whole, Mapping) and isinstance(window, Mapping)):
        raise refused
    if window.get("rope_type", "default") != "default":
        raise refused
    scaling = {key: value for key, value in whole.items() if key != "rope_theta"}
    return {
        "rope_theta": whole.get("rope_theta", DEFAULTS["rope_theta"]),
        "rope_local_base_freq": window.get("rope_theta", DEFAULTS["rope_local_base_freq"]),
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
    }


def _pattern(kinds: Any) -> dict[str, int]:
    """transformers 5's `layer_types`, one per layer, as the period of the layers that see the whole text."""
    if not kinds:
        return {}
    if not isinstance(kinds, list):
        raise _refused(f"layer_types = {kinds!r} is no list")
    period = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    expected = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(len(kinds))]
    if kinds != expected:
        raise _refused(f"layer_types = {kinds!r} has no fixed period")
    return {"sliding_window_pattern": period}


def _refused(why: str) -> CheckpointError:
    return CheckpointError(
        "this config.json is not a supported text encoder's", why, "use a Gemma 3 12B folder as published by Google"
    )
