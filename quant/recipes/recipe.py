"""Recipes: which layers are quantized, and at how many bits. They are data (recipes/*.json, or a user's file).

`quantize` names the layers to quantize. They get the recipe's `bits`, or those that the user asks for; rules of
`at_least` raise the bits of the layers they name, and rules of `at_most` limit that. A rule names layers by a pattern
that the whole path in the network must match. A recipe that `extends` another one also has its rules, and its bits
unless it has its own."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

from ltx2.runtime.errors import InputError, reason
from ltx2.runtime.files.jsonfile import read_object
from ltx2.runtime.model.forms import AFFINE, MODES
from ltx2.runtime.model.layout import COMPONENTS

BITS = MODES[AFFINE].bits
EVERY = "uniform"  # the recipe that names all layers that are ever packed
FOLDER = Path(__file__).parent
GENERAL = "mixed"  # for bits that no preset is made for
KEYS = {"about", "extends", "bits", "quantize", "at_least", "at_most"}

# Path of a layer, bits -> relative error of its output at these bits; None if not known.
Error = Callable[[str, int], float | None]


def unknown(layer: str, bits: int) -> None:
    """No error is known."""


@dataclass(frozen=True)
class Rule:
    """Layers of `component` whose path matches `layers`; `why` is for the reader.

    With `first` or `last` (shares of the number of blocks, rounded up) only layers of the blocks at these ends. With
    `error` (in `at_most` only) just layers whose relative error at these bits is known not to be larger.
    """

    component: str
    layers: str
    bits: int = 0
    first: float = 0.0
    last: float = 0.0
    error: float = 0.0
    why: str = ""

    def covers(self, layer: str, counts: Mapping[str, int]) -> bool:
        """Whether the rule names this layer; `counts` holds the number of blocks under each path."""
        return _matches(self.layers, layer) and (not (self.first or self.last) or self._at_end(layer, counts))

    def allows(self, layer: str, error: Error) -> bool:
        """Whether the layer's error at the rule's bits is small enough."""
        return not self.error or ((found := error(layer, self.bits)) is not None and found <= self.error)

    def _at_end(self, layer: str, counts: Mapping[str, int]) -> bool:
        block = block_of(layer)
        if block is None:
            return False
        path, index = block
        return index < ceil(self.first * counts[path]) or index >= counts[path] - ceil(self.last * counts[path])


@cache
def _matches(pattern: str, layer: str) -> bool:
    """Cached: there are many layers and rules, and every plan asks."""
    return re.fullmatch(pattern, layer) is not None


@dataclass(frozen=True)
class Recipe:
    """A named recipe. `own_bits`: of layers that no rule names, unless the user asks for others."""

    name: str
    quantize: tuple[Rule, ...]
    at_least: tuple[Rule, ...]
    at_most: tuple[Rule, ...] = ()
    own_bits: int | None = None

    def bits(self, component: str, layers: Sequence[str], chosen: int, error: Error = unknown) -> dict[str, int]:
        """Bits of every layer of the component that is quantized; `layers` are the paths of all its layers."""
        counts = block_counts(layers)

        def naming(rules: Iterable[Rule], layer: str) -> list[Rule]:
            return [rule for rule in rules if rule.component == component and rule.covers(layer, counts)]

        def bits_of(layer: str) -> int:
            raised = max([chosen, *(rule.bits for rule in naming(self.at_least, layer))])
            lower = [rule for rule in naming(self.at_most, layer) if rule.bits < raised] if raised > chosen else []
            return max(chosen, min([raised, *(rule.bits for rule in lower if rule.allows(layer, error))]))

        return {layer: bits_of(layer) for layer in layers if naming(self.quantize, layer)}

    def extending(self, other: "Recipe") -> "Recipe":
        """With the rules of another recipe as well, and with its bits where this one has none."""
        return replace(
            self,
            quantize=other.quantize + self.quantize,
            at_least=other.at_least + self.at_least,
            at_most=other.at_most + self.at_most,
            own_bits=self.own_bits or other.own_bits,
        )


def recipe_names() -> list[str]:
    """The recipes that come with ltx2."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def choose_recipe(name: str | None, bits: int) -> Recipe:
    """The recipe of this name; without a name the preset for the bits (q4), else GENERAL. Raises as `load_recipe`."""
    preset = f"q{bits}"
    return load_recipe(name or (preset if preset in recipe_names() else GENERAL))


def load_recipe(name: str) -> Recipe:
    """A recipe by its name or file. Raises InputError if it is missing or malformed."""
    path = _path(name)
    try:
        return _read(path, ())
    except OSError as error:
        raise InputError(
            f"there is no recipe {name!r}", reason(error), f"use {' or '.join(recipe_names())}, or the path of a file"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError, re.error) as error:
        raise InputError(
            f"the recipe {path} cannot be used",
            reason(error),
            "write it like the recipes that come with ltx2 (quant/recipes)",
        ) from error


def _path(name: str, folder: Path = Path()) -> Path:
    return FOLDER / f"{name}.json" if name in recipe_names() else folder / name


def _read(path: Path, extending: tuple[Path, ...]) -> Recipe:
    """`extending`: the recipes that this one is read for."""
    if path in extending:
        raise ValueError(f"{path.name} extends itself")
    data = read_object(path)
    if unknown_keys := data.keys() - KEYS:
        raise ValueError(f"{min(unknown_keys)!r} is no part of a recipe")
    parent = _read(_path(data["extends"], path.parent), (*extending, path)) if "extends" in data else None
    own = {"at_most": []} | ({"quantize": [], "at_least": []} if parent else {}) | data
    recipe = Recipe(
        path.stem,
        _rules(own["quantize"]),
        _rules(own["at_least"]),
        _rules(own["at_most"], lowering=True),
        _checked_bits(data["bits"]) if "bits" in data else None,
    )
    return recipe.extending(parent) if parent else recipe


def _rules(rows: Iterable[Mapping[str, Any]], lowering: bool = False) -> tuple[Rule, ...]:
    rules = tuple(Rule(**row) for row in rows)
    for rule in rules:
        re.compile(rule.layers)
        if not all(0 <= share <= 1 for share in (rule.first, rule.last, rule.error)):
            raise ValueError("first, last and error are shares between 0 and 1")
        if rule.error and not lowering:
            raise ValueError("only rules of at_most ask for an error")
        if rule.component not in COMPONENTS:
            raise ValueError(f"there is no component {rule.component!r}")
        if rule.bits or lowering:
            _checked_bits(rule.bits)
    return rules


def _checked_bits(bits: object) -> int:
    if not isinstance(bits, int) or bits not in BITS:
        raise ValueError(f"{bits} bits are not possible, only {', '.join(map(str, BITS))}")
    return bits


@cache
def block_of(layer: str) -> tuple[str, int] | None:
    """`transformer_blocks.7.attn1.to_q` -> (`transformer_blocks`, 7)"""
    match = re.match(r"(.*?)\.(\d{1,9})\.", layer)
    return (match[1], int(match[2])) if match else None


def block_counts(layers: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for layer in layers:
        if (block := block_of(layer)) is not None:
            counts[block[0]] = max(counts.get(block[0], 0), block[1] + 1)
    return counts
