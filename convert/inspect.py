"""What a published file, a folder of them, or a model folder contains. Reads headers only."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from ltx2.convert import rules
from ltx2.convert.checkpoint import (
    Source,
    gemma_source,
    is_gemma_folder,
    recognise_file,
    special_storage,
    variant_in_name,
)
from ltx2.convert.plan import packed_key
from ltx2.runtime.errors import CheckpointError
from ltx2.runtime.layout import MANIFEST, ModelFolder
from ltx2.runtime.tensorfile import TensorFile, TensorInfo

OTHER, DROPPED = "other", "dropped"


@dataclass
class Summary:
    """Tensors, parameters, bytes and dtypes (tensors of each) of one component."""

    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    dtypes: Counter[str] = field(default_factory=Counter)

    def add(self, tensor: TensorInfo, parameters: int) -> None:
        """Count one tensor."""
        self.tensors += 1
        self.parameters += parameters
        self.bytes += tensor.nbytes
        self.dtypes[tensor.dtype] += 1

    def to_dict(self) -> dict[str, Any]:
        """As in the command's JSON."""
        return {
            "tensors": self.tensors,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "dtypes": dict(sorted(self.dtypes.items())),
        }


def inspect(path: Path) -> dict[str, Any]:
    """Describe `path`: `kind` is `model`, `folder` (with `files`), or a kind of source.

    A source has `release`, `variant` (as far as its name says it), `storage`, `components`, `metadata`; a model folder
    has its manifest's facts. Raises CheckpointError for what is neither.
    """
    if (path / MANIFEST).is_file():
        return _model(ModelFolder.open(path))
    if is_gemma_folder(path):
        return _source(gemma_source(path))
    if not path.is_dir():
        return _source(recognise_file(path))
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{path} holds nothing to inspect", "it has no safetensors files", "name a file or a model folder"
        )
    return {"kind": "folder", "path": str(path), "files": [_source(recognise_file(file)) for file in files]}


def _source(source: Source) -> dict[str, Any]:
    summaries: dict[str, Summary] = {}
    for file in source.files:
        for tensor in file.tensors.values():
            summaries.setdefault(_component(source.kind, tensor.name), Summary()).add(tensor, prod(tensor.shape))
    storage = {name for file in source.files if (name := special_storage(file))}
    has_variant = source.kind == "checkpoint" and "transformer" in summaries
    return {
        "kind": source.kind or "unknown",
        "path": str(source.path),
        "release": source.release.name if source.release else None,
        "variant": variant_in_name(source.path.stem) if has_variant else None,
        "storage": ", ".join(sorted(storage)) or None,
        "bytes": sum(file.size for file in source.files),
        "components": {name: summaries[name].to_dict() for name in sorted(summaries)},
        "metadata": sorted({key for file in source.files for key in file.metadata}),
    }


def _component(kind: str, name: str) -> str:
    target = rules.target(kind, name) if kind in rules.RULES else None
    if target is None:
        return OTHER
    return DROPPED if target.dropped else target.component


def _model(folder: ModelFolder) -> dict[str, Any]:
    manifest = folder.manifest
    components = {}
    for name, record in sorted(manifest.components.items()):
        summary = _stored(folder.tensor_files(name), record.quantization)
        facts = {"class": record.cls, "dtype": record.dtype, "quantization": record.quantization}
        components[name] = facts | summary.to_dict()
    return {
        "kind": "model",
        "path": str(folder.path),
        "release": manifest.release,
        "variant": manifest.variant,
        "tool_version": manifest.tool_version,
        "bytes": sum(file.size for record in manifest.components.values() for file in record.files),
        "components": components,
        "sources": [file.name for file in manifest.sources],
    }


def _stored(files: Iterable[TensorFile], quantization: Mapping[str, Any] | None) -> Summary:
    """Parameters are counted as they were before packing; scales and biases of a packed layer are none."""
    tensors = {tensor.name: tensor for file in files for tensor in file.tensors.values()}
    summary = Summary()
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        packed = quantization is not None and packed_key(name, "scales") in tensors
        if packed and quantization is not None and part == "weight":
            bits = quantization.get(layer, quantization)["bits"]
            summary.add(tensor, prod(tensor.shape) * 32 // bits)
        else:
            summary.add(tensor, 0 if packed and part in ("scales", "biases") else prod(tensor.shape))
    return summary
