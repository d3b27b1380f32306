"""GGUF files beside their values: names of a language model's tensors, its configuration and tokenizer.

Lightricks' networks keep their names there. llama.cpp renames Gemma 3's tensors, adds 1 to the weights of its norms,
and writes its configuration and the pieces of its tokenizer into the header."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ltx2.convert.sources.sentencepiece import SPACE, USER_DEFINED, Piece, tokenizer_of
from ltx2.convert.tensors.gguf import GgufFile, decoder, open_gguf
from ltx2.runtime.errors import CheckpointError, UnsupportedError, reason

GEMMA_ARCHITECTURE = "gemma3"
# llama.cpp's names -> those of a language model alone.
NAMES: Mapping[str, str] = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.weight")
# Keys of a Gemma's header, after the architecture -> of a config.json. Missing ones have Gemma 3's usual values.
KEYS: Mapping[str, str] = {
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
}
# Special tokens -> their names in the header of a tokenizer.
SPECIAL = {"unk": "unknown", "bos": "bos", "eos": "eos", "pad": "padding"}
TOWERS = ("clip", "mmproj")  # architectures of vision towers, which stand in files of their own


def read_gguf(path: Path) -> GgufFile:
    """A GGUF file with its tensors under the names that rules know. Raises CheckpointError for a malformed one,
    UnsupportedError for other models and for values that cannot be decoded."""
    file = open_gguf(path)
    for dtype in file.block_types:
        decoder(dtype)
    if file.architecture in TOWERS:
        why = "prompts are read by the language model alone"
        raise UnsupportedError(f"{path.name} is a vision tower", why, "leave it out: the other GGUF is the model")
    if file.architecture != GEMMA_ARCHITECTURE:
        return file
    renamed = {_renamed(name): tensor for name, tensor in file.tensors.items()}
    return replace(
        file,
        tensors={name: replace(tensor, name=name) for name, tensor in renamed.items()},
        own_names={name: tensor.name for name, tensor in renamed.items()},
        shifted=frozenset(name for name in renamed if name.endswith("norm.weight")),
    )


def _renamed(name: str) -> str:
    match = NAME.fullmatch(name)
    if match is None or match[2] not in NAMES:
        return {"output.weight": "lm_head.weight"}.get(name, name)  # the rest is for the rules to refuse
    return f"model.layers.{match[1]}.{NAMES[match[2]]}.weight" if match[1] else f"model.{NAMES[match[2]]}.weight"


def header_config(file: GgufFile) -> dict[str, Any]:
    """The part of a Gemma's config.json that its header states; shapes state the rest."""
    given = {key.removeprefix(f"{GEMMA_ARCHITECTURE}."): value for key, value in file.values.items()}
    config: dict[str, Any] = {}
    for theirs, ours in KEYS.items():
        if isinstance(value := given.get(theirs), int | float):
            config[ours] = float(f"{value:.7g}") if isinstance(value, float) else value  # stored in float32
    if given.get("rope.scaling.type") == "linear" and "rope.scaling.factor" in given:
        config["rope_scaling"] = {"factor": given["rope.scaling.factor"], "rope_type": "linear"}
    for ours, theirs in SPECIAL.items():
        number = file.values.get(f"tokenizer.ggml.{theirs}_token_id")
        if ours != "unk" and number is not None:
            config[f"{ours}_token_id"] = number
    return config


def header_tokenizer(file: GgufFile) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of a Gemma; empty where the header has no tokenizer. Raises
    CheckpointError for pieces that cannot be used."""
    tokens, scores, kinds = (file.values.get(f"tokenizer.ggml.{key}") for key in ("tokens", "scores", "token_type"))
    if tokens is None:
        return {}
    try:
        if file.values.get("tokenizer.ggml.model") != "llama":
            raise ValueError(f"it is of the kind {file.values.get('tokenizer.ggml.model')}")
        if not scores or not kinds or not len(tokens) == len(scores) == len(kinds):
            raise ValueError("its pieces have no scores, or no kinds")
        pieces = [_piece(*piece) for piece in zip(tokens, scores, kinds, strict=True)]
        ids = {ours: file.values[f"tokenizer.ggml.{theirs}_token_id"] for ours, theirs in SPECIAL.items()}
        return tokenizer_of(pieces, {ours: pieces[number][0] for ours, number in ids.items()})
    except (ValueError, LookupError, TypeError) as error:
        fix = "add a folder with tokenizer.json and tokenizer_config.json, as google/gemma-3-12b-it has them"
        raise CheckpointError(f"the tokenizer in {file.path.name} cannot be used", reason(error), fix) from error


def _piece(text: str, score: float, kind: int) -> Piece:
    """llama.cpp writes spaces in user-defined pieces as spaces, SentencePiece with a sign of its own."""
    return (text.replace(" ", SPACE) if kind == USER_DEFINED else text), score, kind


def loss(file: GgufFile) -> str:
    """A warning of what quantizing the file has cost; empty where it is not quantized."""
    if not file.block_types:
        return ""
    return f"{file.path.name} is quantized already: {', '.join(file.block_types)}; what that lost stays lost"
