"""The components of a model folder: network class and config.json, from a source's own configuration."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ltx2.convert.sources.gemma import text_config
from ltx2.convert.sources.ggufmodel import header_tokenizer
from ltx2.convert.sources.sentencepiece import tokenizer_files
from ltx2.convert.sources.source import Source
from ltx2.convert.sources.textencoder import SENTENCEPIECE, TOKENIZER
from ltx2.convert.tensors.gguf import GgufFile
from ltx2.runtime.errors import CheckpointError
from ltx2.runtime.files.jsonfile import parse_json
from ltx2.runtime.files.tensors import FileRecord
from ltx2.runtime.model.config import AS_PUBLISHED
from ltx2.runtime.model.layout import Fused, is_lora
from ltx2.runtime.model.lorafile import lora_config
from ltx2.runtime.model.origin import GEMMA_VERSION, MODEL_VERSION
from ltx2.runtime.networks.text.config import ConnectorsConfig

# Component -> section of a checkpoint's configuration, and the class where the section does not name it.
SECTIONS: Mapping[str, tuple[str, str]] = {
    "transformer": ("transformer", "AVTransformer3DModel"),
    "connectors": ("transformer", "EmbeddingsConnectors"),
    "video_vae": ("vae", "CausalVideoAutoencoder"),
    "diffusion_vae": ("vae", "CausalDiffusionVAE"),
    "audio_vae": ("audio_vae", "AudioAutoencoder"),
    "vocoder": ("vocoder", "Vocoder"),
    "duration_head": ("duration_head", "DurationHead"),
}
# Component -> a key of its section, and the class that this key makes it.
CLASS_KEYS: Mapping[str, tuple[str, str]] = {"vocoder": ("bwe", "VocoderWithBWE")}
# Component -> keys that it reads from the `transformer` section beside its own.
TRANSFORMER_KEYS: Mapping[str, tuple[str, ...]] = {
    "duration_head": ("cross_attention_dim", "audio_cross_attention_dim"),
}
TRAINED_WITH = "gemma_source_checkpoint"  # in a transformer's metadata
TEXT_PROJECTION = re.compile(r"text_embedding_projection\.(?:(?:\w+_)?aggregate_embed\.)?weight")


@dataclass(frozen=True)
class ComponentPlan:
    """One component to write: folder name, network class, config.json, files copied or made beside the weights, how
    layers are quantized, with which statistics and, if not by a search, by which method; the LoRAs fused into it."""

    name: str
    cls: str
    config: Mapping[str, Any]
    companions: tuple[Path, ...] = ()
    made: Mapping[str, bytes] = field(default_factory=dict)
    quantization: Mapping[str, Any] | None = None
    statistics: FileRecord | None = None
    method: str | None = None
    fused: tuple[Fused, ...] = ()


def component_plan(name: str, sources: Sequence[Source], others: Sequence[Source] = ()) -> ComponentPlan:
    """The component that `sources` fill together; its configuration may stand in `others`. Raises CheckpointError when
    all lack it."""
    plan = _plan(name, sources, others)
    return replace(plan, config=dict(plan.config) | _origin(name, sources))


def _origin(name: str, sources: Sequence[Source]) -> dict[str, str]:
    """The model's version and, for the transformer, its text encoder's, as the files' metadata state them."""
    found: dict[str, str] = {}
    for file in (file for source in sources for file in source.files if not is_lora(name)):
        if version := file.metadata.get(MODEL_VERSION):
            found.setdefault(MODEL_VERSION, version)
        try:
            stated = parse_json(file.metadata.get(TRAINED_WITH, "null"))
        except ValueError:
            stated = None
        if name == "transformer" and isinstance(stated, dict) and GEMMA_VERSION in stated:
            found[GEMMA_VERSION] = str(stated[GEMMA_VERSION])
    return found


def _plan(name: str, sources: Sequence[Source], others: Sequence[Source]) -> ComponentPlan:
    source = sources[0]
    if source.kind == "lora":
        return ComponentPlan(name, "LoRA", lora_config(source.files[0]))
    if name == "text_encoder":
        config = text_config(source.config)
        return ComponentPlan(name, str(config["architectures"][0]), config, source.companions, _tokenizer(source))
    if source.kind.endswith("upscaler"):
        return ComponentPlan(name, str(source.config.get("_class_name", "LatentUpsampler")), dict(source.config))
    key, cls = SECTIONS[name]
    section = _section(key, name, sources, others)
    if name == "connectors":
        return ComponentPlan(name, cls, _connectors_config(section, sources))
    deciding, other = CLASS_KEYS.get(name, ("", ""))
    cls = other if deciding in section else str(section.get("_class_name", cls))
    transformer = source.config.get("transformer")
    given = transformer if isinstance(transformer, Mapping) else {}
    beside = {key: given[key] for key in TRANSFORMER_KEYS.get(name, ()) if key in given}
    return ComponentPlan(name, cls, beside | dict(section))


def _tokenizer(source: Source) -> dict[str, bytes]:
    """The tokenizer's files where the source has only a SentencePiece model, beside the weights or in the file; else
    none."""
    names = {path.name for path in source.companions} | {name for file in source.files for name in file.tensors}
    if {TOKENIZER, "tokenizer_json"} & names:
        return {}
    for path in source.companions:
        if path.name == SENTENCEPIECE:
            return tokenizer_files(path.read_bytes(), path.name)
    headers = (header_tokenizer(file) for file in source.files if isinstance(file, GgufFile))
    if made := next(filter(None, headers), None):
        return made
    models = (file.array("spiece_model").tobytes() for file in source.files if "spiece_model" in file.tensors)
    return next((tokenizer_files(model, f"the spiece_model of {source.path.name}") for model in models), {})


def _section(key: str, component: str, sources: Sequence[Source], others: Sequence[Source]) -> Mapping[str, Any]:
    """The section of the first source that has it; a text projection alone needs none."""
    having = (section for s in (*sources, *others) if isinstance(section := s.config.get(key), Mapping))
    found = next(having, None)
    if found is not None:
        return found
    if component == "connectors" and all(source.kind == "text_encoder" for source in sources):
        return {}
    raise CheckpointError(
        f"{sources[0].path.name} has no configuration for its {component}",
        f"its metadata lacks config.{key}",
        AS_PUBLISHED,
    )


def _connectors_config(section: Mapping[str, Any], sources: Sequence[Source]) -> dict[str, Any]:
    config = ConnectorsConfig.select(section)
    for file in (file for source in sources for file in source.files):
        for name, tensor in file.tensors.items():
            if TEXT_PROJECTION.fullmatch(name) and tensor.shape:
                config["text_projection_in_features"] = tensor.shape[-1]
    return config
