"""The model folder (ltx2.json and one folder per component), read and written without MLX.

    MODEL/ltx2.json                     release, variant, per component class/files/dtype/quantization, sources
    MODEL/<component>/config.json       that network's configuration
    MODEL/<component>/model*.safetensors, with an index where there are several"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ltx2.runtime.errors import CheckpointError, ModelFolderError
from ltx2.runtime.tensorfile import FileRecord, TensorFile, open_tensorfile

MANIFEST = "ltx2.json"
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
FORMAT_METADATA = {"format": "mlx"}
COMPONENTS = (
    "transformer", "connectors", "text_encoder", "video_vae", "audio_vae", "vocoder",
    "spatial_upscaler", "temporal_upscaler", "duration_head",
)  # fmt: skip
LORAS = "loras"  # the folder of components that change others: loras/<name>


def is_lora(component: str) -> bool:
    return component.startswith(f"{LORAS}/")


@dataclass(frozen=True)
class ComponentRecord:
    """What ltx2.json says of one component. `cls` is written as "class"; `files` includes config and tokenizer."""

    cls: str
    files: tuple[FileRecord, ...]
    dtype: str
    quantization: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Manifest:
    """ltx2.json."""

    release: str | None
    variant: str | None
    tool_version: str
    components: Mapping[str, ComponentRecord]
    sources: tuple[FileRecord, ...] = field(default=())

    def to_json(self) -> str:
        """Deterministic text: same content, same bytes."""
        components = {
            name: {
                "class": c.cls,
                "files": [asdict(f) for f in c.files],
                "dtype": c.dtype,
                "quantization": c.quantization,
            }
            for name, c in sorted(self.components.items())
        }
        data = {
            "release": self.release,
            "variant": self.variant,
            "tool_version": self.tool_version,
            "components": components,
            "sources": [asdict(f) for f in self.sources],
        }
        return json.dumps(data, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        data = json.loads(text)
        components = {
            name: ComponentRecord(
                c["class"], tuple(FileRecord(**f) for f in c["files"]), c["dtype"], c["quantization"]
            )
            for name, c in data["components"].items()
        }
        sources = tuple(FileRecord(**f) for f in data["sources"])
        return cls(data["release"], data["variant"], data["tool_version"], components, sources)


@dataclass(frozen=True)
class ModelFolder:
    """An opened model folder: its path and manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> "ModelFolder":
        """Read ltx2.json. Raises ModelFolderError when the folder or its manifest is not usable."""
        manifest = path / MANIFEST
        if not manifest.is_file():
            raise ModelFolderError(
                f"{path} is not a model folder",
                f"it has no {MANIFEST}",
                "convert a checkpoint first: ltx2 convert SOURCE... -o MODEL",
            )
        try:
            return cls(path, Manifest.from_json(manifest.read_text()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFolderError(
                f"{manifest} cannot be read", f"{type(error).__name__}: {error}", "convert the checkpoint again"
            ) from error

    def hashes(self) -> dict[str, list[str]]:
        """SHA-256 of every component's files, as they were written."""
        return {name: [file.sha256 for file in c.files] for name, c in sorted(self.manifest.components.items())}

    def has(self, component: str) -> bool:
        return component in self.manifest.components

    def record(self, component: str) -> ComponentRecord:
        """Raises ModelFolderError when the folder lacks the component."""
        try:
            return self.manifest.components[component]
        except KeyError:
            have = ", ".join(sorted(self.manifest.components)) or "nothing"
            raise ModelFolderError(
                f"{self.path} has no {component}",
                f"it holds {have}",
                f"convert again with the source file that contains the {component}",
            ) from None

    def component_path(self, component: str) -> Path:
        self.record(component)
        return self.path / component

    def config(self, component: str) -> dict[str, Any]:
        """The component's config.json. Raises ModelFolderError when it is missing or malformed."""
        path = self.component_path(component) / CONFIG
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ModelFolderError(f"{path} cannot be read", str(error), "convert the checkpoint again") from error
        if not isinstance(data, dict):
            raise ModelFolderError(f"{path} cannot be read", "it is not a JSON object", "convert the checkpoint again")
        return data

    def weight_files(self, component: str) -> list[Path]:
        """The component's safetensors files in order. Raises ModelFolderError when one is missing."""
        folder = self.component_path(component)
        files = [folder / f.name for f in self.record(component).files if f.name.endswith(".safetensors")]
        for file in files:
            if not file.is_file():
                raise ModelFolderError(
                    f"{file} is missing", f"{MANIFEST} lists it", "convert the checkpoint again, or copy the file back"
                )
        return files

    def tensor_files(self, component: str) -> list[TensorFile]:
        """Headers of the component's safetensors files. Raises ModelFolderError when one is missing or damaged."""
        try:
            return [open_tensorfile(path) for path in self.weight_files(component)]
        except CheckpointError as error:
            fix = "convert the checkpoint again, or copy the file back"
            raise ModelFolderError(f"{component} of {self.path} is damaged: {error.what}", error.why, fix) from error
