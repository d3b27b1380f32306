"""The names of a LoRA's tensors: many spellings of one module of the published networks.

A spelling is a prefix, the module's path, with dots or (kohya) underscores and in Lightricks' or diffusers' words, and
a suffix that says what the tensor is. Which modules there are is data (lora_targets.json): only a name that means one
of them is understood, so nothing is guessed and an underscore has one reading only."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product
from pathlib import Path
from typing import Any

OFFICIAL = "diffusion_model."  # what official LoRAs put before the modules of the transformer's file
# Stripped from the front as often as one fits: trainers nest them.
PREFIXES = ("base_model.model.", "model.diffusion_model.", OFFICIAL, "transformer.", "connectors.")
FLAT_PREFIX = "lora_unet_"  # kohya: what follows has `_` for `.`
TEXT_PROJECTION = "text_embedding_projection."

# diffusers' words -> Lightricks'; each is a whole part of a path.
DIFFUSERS: Mapping[str, str] = {
    "proj_in": "patchify_proj",
    "audio_proj_in": "audio_patchify_proj",
    "time_embed": "adaln_single",
    "audio_time_embed": "audio_adaln_single",
    "prompt_adaln": "prompt_adaln_single",
    "audio_prompt_adaln": "audio_prompt_adaln_single",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
    "video_connector.transformer_blocks": "video_embeddings_connector.transformer_1d_blocks",
    "audio_connector.transformer_blocks": "audio_embeddings_connector.transformer_1d_blocks",
    "text_proj_in": f"{TEXT_PROJECTION}aggregate_embed",
    "video_text_proj_in": f"{TEXT_PROJECTION}video_aggregate_embed",
    "audio_text_proj_in": f"{TEXT_PROJECTION}audio_aggregate_embed",
}

# What a tensor is; the down factor is (rank, in), the up factor (out, rank).
DOWN, UP, ALPHA, DELTA, BIAS_DELTA = "lora_A.weight", "lora_B.weight", "alpha", "diff", "diff_b"
_FACTORS = {"A": DOWN, "down": DOWN, "B": UP, "up": UP}
# The part after lora_A is the name of a PEFT adapter, mostly "default".
_SUFFIX = re.compile(
    r"(?P<path>[^#]+)\.(?:lora_(?P<factor>A|B|down|up)(?:(?:\.\w+)?\.weight)?|(?P<other>alpha|diff|diff_b))"
)
_BLOCK = re.compile(r"(?<=blocks[._])(?:0|[1-9]\d{0,2})(?=[._])")


@dataclass(frozen=True)
class Module:
    """A kind of module in the published networks: its path with `#` for the block, and the releases that have it.

    `rows_per_column`: how many times wider its output is than its input, by release, where releases differ in it.
    """

    path: str
    releases: frozenset[str]
    rows_per_column: Mapping[str, int]


@dataclass(frozen=True)
class LoraTensor:
    """What one tensor's name says: the module with Lightricks' own path, and what of it the tensor is."""

    module: str
    part: str

    @property
    def name(self) -> str:
        """The name it would have in an official file."""
        prefix = "" if self.module.startswith(TEXT_PROJECTION) else OFFICIAL
        return f"{prefix}{self.module}.{self.part}"


@cache
def modules() -> Mapping[str, Module]:
    """Every kind of module that a LoRA may change, by its path."""
    rows = json.loads((Path(__file__).parent / "lora_targets.json").read_text())
    releases: dict[str, set[str]] = {}
    widths: dict[str, dict[str, int]] = {}
    for row in rows:
        for path in (path for template in row["modules"] for path in _expanded(template)):
            releases.setdefault(path, set()).update(row["releases"])
        for path, ratio in row.get("rows_per_column", {}).items():
            widths.setdefault(path, {}).update(dict.fromkeys(row["releases"], ratio))
    return {path: Module(path, frozenset(found), widths.get(path, {})) for path, found in releases.items()}


@lru_cache(8192)  # asked several times for each tensor of a file; the largest published one has 3320
def read_name(name: str) -> LoraTensor | None:
    """What a tensor of a LoRA is; None when the name means no known module or nothing this version applies."""
    match = _SUFFIX.fullmatch(name)
    if match is None:
        return None
    path = match["path"]
    module = _flat_module(path) if path.startswith(FLAT_PREFIX) else _dotted_module(path)
    return LoraTensor(module, match["other"] or _FACTORS[match["factor"]]) if module else None


def module_kind(module: str) -> Module:
    """The kind of a module that `read_name` returned."""
    return modules()[_BLOCK.sub("#", module, count=1)]


def _dotted_module(path: str) -> str | None:
    while prefix := next((p for p in PREFIXES if path.startswith(p)), ""):
        path = path.removeprefix(prefix)
    official = _translated(path)
    return official if _BLOCK.sub("#", official, count=1) in modules() else None


def _flat_module(path: str) -> str | None:
    flat = path.removeprefix(FLAT_PREFIX)
    block = _BLOCK.search(flat)
    known = _flat_paths().get(_BLOCK.sub("#", flat, count=1))
    return known.replace("#", block.group()) if known and block else known


@cache
def _flat_paths() -> Mapping[str, str]:
    """Every module's path as kohya writes it, with Lightricks' words and with diffusers'."""
    back = {ours: theirs for theirs, ours in DIFFUSERS.items()}
    return {spelling.replace(".", "_"): path for path in modules() for spelling in (path, _translated(path, back))}


def _translated(path: str, words: Mapping[str, str] = DIFFUSERS) -> str:
    """A path with the parts that are among `words` replaced."""
    return _whole_parts(tuple(words)).sub(lambda match: words[match.group()], path)


@cache
def _whole_parts(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"(?<![^.])(?:{'|'.join(map(re.escape, words))})(?![^.])")


def _expanded(template: str) -> list[str]:
    """`a.(b|c)` -> `a.b`, `a.c`."""
    choices: list[Any] = [part.split("|") for part in re.split(r"[()]", template)]
    return ["".join(parts) for parts in product(*choices)]
