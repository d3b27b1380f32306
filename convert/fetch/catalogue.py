"""The published files (releases/*.json) with their repositories, sizes and licences, and the bundles that one model
needs. Downloading asks the hub for sizes; those here serve lists and dry runs without a network."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from ltx2.runtime.errors import InputError
from ltx2.runtime.generate.options.preset import sampled_releases

HUB = "https://huggingface.co"


@dataclass(frozen=True)
class HubFile:
    """One file: its path in the repository and its size, which is an estimate unless `exact`."""

    path: str
    bytes: int
    exact: bool = True


@dataclass(frozen=True)
class Published:
    """A file, or a folder of files that belong together, to download and convert by its name. `folder` is its place in
    the weights folder, `licence` the page with the terms, `terms` their name, `bits` the width of most weights."""

    name: str
    release: str
    repository: str
    folder: str
    purpose: str
    licence: str
    terms: str
    gated: bool
    files: tuple[HubFile, ...]
    bits: int = 16
    is_folder: bool = False

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def exact(self) -> bool:
        return all(file.exact for file in self.files)

    @property
    def page(self) -> str:
        return f"{HUB}/{self.repository}"

    def source(self, weights: Path) -> Path:
        """Its path in the weights folder, for `convert`."""
        return weights / self.folder if self.is_folder else weights / self.folder / self.files[0].path


@dataclass(frozen=True)
class Bundle:
    """All files that one model needs. `generates`: this version makes clips with it, and does not only convert it."""

    name: str
    release: str
    purpose: str
    variant: str
    names: tuple[str, ...]

    @property
    def generates(self) -> bool:
        return self.release in sampled_releases()


@dataclass(frozen=True)
class Catalogue:
    """All published files and bundles, by name."""

    published: Mapping[str, Published]
    bundles: Mapping[str, Bundle]

    def choose(self, names: Iterable[str]) -> tuple[Published, ...]:
        """The files of some names (of files, with or without `.safetensors`, or bundles), each once. Raises InputError
        for an unknown name."""
        chosen: dict[str, Published] = {}
        for name in names:
            for member in self.bundles[name].names if name in self.bundles else (name,):
                found = self.published.get(member) or self.published.get(f"{member}.safetensors")
                if found is None:
                    raise self._unknown(name)
                chosen[found.name] = found
        return tuple(chosen.values())

    def bundle(self, name: str) -> Bundle:
        """The bundle of this name, or whose model is the published file of this name. Raises InputError for another."""
        if name in self.bundles:
            return self.bundles[name]
        (file,) = self.choose([name])
        for bundle in self.bundles.values():
            if bundle.names[0] == file.name:
                return bundle
        why = f"it is a part of one, for: {file.purpose}"
        raise InputError(f"{name} is no model", why, f"name one of {', '.join(self.bundles)}")

    def size(self, name: str) -> int:
        """Bytes of a file or bundle, as far as known without the hub."""
        return sum(published.bytes for published in self.choose([name]))

    def gated(self, name: str) -> bool:
        """Whether a file, or one of a bundle, needs a login and an accepted licence."""
        return any(published.gated for published in self.choose([name]))

    def to_dict(self) -> dict[str, Any]:
        """For `ltx2 download --list --json`."""
        return {
            "bundles": [
                {
                    "name": b.name, "release": b.release, "variant": b.variant, "for": b.purpose,
                    "files": list(b.names), "bytes": self.size(b.name), "gated": self.gated(b.name),
                    "generates": b.generates,
                }
                for b in self.bundles.values()
            ],
            "files": [
                {
                    "name": p.name, "release": p.release, "repository": p.repository, "for": p.purpose,
                    "paths": [f"{p.folder}/{file.path}" for file in p.files], "bytes": p.bytes, "exact": p.exact,
                    "gated": p.gated, "licence": p.licence,
                }
                for p in self.published.values()
            ],
        }  # fmt: skip

    def _unknown(self, name: str) -> InputError:
        known = [*self.bundles, *(published.removesuffix(".safetensors") for published in self.published)]
        near = get_close_matches(name.removesuffix(".safetensors"), known, n=3, cutoff=0.5)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        why = f"the catalogue has no such name{meant}"
        return InputError(f"nothing is published as {name}", why, "see ltx2 download --list")


@cache
def catalogue() -> Catalogue:
    """All releases that this version knows."""
    published: dict[str, Published] = {}
    bundles: dict[str, Bundle] = {}
    for path in sorted((Path(__file__).parent.parent / "names" / "releases").glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        for repository in data.get("repositories", []):
            published |= {p.name: p for p in _published(data["name"], repository)}
        for name, bundle in data.get("bundles", {}).items():
            bundles[name] = Bundle(name, data["name"], bundle["for"], bundle["variant"], tuple(bundle["names"]))
    return Catalogue(published, bundles)


def _published(release: str, data: Mapping[str, Any]) -> Iterable[Published]:
    """The files of one repository; one that has a `name` is a folder of all its files."""
    common = (data["repository"], data["folder"])
    access = (data["licence"], data["terms"], data["gated"])
    if "name" in data:
        files = tuple(_file(path, facts) for path, facts in data["files"].items())
        yield Published(data["name"], release, *common, data["for"], *access, files, is_folder=True)
        return
    for path, facts in data["files"].items():
        name, bits = PurePosixPath(path).name, facts.get("bits", 16)
        yield Published(name, release, *common, facts["for"], *access, (_file(path, facts),), bits)


def _file(path: str, facts: Mapping[str, Any]) -> HubFile:
    return HubFile(path, facts.get("bytes", facts.get("about")), exact="bytes" in facts)
