"""What people take for a checkpoint: other formats, web pages saved as files, pointers instead of files, and files that
ltx2 writes for other purposes. Told from a file's first bytes or its tensors, so that the error names what it is."""

import re
from pathlib import Path

from ltx2.runtime.errors import CheckpointError, Ltx2Error, UnsupportedError
from ltx2.runtime.files.paths import open_regular
from ltx2.runtime.files.tensors import TensorFile

HEAD_BYTES = 512
SAFETENSORS = "use the .safetensors file as Lightricks publishes it (ltx2 download --list shows them)"
AGAIN = "download the file itself: ltx2 download, hf download, or git lfs pull in the folder it was cloned to"
LOGIN = "accept the licence on the model's page, log in (hf auth login), and download again"
WEIGHTS = "name the weights: a .safetensors file"

# What a file begins with: what it is, why that is no source, what is, and the kind of error. First match wins.
FOREIGN: tuple[tuple[bytes, str, str, str, type[Ltx2Error]], ...] = (
    (rb"version https://git-lfs", "is a Git LFS pointer, not the file",
     "git cloned the repository without its large files: this one only says where they are", AGAIN, CheckpointError),
    (rb"(?i)\s*(<!doctype html|<html|<\?xml|<error)", "is a web page, not the file",
     "it is what a site answers to a browser, such as a login or an error page", AGAIN, CheckpointError),
    (rb"(?i)(access to \w+ .+ is restricted|entry not found|repository not found|invalid (username|user token)"
     rb"|unauthorized|forbidden|\{\"error\")", "is an error message, not the file",
     "the site refused the download, and its answer was saved under the file's name", LOGIN, CheckpointError),
    (rb"PK\x03\x04|\x80[\x02-\x05]", "is a PyTorch file (.bin, .pt, .ckpt)",
     "it holds Python objects, and reading it would run code from it", SAFETENSORS, UnsupportedError),
    (rb"....ftyp", "is a video", "clips hold no weights", WEIGHTS, CheckpointError),
    (rb"\x89PNG|\xff\xd8\xff|RIFF", "is a picture or a sound", "it holds no weights", WEIGHTS, CheckpointError),
    (rb"\s*[{\[]\s*[\"\]}\[{\d]", "is a JSON file", "it holds no weights", WEIGHTS, CheckpointError),
    (rb"[\x09\x0a\x0d\x20-\x7e]{16}", "is a text", "it holds no weights", WEIGHTS, CheckpointError),
)  # fmt: skip
# Tensor files that ltx2 writes, by a key of their metadata or their tensors' names: what they are, and what for.
OURS = (
    ("run", "", "state", "generate --resume"),
    ("about", "", "statistics", "quantize --stats"),
    ("", r"(?:video|audio)", "latents", "generate --latents"),
    ("", r"(?:negative_)?(?:video|audio)_context", "embeddings", "generate --embeddings"),
    ("", r"(?:stage\d|ancestral|decoder)\..+", "noise", "generate --noise"),
)


def foreign_kind(path: Path) -> tuple[str, str, str, type[Ltx2Error]] | None:
    """What a file that is plainly no safetensors file is, why that is no source, what is, and the kind of error."""
    try:
        with open_regular(path) as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return None  # the reader says what is wrong
    if head[4:9] == b"\0\0\0\0{":  # a header of less than 4 GB, as JSON
        return None
    if not head.strip(b"\0"):
        why = f"{'it is empty' if not head else 'it begins with zeros'}, as an interrupted download leaves it"
        return "holds no data", why, "download the file again", CheckpointError
    return next((row[1:] for row in FOREIGN if re.match(row[0], head, re.DOTALL)), None)


def check_is_tensorfile(path: Path) -> None:
    """Refuse by name what is plainly something else than a safetensors file; the rest is for its reader to judge.

    Raises CheckpointError or UnsupportedError.
    """
    if (found := foreign_kind(path)) is not None:
        what, why, fix, error = found
        raise error(f"{path.name} {what}", why, fix)


def our_kind(file: TensorFile) -> tuple[str, str] | None:
    """What a tensor file of ltx2's own is, and the option that takes it."""
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
