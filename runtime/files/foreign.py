"""Files that people take for safetensors: other formats, saved web pages, pointers to files. Their first bytes tell, so
that the error can name them."""

import re
from pathlib import Path

from ltx2.runtime.errors import CheckpointError, InputError, Ltx2Error, UnsupportedError
from ltx2.runtime.files.paths import open_regular

HEAD_BYTES = 512
SAFETENSORS = "use the .safetensors file as Lightricks publishes it (ltx2 download --list shows them)"
AGAIN = "download the file itself: ltx2 download, hf download, or git lfs pull in the folder it was cloned to"
LOGIN = "accept the licence on the model's page, log in (hf auth login), and download again"
TEXT = rb"[\x09\x0a\x0d\x20-\x7e]"
NAME = "name a .safetensors file"

Row = tuple[bytes, str, str, str, type[Ltx2Error]]  # first bytes, name, reason, fix and error class
# What is saved in place of a file.
INSTEAD: tuple[Row, ...] = (
    (rb"version https://git-lfs", "is a Git LFS pointer, not the file",
     "git cloned the repository without its large files: this one only says where they are", AGAIN, CheckpointError),
    (rb"(?i)\s*(<!doctype html|<html|<\?xml(?!.*<svg)|<error)", "is a web page, not the file",
     "it is what a site answers to a browser, such as a login or an error page", AGAIN, CheckpointError),
    (rb"(?i)(access to \w+ .+ is restricted|entry not found|repository not found|invalid (username|user token)"
     rb"|unauthorized|forbidden|\{\"error\")", "is an error message, not the file",
     "the site refused the download, and its answer was saved under the file's name", LOGIN, CheckpointError),
)  # fmt: skip
# The first match wins.
FOREIGN: tuple[Row, ...] = (
    *INSTEAD,
    (rb"PK\x03\x04|\x80[\x02-\x05][^\0]", "is a PyTorch file (.bin, .pt, .ckpt)",
     "it holds Python objects, and reading it would run code from it", SAFETENSORS, UnsupportedError),
    (rb"....ftyp(?:heic|heix|mif1|avif)|\x89PNG|\xff\xd8\xff|RIFF....WEBP", "is a picture",
     "it holds no tensors", NAME, CheckpointError),
    (rb"....ftyp|GIF8|\x1a\x45\xdf\xa3|RIFF....AVI ", "is a video", "it holds no tensors", NAME, CheckpointError),
    (rb"RIFF|ID3|fLaC|OggS", "is a sound", "it holds no tensors", NAME, CheckpointError),
    (rb"\s*[{\[]\s*[\"\]}\[{\d]", "is a JSON file", "it holds no tensors", NAME, CheckpointError),
    (TEXT + rb"{16}|" + TEXT + rb"+\Z", "is a text", "it holds no tensors", NAME, CheckpointError),
)  # fmt: skip


def foreign_kind(path: Path) -> tuple[str, str, str, type[Ltx2Error]] | None:
    """Name, reason, fix and error class for a file in another format; None where its bytes do not tell."""
    try:
        with open_regular(path) as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return None  # the reader's own error says more
    if head[4:9] == b"\0\0\0\0{":  # a header of less than 4 GB, as JSON
        return None
    if not head.strip(b"\0"):
        why = f"{'it is empty' if not head else 'it begins with zeros'}, as an interrupted download leaves it"
        return "holds no data", why, "download the file again", CheckpointError
    return next((row[1:] for row in FOREIGN if re.match(row[0], head, re.DOTALL)), None)


def check_delivered(path: Path) -> None:
    """Raises InputError for what a site or git has left in place of the file."""
    if (found := foreign_kind(path)) is not None and found in [row[1:] for row in INSTEAD]:
        raise InputError(f"{path} {found[0]}", found[1], "download the file itself")
