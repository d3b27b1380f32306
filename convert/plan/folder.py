"""A model folder as a plan that copies it, which quantizing starts from; and a plan as the folder that it would make:
headers and configurations without files."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ltx2.convert.plan.entries import Asset, Move, Plan, packed_key
from ltx2.convert.sources.components import ComponentPlan
from ltx2.convert.tensors.codes import BlockScales, Fp8, Int8, MlxCodes, Nvfp4, Scale
from ltx2.convert.tensors.keep import Keep
from ltx2.runtime.files.tensors import TensorFile, TensorInfo
from ltx2.runtime.model.config import STORAGE_KEYS
from ltx2.runtime.model.forms import AFFINE, Quantization
from ltx2.runtime.model.layout import CONFIG, INDEX, ComponentRecord, Manifest, ModelFolder

PROMPT_TOKENS = 100  # of a usual prompt


def folder_plan(folder: ModelFolder) -> Plan:
    """The plan that copies a model folder as it is."""
    entries: list[Move] = []
    components = {}
    for name, record in folder.manifest.components.items():
        extra = [folder.path / name / f.name for f in record.files if _is_companion(f.name)]
        config = {k: v for k, v in folder.config(name).items() if k not in STORAGE_KEYS}
        packed = (record.quantization, record.statistics, record.method, record.fused)
        components[name] = ComponentPlan(name, record.cls, config, tuple(extra), {}, *packed)
        entries += _moves(name, folder.tensor_files(name), Quantization.from_config(record.quantization))
    manifest = folder.manifest
    return Plan(tuple(entries), components, manifest.release, manifest.variant, manifest.sources, manifest.sizes)


def _moves(component: str, files: list[TensorFile], quantization: Quantization) -> Iterator[Move]:
    where = {name: file for file in files for name in file.tensors}
    for name, file in where.items():
        codes = _codes(name, where, quantization)
        yield Move(file, file.tensors[name], component, name, packing=Keep(codes) if codes else None)


def _codes(name: str, where: Mapping[str, TensorFile], quantization: Quantization) -> MlxCodes | None:
    """The codes of a layer that was kept as published, which has a `weight_scale`; None for another tensor."""
    scale, blocks = packed_key(name, "weight_scale"), packed_key(name, "scales")
    if not name.endswith(".weight") or scale not in where:
        return None
    file, factor = where[name], Scale(where[scale], where[scale].tensors[scale])
    form = quantization.of(name.removesuffix(".weight"))
    if form.mode == "mxfp8":
        return Fp8(file, file.tensors[name], factor)
    if form.mode == AFFINE:
        return Int8(file, file.tensors[name], factor, form)
    tensor = where[blocks].tensors[blocks]
    rows, columns = tensor.shape
    return Nvfp4(file, file.tensors[name], factor, BlockScales(where[blocks], tensor, (rows, columns), tiled=False))


def _is_companion(name: str) -> bool:
    return name not in (CONFIG, INDEX) and not name.endswith(".safetensors")


@dataclass(frozen=True)
class DescribedFolder(ModelFolder):
    """A model folder in memory only: `configs` and `files` (headers alone) by component, and the bytes of files
    `beside` tensors. Without a tokenizer every prompt has PROMPT_TOKENS tokens."""

    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    files: Mapping[str, TensorFile] = field(default_factory=dict)
    beside: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors and of the files beside them."""
        return self.beside + sum(file.size for file in self.files.values())

    def joined(self, other: "DescribedFolder") -> "DescribedFolder":
        """With the components of another folder too, which replace those of the same name."""
        components = {**self.manifest.components, **other.manifest.components}
        return replace(
            self,
            manifest=replace(self.manifest, components=components),
            configs={**self.configs, **other.configs},
            files={**self.files, **other.files},
        )

    def config(self, component: str) -> dict[str, Any]:
        quantization = self.record(component).quantization
        return dict(self.configs[component]) | ({"quantization": dict(quantization)} if quantization else {})

    def tensor_files(self, component: str) -> list[TensorFile]:
        return [self.files[component]]

    def tokens(self, length: int) -> tuple[Any, Any, int] | None:
        count = min(length, PROMPT_TOKENS)
        ids, mask = np.zeros((1, length), np.int32), np.zeros((1, length), np.int32)
        ids[0, length - count :], mask[0, length - count :] = np.arange(count), 1
        return ids, mask, 0


def described_folder(plan: Plan, path: Path) -> DescribedFolder:
    """The folder that writing a plan to `path` would make, without its files' hashes."""
    records = {name: ComponentRecord(c.cls, (), "BF16", c.quantization) for name, c in plan.components.items()}
    configs = {name: component.config for name, component in plan.components.items()}
    files = {name: _described(path / name, plan.moves(name)) for name in records}
    beside = sum(entry.tensor.nbytes for entry in plan.entries if isinstance(entry, Asset))
    manifest = Manifest(plan.release, plan.variant, "", records, sizes=plan.sizes)
    return DescribedFolder(path, manifest, configs, files, beside)


def _described(path: Path, moves: Iterable[Move]) -> TensorFile:
    tensors, end = {}, 0
    for move in moves:
        for name, spec in move.stored().items():
            start, end = end, end + spec.nbytes
            tensors[name] = TensorInfo(name, spec.dtype, spec.shape, start, end)
    return TensorFile(path, {}, tensors, end)
