"""Prompts to token ids, with the tokenizer files that come with the text encoder."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ltx2.runtime.errors import ModelFolderError, reason
from ltx2.runtime.files.jsonfile import read_object
from ltx2.runtime.files.paths import check_regular

if TYPE_CHECKING:
    import tokenizers

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

Ids = np.ndarray[Any, np.dtype[np.int32]]


class Encoded(NamedTuple):
    """A prompt of fixed length, left-padded. `ids` and `mask` (1 = token, 0 = padding) are int32 (1, length)."""

    ids: Ids
    mask: Ids
    truncated: int  # tokens cut off at the end


class Tokenizer:
    """A tokenizer that puts the beginning-of-sequence token first and nothing at the end; no chat template."""

    def __init__(self, backend: "tokenizers.Tokenizer", bos: int, pad: int) -> None:
        self._backend = backend
        self.bos = bos
        self.pad = pad

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read tokenizer.json, and the names of the special tokens from tokenizer_config.json.

        Raises ModelFolderError when they are missing or unusable.
        """
        import tokenizers  # here: only prompts need it

        path = folder / TOKENIZER
        try:
            check_regular(path)
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower class
            raise _unreadable(path, error) from error
        # A file saved after use may hold the length it was last used with.
        backend.no_truncation()
        backend.no_padding()
        try:
            config = read_object(folder / TOKENIZER_CONFIG)
        except (OSError, ValueError) as error:
            raise _unreadable(folder / TOKENIZER_CONFIG, error) from error
        bos = _token_id(backend, config, "bos_token")
        pad = _token_id(backend, config, "pad_token", "eos_token")
        return cls(backend, bos, pad)

    def encode(self, prompt: str, length: int) -> Encoded:
        """Exactly `length` ids: padding, then a beginning-of-sequence token and the stripped prompt's tokens."""
        tokens = self._backend.encode(prompt.strip()).ids
        if tokens[:1] != [self.bos]:  # whether the post-processor adds it differs between Gemma's generations
            tokens = [self.bos, *tokens]
        kept = tokens[:length]
        ids = np.full((1, length), self.pad, np.int32)
        mask = np.zeros((1, length), np.int32)
        ids[0, length - len(kept) :] = kept
        mask[0, length - len(kept) :] = 1
        return Encoded(ids, mask, len(tokens) - len(kept))


def _unreadable(path: Path, error: Exception) -> ModelFolderError:
    return ModelFolderError(
        f"the text encoder's {path.name} cannot be read",
        reason(error),
        "convert again with the complete Gemma folder as a source; its tokenizer files are copied along",
    )


def _token_id(backend: "tokenizers.Tokenizer", config: dict[str, Any], *names: str) -> int:
    """The id of the first of the named special tokens that the tokenizer has."""
    for name in names:
        token = config.get(name)
        # Written as the text itself or as an object that holds it.
        text = token.get("content") if isinstance(token, dict) else token
        number = backend.token_to_id(text) if isinstance(text, str) else None
        if number is not None:
            return int(number)
    raise ModelFolderError(
        f"the tokenizer has no {names[0]}",
        f"{TOKENIZER_CONFIG} names no token of {TOKENIZER} as {' or '.join(names)}",
        "convert again with the complete Gemma folder as a source",
    )
