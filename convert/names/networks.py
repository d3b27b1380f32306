"""The names of a network's tensors (networks.json), for networks that this version converts and cannot compute yet.

A name is a pattern: `{a,b}` stands for each of its parts, `{0-3}` for numbers, `{$key}` for the numbers below the value
of a configuration key, and `{$key=value}` for the places where a list in the configuration has this value. A row holds
`when` each of its keys has one of the values (null: the key is absent)."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from functools import cache
from pathlib import Path
from typing import Any

from ltx2.runtime.errors import ConfigError, UnsupportedError
from ltx2.runtime.model.config import AS_PUBLISHED

BRACES = re.compile(r"\{([^{}]*)\}")
BESIDE_WEIGHT = ("scales", "biases", "weight_scale")  # of layers stored as codes
MOST = 1000  # numbers that a configuration may ask for


def expand(pattern: str, config: Mapping[str, Any] | None = None) -> Iterator[str]:
    """All names a pattern stands for. Raises ConfigError for impossible values in the configuration."""
    match = BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    for part in match[1].split(","):
        for value in _values(part, config or {}):
            yield from expand(pattern[: match.start()] + value + pattern[match.end() :], config)


def _values(part: str, config: Mapping[str, Any]) -> Iterable[str]:
    if numbers := re.fullmatch(r"(\d+)-(\d+)", part):
        return map(str, range(int(numbers[1]), int(numbers[2]) + 1))
    if not part.startswith("$"):
        return (part,)
    key, _, wanted = part[1:].partition("=")
    given = config.get(key, [] if wanted else 0)  # where the configuration is silent, there are none
    if wanted and isinstance(given, list) and len(given) <= MOST:
        return (str(place) for place, value in enumerate(given) if value == wanted)
    if not wanted and type(given) is int and 0 <= given <= MOST:
        return map(str, range(given))
    raise ConfigError(f"the configuration says {key} = {given!r}", "no network is made like this", AS_PUBLISHED)


def is_listed(class_name: str) -> bool:
    """Whether the names of this network's tensors are known."""
    return class_name in _networks()


def parts(class_name: str, config: Mapping[str, Any]) -> dict[str, set[str]]:
    """The names of a network's tensors, by the part of it that a file of its own may hold.

    Raises UnsupportedError for an unknown class.
    """
    if not is_listed(class_name):
        raise UnsupportedError(
            f"network class {class_name!r} is not known", f"known are {', '.join(sorted(_networks()))}", "update ltx2"
        )
    found: dict[str, set[str]] = {}
    for row in _networks()[class_name]:
        if all(config.get(key) in values for key, values in row.get("when", {}).items()):
            names = found.setdefault(row.get("part", ""), set())
            for pattern in row["names"]:
                names.update(expand(pattern, config))
    return found


def name_differences(class_name: str, config: Mapping[str, Any], stored: Set[str]) -> dict[str, list[str]]:
    """Kind of difference -> the tensors concerned; empty when all names are those of the network, or of whole parts of
    it. Raises as `parts` does."""
    wanted: set[str] = set()
    for names in parts(class_name, config).values():
        wanted |= names if names & stored else set()
    layers = {name.removesuffix(".weight") for name in wanted}
    strange = (name for name in stored - wanted if not _is_beside_weight(name, layers))
    found = {"missing": sorted(wanted - stored), "not part of the network": sorted(strange)}
    return {kind: names for kind, names in found.items() if names}


def _is_beside_weight(name: str, layers: Set[str]) -> bool:
    layer, _, part = name.rpartition(".")
    return part in BESIDE_WEIGHT and layer in layers


@cache
def _networks() -> Mapping[str, list[Mapping[str, Any]]]:
    networks: Mapping[str, list[Mapping[str, Any]]] = json.loads(Path(__file__).with_name("networks.json").read_text())
    return networks
