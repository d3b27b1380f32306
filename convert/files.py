"""From a plan to files: which component holds which files, in what order, of what size and from which bytes.

Everything but the data is known before anything is written. Tensors stand in natural order (block 2 before block 10),
so one block's tensors are contiguous, and a shard ends where a block ends."""

import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

from ltx2.convert.components import ComponentPlan
from ltx2.convert.plan import Asset, Move, Plan, natural_order, packed_key, parameters
from ltx2.convert.steps import Form, Packing
from ltx2.runtime.errors import NumericsError
from ltx2.runtime.layout import CONFIG, FORMAT_METADATA, INDEX
from ltx2.runtime.tensorfile import (
    Array,
    Output,
    Writing,
    read_blocks,
    row_chunks,
    tensorfile_size,
    write_blocks,
    write_tensorfile,
)

WEIGHTS = "model.safetensors"
HEADER_BYTES = 160  # at most, for one tensor's entry beside its name


@dataclass(frozen=True)
class PlannedFile(ABC):
    """One file of the model folder."""

    component: str
    name: str

    @property
    def path(self) -> str:
        """Path inside the model folder."""
        return f"{self.component}/{self.name}"

    @property
    @abstractmethod
    def size(self) -> int:
        """Size in bytes, known before the file is written."""

    @abstractmethod
    def write(self, path: Path) -> Writing:
        """Write the file to `path`."""


@dataclass(frozen=True)
class TextFile(PlannedFile):
    """A small file made here."""

    content: bytes

    @property
    def size(self) -> int:
        return len(self.content)

    def write(self, path: Path) -> Writing:
        return write_blocks(path, [self.content])


@dataclass(frozen=True)
class CopiedFile(PlannedFile):
    """A source's file taken over as it is (tokenizer)."""

    source: Path

    @cached_property
    def size(self) -> int:
        return self.source.stat().st_size

    def write(self, path: Path) -> Writing:
        return write_blocks(path, read_blocks(self.source))


@dataclass(frozen=True)
class AssetFile(PlannedFile):
    """A file whose bytes a source holds as a tensor (tokenizer)."""

    asset: Asset

    @property
    def size(self) -> int:
        return self.asset.tensor.nbytes

    def write(self, path: Path) -> Writing:
        return write_blocks(path, [self.asset.file.array(self.asset.tensor.name).data])


@dataclass(frozen=True)
class WeightFile(PlannedFile):
    """A safetensors file."""

    outputs: tuple[Output, ...]

    @cached_property
    def size(self) -> int:
        return tensorfile_size(self.outputs, FORMAT_METADATA)

    def write(self, path: Path) -> Writing:
        return write_tensorfile(path, self.outputs, FORMAT_METADATA)


def component_files(plan: Plan, component: ComponentPlan, shard_bytes: int) -> list[PlannedFile]:
    """All files of one component: configuration, companions, index, weights."""
    config = dict(component.config)
    if component.quantization is not None:  # twice, as mlx-lm writes it
        config |= {"quantization": component.quantization, "quantization_config": component.quantization}
    files: list[PlannedFile] = [TextFile(component.name, CONFIG, _json(config))]
    files += [CopiedFile(component.name, path.name, path) for path in sorted(component.companions)]
    files += [AssetFile(component.name, asset.name, asset) for asset in plan.assets(component.name)]
    moves = sorted(plan.moves(component.name), key=lambda move: natural_order(move.key))
    shards = list(_shards(moves, shard_bytes))
    weights = [
        WeightFile(component.name, shard_name(n, len(shards)), tuple(o for move in shard for o in outputs(move)))
        for n, shard in enumerate(shards, 1)
    ]
    if len(weights) > 1:
        files.append(TextFile(component.name, INDEX, _index(moves, weights)))
    return files + weights


def shard_name(number: int, count: int) -> str:
    """The file name of one of `count` shards."""
    return WEIGHTS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def main_dtype(moves: Iterable[Move]) -> str:
    """The float dtype that most bytes have before packing."""
    sizes: Counter[str] = Counter()
    for move in moves:
        if move.values.dtype in ("BF16", "F16", "F32"):
            sizes[move.values.dtype] += move.values.nbytes
    return max(sorted(sizes), key=lambda dtype: sizes[dtype])


def outputs(move: Move) -> list[Output]:
    """The tensors one plan entry becomes, as streams."""
    if move.packing is not None:
        return _packed(move, move.packing)
    form = move.form
    return [Output(move.key, form.dtype, form.shape, partial(_rows, move))]


def _rows(move: Move) -> Iterator[Array]:
    """The transformed tensor in chunks of rows."""
    array = move.file.array(move.tensor.name)
    if any(step.whole for step in move.steps):
        yield _transformed(move, array, 0)
        return
    for rows in row_chunks(array.shape, array.itemsize):
        yield _transformed(move, array[rows], rows.start if isinstance(rows, slice) else 0)
        move.file.release(move.tensor.name)


def _transformed(move: Move, rows: Array, start: int) -> Array:
    """What becomes of some of the tensor's rows, the first of which is row `start`."""
    form = Form(move.tensor.shape, move.tensor.dtype)
    for step in move.steps:
        try:
            rows = step.rows(rows, form, start)
        except NumericsError as error:
            raise NumericsError(f"{move.tensor.name}: {error.what}", error.why, error.fix) from error
        form = step.form(form)
    return rows


def _packed(move: Move, packing: Packing) -> list[Output]:
    """The packed weight as a stream; its scales and biases are small and held until the weight is written."""
    forms, dtype, constants = packing.forms(move.form), move.form.dtype, packing.constants()
    held: dict[str, list[Array]] = {}

    def weight() -> Iterator[Array]:
        held.clear()
        for rows in _rows(move):
            parts = packing.rows(rows, dtype)
            for part in forms.keys() - {"weight"} - constants.keys():
                held.setdefault(part, []).append(parts[part])
            yield parts["weight"]

    def stream(part: str) -> Iterator[Array]:
        if part in constants:
            return iter([constants[part]])
        return weight() if part == "weight" else iter(held.pop(part))

    return [Output(packed_key(move.key, p), f.dtype, f.shape, partial(stream, p)) for p, f in forms.items()]


def _shards(moves: list[Move], limit: int) -> Iterator[list[Move]]:
    """Greedy files of at most `limit` bytes that end between blocks; a block larger than a file is cut."""
    shard: list[Move] = []
    size = 0
    for group in _blocks(moves):
        pieces = [group] if _bytes(group) <= limit else [[move] for move in group]
        for piece in pieces:
            if shard and size + _bytes(piece) > limit:
                yield shard
                shard, size = [], 0
            shard += piece
            size += _bytes(piece)
    if shard:
        yield shard


def _blocks(moves: list[Move]) -> Iterator[list[Move]]:
    def block(move: Move) -> str:
        match = re.match(r".*?\d{1,9}(?=\.)", move.key)
        return match[0] if match else move.key

    for _, group in groupby(moves, block):
        yield list(group)


def _bytes(moves: list[Move]) -> int:
    return sum(form.nbytes + len(key) + HEADER_BYTES for move in moves for key, form in move.stored().items())


def _index(moves: list[Move], weights: list[WeightFile]) -> bytes:
    """model.safetensors.index.json as mlx-lm writes it."""
    where = {output.key: file.name for file in weights for output in file.outputs}
    total = {
        "total_size": sum(output.nbytes for file in weights for output in file.outputs),
        "total_parameters": sum(prod(move.values.shape) for move in parameters(moves)),
    }
    return _json({"metadata": total, "weight_map": dict(sorted(where.items()))})


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
