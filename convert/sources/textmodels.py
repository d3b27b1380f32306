"""Names language models by their configuration or sizes (textmodels.json), so that the error for a wrong text encoder
says which it is and which is needed."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ltx2.convert.names.release import releases, titles
from ltx2.runtime.errors import UnsupportedError
from ltx2.runtime.files.tensors import TensorInfo

_MODEL = r"(?:model\.)?(?:language_model\.)?(?:model\.)?"
EMBEDDING = re.compile(rf"{_MODEL}embed_tokens\.weight")
LAYER = re.compile(rf"{_MODEL}layers\.(\d+)\.(.+)")
T5_LAYER = re.compile(r"encoder\.block\.\d+\.layer\..+")
Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class TextModel:
    """A published language model: `types` as its configuration spells them, width and number of layers where these tell
    it from others of its family; `usable` where a release reads text with it."""

    title: str
    types: tuple[str, ...]
    width: int | None = None
    layers: int | None = None
    usable: bool = False

    def fits(self, kind: str | None, width: int | None, layers: int | None) -> bool:
        """Whether a model with these facts (None: unknown) is this one; a kind is needed where there is no size."""
        sized = self.width is not None and (width, layers) == (self.width, self.layers)
        return sized if kind is None else kind in self.types and (self.width is None or sized)


@cache
def text_models() -> tuple[TextModel, ...]:
    """All models known by name; in a family, models of a known size come first."""
    rows = json.loads(Path(__file__).with_name("textmodels.json").read_text())
    return tuple(TextModel(**row | {"types": tuple(row["types"])}) for row in rows)


def check_text_model(path: Path, config: Mapping[str, Any], tensors: Tensors) -> None:
    """Raises UnsupportedError for the text encoder of no release, by its config.json or, without one, by its
    tensors."""
    if any(map(T5_LAYER.fullmatch, tensors)):
        raise _refused(f"{path.name} holds T5")
    kind, language = config.get("model_type"), config.get("text_config") or config  # of a model that sees
    if isinstance(kind, str) and isinstance(language, Mapping):
        width, layers = (language.get(key) for key in ("hidden_size", "num_hidden_layers"))
    else:
        kind, sizes = text_kind(tensors), shape_config(tensors)
        width, layers = (sizes.get(key) for key in ("hidden_size", "num_hidden_layers"))
    model = next((m for m in text_models() if m.fits(kind, width, layers)), None)
    if model is None or not model.usable:
        named = f"a {kind} model" if kind else f"a language model of {layers} layers"
        raise _refused(f"{path} holds {model.title if model else named}")


def text_kind(tensors: Tensors) -> str | None:
    """A Gemma's `model_type`, told from the parts of its layers; None for other models."""
    parts = {match[2] for name in tensors if (match := LAYER.fullmatch(name))}
    if "layer_scalar" in parts:
        return "gemma4"
    normed = {"pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"} <= parts
    return ("gemma3" if "self_attn.q_norm.weight" in parts else "gemma2") if normed else None


def shape_config(tensors: Tensors) -> dict[str, int]:
    """The part of a language model's config.json that its shapes tell."""
    first: dict[str, tuple[int, ...]] = {}
    layers = 0
    for name, tensor in tensors.items():
        if EMBEDDING.fullmatch(name) and len(tensor.shape) == 2:
            first["embed"] = tensor.shape
        elif match := LAYER.fullmatch(name):
            layers = max(layers, int(match[1]) + 1)
            first.setdefault(match[2], tensor.shape)
    rows = {part.split(".")[-2]: shape[0] for part, shape in first.items() if part.endswith(".weight") and shape}
    if "embed" not in first or not rows.keys() >= {"q_proj", "k_proj", "gate_proj"}:
        return {"num_hidden_layers": layers}
    found = {
        "vocab_size": first["embed"][0],
        "hidden_size": rows.get("input_layernorm", first["embed"][1]),
        "num_hidden_layers": layers,
        "intermediate_size": rows["gate_proj"],
    }
    if head := rows.get("q_norm"):
        heads = {"num_attention_heads": rows["q_proj"] // head, "num_key_value_heads": rows["k_proj"] // head}
        found |= {"head_dim": head, "query_pre_attn_scalar": head} | heads
    return found


def _refused(what: str) -> UnsupportedError:
    readers = {r.text_encoder: [o for o in releases() if o.text_encoder == r.text_encoder] for r in releases()}
    needed = "; ".join(f"{titles(found, 'and')}: {encoder}" for encoder, found in readers.items())
    return UnsupportedError(
        what,
        f"a release reads text with the model it was trained with ({needed})",
        "name a folder of google/gemma-3-12b-it, or the text encoder file that the release brings along",
    )
