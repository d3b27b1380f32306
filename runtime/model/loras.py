"""LoRAs that are applied at generation: opened and checked from headers alone.

A LoRA is a published file or a converted loras/<name> folder (lorafile.py describes both). Its changes of the
transformer's linear layers are applied; those of other networks are not, as in Lightricks' pipelines. Fusing a LoRA
into weights uses `Change` too."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np

from ltx2.runtime.errors import CheckpointError, InputError, reason
from ltx2.runtime.files.jsonfile import read_object
from ltx2.runtime.files.paths import visible
from ltx2.runtime.files.tensors import Array, TensorFile, TensorInfo, open_tensorfile, to_float32
from ltx2.runtime.model.layout import CONFIG, LORAS, TRANSFORMER, ModelFolder, is_lora
from ltx2.runtime.model.lorafile import REFERENCE, Layers, Shapes, checked_layers, lora_config, misfits
from ltx2.runtime.model.names import ALPHA, BIAS_DELTA, DELTA, DOWN, UP

OTHER = "use a LoRA made for the model's release"


def find_lora(name: str | Path, folder: ModelFolder) -> Path:
    """The path of the LoRA of this name in a model folder, else of the file or folder that it names. Raises InputError
    where there is neither."""
    if folder.has(component := f"{LORAS}/{name}"):
        return folder.component_path(component)
    if Path(name).exists():
        return Path(name)
    have = ", ".join(c.removeprefix(f"{LORAS}/") for c in folder.manifest.components if is_lora(c)) or "none"
    why = f"there is no such file, and the model's own are: {have}"
    raise InputError(f"there is no LoRA {name}", why, "name a .safetensors file, a converted folder or one of these")


@dataclass(frozen=True)
class LoraUse:
    """A LoRA and its strengths by stage; the last one holds for all later stages too."""

    path: Path
    strengths: tuple[float, ...] = (1.0,)

    def strength(self, stage: int) -> float:
        """Its strength in a stage, counted from 1."""
        return self.strengths[min(stage, len(self.strengths)) - 1]


@dataclass(frozen=True)
class Change:
    """The change of one layer by a LoRA of strength 1: weight += scale * up @ down + diff, bias += diff_b; down is
    (rank, inputs), up (outputs, rank). `parts` has the file and the tensor of each part present."""

    parts: Mapping[str, tuple[TensorFile, TensorInfo]]
    scale: float

    def shape(self, part: str) -> tuple[int, ...]:
        return self.parts[part][1].shape

    def parameters(self) -> set[str]:
        """The parameters that it changes: weight, bias, or both."""
        weight = {"weight"} if self.parts.keys() - {BIAS_DELTA} else set()
        return weight | ({"bias"} if BIAS_DELTA in self.parts else set())

    def rows(self, start: int, stop: int) -> Array:
        """Rows [start, stop) of the weight's change, float32 (stop - start, inputs). Raises LookupError where there is
        none."""
        if DOWN not in self.parts:
            return self._values(DELTA, start, stop)
        down = self._values(DOWN, 0, self.shape(DOWN)[0])
        product = np.float32(self.scale) * self._values(UP, start, stop) @ down
        return product + self._values(DELTA, start, stop) if DELTA in self.parts else product

    def bias(self) -> Array:
        """The bias's change, float32 (outputs,). Raises LookupError where there is none."""
        return self._values(BIAS_DELTA, 0, self.shape(BIAS_DELTA)[0])

    def _values(self, part: str, start: int, stop: int) -> Array:
        """Rows [start, stop) of a part, float32 (stop - start, ...)."""
        file, tensor = self.parts[part]
        return to_float32(file.rows(tensor.name, start, stop), tensor.dtype)


@dataclass(frozen=True)
class Lora:
    """An opened LoRA: its changes by "<component>.<path>", and config.json of its converted folder."""

    path: Path
    changes: Mapping[str, Change]
    config: Mapping[str, Any]
    version: str = ""  # that the file says it is made for

    @classmethod
    def open(cls, path: Path) -> "Lora":
        """Raises CheckpointError for a file that is no LoRA or not complete, UnsupportedError for other adapters."""
        if path.is_dir():
            files = [open_tensorfile(file) for file in visible(path, "*.safetensors")]
            return cls.of_folder(path, files)
        file = open_tensorfile(path)
        layers, config = checked_layers(file), lora_config(file)
        where = dict.fromkeys(file.tensors, file)
        return cls(path, _changes(layers, where, config), config, file.metadata.get("model_version", ""))

    @classmethod
    def of_folder(cls, path: Path, files: Sequence[TensorFile], config: Mapping[str, Any] | None = None) -> "Lora":
        """A converted one; `config` None: read its config.json. Raises as `open`."""
        where = {name: file for file in files for name in file.tensors}
        layers = checked_layers(TensorFile(path, {}, {name: file.tensors[name] for name, file in where.items()}))
        known = _folder_config(path, len(layers)) if config is None else config
        return cls(path, _changes(layers, where, known), known)

    def applied(self) -> dict[str, Change]:
        """The changes of the transformer, by path."""
        prefix = f"{TRANSFORMER}."
        return {name.removeprefix(prefix): change for name, change in self.changes.items() if name.startswith(prefix)}

    def check(self, wanted: Shapes, release: str | None) -> None:
        """Raises InputError unless the LoRA fits a transformer of this release, whose parameters have these shapes (of
        unpacked weights)."""
        applied, name = self.applied(), self.path.name
        if release and self.version and not self.version.startswith(release):
            why = f"it is made for {self.version}, and the model is of {release}"
            raise InputError(f"{name} does not fit the model", why, OTHER)
        if not applied:
            why = f"none of the {len(self.changes)} layers that it changes is the transformer's"
            raise InputError(f"{name} has no effect", why, "leave it out")
        parts = ((f"{TRANSFORMER}.{path}", part, change) for path, change in applied.items() for part in change.parts)
        shapes = {f"{layer}.{part}": change.shape(part) for layer, part, change in parts}
        _, reasons = misfits(shapes, {TRANSFORMER: wanted})
        if reasons:
            layer, reason = next(iter(reasons.items()))
            fitting = f"it fits {len(applied) - len(reasons)} of the {len(applied)} layers that it changes"
            why = f"{fitting}; {layer}: {reason}"
            raise InputError(f"{name} does not fit the model", why, OTHER)

    def check_factors(self) -> None:
        """Raises InputError unless factors alone change the transformer's layers, so that they can act beside the
        weights."""
        applied, name = self.applied(), self.path.name
        whole = [path for path, change in applied.items() if not change.parts.keys() <= {DOWN, UP}]
        if whole:
            why = f"it changes {len(whole)} weights or biases by more than factors; the first is {whole[0]}"
            raise InputError(f"{name} cannot act beside the weights", why, "fuse it: ltx2 convert --fuse LORA")


