"""Published releases as data (releases/*.json): the signs in a file that tell its release, and the text encoder that it
needs. A new release adds a data file."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ltx2.runtime.errors import CheckpointError
from ltx2.runtime.files.tensors import TensorFile


@dataclass(frozen=True)
class Sign:
    """Evidence in a file's header; all given parts must hold. `tensor`: a pattern that some tensor name matches;
    `absent`: one that none matches; `metadata`: patterns of values by key; `config`: values by key of the file's own
    configuration (null: there is no such key)."""

    tensor: str = ""
    absent: str = ""
    metadata: Mapping[str, str | None] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def seen_in(self, names: str, metadata: Mapping[str, str], config: Mapping[str, Any]) -> bool:
        """Whether a file has this sign; `names`: its tensors' names, one per line."""
        return (
            all(_holds(pattern, metadata.get(key)) for key, pattern in self.metadata.items())
            and all(config.get(key) == value for key, value in self.config.items())
            and (not self.tensor or _holds(self.tensor, names))
            and (not self.absent or not _holds(self.absent, names))
        )


def _holds(pattern: str | None, value: str | None) -> bool:
    if pattern is None or value is None:
        return pattern == value
    return re.search(pattern, value, re.MULTILINE) is not None


@dataclass(frozen=True)
class Release:
    """One published version: its name, its title for people, the text encoder that it needs, and its signs."""

    name: str
    title: str
    text_encoder: str
    signs: tuple[Sign, ...]


@cache
def releases() -> tuple[Release, ...]:
    """All releases that this version knows, oldest first."""
    found = []
    for path in sorted((Path(__file__).parent / "releases").glob("*.json")):
        data = json.loads(path.read_text())
        signs = tuple(Sign(**sign) for sign in data["signs"])
        found.append(Release(data["name"], data["title"], data["text_encoder"], signs))
    return tuple(found)


def recognise_releases(file: TensorFile, config: Mapping[str, Any]) -> tuple[Release, ...]:
    """The releases whose signs a file has: one; several that share the file (a temporal upscaler, Gemma 3); or none
    (some LoRAs). Raises CheckpointError when the signs contradict each other."""
    names = "\n".join(file.tensors)
    seen = {r.name: [sign for sign in r.signs if sign.seen_in(names, file.metadata, config)] for r in releases()}
    found = tuple(release for release in releases() if seen[release.name])
    if any(seen[release.name] != seen[found[0].name] for release in found):
        raise CheckpointError(
            f"{file.path.name} mixes releases", f"it carries signs of {titles(found, 'and')}", "use it as published"
        )
    return found


def titles(found: Sequence[Release], word: str = "or") -> str:
    """`LTX-2, LTX-2.3 or LTX-2.5`"""
    *first, last = [release.title for release in found]
    return f"{', '.join(first)} {word} {last}" if first else last
