"""Names and axes as data: the component of a source's tensor, its key there, and the permutation of its axes.

Keys are the published names without the component's prefix, except where the table of names has others
(runtime/model/names.json); convolution kernels get MLX's channels-last layout. A row that drops tensors has the reason.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from ltx2.runtime.model.names import folder_name, modules, read_lora_name

UNUSED_STATISTIC = "a statistic no network uses"
VISION = "vision and audio towers and their projectors are not part of the text encoder"
TIED = "the embedding's weights again, which the text encoder ends without"
CONSTANT = "a constant buffer, computed where it is used"
UNUSED_MARK = "a mark of keyframes that Lightricks' decoder does not use"
UNUSED_CONSTANT = "a constant buffer that no network uses"


@dataclass(frozen=True)
class Rule:
    """Tensors whose name begins with `prefix` go to `component`, or are dropped for the reason `dropped`; `keep`
    replaces the prefix in their key. An `asset` holds the bytes of a file named `keep`."""

    prefix: str
    component: str = ""
    keep: str = ""
    dropped: str = ""
    asset: bool = False
    exact: bool = False  # the whole name is `prefix`


@dataclass(frozen=True)
class Target:
    """A tensor's component and key there; `dropped` is the reason where it has none. An `asset` becomes the file
    `key`."""

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


_STATISTICS, _PROJECTION = "per_channel_statistics.", "text_embedding_projection."
_TRANSFORMER = "model.diffusion_model."
_CONNECTORS = ("video_embeddings_connector.", "audio_embeddings_connector.")
_UNUSED_STATISTICS = tuple(
    Rule(f"{vae}{_STATISTICS}{name}", dropped=UNUSED_STATISTIC, exact=True)
    for vae in ("vae.", "")
    for name in ("channel", "mean-of-stds", "mean-of-stds_over_std-of-means")
)
_VAE_PARTS = ("encoder.", "decoder.", _STATISTICS)  # in a file of its own
# The first parts of names in a transformer that is published without its prefix.
_ROOTS = sorted(
    {f"{module.published.split('.')[0]}." for module in modules() if module.component == "transformer"}
    | {"scale_shift_table", "audio_scale_shift_table", "keyframes_abs_pos_embedding"}
)
_BARE = frozenset(part for part in _ROOTS if not part.endswith("."))
_BARE_PREFIXES = (*_CONNECTORS, *(part for part in _ROOTS if part.endswith(".")))
CHECKPOINT = (
    *(Rule(f"{_TRANSFORMER}{name}", "connectors", name) for name in _CONNECTORS),
    Rule(_TRANSFORMER, "transformer"),
    Rule(f"{_PROJECTION}weight", "connectors", f"{_PROJECTION}aggregate_embed.weight", exact=True),
    Rule(_PROJECTION, "connectors", _PROJECTION),
    *_UNUSED_STATISTICS,
    Rule("vae.", "video_vae"),
    Rule("audio_vae.", "audio_vae"),
    Rule("vocoder.mel_stft.stft_fn.inverse_basis", dropped=UNUSED_CONSTANT, exact=True),  # only spectra are taken
    Rule("vocoder.", "vocoder"),
    Rule("duration_head.", "duration_head"),
    *(Rule(part, "video_vae", part) for part in _VAE_PARTS),
    *(Rule(part, "connectors", part) for part in _CONNECTORS),
    *(Rule(part, "transformer", part, exact=not part.endswith(".")) for part in _ROOTS),
)
DIFFUSION_VAE = (
    *_UNUSED_STATISTICS,
    *(Rule(f"{vae}decoder.type_emb", dropped=UNUSED_MARK, exact=True) for vae in ("vae.", "")),
    Rule("vae.", "diffusion_vae"),
    *(Rule(part, "diffusion_vae", part) for part in _VAE_PARTS),
)
UPSCALER = Rule("upsampler.blur_down.kernel", dropped=CONSTANT, exact=True)
_VISION = (
    "vision_tower.", "vision_model.", "vision_embedder.", "multi_modal_projector.", "embed_vision.", "embed_audio.",
    "audio_tower.", "audio_model.", "audio_projector.",
)  # fmt: skip
_NO_TEXT = tuple(Rule(f"{model}{name}", dropped=VISION) for model in ("", "model.") for name in _VISION)
_ASSETS = (
    "tokenizer_config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json",
    "special_tokens_map.json", "added_tokens.json", "tokenizer.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# A language model and the files of its tokenizer: as published, as newer transformers write it, and alone.
GEMMA = (
    Rule("tokenizer_json", "text_encoder", "tokenizer.json", asset=True),
    Rule("spiece_model", "text_encoder", "tokenizer.model", asset=True),
    *(Rule(f"hf_asset__{name}", "text_encoder", name, asset=True) for name in _ASSETS),
    *(Rule(f"{model}lm_head.weight", dropped=TIED, exact=True) for model in ("", "language_model.", "model.")),
    *_NO_TEXT,
    *(
        Rule(prefix, "text_encoder", f"model.{part}")
        for prefix, part in (
            ("language_model.model.", ""), ("model.language_model.", ""), ("language_model.", ""), ("model.", ""),
            ("embed_tokens.", "embed_tokens."), ("layers.", "layers."), ("norm.", "norm."),
        )
    ),
)  # fmt: skip
# The kinds of source that convert/checkpoint.py tells apart -> their rules, first match wins.
RULES: Mapping[str, tuple[Rule, ...]] = {
    "checkpoint": CHECKPOINT,
    "diffusion_vae": DIFFUSION_VAE,
    "spatial_upscaler": (UPSCALER, Rule("", "spatial_upscaler")),
    "temporal_upscaler": (Rule("", "temporal_upscaler"),),
    "gemma": GEMMA,
    # A language model in one file with its projections.
    "text_encoder": (Rule(_PROJECTION, "connectors", _PROJECTION), *GEMMA),
    "lora": (),  # their names are read by the table of names alone
}

# PyTorch (out, in, *kernel) -> MLX (out, *kernel, in); transposed convolutions are (in, out, kernel) in PyTorch.
TRANSPOSES = (
    Axes("video_vae", r".+\.weight", (0, 2, 3, 4, 1)),
    Axes("diffusion_vae", r".+\.weight", (0, 2, 3, 4, 1)),
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
    """The target of a tensor in a source of this kind; None when no rule knows it."""
    if kind == "lora":
        found = read_lora_name(name)
        return Target(found.kind.component, f"{found.path}.{found.part}") if found else None
    exact, prefixes = _rules(kind)
    rule = exact.get(name) or next((rule for rule in prefixes if name.startswith(rule.prefix)), None)
    if rule is None or not (rule.exact or rule.asset or len(name) > len(rule.prefix)):
        return None
    if rule.dropped:
        return Target("", "", rule.dropped)
    if rule.asset:
        return Target(rule.component, rule.keep, asset=True)
    return Target(rule.component, folder_name(rule.component, rule.keep + name[len(rule.prefix) :]))


@cache
def _rules(kind: str) -> tuple[Mapping[str, Rule], tuple[Rule, ...]]:
    """The rules for whole names by name, and those for prefixes in order."""
    whole = {rule.prefix: rule for rule in reversed(RULES[kind]) if rule.exact or rule.asset}
    return whole, tuple(rule for rule in RULES[kind] if rule.prefix not in whole)


def prefixed(name: str) -> str:
    """A tensor's name with the published prefix of the transformer, where it belongs to that; else unchanged."""
    return f"{_TRANSFORMER}{name}" if name in _BARE or name.startswith(_BARE_PREFIXES) else name


def axes(component: str, key: str, rank: int) -> tuple[int, ...] | None:
    """The permutation of a tensor's axes into MLX's layout; None when they stay."""
    for row in TRANSPOSES:
        if row.component == component and len(row.axes) == rank and re.fullmatch(row.pattern, key):
            return row.axes
    return None


def is_linear(component: str, key: str, shape: tuple[int, ...]) -> bool:
    """Whether this is the weight of a linear layer."""
    return len(shape) == 2 and re.fullmatch(LINEARS.get(component, ""), key) is not None
