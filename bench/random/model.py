"""A published model without its files: the folder that converting it would make, with random weights. Time and memory
do not depend on the values, so `bench --random` shows what a machine will do before 43 GB are downloaded; only the disk
is left out. Quantized models get random codes; nothing is packed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ltx2.bench.random.values import RandomValues
from ltx2.convert.fetch.catalogue import catalogue
from ltx2.convert.fetch.described import bundle_sources
from ltx2.convert.plan.folder import DescribedFolder, described_folder
from ltx2.convert.plan.make import Options, make_plan
from ltx2.quant.apply import Settings, quantize_plan
from ltx2.runtime.memory.blocks import Names, Weights
from ltx2.runtime.model.forms import AFFINE


@dataclass(frozen=True)
class RandomFolder(DescribedFolder):
    """A model folder in memory whose tensors are random."""

    def how_to_shrink(self) -> str:
        return "measure fewer bits: --bits 4, or --bits 3 --recipe uniform"

    def arrays(self, component: str) -> dict[str, mx.array]:
        """The component's tensors in their shapes, lazy: each is made when it is first used."""
        return dict(self.values(component, {name: name for name in self.files[component].tensors}))

    def blocks(self, component: str, names: Mapping[int, Names]) -> dict[int, "_RandomBlock"]:
        return {index: _RandomBlock(self, component, found) for index, found in names.items()}

    def values(self, component: str, names: Names) -> Weights:
        """Some of the component's tensors, lazy; `names`: in the network -> in the files."""
        values = RandomValues(self.quantization(component))
        tensors = {name: self.files[component].tensors[stored] for name, stored in names.items()}
        return [(name, values.tensor(t.name, t.dtype, t.shape)) for name, t in tensors.items()]


@dataclass(frozen=True)
class _RandomBlock:
    """A block that is made anew every time it is read."""

    folder: RandomFolder
    component: str
    names: Names

    @property
    def size(self) -> int:
        tensors = self.folder.files[self.component].tensors
        return sum(tensors[stored].nbytes for stored in self.names.values())

    def read(self) -> Weights:
        made = self.folder.values(self.component, self.names)
        mx.eval([value for _, value in made])
        return made

    def views(self, made: Weights, /) -> Weights:
        return made


def random_folder(name: str, settings: Settings | None = None) -> RandomFolder:
    """The model of this name in the catalogue (a bundle, or its checkpoint), as published or quantized. Raises
    InputError for other names."""
    bundle = catalogue().bundle(name)
    sources = [source for source in bundle_sources(bundle) if source.kind != "lora"]
    plan, path = make_plan(sources, Options(variant=bundle.variant)), Path(name)
    if settings is not None:
        plan, path = quantize_plan(plan, settings), path.with_name(f"{path.name}-{_kind(settings)}")
    made = described_folder(plan, path)
    return RandomFolder(path, made.manifest, made.configs, made.files)


def _kind(settings: Settings) -> str:
    """The usual name of a folder of such weights: q4, mxfp8, q3-uniform, q4-small."""
    bits = f"q{settings.form.bits}" if settings.mode == AFFINE else settings.mode
    if settings.recipe == Settings().recipe:
        return bits
    recipe = Path(str(settings.recipe)).stem
    return recipe if settings.bits is None and settings.mode == AFFINE else f"{bits}-{recipe}"
