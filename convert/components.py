"""The components of a model folder: their network class and their config.json, taken from a source's own
configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltx2.convert.checkpoint import Source
from ltx2.convert.gemma import text_config
from ltx2.runtime.config import AS_PUBLISHED
from ltx2.runtime.errors import CheckpointError
from ltx2.runtime.text_encoder.config import ConnectorsConfig

# Component -> section of a checkpoint's configuration, and the class where the section does not name it.
SECTIONS: Mapping[str, tuple[str, str]] = {
    "transformer": ("transformer", "AVTransformer3DModel"),
    "connectors": ("transformer", "EmbeddingsConnectors"),
    "video_vae": ("vae", "CausalVideoAutoencoder"),
    "audio_vae": ("audio_vae", "AudioAutoencoder"),
    "vocoder": ("vocoder", "Vocoder"),
}
TEXT_PROJECTION = "text_embedding_projection.aggregate_embed.weight"


@dataclass(frozen=True)
class ComponentPlan:
    """One component to write: folder name, network class, config.json, and files copied beside the weights."""

    name: str
    cls: str
    config: Mapping[str, Any]
    companions: tuple[Path, ...] = ()
    quantization: Mapping[str, Any] | None = None


def component_plan(name: str, source: Source) -> ComponentPlan:
    """How `source` fills the component. Raises CheckpointError when it lacks the configuration."""
    if source.kind == "lora":
        return ComponentPlan(name, "LoRA", _lora_config(source))
    if source.kind == "gemma":
        return ComponentPlan(name, "Gemma3ForCausalLM", text_config(source.config), source.companions)
    if source.kind != "checkpoint":
        return ComponentPlan(name, str(source.config.get("_class_name", "LatentUpsampler")), dict(source.config))
    section, cls = SECTIONS[name]
    config = source.config.get(section)
    if not isinstance(config, Mapping):
        raise CheckpointError(
            f"{source.path.name} has no configuration for its {name}",
            f"its metadata lacks config.{section}",
            AS_PUBLISHED,
        )
    if name == "connectors":
        return ComponentPlan(name, cls, _connectors_config(config, source))
    return ComponentPlan(name, str(config.get("_class_name", cls)), dict(config))


def _connectors_config(section: Mapping[str, Any], source: Source) -> dict[str, Any]:
    config = ConnectorsConfig.select(section)
    for file in source.files:
        if TEXT_PROJECTION in file.tensors:
            config["text_projection_in_features"] = file.tensors[TEXT_PROJECTION].shape[-1]
    return config


def _lora_config(source: Source) -> dict[str, Any]:
    """Rank facts: delta = scale * B @ A; without alpha in the file the scale is 1."""
    ranks = [t.shape[0] for f in source.files for n, t in f.tensors.items() if n.endswith(".lora_A.weight")]
    return {"rank": max(ranks, default=0), "scale": 1.0, "modules": len(ranks)}
