"""Describes the content of a published file, a folder of them, or a model folder, by headers only."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from ltx2.convert.names import rules
from ltx2.convert.names.release import releases
from ltx2.convert.plan.check import check_projection, check_tokenizer
from ltx2.convert.plan.entries import SCALE_PARTS, packed_key
from ltx2.convert.plan.make import Options, make_plan, packed_by_mlx
from ltx2.convert.results import component, result
from ltx2.convert.sources.checkpoint import check_source, recognise, special_storage
from ltx2.convert.sources.ours import our_kind
from ltx2.convert.sources.source import VARIANTS, Source, variant_in_name
from ltx2.convert.tensors.scales import CodedTensors, dropped_beside_codes, find_codes
from ltx2.convert.tensors.steps import Spec
from ltx2.runtime.errors import Ltx2Error
from ltx2.runtime.files.tensors import TensorFile, TensorInfo
from ltx2.runtime.generate.options.preset import sampled_releases
from ltx2.runtime.model.forms import Quantization
from ltx2.runtime.model.layout import MANIFEST, ModelFolder, missing_networks
from ltx2.runtime.model.lorafile import alphas

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

    A source has `releases` (those it may belong to) and `release` (where it is one), `variant` (where its name says
    it), `storage`, `components`, `metadata`; a model folder has its manifest's facts. Both say whether this version can
    `convert` and `generate`, and why not: a source in `reason`, a model folder in `missing`. Raises CheckpointError for
    anything else.
    """
    if (path / MANIFEST).is_file():
        return _model(ModelFolder.open(path))
    if path.is_dir():
        sources = recognise(path)
        if len(sources) > 1 or sources[0].path != path:
            return {"kind": "folder", "path": str(path), "files": [_source(source) for source in sources]}
        return _source(sources[0])
    facts = result(path)
    if not facts:
        (source,) = recognise(path)
        facts = _ours(source)
    return {"path": str(path), "bytes": path.stat().st_size} | facts if facts else _source(source)


def _ours(source: Source) -> dict[str, Any]:
    """A tensor file that ltx2 has written; empty for a source."""
    if (part := component(source.path)) is not None:
        folder, name = part
        form = Quantization.from_config(folder.manifest.components[name].quantization)
        of = {"kind": "component", "of": str(folder.path), "release": folder.manifest.release}
        return of | {"components": {name: _stored(source.files, form).to_dict()}}
    if source.kind or (found := our_kind(source.files[0])) is None:
        return {}
    shapes = {name: list(tensor.shape) for name, tensor in source.files[0].tensors.items()}
    return {"kind": found[0], "tensors": shapes}


def _source(source: Source) -> dict[str, Any]:
    storage = {name for file in source.files if (name := special_storage(file))}
    components = _components(source)
    has_variant = source.kind == "checkpoint" and "transformer" in components
    variant = variant_in_name(source.path.stem) if has_variant else None
    reason = _refusal(source)
    return {
        "kind": source.kind or "unknown",
        "path": str(source.path),
        "release": source.release.name if source.release else None,
        "releases": [release.name for release in source.releases],
        "variant": variant,
        "storage": ", ".join(sorted(storage)) or None,
        "convert": reason is None,
        "reason": reason,
        "generate": reason is None and any(r.name in sampled_releases() for r in source.releases or releases()),
        "bytes": sum(file.size for file in source.files),
        "components": {name: components[name].to_dict() for name in sorted(components)},
        "metadata": sorted({key for file in source.files for key in file.metadata}),
    }


def _refusal(source: Source) -> str | None:
    """The reason why converting this source would be refused; None where it would not."""
    try:
        check_source(source)
        plan = make_plan([source], Options(VARIANTS[0]))
        check_tokenizer(plan)
        check_projection(plan)
    except Ltx2Error as error:
        return f"{error.what}: {error.why}"
    return None


def _components(source: Source) -> dict[str, Summary]:
    """A summary of each component. Tensors beside codes, such as scales, are no parameters, nor is a tokenizer."""
    try:
        coded = find_codes(source.files, packed_by_mlx(source))
    except Ltx2Error:  # the reason for not converting
        coded = CodedTensors()
    summaries: dict[str, Summary] = {}
    for file in source.files:
        owners = {name: weight for name, (weight, _) in coded.scales.items()}
        owners |= alphas(file) if source.kind == "lora" else {}
        for name, tensor in file.tensors.items():
            component, is_weight = _place(source.kind, owners.get(name, name))
            codes = coded.codes.get(name)
            shape = codes.shape(Spec(tensor.shape, tensor.dtype)) if codes else tensor.shape
            counts = is_weight and name not in owners
            summaries.setdefault(component, Summary()).add(tensor, prod(shape) if counts else 0)
    return summaries


def _place(kind: str, name: str) -> tuple[str, bool]:
    """The component a tensor goes to, and whether it can be a parameter there."""
    target = rules.target(kind, name) if kind in rules.RULES else None
    if dropped_beside_codes(name):
        return DROPPED, False
    if target is None:
        return OTHER, True
    return (DROPPED if target.dropped else target.component), not target.asset


def _model(folder: ModelFolder) -> dict[str, Any]:
    manifest = folder.manifest
    missing = missing_networks(manifest.components)
    components = {}
    for name, record in sorted(manifest.components.items()):
        summary = _stored(folder.tensor_files(name), Quantization.from_config(record.quantization))
        facts = {"class": record.cls, "dtype": record.dtype, "quantization": record.quantization}
        components[name] = facts | summary.to_dict()
    return {
        "kind": "model",
        "path": str(folder.path),
        "release": manifest.release,
        "variant": manifest.variant,
        "generate": not missing and manifest.release in sampled_releases(),
        "missing": missing,
        "tool_version": manifest.tool_version,
        "bytes": sum(file.size for record in manifest.components.values() for file in record.files),
        "components": components,
        "sources": [file.name for file in manifest.sources],
    }


def _stored(files: Iterable[TensorFile], quantization: Quantization) -> Summary:
    """Parameters are counted as they were before packing; scales and biases of a packed layer are none."""
    tensors = {tensor.name: tensor for file in files for tensor in file.tensors.values()}
    summary = Summary()
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        scales = {packed_key(name, part) for part in SCALE_PARTS}
        packed = quantization.common is not None and not scales.isdisjoint(tensors)
        if packed and part == "weight":
            summary.add(tensor, prod(tensor.shape) * 32 // quantization.of(layer).bits)
        else:
            summary.add(tensor, 0 if packed and part in SCALE_PARTS else prod(tensor.shape))
    return summary
