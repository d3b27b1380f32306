"""The model folder, read and written without MLX.

MODEL/README.md                     model card, for people and the Hugging Face Hub
MODEL/ltx2.json                     release, variant, sources; per component class, files, dtype, quantization
MODEL/<component>/config.json       that network's configuration
MODEL/<component>/model*.safetensors, with an index where there are several"""

import json
import re
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ltx2.runtime.errors import CheckpointError, ModelFolderError, reason
from ltx2.runtime.files.jsonfile import parse_object, read_object, read_text
from ltx2.runtime.files.paths import is_base_name
from ltx2.runtime.files.tensors import FileRecord, TensorFile, open_tensorfile
from ltx2.runtime.model.forms import Quantization

MANIFEST = "ltx2.json"
CARD = "README.md"
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
FORMAT_METADATA = {"format": "mlx"}
COMPONENTS = (
    "transformer", "connectors", "text_encoder", "video_vae", "diffusion_vae", "audio_vae", "vocoder",
    "spatial_upscaler", "temporal_upscaler", "duration_head",
)  # fmt: skip
TRANSFORMER = "transformer"
VIDEO_VAE, DIFFUSION_VAE = "video_vae", "diffusion_vae"
NEEDED = (TRANSFORMER, "connectors", "text_encoder", "audio_vae", "vocoder")  # beside a video VAE
DURATION_HEAD = "duration_head"
SIZES = ("width", "height", "frames", "fps")
MOST_OF_A_SIZE = 1 << 16
LORAS = "loras"  # the folder of components loras/<name>, which change others
LORA_FOLDER = re.compile(rf"{LORAS}/[a-z0-9_][a-z0-9._-]{{0,254}}")


def is_lora(component: str) -> bool:
    return component.startswith(f"{LORAS}/")


@dataclass(frozen=True)
class Fused:
    """A LoRA that was added to a component's weights: its file's name and its strength."""

    name: str
    strength: float