def _changes(layers: Layers, where: Mapping[str, TensorFile], config: Mapping[str, Any]) -> dict[str, Change]:
    changes = {}
    for layer in layers.values():
        parts = {part: (where[t.name], t) for part, t in layer.parts.items() if part != ALPHA}
        changes[layer.path] = Change(parts, config.get("scales", {}).get(layer.path, config["scale"]))
    return changes


def _folder_config(path: Path, layers: int) -> dict[str, Any]:
    try:
        config = read_object(path / CONFIG)
        if config["modules"] != layers:
            raise ValueError(f"it says that {config['modules']} layers are changed, {layers} are there")
        scales = (config["scale"], *config.get("scales", {}).values())
        if not all(isinstance(scale, int | float) and isfinite(scale) for scale in scales):
            raise ValueError("a scale is not a number")
        return config
    except (OSError, ValueError, LookupError, AttributeError) as error:
        fix = "name a LoRA's .safetensors, or convert it again"
        raise CheckpointError(f"{path} is no converted LoRA", f"{CONFIG}: {reason(error)}", fix) from error


@dataclass(frozen=True)
class LoraSet:
    """The LoRAs of a run, opened and checked."""

    uses: tuple[tuple[LoraUse, Lora], ...] = ()

    @classmethod
    def open(cls, uses: Sequence[LoraUse], wanted: Shapes, release: str | None) -> "LoraSet":
        """`wanted`: shapes of the transformer's parameters, unpacked. Raises as `Lora.open` and `Lora.check`."""
        opened = tuple((use, Lora.open(use.path)) for use in uses)
        for _, lora in opened:
            lora.check(wanted, release)
            lora.check_factors()
        return cls(opened)

    def at(self, stage: int) -> dict[str, list[tuple[float, Change]]]:
        """Strengths and changes of the transformer's layers in a stage, counted from 1, by path."""
        found: dict[str, list[tuple[float, Change]]] = {}
        for use, lora in self.uses:
            if strength := use.strength(stage):
                for path, change in lora.applied().items():
                    found.setdefault(path, []).append((strength, change))
        return found

    def strengths(self, stage: int) -> frozenset[tuple[Path, float]]:
        """The LoRAs that act in a stage, counted from 1, and their strengths."""
        return frozenset((use.path, use.strength(stage)) for use, _ in self.uses if use.strength(stage))

    def sizes(self, stage: int) -> dict[str, int]:
        """The number of values in the factors of every layer that a stage, counted from 1, changes."""

        def size(change: Change) -> int:
            return prod(change.shape(DOWN)) + prod(change.shape(UP))

        return {path: sum(size(change) for _, change in layer) for path, layer in self.at(stage).items()}

    def largest(self, stage: int) -> int:
        """The number of values in the largest weight that a stage changes."""
        changes = (change for layer in self.at(stage).values() for _, change in layer)
        return max((change.shape(UP)[0] * change.shape(DOWN)[1] for change in changes), default=0)

    @property
    def reference_factors(self) -> tuple[int, int]:
        """An IC-LoRA's factors for its reference: that its sides are divided by, and that one frame in so many is kept.
        Raises InputError where two LoRAs disagree."""
        return self._factor("reference_downscale_factor"), self._factor("reference_temporal_scale_factor")

    def _factor(self, name: str) -> int:
        found = {int(lora.config.get(name, 1)) for _, lora in self.uses} - {1}
        if len(found) > 1:
            why = f"their {name} are {' and '.join(map(str, sorted(found)))}"
            raise InputError("these LoRAs do not go together", why, "use one IC-LoRA at a time")
        return found.pop() if found else 1

    def doubts(self, referring: bool) -> Iterator[str]:
        """A warning where an IC-LoRA lacks a reference, or a reference an IC-LoRA, as far as metadata tell."""
        made_for = [lora.path.name for _, lora in self.uses if lora.config.keys() & set(REFERENCE)]
        if made_for and not referring:
            yield f"{made_for[0]} is an IC-LoRA, made to follow a video: give --reference"
        elif referring and not made_for:
            names = ", ".join(lora.path.name for _, lora in self.uses)
            yield f"{names} does not say that it is an IC-LoRA: only those follow a --reference"

    def facts(self) -> Iterator[tuple[str, int, int]]:
        """Every LoRA's name, the number of the transformer's layers that it changes, and the number of other networks'
        layers, which stay as they are."""
        for _, lora in self.uses:
            count = len(lora.applied())
            yield lora.path.name, count, len(lora.changes) - count
