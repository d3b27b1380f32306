"""Names and axes as data: which component a source's tensor belongs to, its key there, and how its axes turn.

Keys are the published names without the component's prefix, except where the table of names has others
(runtime/model/names.json); convolution kernels get MLX's channels-last layout. What is dropped is dropped by a row that
gives the reason."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ltx2.runtime.model.names import folder_name, published_name, read_lora_name

UNUSED_STATISTIC = "a statistic no network uses"
VISION = "vision and audio towers and their projectors are not part of the text encoder"
CONSTANT = "a constant buffer, computed where it is used"
UNUSED_MARK = "a mark of keyframes that Lightricks' decoder does not use"
UNUSED_CONSTANT = "a constant buffer that no network uses"


@dataclass(frozen=True)
class Rule:
    """Tensors whose name begins with `prefix` go to `component`, or are dropped; `keep` stands for the prefix in their
    key. An `asset` holds the bytes of a file, which is called `keep`."""

    prefix: str
    component: str = ""
    keep: str = ""
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


_STATISTICS = "per_channel_statistics."
_UNUSED_STATISTICS = tuple(
    Rule(f"{vae}{_STATISTICS}{name}", dropped=UNUSED_STATISTIC)
    for vae in ("vae.", "")
    for name in ("channel", "mean-of-stds", "mean-of-stds_over_std-of-means")
)
_VAE_PARTS = ("encoder.", "decoder.", _STATISTICS)  # in a file of its own
CHECKPOINT = (
    Rule("model.diffusion_model.video_embeddings_connector.", "connectors", "video_embeddings_connector."),
    Rule("model.diffusion_model.audio_embeddings_connector.", "connectors", "audio_embeddings_connector."),
    Rule("model.diffusion_model.", "transformer"),
    Rule("text_embedding_projection.", "connectors", "text_embedding_projection."),
    *_UNUSED_STATISTICS,
    Rule("vae.", "video_vae"),
    Rule("audio_vae.", "audio_vae"),
    Rule("vocoder.mel_stft.stft_fn.inverse_basis", dropped=UNUSED_CONSTANT),  # only spectra are taken
    Rule("vocoder.", "vocoder"),
    Rule("duration_head.", "duration_head"),
    *(Rule(part, "video_vae", part) for part in _VAE_PARTS),
)
DIFFUSION_VAE = (
    *_UNUSED_STATISTICS,
    *(Rule(f"{vae}decoder.type_emb", dropped=UNUSED_MARK) for vae in ("vae.", "")),
    Rule("vae.", "diffusion_vae"),
    *(Rule(part, "diffusion_vae", part) for part in _VAE_PARTS),
)
UPSCALER = Rule("upsampler.blur_down.kernel", dropped=CONSTANT)
_VISION = (
    "vision_tower.", "vision_model.", "vision_embedder.", "multi_modal_projector.", "embed_vision.", "embed_audio.",
    "audio_tower.", "audio_model.", "audio_projector.",
)  # fmt: skip
_NO_TEXT = tuple(Rule(f"{model}{name}", dropped=VISION) for model in ("", "model.") for name in _VISION)
_ASSETS = (
    "tokenizer_config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json",
    "special_tokens_map.json", "added_tokens.json", "tokenizer.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# Gemma as published, as newer transformers write it, and the language model alone.
GEMMA = (
    *_NO_TEXT,
    *(Rule(prefix, "text_encoder", "model.") for prefix in ("language_model.model.", "model.language_model.")),
)
# The kinds of source that convert/checkpoint.py tells apart -> their rules, first match wins.
RULES: Mapping[str, tuple[Rule, ...]] = {
    "checkpoint": CHECKPOINT,
    "diffusion_vae": DIFFUSION_VAE,
    "spatial_upscaler": (UPSCALER, Rule("", "spatial_upscaler")),
    "temporal_upscaler": (Rule("", "temporal_upscaler"),),
    "gemma": GEMMA,
    # A language model in one file with its projections and its tokenizer.
    "text_encoder": (
        Rule("tokenizer_json", "text_encoder", "tokenizer.json", asset=True),
        *(Rule(f"hf_asset__{name}", "text_encoder", name, asset=True) for name in _ASSETS),
        Rule("text_embedding_projection.", "connectors", "text_embedding_projection."),
        *GEMMA,
        Rule("model.", "text_encoder", "model."),
    ),
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
    """Where a tensor of a source of this kind goes; None when no rule knows it."""
    if kind == "lora":
        found = read_lora_name(name)
        return Target(found.kind.component, f"{found.path}.{found.part}") if found else None
    for rule in RULES[kind]:
        exact = rule.asset or (rule.dropped and not rule.prefix.endswith("."))
        if name == rule.prefix if exact else name.startswith(rule.prefix) and name != rule.prefix:
            if rule.dropped:
                return Target("", "", rule.dropped)
            if rule.asset:
                return Target(rule.component, rule.keep, asset=True)
            return Target(rule.component, folder_name(rule.component, rule.keep + name.removeprefix(rule.prefix)))
    return None


def published(component: str, key: str) -> str:
    """A tensor's name in a checkpoint as published, from that in a model folder: what `target` read forwards."""
    name = published_name(component, key)
    rule = next(rule for rule in CHECKPOINT if rule.component == component and name.startswith(rule.keep))
    return rule.prefix + name.removeprefix(rule.keep)


def axes(component: str, key: str, rank: int) -> tuple[int, ...] | None:
    """The permutation that turns this tensor into MLX's layout; None when it stays."""
    for row in TRANSPOSES:
        if row.component == component and len(row.axes) == rank and re.fullmatch(row.pattern, key):
            return row.axes
    return None


def published_shape(component: str, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tensor's shape as published, from that in a model folder."""
    turned = axes(component, key, len(shape))
    return tuple(shape[turned.index(axis)] for axis in range(len(shape))) if turned else shape


def is_linear(component: str, key: str, shape: tuple[int, ...]) -> bool:
    """Whether this is the weight of a linear layer."""
    return len(shape) == 2 and re.fullmatch(LINEARS.get(component, ""), key) is not None
