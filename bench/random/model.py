"""A published model without its files: networks of the published shapes whose weights are random, made where others are
read. Time and memory do not depend on the values, so the one pipeline runs on it and says what a machine will do before
43 GB are downloaded; only the disk is left out.

Quantized ones have the layers, widths and tensors that `ltx2 quantize` would write, for the same plan decides; codes
are random as they stand, nothing is packed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ltx2.bench.random.published import published
from ltx2.bench.random.values import RandomValues
from ltx2.convert.fetch.catalogue import Bundle, catalogue
from ltx2.convert.plan.folder import folder_plan
from ltx2.convert.tensors.steps import Spec
from ltx2.quant.apply import Settings, quantize_plan
from ltx2.runtime.errors import InputError
from ltx2.runtime.files.tensors import TensorFile, TensorInfo
from ltx2.runtime.generate.options.preset import load_preset
from ltx2.runtime.memory.blocks import Names, Weights
from ltx2.runtime.model.forms import AFFINE
from ltx2.runtime.model.layout import TRANSFORMER, ComponentRecord, Manifest, ModelFolder
from ltx2.runtime.networks.load import build_network, parameter_shapes

Tensors = Mapping[str, Spec]


@dataclass(frozen=True)
class RandomFolder(ModelFolder):
    """A model folder that exists in memory only. `configs` and `tensors` are by component."""

    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tensors: Mapping[str, Tensors] = field(default_factory=dict)

    def config(self, component: str) -> dict[str, Any]:
        quantization = self.record(component).quantization
        return dict(self.configs[component]) | ({"quantization": dict(quantization)} if quantization else {})

    def tensor_files(self, component: str) -> list[TensorFile]:
        """Headers as a file would have them."""
        return [TensorFile(self.path / component, {}, dict(_headers(self.tensors[component])))]

    def how_to_shrink(self) -> str:
        return "measure fewer bits: --bits 4, or --bits 3 --recipe uniform"

    def arrays(self, component: str) -> dict[str, mx.array]:
        """The component's tensors, lazy: each is made when it is first used."""
        values = RandomValues(self.quantization(component))
        return {name: values.tensor(name, spec) for name, spec in self.tensors[component].items()}

    def blocks(self, component: str, names: Mapping[int, Names]) -> dict[int, "_RandomBlock"]:
        return {index: _RandomBlock(self, component, found) for index, found in names.items()}

    def tokens(self, length: int) -> tuple[np.ndarray, np.ndarray, int]:
        """As many as a usual prompt has, whatever the prompt: there is no tokenizer."""
        count = min(length, published(self.manifest.release)["prompt_tokens"])
        ids, mask = np.zeros((1, length), np.int32), np.zeros((1, length), np.int32)
        ids[0, length - count :], mask[0, length - count :] = np.arange(count), 1
        return ids, mask, 0


@dataclass(frozen=True)
class _RandomBlock:
    """A block that is made anew every time it is read."""

    folder: RandomFolder
    component: str
    names: Names

    @property
    def size(self) -> int:
        specs = self.folder.tensors[self.component]
        return sum(specs[stored].itemsize * prod(specs[stored].shape) for stored in self.names.values())

    def read(self) -> Weights:
        values = RandomValues(self.folder.quantization(self.component))
        specs = self.folder.tensors[self.component]
        made = [(name, values.tensor(stored, specs[stored])) for name, stored in self.names.items()]
        mx.eval([value for _, value in made])
        return made

    def views(self, made: Weights, /) -> Weights:
        return made


def random_folder(name: str, settings: Settings | None = None) -> RandomFolder:
    """The model that the catalogue has under `name` (a checkpoint, or the bundle that it is in), in 16 bits or
    quantized.

    Raises InputError for other names, UnsupportedError for a model that cannot generate yet.
    """
    bundle = _bundle(name)
    load_preset(bundle.release)
    data, path = published(bundle.release), Path(name)
    configs = {component: config for component, (_, config) in data["networks"].items()}
    tensors = {component: dict(_plain(component, *network)) for component, network in data["networks"].items()}
    records = {component: ComponentRecord(cls, (), "BF16") for component, (cls, _) in data["networks"].items()}
    manifest = Manifest(bundle.release, bundle.variant, "random", records)
    folder = RandomFolder(path, manifest, configs, tensors)
    return folder if settings is None else _quantized(folder, settings)


def _bundle(name: str) -> Bundle:
    """The bundle of this name, or whose model this is."""
    known = catalogue()
    chosen = known.choose([name])
    if any(part.bits < 16 for part in chosen):
        why = "random weights stand in for 16-bit files, and for what ltx2 makes of those"
        raise InputError(f"{name} is not of 16 bits", why, "name the 16-bit model, with --bits 8 or --mode mxfp8")
    model = chosen[0].name
    for bundle in known.bundles.values():
        if name in (bundle.name, bundle.names[0], Path(bundle.names[0]).stem) and model == bundle.names[0]:
            return bundle
    why = f"it is a part of one, for: {chosen[0].purpose}"
    raise InputError(f"{name} is no model", why, "name a bundle or checkpoint that `ltx2 download --list` shows")


def _plain(component: str, class_name: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Spec]]:
    """A network's tensors as a conversion of 16-bit files stores them: the transformer's tables are wider."""
    for name, shape in parameter_shapes(build_network(class_name, config)).items():
        yield name, Spec(shape, "F32" if component == TRANSFORMER and "scale_shift_table" in name else "BF16")


def _quantized(folder: RandomFolder, settings: Settings) -> RandomFolder:
    plan = quantize_plan(folder_plan(folder), settings)
    records = {
        name: replace(record, quantization=plan.components[name].quantization)
        for name, record in folder.manifest.components.items()
    }
    tensors = {
        name: {key: spec for move in plan.moves(name) for key, spec in move.stored().items()} for name in records
    }
    path = folder.path.with_name(f"{folder.path.name}-{_kind(settings)}")
    return replace(folder, path=path, manifest=replace(folder.manifest, components=records), tensors=tensors)


def _kind(settings: Settings) -> str:
    """What a folder of such weights would be called: q4, mxfp8, q3-uniform, q4-small."""
    bits = f"q{settings.form.bits}" if settings.mode == AFFINE else settings.mode
    if settings.recipe == Settings().recipe:
        return bits
    recipe = Path(str(settings.recipe)).stem
    return recipe if settings.bits is None and settings.mode == AFFINE else f"{bits}-{recipe}"


def _headers(tensors: Tensors) -> Iterator[tuple[str, TensorInfo]]:
    end = 0
    for name, spec in tensors.items():
        start, end = end, end + spec.itemsize * prod(spec.shape)
        yield name, TensorInfo(name, spec.dtype, spec.shape, start, end)