@dataclass(frozen=True)
class ComponentRecord:
    """A component in ltx2.json. `cls` is written as "class"; `files` include configuration and tokenizer; `statistics`
    is the file of activation statistics that layers were packed with, `method` the way to choose their codes unless by
    a search; `fused` are the LoRAs in its weights."""

    cls: str
    files: tuple[FileRecord, ...]
    dtype: str
    quantization: Mapping[str, Any] | None = None
    statistics: FileRecord | None = None
    method: str | None = None
    fused: tuple[Fused, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As ltx2.json has it."""
        data = {
            "class": self.cls,
            "files": [asdict(f) for f in self.files],
            "dtype": self.dtype,
            "quantization": self.quantization,
        }
        data |= {"statistics": asdict(self.statistics)} if self.statistics else {}
        data |= {"method": self.method} if self.method else {}
        return data | ({"fused": [asdict(lora) for lora in self.fused]} if self.fused else {})


@dataclass(frozen=True)
class Manifest:
    """ltx2.json. `card` is README.md as it was written; people may edit it. `sizes` are the default width, height,
    frames and fps of the model's clips, where its source has others than its release."""

    release: str | None
    variant: str | None
    tool_version: str
    components: Mapping[str, ComponentRecord]
    sources: tuple[FileRecord, ...] = field(default=())
    card: FileRecord | None = None
    sizes: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """Deterministic text: same content, same bytes."""
        components = {name: component.to_dict() for name, component in sorted(self.components.items())}
        data: dict[str, Any] = {
            "release": self.release,
            "variant": self.variant,
            "tool_version": self.tool_version,
            "components": components,
            "sources": [asdict(f) for f in self.sources],
        }
        data |= {"card": asdict(self.card)} if self.card else {}
        data |= {"sizes": dict(self.sizes)} if self.sizes else {}
        return json.dumps(data, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Raises ValueError for anything that `to_json` does not write, above all names that lead out of the folder."""
        try:
            data = parse_object(text)
            components = {name: _component(name, c) for name, c in data["components"].items()}
            sources = tuple(file_record(file) for file in data["sources"])
            card = file_record(data["card"]) if "card" in data else None
            if card and card.name != CARD:
                raise ValueError(f"its card is {card.name!r}")
            sizes = read_sizes(data.get("sizes", {}))
            release, variant, version = (data[key] for key in ("release", "variant", "tool_version"))
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"it is not written as ltx2 writes it ({error!r})") from error
        return cls(_text(release, None), _text(variant, None), _text(version), components, sources, card, sizes)


def read_sizes(data: Mapping[str, Any]) -> dict[str, float]:
    """Sizes of clips from ltx2.json or a checkpoint's metadata. Raises ValueError, TypeError or AttributeError for
    anything else."""
    for name, value in data.items():
        if name not in SIZES or isinstance(value, bool) or not 0 < value <= MOST_OF_A_SIZE:
            raise ValueError(f"sizes are {', '.join(SIZES)}, not {name} {value}")
        if name != "fps" and value != int(value):
            raise ValueError(f"{name} {value} is not whole")
    return {name: float(value) if name == "fps" else int(value) for name, value in data.items()}


def file_record(data: Mapping[str, Any]) -> FileRecord:
    """A FileRecord from JSON. Raises ValueError, LookupError or TypeError for another object, and for a name that leads
    elsewhere."""
    record = FileRecord(data["name"], data["size"], data["sha256"])
    if not is_base_name(record.name):
        raise ValueError(f"{record.name!r} is not the name of a file in a folder")
    if type(record.size) is not int or not 0 <= record.size < 1 << 63:
        raise ValueError(f"{record.size!r} is not the size of {record.name}")
    _text(record.sha256)
    return record


def _component(name: str, data: Mapping[str, Any]) -> ComponentRecord:
    if name not in COMPONENTS and not LORA_FOLDER.fullmatch(name):
        raise ValueError(f"there is no component {name!r}")
    files = tuple(file_record(file) for file in data["files"])
    if len({file.name for file in files}) < len(files):
        raise ValueError(f"{name} lists a file twice")
    statistics = data.get("statistics")
    Quantization.from_config(data["quantization"])  # raises
    return ComponentRecord(
        _text(data["class"]),
        files,
        _text(data["dtype"]),
        data["quantization"],
        file_record(statistics) if statistics else None,
        _text(data.get("method"), None),
        tuple(Fused(_text(lora["name"]), float(lora["strength"])) for lora in data.get("fused", ())),
    )


def _text(value: Any, *instead: None) -> Any:
    if not isinstance(value, str) and value not in instead:
        raise ValueError(f"{value!r} is not a text")
    return value


def missing_networks(have: Container[str]) -> list[str]:
    """The components that generating from a prompt needs and `have` lacks."""
    missing = [name for name in NEEDED if name not in have]
    return missing + ([] if VIDEO_VAE in have or DIFFUSION_VAE in have else [VIDEO_VAE])


def model_folders(folder: Path) -> list[Path]:
    """The model folders directly inside a folder."""
    return [manifest.parent for manifest in sorted(folder.glob(f"*/{MANIFEST}"))]


def _not_a_folder(path: Path) -> ModelFolderError:
    """The error for a path that is no model folder."""
    convert = "convert a checkpoint first: ltx2 convert SOURCE... -o MODEL"
    if not path.exists():
        why = "there is no such file or folder"
        return ModelFolderError(f"there is no model folder {path}", why, f"check the path, or {convert}")
    if inside := model_folders(path):
        why = f"it holds model folders: {', '.join(map(str, inside))}"
        return ModelFolderError(f"{path} is not a model folder", why, f"use {inside[0]}")
    why = f"it has no {MANIFEST}" if path.is_dir() else "it is a file"
    return ModelFolderError(f"{path} is not a model folder", why, convert)


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
            raise _not_a_folder(path)
        try:
            return cls(path, Manifest.from_json(read_text(manifest)))
        except (OSError, ValueError) as error:
            raise ModelFolderError(
                f"{manifest} cannot be read", reason(error), "convert the checkpoint again, or update ltx2"
            ) from error

    def arrays(self, component: str) -> Mapping[str, Any] | None:
        """The component's tensors as arrays, for a folder in memory only; None: its files hold them."""
        return None

    def blocks(self, component: str, names: Mapping[int, Mapping[str, str]]) -> Mapping[int, Any] | None:
        """The component's blocks by number as streaming reads them, for a folder in memory only, else None."""
        return None

    def tokens(self, length: int) -> tuple[Any, Any, int] | None:
        """Ids and mask of a prompt, (1, length) each, and the number of cut tokens, for a folder in memory only, else
        None."""
        return None

    def how_to_shrink(self) -> str:
        """The fix of an error that its weights do not fit in memory."""
        if any(record.quantization for record in self.manifest.components.values()):
            return "convert or quantize again with fewer --bits, or with --fit and this computer's memory in GB"
        return f"make it smaller: ltx2 quantize {self.path} -o {self.path}-q4 --bits 4"

    def hashes(self) -> dict[str, list[str]]:
        """SHA-256 of every component's files, by component, as they were written."""
        return {name: [file.sha256 for file in c.files] for name, c in sorted(self.manifest.components.items())}

    @property
    def distilled_lora(self) -> str | None:
        """The name of the folder's LoRA that makes a dev model a distilled one."""
        names = sorted(name for name in self.manifest.components if is_lora(name) and "distilled" in name)
        return names[0].removeprefix(f"{LORAS}/") if names else None

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
            data = read_object(path)
            Quantization.from_config(data.get("quantization"))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ModelFolderError(f"{path} cannot be read", reason(error), "convert the checkpoint again") from error
        return data

    def quantization(self, component: str) -> Quantization:
        """How the component's layers are packed. Raises as `config`."""
        return Quantization.from_config(self.config(component).get("quantization"))

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
            if isinstance(error.__cause__, PermissionError):
                raise ModelFolderError(error.what, error.why, error.fix) from error
            fix = "convert the checkpoint again, or copy the file back"
            raise ModelFolderError(f"{component} of {self.path} is damaged: {error.what}", error.why, fix) from error
