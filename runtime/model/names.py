"""The names of tensors as one table (names.json): as Lightricks publishes them, in diffusers' words, and in a model
folder. Converting looks up published names; a LoRA's tensors may have any of the three. Only a name that matches a row
is understood, so nothing is guessed."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product
from pathlib import Path
from typing import Any

BLOCK = "{bid}"
_NUMBER = re.compile(r"(?<=blocks[._])(?:0|[1-9]\d{0,2})(?=[._])")
# Stripped from the front of a LoRA's names while one fits: trainers nest them.
PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "connectors.")
FLAT_PREFIX = "lora_unet_"  # kohya, musubi-tuner: `_` stands for `.` in the rest
# The parts of a LoRA; the down factor is (rank, in), the up factor (out, rank).
DOWN, UP, ALPHA, DELTA, BIAS_DELTA = "lora_A.weight", "lora_B.weight", "alpha", "diff", "diff_b"
_FACTORS = {"A": DOWN, "down": DOWN, "B": UP, "up": UP}
# The part after lora_A is the name of a PEFT adapter, mostly "default".
_SUFFIX = re.compile(
    r"(?P<path>[^{]+)\.(?:lora_(?P<factor>A|B|down|up)(?:(?:\.\w+)?\.weight)?|(?P<other>alpha|diff|diff_b))"
)


@dataclass(frozen=True)
class Module:
    """A row: a module's path, with `{bid}` for its block's number, as published (below the component's prefix), in
    diffusers' words and in a model folder; the releases that have it, each with the ratio of its output's width to its
    input's where releases differ in it. `lora`: LoRAs may change it."""

    component: str
    published: str
    diffusers: str
    folder: str
    releases: Mapping[str, int | None]
    lora: bool


@dataclass(frozen=True)
class LoraTensor:
    """The meaning of one tensor's name: its module, the number of the module's block, and the part of the LoRA."""

    kind: Module
    number: str
    part: str

    @property
    def module(self) -> str:
        """Its published path."""
        return self.kind.published.replace(BLOCK, self.number)

    @property
    def path(self) -> str:
        """Its path in a model folder."""
        return self.kind.folder.replace(BLOCK, self.number)

    @property
    def name(self) -> str:
        """The name it would have in an official file."""
        prefix = "" if self.module.startswith("text_embedding_projection.") else "diffusion_model."
        return f"{prefix}{self.module}.{self.part}"


def folder_name(component: str, name: str) -> str:
    """A tensor's name in a model folder, from the published one below its prefix; the same where the table has no row
    for it or its module."""
    if (paths := _folder_paths().get(component)) is None:
        return name
    template, number = _split(name)
    module, _, part = template.rpartition(".")
    if path := paths.get(template):
        return path.replace(BLOCK, number)
    path = paths.get(module)
    return f"{path.replace(BLOCK, number)}.{part}" if path else name


@lru_cache(8192)  # asked several times for each tensor of a file; the largest published one has 3320
def read_lora_name(name: str) -> LoraTensor | None:
    """The meaning of a LoRA tensor's name; None for a name of no known module or part."""
    match = _SUFFIX.fullmatch(name)
    if match is None:
        return None
    path, flat = match["path"], match["path"].startswith(FLAT_PREFIX)
    while prefix := next((p for p in (FLAT_PREFIX, *PREFIXES) if path.startswith(p)), ""):
        path = path.removeprefix(prefix)
    template, number = _split(path)
    kind = _spellings()[flat].get(template)
    return LoraTensor(kind, number, match["other"] or _FACTORS[match["factor"]]) if kind else None


@cache
def modules() -> tuple[Module, ...]:
    """All rows, one for each component and published path."""
    data = json.loads(Path(__file__).with_name("names.json").read_text())
    found: dict[tuple[str, str], Module] = {}
    for row in data["rows"]:
        for words in _choices(row["published"], data["sets"]):
            ours, theirs = ([part.split(":")[0] for part in words], [part.split(":")[-1] for part in words])
            published = _filled(row["published"], ours)
            known = found.get((row["component"], published))
            releases = dict.fromkeys(row["releases"], row.get("rows_per_column"))
            found[row["component"], published] = Module(
                row["component"],
                published,
                _filled(row.get("diffusers", row["published"]), theirs),
                _filled(row.get("folder", row["published"]), ours),
                {**(known.releases if known else {}), **releases},
                row.get("for") == "lora",
            )
    return tuple(found.values())


def _choices(template: str, sets: Mapping[str, list[str]]) -> Iterator[tuple[str, ...]]:
    """All combinations of words for the `{NAME}`s of a template, in order."""
    return product(*(sets[name] for name in re.findall(r"\{(\w+)\}", template) if name != "bid"))


def _filled(template: str, words: list[str]) -> str:
    """A row's three templates have the same sets in the same order."""
    rest: Iterator[Any] = iter(words)
    return re.sub(r"\{(?!bid)\w+\}", lambda _: next(rest), template)


@cache
def _folder_paths() -> Mapping[str, Mapping[str, str]]:
    """Component -> a module's published path -> its path in a model folder."""
    paths: dict[str, dict[str, str]] = {}
    for module in modules():
        paths.setdefault(module.component, {})[module.published] = module.folder
    return paths


@cache
def _spellings() -> tuple[Mapping[str, Module], Mapping[str, Module]]:
    """Modules that LoRAs change by their paths, and by these as kohya and musubi-tuner write them."""
    dotted = {path: m for m in modules() if m.lora for path in (m.folder, m.diffusers, m.published)}
    flat = {path.replace(".", "_"): module for path, module in dotted.items()}
    # musubi-tuner's wrapper calls the transformer `model` and the picture's connector `embeddings_connector`.
    flat |= {f"model_{path}": module for path, module in flat.items() if module.component == "transformer"}
    flat |= {path.removeprefix("video_"): m for path, m in flat.items() if path.startswith("video_embeddings_")}
    return dotted, flat


def _split(path: str) -> tuple[str, str]:
    """A path with `{bid}` for its block's number, and that number ("" where it has none)."""
    number = _NUMBER.search(path)
    return (_NUMBER.sub(BLOCK, path, count=1), number.group()) if number else (path, "")
