"""Language models by name, from their configuration or sizes (textmodels.json): a wrong text encoder is refused with
what it is and what is needed."""

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

EMBEDDING = re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?embed_tokens\.weight")
LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.self_attn\.q_proj\.weight")
GEMMA_4_LAYER = re.compile(r"(?:.*\.)?layers\.\d+\.layer_scalar")
T5_LAYER = re.compile(r"encoder\.block\.\d+\.layer\..+")


@dataclass(frozen=True)
class TextModel:
    """A published language model: `types` as its configuration spells them, width and number of layers where they
    tell it from others of its family, and whether a release reads text with it."""

    title: str
    types: tuple[str, ...]
    width: int | None = None
    layers: int | None = None
    usable: bool = False

    def fits(self, kind: str | None, width: int | None, layers: int | None) -> bool:
        """Whether a model with these facts (None: unknown) is this one; a kind is needed where there is no size."""
        if kind is None:
            return self.width is not None and (width, layers) == (self.width, self.layers)
        return kind in self.types and (self.width is None or (width, layers) == (self.width, self.layers))


@cache
def text_models() -> tuple[TextModel, ...]:
    """All models known by name; of a family, those of a known size first."""
    rows = json.loads(Path(__file__).with_name("textmodels.json").read_text())
    return tuple(TextModel(**row | {"types": tuple(row["types"])}) for row in rows)


def check_text_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises UnsupportedError when a transformers folder with this config.json is no text encoder of any release."""
    kind = config.get("model_type")
    language = config.get("text_config") or config  # of a model that sees, its language model
    if not isinstance(kind, str) or not isinstance(language, Mapping):
        raise _refused(f"{folder} holds a model that its config.json does not name")
    width, layers = (language.get(key) for key in ("hidden_size", "num_hidden_layers"))
    model = next((m for m in text_models() if m.fits(kind, width, layers)), None)
    if model is None or not model.usable:
        raise _refused(f"{folder} holds {model.title if model else f'a {kind} model'}")


def check_text_model(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Raises UnsupportedError when a file holds a language model alone, without configuration and tokenizer."""
    if any(map(T5_LAYER.fullmatch, tensors)):
        raise _refused(f"{path.name} holds T5")
    embedding = next((tensor for name, tensor in tensors.items() if EMBEDDING.fullmatch(name) and tensor.shape), None)
    if embedding is None:
        return
    kind = "gemma4" if any(map(GEMMA_4_LAYER.fullmatch, tensors)) else None
    layers = len({match[1] for name in tensors if (match := LAYER.fullmatch(name))})
    model = next((m for m in text_models() if m.fits(kind, embedding.shape[-1], layers)), None)
    title = model.title if model else f"a language model of {layers} layers"
    raise _refused(f"{path.name} holds {title}, without its configuration and tokenizer")


def _refused(what: str) -> UnsupportedError:
    readers = {r.text_encoder: [o for o in releases() if o.text_encoder == r.text_encoder] for r in releases()}
    needed = "; ".join(f"{titles(found, 'and')}: {encoder}" for encoder, found in readers.items())
    return UnsupportedError(
        what,
        f"a release reads text with the model it was trained with ({needed})",
        "name a folder of google/gemma-3-12b-it, or the text encoder file that the release brings along",
    )
