"""Published releases as data (releases/*.json): how one is recognised from a file's content, and whether this version
converts it. A new release adds a data file."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ltx2.runtime.errors import CheckpointError
from ltx2.runtime.tensorfile import TensorFile


@dataclass(frozen=True)
class Sign:
    """Evidence in a file's header; all that is given must hold.

    `tensor`: a pattern found in some tensor name; `absent`: one found in none; `metadata`: a pattern found in the
    value of a key, and `config`: the value of a key of the embedded configuration (null: there is no such key).
    """

    tensor: str = ""
    absent: str = ""
    metadata: Mapping[str, str | None] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def seen_in(self, file: TensorFile, config: Mapping[str, Any]) -> bool:
        """Whether the file carries this sign."""
        return (
            (not self.tensor or _found(self.tensor, file))
            and (not self.absent or not _found(self.absent, file))
            and all(_holds(pattern, file.metadata.get(key)) for key, pattern in self.metadata.items())
            and all(config.get(key) == value for key, value in self.config.items())
        )


def _found(pattern: str, file: TensorFile) -> bool:
    search = re.compile(pattern).search
    return any(search(name) for name in file.tensors)


def _holds(pattern: str | None, value: str | None) -> bool:
    if pattern is None or value is None:
        return pattern == value
    return re.search(pattern, value) is not None


@dataclass(frozen=True)
class Release:
    """One published version: its name, its human title, and the signs that give it away."""

    name: str
    title: str
    supported: bool
    signs: tuple[Sign, ...]


@cache
def releases() -> tuple[Release, ...]:
    """All releases this version knows, oldest first."""
    found = []
    for path in sorted((Path(__file__).parent / "releases").glob("*.json")):
        data = json.loads(path.read_text())
        signs = tuple(Sign(**sign) for sign in data["signs"])
        found.append(Release(data["name"], data["title"], data["supported"], signs))
    return tuple(found)


def recognise_release(file: TensorFile, config: Mapping[str, Any]) -> Release | None:
    """The release a file belongs to; None when its content fits several alike (text encoder, audio VAE, some LoRAs).

    Raises CheckpointError when the signs contradict each other.
    """
    found = [r for r in releases() if any(sign.seen_in(file, config) for sign in r.signs)]
    if len(found) > 1:
        raise CheckpointError(
            f"{file.path.name} mixes releases",
            f"it carries signs of {' and '.join(r.title for r in found)}",
            "use the checkpoint as published",
        )
    return found[0] if found else None
