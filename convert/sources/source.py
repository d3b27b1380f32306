"""A source: one published file, or the files of a text encoder."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltx2.convert.names.release import Release
from ltx2.runtime.errors import CheckpointError, reason
from ltx2.runtime.files.jsonfile import read_object
from ltx2.runtime.files.tensors import TensorFile

GEMMA = "gemma"
VARIANTS = ("dev", "distilled")
AGAIN = "download the file again"


@dataclass(frozen=True, eq=False)
class Source:
    """One recognised source. `kind` names its rules (names/rules.py); `releases` are those it may belong to, none
    where nothing tells; `companions` are files copied along."""

    path: Path
    kind: str
    files: tuple[TensorFile, ...]
    config: Mapping[str, Any]
    releases: tuple[Release, ...] = ()
    companions: tuple[Path, ...] = ()

    @property
    def release(self) -> Release | None:
        """The release it belongs to, where that is certain."""
        return self.releases[0] if len(self.releases) == 1 else None

    def tensor_count(self) -> int:
        """Number of tensors in all its files."""
        return sum(len(file.tensors) for file in self.files)


def variant_in_name(name: str) -> str | None:
    """`dev` or `distilled` when exactly one of them is a word of the file's name."""
    words = re.split(r"[^a-z]+", name.lower())
    found = [variant for variant in VARIANTS if variant in words]
    return found[0] if len(found) == 1 else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError when the file cannot be read or holds something else."""
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read", reason(error), AGAIN) from error
