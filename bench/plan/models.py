"""The models to plan: a published bundle, known by its headers alone, or a model folder; as it is or quantized.

All blocks of a published transformer but the first and the last few are alike, in headers and recipes. So a bundle is
planned with a few of them and with one more; every further block adds the same to every figure. Planning with all of
them would take three times as long."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, cast

from ltx2.convert.fetch.catalogue import Bundle, catalogue
from ltx2.convert.fetch.described import block_count, bundle_sources
from ltx2.convert.names.header import BLOCK
from ltx2.convert.plan.entries import Drop, Entry, Merge, Plan
from ltx2.convert.plan.folder import DescribedFolder, described_folder, folder_plan
from ltx2.convert.plan.make import Options, lora_name, make_plan
from ltx2.convert.sources.source import Source
from ltx2.quant.apply import Settings, quantize_plan, recipe_forms
from ltx2.runtime.files.tensors import TensorFile
from ltx2.runtime.generate.job import Job
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.generate.planning import MemoryPlan, Needs, plan_memory
from ltx2.runtime.memory.plan import Need
from ltx2.runtime.model.forms import Form
from ltx2.runtime.model.layout import TRANSFORMER, ModelFolder, is_lora
from ltx2.runtime.model.loras import Lora, LoraSet
from ltx2.runtime.networks.load import encode_prompt
from ltx2.runtime.networks.text.tokenizer import Encoded
from ltx2.runtime.networks.video_vae.tiles import Tiling
from ltx2.runtime.sampling.latents import Sizes

FIRST, LAST = 1, 6  # blocks at either end that recipes may treat differently
ONE_MORE = FIRST + 1  # the block that the smaller folder lacks
PROMPT = "a prompt of usual length"
T = TypeVar("T")


class Planned(ABC):
    """A model that may be used as it is (`settings` None) or quantized. `bits`: of most of its weights; `download`:
    bytes to fetch; `source`: bytes of the folder to quantize, where that is on this disk; `sizes`: default sizes of
    clips, where they differ from its release's."""

    name: str
    purpose: str
    release: str | None
    variant: str | None
    bits: int
    download: int = 0
    source: int = 0
    sizes: Mapping[str, float] = MappingProxyType({})

    @abstractmethod
    def size(self, settings: Settings | None) -> int:
        """Bytes of the model folder. Raises InputError or UnsupportedError for settings that do not fit the model."""

    @abstractmethod
    def memory(self, settings: Settings | None, request: Request) -> MemoryPlan:
        """The memory that generating takes. Raises as `size`, and what `Job` raises."""


class PlannedBundle(Planned):
    """A published bundle, from its headers."""

    def __init__(self, bundle: Bundle) -> None:
        self.name, self.purpose = bundle.name, bundle.purpose
        self.release, self.variant = bundle.release, bundle.variant
        alike = range(FIRST, block_count(bundle) - LAST)
        sources, self._repeated = bundle_sources(bundle, alike[2:]), len(alike) - 1
        self._networks = tuple(source for source in sources if source.kind != "lora")
        self._loras = tuple(source for source in sources if source.kind == "lora")
        chosen = catalogue().choose([bundle.name])
        self.bits = min(published.bits for published in chosen)
        self.download = sum(published.bytes for published in chosen)
        files = [file for published in chosen for file in published.files]
        self._beside = sum(file.bytes for file in files if not file.path.endswith((".safetensors", ".index.json")))

    def size(self, settings: Settings | None) -> int:
        fewer, more = self._folder(settings, fewer=True), self._folder(settings)
        return fewer.nbytes + self._repeated * (more.nbytes - fewer.nbytes) + self._beside

    def memory(self, settings: Settings | None, request: Request) -> MemoryPlan:
        fewer, more = (self._job(settings, request, least) for least in (True, False))
        return plan_memory(fewer, needs=_BundleNeeds(fewer, more, self._repeated))

    def _job(self, settings: Settings | None, request: Request, fewer: bool) -> Job:
        loras = {lora_name(source.path): _opened_lora(source, fewer) for source in self._loras}
        return _BundleJob(self._folder(settings, fewer), request, loras)

    def _folder(self, settings: Settings | None, fewer: bool = False) -> DescribedFolder:
        folder = _networks(self._networks, settings, fewer)
        for source in self._loras:
            folder = folder.joined(_lora(source, fewer))
        return replace(folder, path=Path(self.name), manifest=replace(folder.manifest, variant=self.variant))


class PlannedFolder(Planned):
    """A model folder on this disk."""

    def __init__(self, folder: ModelFolder) -> None:
        manifest = folder.manifest
        self.name, self.purpose, self.release, self.variant = str(folder.path), "", manifest.release, manifest.variant
        self.bits = 16
        self._folder = folder
        self.sizes = manifest.sizes
        self.source = sum(file.size for record in manifest.components.values() for file in record.files)

    def size(self, settings: Settings | None) -> int:
        if settings is None:
            return self.source
        kept = sum(file.nbytes for name in self._folder.manifest.components for file in self._tensors(name))
        return self.source - kept + self._quantized(settings).nbytes

    def _tensors(self, component: str) -> Iterable[Any]:
        return (tensor for file in self._folder.tensor_files(component) for tensor in file.tensors.values())

    def memory(self, settings: Settings | None, request: Request) -> MemoryPlan:
        if settings is None:
            return plan_memory(Job(self._folder, request))
        return plan_memory(_FolderJob(self._quantized(settings), request, self._folder))

    @cache  # noqa: B019 (there are few)
    def _quantized(self, settings: Settings) -> DescribedFolder:
        return described_folder(quantize_plan(folder_plan(self._folder), settings), self._folder.path)


