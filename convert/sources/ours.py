"""Tensor files that ltx2 writes for other purposes and that people take for a checkpoint: errors name them by their
tensors."""

import re

from ltx2.runtime.errors import CheckpointError
from ltx2.runtime.files.tensors import TensorFile

# A key of the metadata, or the pattern of all tensors' names; what the file holds, and the option that takes it.
OURS = (
    ("run", "", "state", "generate --resume"),
    ("about", "", "statistics", "quantize --stats"),
    ("", r"(?:video|audio)", "latents", "generate --latents"),
    ("", r"(?:negative_)?(?:video|audio)_context", "embeddings", "generate --embeddings"),
    ("", r"(?:stage\d|ancestral|decoder)\..+", "noise", "generate --noise"),
)


def our_kind(file: TensorFile) -> tuple[str, str] | None:
    """The kind of a tensor file of ltx2's own, and the option that takes it; None for another file."""
    for key, pattern, kind, option in OURS:
        named = bool(pattern and file.tensors) and all(re.fullmatch(pattern, name) for name in file.tensors)
        if (key and key in file.metadata) or named:
            return kind, option
    return None


def check_is_ours(file: TensorFile) -> None:
    """Raises CheckpointError for a file that ltx2 has written for another purpose."""
    if (found := our_kind(file)) is not None:
        kind, option = found
        what = f"{file.path.name} holds {kind}, not weights"
        raise CheckpointError(what, "ltx2 has written it", f"use it with {option}")
