"""Which layers are quantized, and at how many bits: recipes are data (recipes/*.json, or a user's file).

`quantize` names the layers that are touched at all; every rule of `at_least` raises the chosen bits to its own for
the layers it names. Layers are named by patterns over their path in the network, which all of the path must match."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from ltx2.quant.kinds import KINDS
from ltx2.runtime.errors import InputError
from ltx2.runtime.jsonfile import read_object
from ltx2.runtime.layout import COMPONENTS

BITS = KINDS["affine"].bits
FOLDER = Path(__file__).parent / "recipes"
DEFAULT = "mixed"


@dataclass(frozen=True)
class Rule:
    """Layers of `component` whose path matches `layers`; `why` is for the reader.

    With `first` or `last` (shares of the number of blocks, rounded up) only layers of the blocks at these ends.
    """

    component: str
    layers: str
    bits: int = 0
    first: float = 0.0
    last: float = 0.0
    why: str = ""

    def covers(self, layer: str, counts: Mapping[str, int]) -> bool:
        """Whether the rule names this layer; `counts` holds the number of blocks under each path."""
        return bool(re.fullmatch(self.layers, layer)) and (not (self.first or self.last) or self._at_end(layer, counts))

    def _at_end(self, layer: str, counts: Mapping[str, int]) -> bool:
        block = _block(layer)
        if block is None:
            return False
        path, index = block
        return index < ceil(self.first * counts[path]) or index >= counts[path] - ceil(self.last * counts[path])


@dataclass(frozen=True)
class Recipe:
    """A named recipe."""

    name: str
    quantize: tuple[Rule, ...]
    at_least: tuple[Rule, ...]

    def bits(self, component: str, layers: Sequence[str], chosen: int) -> dict[str, int]:
        """Bits of every layer of the component that is quantized; `layers` are the paths of all its layers."""
        counts = _block_counts(layers)
        rules = [rule for rule in self.quantize if rule.component == component]
        floors = [rule for rule in self.at_least if rule.component == component]
        return {
            layer: max([chosen, *(floor.bits for floor in floors if floor.covers(layer, counts))])
            for layer in layers
            if any(rule.covers(layer, counts) for rule in rules)
        }


def recipe_names() -> list[str]:
    """The recipes that come with ltx2."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_recipe(name: str = DEFAULT) -> Recipe:
    """A recipe by its name or file. Raises InputError when there is none or it is malformed."""
    path = FOLDER / f"{name}.json" if name in recipe_names() else Path(name)
    try:
        data = read_object(path)
        return Recipe(path.stem, _rules(data["quantize"]), _rules(data["at_least"]))
    except OSError as error:
        raise InputError(
            f"there is no recipe {name!r}", str(error), f"use {' or '.join(recipe_names())}, or the path of a file"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError, re.error) as error:
        raise InputError(
            f"the recipe {path} cannot be used",
            f"{type(error).__name__}: {error}",
            "write it like the recipes that come with ltx2 (quant/recipes)",
        ) from error


def _rules(rows: Iterable[Mapping[str, Any]]) -> tuple[Rule, ...]:
    rules = tuple(Rule(**row) for row in rows)
    for rule in rules:
        re.compile(rule.layers)
        if not (0 <= rule.first <= 1 and 0 <= rule.last <= 1):
            raise ValueError("first and last are shares between 0 and 1")
        if rule.component not in COMPONENTS:
            raise ValueError(f"there is no component {rule.component!r}")
        if rule.bits not in (0, *BITS):
            raise ValueError(f"{rule.bits} bits are not possible, only {', '.join(map(str, BITS))}")
    return rules


def _block(layer: str) -> tuple[str, int] | None:
    """`transformer_blocks.7.attn1.to_q` -> (`transformer_blocks`, 7)"""
    match = re.match(r"(.*?)\.(\d{1,9})\.", layer)
    return (match[1], int(match[2])) if match else None


def _block_counts(layers: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for layer in layers:
        if (block := _block(layer)) is not None:
            counts[block[0]] = max(counts.get(block[0], 0), block[1] + 1)
    return counts
