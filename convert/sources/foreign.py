"""What people take for a checkpoint: other formats, web pages saved as files, pointers instead of files. Told from a
file's first bytes, so that the error names what it is."""

import re
from dataclasses import dataclass
from pathlib import Path

from ltx2.runtime.errors import CheckpointError, Ltx2Error, UnsupportedError
from ltx2.runtime.files.paths import open_regular

HEAD_BYTES = 512
SAFETENSORS = "use the .safetensors file as Lightricks publishes it (ltx2 download --list shows them)"
AGAIN = "download the file itself: ltx2 download, hf download, or git lfs pull in the folder it was cloned to"


@dataclass(frozen=True)
class Foreign:
    """Files that begin with `pattern`: what they are, why that is no source, and what is."""

    pattern: bytes
    what: str
    why: str
    fix: str
    error: type[Ltx2Error] = CheckpointError


FOREIGN = (
    Foreign(
        rb"version https://git-lfs",
        "is a Git LFS pointer, not the file",
        "git cloned the repository without its large files: this one only says where the data are",
        AGAIN,
    ),
    Foreign(
        rb"(?i)\s*(<!doctype html|<html|<\?xml|<error)",
        "is a web page, not the file",
        "it is what a site answers to a browser, such as a login or an error page",
        AGAIN,
    ),
    Foreign(
        rb"(?i)(access to \w+ .+ is restricted|entry not found|repository not found|invalid (username|user token)"
        rb"|unauthorized|forbidden|\{\"error\")",
        "is an error message, not the file",
        "the site refused the download, and its answer was saved under the file's name",
        "accept the licence on the model's page, log in (hf auth login), and download again",
    ),
    Foreign(
        rb"GGUF",
        "is a GGUF file",
        "its weights are quantized in blocks that MLX does not compute with",
        SAFETENSORS,
        UnsupportedError,
    ),
    Foreign(
        rb"PK\x03\x04|\x80[\x02-\x05]",
        "is a PyTorch file (.bin, .pt, .ckpt)",
        "it holds Python objects, and reading it would run code from it",
        SAFETENSORS,
        UnsupportedError,
    ),
)


def check_is_tensorfile(path: Path) -> None:
    """Refuse by name what is plainly something else than a safetensors file; the rest is for its reader to judge.

    Raises CheckpointError or UnsupportedError.
    """
    try:
        with open_regular(path) as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return  # the reader says what is wrong
    if head[4:9] == b"\0\0\0\0{":  # a header of less than 4 GB, as JSON
        return
    for foreign in FOREIGN:
        if re.match(foreign.pattern, head):
            raise foreign.error(f"{path.name} {foreign.what}", foreign.why, foreign.fix)
    if not head.strip(b"\0"):
        why = f"{'it is empty' if not head else 'it begins with zeros'}, as an interrupted download leaves it"
        raise CheckpointError(f"{path.name} holds no data", why, "download the file again")
