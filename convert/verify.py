"""Verifies a model folder: every file, hash, tensor and shape; given the sources, every value.

All differences are collected before the verdict."""

import hashlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ltx2.convert.card import card_state
from ltx2.convert.compare import Repack, compare_values
from ltx2.convert.plan.check import network_differences
from ltx2.convert.sources.checkpoint import open_sources
from ltx2.convert.sources.source import read_json
from ltx2.runtime.errors import Ltx2Error, VerificationError, listed
from ltx2.runtime.events import BytesDone, Event
from ltx2.runtime.files.paths import visible
from ltx2.runtime.files.ranges import digesting
from ltx2.runtime.model.layout import INDEX, MANIFEST, ModelFolder, is_lora
from ltx2.runtime.model.lorafile import misfits
from ltx2.runtime.networks.load import Shapes, build_component, parameter_shapes


@dataclass(frozen=True)
class Verified(Event):
    """Last event of a verification: components, files and their bytes, tensors, and how many of those equal the
    sources. `card`: README.md is "as written", "edited", or there is "none"; all three are right."""

    components: tuple[str, ...]
    files: int
    bytes: int
    tensors: int
    compared: int
    card: str = "none"

    def to_dict(self) -> dict[str, Any]:
        """The command's JSON result."""
        return {"verified": True} | asdict(self) | {"components": list(self.components)}


def verify(folder: Path, sources: Sequence[Path] = (), repack: Repack | None = None) -> Iterator[Event]:
    """Check a model folder; the last event is Verified.

    `sources` are the checkpoints it was converted from; `repack` quantizes their plan as the folder is quantized.
    Raises VerificationError listing the differences, ModelFolderError when `folder` is no model folder.
    """
    model = ModelFolder.open(folder)
    differences = yield from _file_differences(model)
    shapes: dict[str, Shapes] = {}
    for component in model.manifest.components:
        differences += _tensor_differences(model, component, shapes)
    compared = 0
    if sources and not differences:
        compared, differences = yield from compare_values(model, open_sources(sources), repack)
    if differences:
        raise _failed(folder, differences)
    files = [file for record in model.manifest.components.values() for file in record.files]
    counts = (len(files), sum(file.size for file in files), sum(map(len, shapes.values())), compared)
    yield Verified(tuple(sorted(shapes)), *counts, card_state(model))


def _failed(folder: Path, differences: list[str]) -> VerificationError:
    return VerificationError(
        f"{folder} does not hold what it should",
        listed(differences, "; "),
        "convert again with --force, or copy the folder again",
    )


def _file_differences(model: ModelFolder) -> Generator[Event, None, list[str]]:
    """Presence, size and hash of every file, and weight files that should not be there."""
    differences, done = [], 0
    total = sum(file.size for record in model.manifest.components.values() for file in record.files)
    for component, record in model.manifest.components.items():
        for file in record.files:
            path, name = model.path / component / file.name, f"{component}/{file.name}"
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                differences.append(f"{name} is missing")
            elif size != file.size:
                differences.append(f"{name} has {size} bytes and should have {file.size}")
            elif (yield from _hash(path, done, total)) != file.sha256:
                differences.append(f"{name} has another SHA-256 than {MANIFEST} says")
            done += file.size
        strangers = {path.name for path in visible(model.path / component, "*.safetensors")}
        strangers -= {file.name for file in record.files}
        differences += [f"{component}/{name} is not listed in {MANIFEST}" for name in sorted(strangers)]
    return differences


def _hash(path: Path, done: int, total: int) -> Generator[Event, None, str]:
    digest = hashlib.sha256()
    for count in digesting(path, digest):
        done += count
        yield BytesDone(path.name, done, total)
    return digest.hexdigest()


def _tensor_differences(model: ModelFolder, component: str, shapes: dict[str, Shapes]) -> list[str]:
    """Names and shapes against the network, and the index against the files. Adds what is stored to `shapes`."""
    try:
        files = model.tensor_files(component)
        where = {name: file.path.name for file in files for name in file.tensors}
        shapes[component] = {name: tensor.shape for file in files for name, tensor in file.tensors.items()}
        if len(where) != sum(len(file.tensors) for file in files):
            return [f"{component}: a tensor is stored in two files"]
        return _misfits(model, component, shapes[component]) + _index_differences(model, component, where)
    except Ltx2Error as error:  # an unreadable file is one difference among the others
        return [f"{component}: {error.what} ({error.why})"]


def _misfits(model: ModelFolder, component: str, stored: Shapes) -> list[str]:
    if is_lora(component):
        targets = [name for name in ("transformer", "connectors") if model.has(name)]
        shapes = {name: parameter_shapes(build_component(model, name, {})) for name in targets}
        _, wrong = misfits(stored, shapes)
        return [f"{component}: the factors for {module} do not fit ({reason})" for module, reason in wrong.items()]
    record, config = model.record(component), model.config(component)
    build = partial(build_component, model, component, stored)
    found = network_differences(record.cls, config, stored, build)
    return [f"{component}: tensor {name} is {kind}" for kind, names in found.items() for name in names]


def _index_differences(model: ModelFolder, component: str, where: Mapping[str, str]) -> list[str]:
    path = model.component_path(component) / INDEX
    if not path.is_file():
        return [] if len(set(where.values())) == 1 else [f"{component}/{INDEX} is missing"]
    listed = read_json(path).get("weight_map")
    return [] if listed == where else [f"{component}/{INDEX} does not say where the tensors are"]
