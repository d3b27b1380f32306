"""A model folder as a plan: the same tensors where they are; what quantizing starts from."""

from collections.abc import Iterator, Mapping

from ltx2.convert.plan.entries import Move, Plan, packed_key
from ltx2.convert.sources.components import ComponentPlan
from ltx2.convert.tensors.codes import BlockScales, Codes, Fp8, Nvfp4, Scale
from ltx2.convert.tensors.keep import Keep
from ltx2.runtime.files.tensors import TensorFile
from ltx2.runtime.model.config import STORAGE_KEYS
from ltx2.runtime.model.forms import Quantization
from ltx2.runtime.model.layout import CONFIG, INDEX, ModelFolder


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
    return Plan(tuple(entries), components, manifest.release, manifest.variant, manifest.sources)


def _moves(component: str, files: list[TensorFile], quantization: Quantization) -> Iterator[Move]:
    where = {name: file for file in files for name in file.tensors}
    for name, file in where.items():
        codes = _codes(name, where, quantization)
        yield Move(file, file.tensors[name], component, name, packing=Keep(codes) if codes else None)


def _codes(name: str, where: Mapping[str, TensorFile], quantization: Quantization) -> Codes | None:
    """The codes of a layer that was kept as published: those have a `weight_scale`."""
    scale, blocks = packed_key(name, "weight_scale"), packed_key(name, "scales")
    if not name.endswith(".weight") or scale not in where:
        return None
    file, factor = where[name], Scale(where[scale], where[scale].tensors[scale])
    if quantization.of(name.removesuffix(".weight")).mode == "mxfp8":
        return Fp8(file, file.tensors[name], factor)
    tensor = where[blocks].tensors[blocks]
    rows, columns = tensor.shape
    return Nvfp4(file, file.tensors[name], factor, BlockScales(where[blocks], tensor, (rows, columns), tiled=False))


def _is_companion(name: str) -> bool:
    return name not in (CONFIG, INDEX) and not name.endswith(".safetensors")
