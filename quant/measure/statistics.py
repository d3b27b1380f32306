"""Files of statistics of the inputs of a model's linear layers: E[x^2] and E[x] of every channel.

A file belongs to a model, not to one of its folders: the layers' inputs are the same whether weights are quantized, FP8
or of another float type. Layers have the names of the model folder."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ltx2.convert.output.pieces import values_of
from ltx2.convert.plan.entries import Layer, Move, Plan
from ltx2.quant.codes.inputs import Inputs
from ltx2.quant.measure.recording import NAME as CALL_NAME
from ltx2.quant.measure.recording import Call, read_calls
from ltx2.runtime.errors import InputError, reason
from ltx2.runtime.files.jsonfile import parse_object
from ltx2.runtime.files.ranges import sha256
from ltx2.runtime.files.tensors import (
    FLOATS,
    FORMAT,
    Array,
    FileRecord,
    TensorFile,
    TensorInfo,
    f32_to_bf16,
    open_tensorfile,
    to_float32,
    write_tensorfile,
)
from ltx2.runtime.model.layout import COMPONENTS, file_record

KIND = "linear input statistics"  # tells the file from other safetensors files
ABOUT = "about"
MEAN_SQUARE, MEAN, SENSITIVITY = "mean_square", "mean", "sensitivity"
NAME = re.compile(rf"({'|'.join(COMPONENTS)})\.(.+)\.({MEAN_SQUARE}|{MEAN}|{SENSITIVITY})")
MAKE = "make it with ltx2 calibrate"


@dataclass(frozen=True)
class About:
    """The origin of statistics. `identities`, component -> `identity`, tells the networks of one model from those of
    another; `prompts` and `options`: what was generated."""

    tool_version: str
    release: str | None
    variant: str | None
    identities: Mapping[str, str]
    sources: tuple[FileRecord, ...]
    prompts: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: str) -> "About":
        """Raises ValueError, LookupError, TypeError or AttributeError for another text."""
        data = parse_object(text)
        data["sources"] = tuple(file_record(source) for source in data["sources"])
        data["prompts"] = tuple(map(str, data["prompts"]))
        data["identities"] = {str(name): str(value) for name, value in data["identities"].items()}
        return cls(**data)


@dataclass(frozen=True)
class Statistics:
    """An open file of statistics; values are read when they are used. `record` identifies the file."""

    file: TensorFile
    record: FileRecord
    about: About

    @classmethod
    def open(cls, path: Path) -> "Statistics":
        """Raises CheckpointError for another kind of file, InputError for safetensors that are no statistics."""
        file = open_tensorfile(path)
        if file.metadata.get(FORMAT) != KIND:
            raise InputError(f"{path} holds no statistics", "it is a safetensors file of another kind", MAKE)
        try:
            about = About.from_json(file.metadata[ABOUT])
            _check_tensors(file.tensors)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"the statistics {path} cannot be used", reason(error), MAKE) from error
        return cls(file, FileRecord(path.name, file.size, sha256(path)), about)

    @cached_property
    def layers(self) -> dict[Layer, int]:
        """The layers with statistics, and their widths."""
        parts = ((NAME.fullmatch(name), tensor) for name, tensor in self.file.tensors.items())
        return {(m[1], m[2]): t.shape[0] for m, t in parts if m is not None and m[3] == MEAN_SQUARE}

    def inputs(self, component: str, layer: str, biased: bool) -> Inputs | None:
        """The statistics of one layer, None if it has none. Raises InputError for impossible values."""
        if (component, layer) not in self.layers:
            return None
        mean_square, mean = (self._values(f"{component}.{layer}.{part}") for part in (MEAN_SQUARE, MEAN))
        if (mean_square < 0).any():
            raise InputError(f"{self.file.path}: mean squares of {component}.{layer} are negative", "none can be", MAKE)
        return Inputs(mean_square, mean if biased else None)

    @cached_property
    def sensitivities(self) -> dict[Layer, float]:
        """By layer, if measured: squared relative change of the velocity per squared relative error of its output."""
        found = {}
        for name in self.file.tensors:
            match = NAME.fullmatch(name)
            if match is not None and match[3] == SENSITIVITY:
                found[match[1], match[2]] = float(self._values(name))
                if found[match[1], match[2]] < 0:
                    raise InputError(f"{self.file.path}: {name} is negative", "no change is", MAKE)
        return found

    @cached_property
    def calls(self) -> tuple[Call, ...]:
        """The recorded calls of the transformer, if any. Raises InputError if a part of one is missing."""
        try:
            return tuple(read_calls(self.file))
        except LookupError as error:
            raise InputError(f"{self.file.path}: a recorded call is not whole", str(error), MAKE) from error

    def _values(self, name: str) -> Array:
        """A tensor (width,) or (). Raises InputError for values that are not finite."""
        values = np.array(self.file.array(name))
        if not np.isfinite(values).all():
            raise InputError(f"{self.file.path}: {name} is not finite", "the model computed no numbers there", MAKE)
        return values

    def check(self, plan: Plan) -> None:
        """Raises InputError if they belong to other networks than the plan's."""
        common = self._common(plan)
        if not common:
            theirs = ", ".join(dict.fromkeys(component for component, _ in self.layers)) or "nothing"
            raise self._misfit(f"they are of {theirs}, the model holds {', '.join(plan.components)}")
        widths = {(m.component, m.layer): m.values.shape[-1] for m in _weights(plan)}
        for (component, layer), width in self.layers.items():
            if component in common and (component, layer) not in widths:
                raise self._misfit(f"the model has no {component}.{layer}")
            if component in common and width != (ours := widths[component, layer]):
                raise self._misfit(f"{component}.{layer} has {ours} inputs, there it has {width}")

    def strangers(self, plan: Plan) -> Iterator[str]:
        """Warns if they belong to another model with the same networks."""
        what = f"the statistics {self.file.path.name} were made with another model"
        strange = [n for n in self._common(plan) if self.about.identities.get(n) != identity(plan, n)]
        if plan.variant and (plan.release, plan.variant) != (self.about.release, self.about.variant):
            theirs, ours = f"{self.about.release} {self.about.variant}", f"{plan.release} {plan.variant}"
            yield f"{what} ({theirs}, this is {ours}) and may fit this one less well"
        elif strange:
            yield f"{what} (another {', '.join(strange)}) and may fit this one less well"

    def _common(self, plan: Plan) -> list[str]:
        components = {component for component, _ in self.layers}
        return [name for name in plan.components if name in components]

    def _misfit(self, why: str) -> InputError:
        return InputError(f"the statistics {self.file.path} do not fit the model", why, "calibrate this model")