class _FolderJob(Job):
    """A job of a folder that is still to be quantized, with the tokenizer of its source."""

    def __init__(self, folder: ModelFolder, request: Request, origin: ModelFolder) -> None:
        super().__init__(folder, request)
        self._origin = origin

    @cached_property
    def tokens(self) -> dict[str, Encoded]:
        length = self.preset.text_tokens
        return {name: encode_prompt(self._origin, text, length) for name, text in self.prompts.items()}


class _BundleJob(Job):
    """A job of a described folder and described LoRAs, by name."""

    def __init__(self, folder: ModelFolder, request: Request, loras: Mapping[str, Lora]) -> None:
        super().__init__(folder, request)
        self._described = loras

    @cached_property
    def loras(self) -> LoraSet:
        use = self._distilled_lora()
        return LoraSet() if use is None else LoraSet(((use, self._described[use.path.name]),))


class _BundleNeeds(Needs):
    """The needs of a bundle's phases with all blocks: `more` is a job with one block more than `job`, and the bundle
    has `repeated` such blocks."""

    def __init__(self, job: Job, more: Job, repeated: int) -> None:
        super().__init__(job)
        self._more, self._repeated = Needs(more), repeated

    @cached_property
    def usual(self) -> int:
        return _grown(self.headers.weights(TRANSFORMER), self._more.headers.weights(TRANSFORMER), self._repeated)

    def of(self, sizes: Sizes, tiling: Tiling | None) -> tuple[Need, ...]:
        return tuple(
            self._with_all(one, self._more.phases[index].need(self._more.headers, sizes, tiling)) if one.blocks else one
            for index, one in enumerate(super().of(sizes, tiling))
        )

    def _with_all(self, fewer: Need, more: Need) -> Need:
        """A phase's need with all blocks, from those without and with one block."""
        repeated = [more.blocks[ONE_MORE]] * self._repeated
        blocks = (*more.blocks[:ONE_MORE], *repeated, *more.blocks[ONE_MORE + 1 :])
        return replace(_grown(fewer, more, self._repeated), blocks=blocks)


def _grown(fewer: T, more: T, repeated: int) -> T:
    """A number, or a dataclass with numbers, extrapolated: the difference counts once per repeated block."""
    if isinstance(fewer, int) and isinstance(more, int):
        return cast(T, fewer + repeated * (more - fewer))
    if is_dataclass(fewer) and not isinstance(fewer, type):
        found = {f.name: _grown(getattr(fewer, f.name), getattr(more, f.name), repeated) for f in fields(fewer)}
        return cast(T, replace(fewer, **found))
    return fewer


@cache
def _networks(sources: tuple[Source, ...], settings: Settings | None, fewer: bool) -> DescribedFolder:
    """The folder of described sources, for any variant; `fewer`: with one block less."""
    if fewer:
        return _without_one(_networks(sources, settings, fewer=False))
    plan = _plan(sources)
    if settings is None:
        return described_folder(plan, Path())
    folder = _networks(sources, None, fewer=False)
    for name in {rule.component for rule in settings.rules.quantize} & plan.components.keys():
        folder = folder.joined(_packed(sources, name, settings))
    return folder


@cache
def _plan(sources: tuple[Source, ...]) -> Plan:
    return make_plan(sources, Options(variant="dev"))


@cache
def _part(sources: tuple[Source, ...], component: str) -> Plan:
    """The plan of one component."""
    plan = _plan(sources)
    entries = tuple(entry for entry in plan.entries if _component(entry) == component)
    return replace(plan, entries=entries, components={component: plan.components[component]})


def _packed(sources: tuple[Source, ...], component: str, settings: Settings) -> DescribedFolder:
    """One component quantized; recipes that treat it alike share the plan."""
    plan = _part(sources, component)
    key = sources, component, frozenset(recipe_forms(plan, settings)[component].items())
    if key not in _known:
        _known[key] = described_folder(quantize_plan(plan, settings), Path())
    return _known[key]


_known: dict[tuple[tuple[Source, ...], str, frozenset[tuple[str, Form]]], DescribedFolder] = {}


@cache
def _lora(source: Source, fewer: bool) -> DescribedFolder:
    return _without_one(_lora(source, fewer=False)) if fewer else described_folder(make_plan([source]), Path())


@cache
def _opened_lora(source: Source, fewer: bool) -> Lora:
    folder = _lora(source, fewer)
    ((name, file),) = folder.files.items()
    return Lora.of_folder(Path(name), [file], folder.config(name))


def _component(entry: Entry) -> str:
    if isinstance(entry, Drop):
        return ""
    return entry.into.component if isinstance(entry, Merge) else entry.component


def _without_one(folder: DescribedFolder) -> DescribedFolder:
    """The folder without one of the transformer's blocks and LoRAs' changes of it."""
    changed = {name: file for name, file in folder.files.items() if name == TRANSFORMER or is_lora(name)}
    return replace(folder, files={**folder.files, **{name: _shorter(file) for name, file in changed.items()}})


def _shorter(file: TensorFile) -> TensorFile:
    def kept(name: str) -> bool:
        return (found := BLOCK.search(name)) is None or int(found[1]) != ONE_MORE

    tensors = {name: tensor for name, tensor in file.tensors.items() if kept(name)}
    return replace(file, tensors=tensors, size=sum(tensor.nbytes for tensor in tensors.values()))
