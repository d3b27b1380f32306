"""Names and axes as data: which component a source's tensor belongs to, its key there, and how its axes turn.

Keys are the checkpoint's own names without the component's prefix, except where RENAMES says otherwise; convolution
kernels get MLX's channels-last layout. What is dropped is dropped by a row that gives the reason."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ltx2.convert.names.lora_names import read_name

UNUSED_STATISTIC = "a statistic no network uses"
VISION = "vision and audio towers and their projectors are not part of the text encoder"
CONSTANT = "a constant buffer, computed where it is used"
UNUSED_CONSTANT = "a constant buffer that no network uses"


@dataclass(frozen=True)
class Rule:
    """Tensors whose whole name matches `pattern` go to `component` as `key` (a match template) or are dropped; an
    `asset` holds the bytes of a file, which is called `key`."""

    pattern: str
    component: str = ""
    key: str = r"\1"
    dropped: str = ""
    asset: bool = False


@dataclass(frozen=True)
class Target:
    """Where a tensor goes; `dropped` holds the reason when it goes nowhere. An `asset` becomes the file `key`."""

    component: str
    key: str
    dropped: str = ""
    asset: bool = False


@dataclass(frozen=True)
class Axes:
    """Tensors of `component` with this key pattern and rank are transposed by `axes`."""

    component: str
    pattern: str
    axes: tuple[int, ...]


_UNUSED_STATISTICS = r"per_channel_statistics\.(channel|mean-of-stds|mean-of-stds_over_std-of-means)"
CHECKPOINT = (
    Rule(r"model\.diffusion_model\.(video|audio)_embeddings_connector\.(.+)", "connectors", r"\1_connector.\2"),
    Rule(r"model\.diffusion_model\.(.+)", "transformer"),
    Rule(r"text_embedding_projection\.(.+)", "connectors", r"text_projection.\1"),
    Rule(rf"(?:vae\.)?{_UNUSED_STATISTICS}", dropped=UNUSED_STATISTIC),
    Rule(r"vae\.(.+)", "video_vae"),
    Rule(r"audio_vae\.(.+)", "audio_vae"),
    Rule(r"vocoder\.mel_stft\.stft_fn\.inverse_basis", dropped=UNUSED_CONSTANT),  # only spectra are taken
    Rule(r"vocoder\.(.+)", "vocoder"),
    Rule(r"duration_head\.(.+)", "duration_head"),
    Rule(r"((?:encoder|decoder|per_channel_statistics)\..+)", "video_vae"),  # in a file of its own
)
SPATIAL_UPSCALER = (
    Rule(r"upsampler\.blur_down\.kernel", dropped=CONSTANT),
    Rule(r"(.+)", "spatial_upscaler"),
)
TEMPORAL_UPSCALER = (Rule(r"(.+)", "temporal_upscaler"),)
GEMMA = (
    Rule(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\.(.+)", dropped=VISION),
    Rule(r"language_model\.model\.(.+)", "text_encoder", r"model.\1"),  # as published
    Rule(r"model\.language_model\.(.+)", "text_encoder", r"model.\1"),  # as newer transformers write it
)
# A language model in one file with its projections and its tokenizer.
_ASSETS = r"[a-z_]+_config\.json|(?:special_tokens_map|added_tokens|tokenizer)\.json|chat_template\.(?:jinja|json)"
TEXT_ENCODER = (
    Rule(r"tokenizer_json", "text_encoder", "tokenizer.json", asset=True),
    Rule(rf"hf_asset__({_ASSETS})", "text_encoder", asset=True),
    Rule(r"text_embedding_projection\.(.+)", "connectors", r"text_projection.\1"),
    Rule(r"(?:model\.)?(?:vision_\w+|audio_\w+|embed_vision|embed_audio|multi_modal_projector)\..+", dropped=VISION),
    Rule(r"(?:model\.language_model|language_model\.model|model)\.(.+)", "text_encoder", r"model.\1"),
)
_CHANGE = r"(?:lora_[AB]\.weight|diff|diff_b)"
LORA = (  # official names: `target` translates the other spellings (lora_names.py)
    Rule(rf"diffusion_model\.(video|audio)_embeddings_connector\.(.+\.{_CHANGE})", "connectors", r"\1_connector.\2"),
    Rule(rf"diffusion_model\.(.+\.{_CHANGE})", "transformer"),
    Rule(rf"text_embedding_projection\.(.+\.{_CHANGE})", "connectors", r"text_projection.\1"),
)
# The kinds of source that convert/checkpoint.py tells apart -> their rules, first match wins.
RULES: Mapping[str, tuple[Rule, ...]] = {
    "checkpoint": CHECKPOINT,
    "spatial_upscaler": SPATIAL_UPSCALER,
    "temporal_upscaler": TEMPORAL_UPSCALER,
    "gemma": GEMMA,
    "text_encoder": TEXT_ENCODER,
    "lora": LORA,
}

_ATTENTION = (("to_out.0.", "to_out."), ("ff.net.0.proj.", "ff.proj_in."), ("ff.net.2.", "ff.proj_out."))
_STATISTICS = (
    ("per_channel_statistics.mean-of-means", "per_channel_statistics.mean"),
    ("per_channel_statistics.std-of-means", "per_channel_statistics.std"),
)
RENAMES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "transformer": _ATTENTION,
    "connectors": _ATTENTION,
    "video_vae": _STATISTICS,
    "audio_vae": _STATISTICS,
}

# PyTorch (out, in, *kernel) -> MLX (out, *kernel, in); transposed convolutions are (in, out, kernel) in PyTorch.
TRANSPOSES = (
    Axes("video_vae", r".+\.weight", (0, 2, 3, 4, 1)),
    Axes("audio_vae", r".+\.weight", (0, 2, 3, 1)),
    Axes("vocoder", r"(.+\.)?ups\.\d+\.weight", (1, 2, 0)),
    Axes("vocoder", r".+\.(weight|filter|forward_basis)", (0, 2, 1)),
    Axes("spatial_upscaler", r".+\.weight", (0, 2, 3, 4, 1)),
    Axes("spatial_upscaler", r".+\.weight", (0, 2, 3, 1)),
    Axes("temporal_upscaler", r".+\.weight", (0, 2, 3, 4, 1)),
)

# Weights of linear layers, which MLX multiplies as codes too; not embeddings.
LINEARS: Mapping[str, str] = {
    "transformer": r".+\.weight",
    "connectors": r".+\.weight",
    "text_encoder": r"model\.layers\..+\.weight",
}

# Modulation tables that a checkpoint keeps in float32 stay float32 whatever --dtype says.
FLOAT32_TABLES = re.compile(r"(.+\.)?(audio_)?(prompt_)?scale_shift_table(_\w+)?")


def target(kind: str, name: str) -> Target | None:
    """Where a tensor of a source of this kind goes; None when no rule knows it."""
    if kind == "lora":
        if (found := read_name(name)) is None:
            return None
        name = found.name
    for rule in RULES[kind]:
        if match := re.fullmatch(rule.pattern, name):
            if rule.dropped:
                return Target("", "", rule.dropped)
            return Target(rule.component, _renamed(rule.component, match.expand(rule.key)), asset=rule.asset)
    return None


def _renamed(component: str, key: str) -> str:
    for old, new in RENAMES.get(component, ()):
        key = key.replace(old, new)
    return key


def axes(component: str, key: str, rank: int) -> tuple[int, ...] | None:
    """The permutation that turns this tensor into MLX's layout; None when it stays."""
    for row in TRANSPOSES:
        if row.component == component and len(row.axes) == rank and re.fullmatch(row.pattern, key):
            return row.axes
    return None


def is_linear(component: str, key: str, shape: tuple[int, ...]) -> bool:
    """Whether this is the weight of a linear layer."""
    return len(shape) == 2 and re.fullmatch(LINEARS.get(component, ""), key) is not None