def identity(plan: Plan, component: str) -> str:
    """Tells one trained network from another, however its layers are stored: a hash of its norms' weights, which
    nothing packs, in bfloat16, as they are published."""
    digest = hashlib.sha256()
    moves = [m for m in plan.moves(component) if m.key.endswith(".weight") and len(m.spec.shape) == 1]
    for move in sorted(moves, key=lambda move: move.key):
        digest.update(move.key.encode())
        for rows in values_of(move):
            digest.update(f32_to_bf16(to_float32(rows, move.spec.dtype)).tobytes())
    return digest.hexdigest()


def write_statistics(
    path: Path,
    layers: Mapping[Layer, Inputs],
    about: About,
    sensitivities: Mapping[Layer, float] | None = None,
    calls: Mapping[str, tuple[str, Array]] | None = None,
) -> None:
    """Write a file of statistics, with the tensors of recorded `calls` (any shapes); it appears under its name only
    when complete. The same values give the same bytes."""
    tensors = dict(calls or {})
    for (component, layer), inputs in sorted(layers.items()):
        assert inputs.mean is not None, "both moments are known of every layer"
        tensors[f"{component}.{layer}.{MEAN_SQUARE}"] = "F32", inputs.mean_square.astype(np.float32)
        tensors[f"{component}.{layer}.{MEAN}"] = "F32", inputs.mean.astype(np.float32)
    for (component, layer), value in sorted((sensitivities or {}).items()):
        tensors[f"{component}.{layer}.{SENSITIVITY}"] = "F32", np.array(value, np.float32)
    write_tensorfile(path, tensors, {FORMAT: KIND, ABOUT: json.dumps(asdict(about))})


def _weights(plan: Plan) -> Iterator[Move]:
    """The weights of linear layers, and others of two axes."""
    for component in plan.components:
        for move in plan.moves(component):
            if move.key.endswith(".weight") and len(move.values.shape) == 2 and move.values.dtype in FLOATS.values():
                yield move


def _check_tensors(tensors: Mapping[str, TensorInfo]) -> None:
    """Raises ValueError for tensors that do not belong in a file of statistics."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors.items():
        if CALL_NAME.fullmatch(name) and tensor.dtype in FLOATS.values():
            continue
        match = NAME.fullmatch(name)
        axes = 0 if match and match[3] == SENSITIVITY else 1
        if match is None or tensor.dtype != "F32" or len(tensor.shape) != axes:
            raise ValueError(f"{name!r}, {tensor.dtype} {list(tensor.shape)}, is no statistic that this version knows")
        if axes and shapes.setdefault(f"{match[1]}.{match[2]}", tensor.shape) != tensor.shape:
            raise ValueError(f"{name} has another shape than the layer's other moment")
    alone = [layer for layer in shapes if not {f"{layer}.{MEAN_SQUARE}", f"{layer}.{MEAN}"} <= tensors.keys()]
    if alone:
        raise ValueError(f"of {alone[0]} only one moment is there")
