"""From a plan to files: which component holds which files, in what order, of what size and from which bytes.

Everything but the data is known before anything is written, the place of every byte included. Tensors stand in the
sources' order, so that sources are read from begin to end; only what belongs to one block is brought together, and a
file ends where a block ends."""

import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from math import prod
from typing import Any, TypeVar

from ltx2.convert.output.pieces import Piece, Rows, bytes_of, rows_of
from ltx2.convert.plan.entries import Asset, Move, Plan, parameters
from ltx2.convert.sources.components import ComponentPlan
from ltx2.convert.tensors.steps import Parts, Spec
from ltx2.runtime.files.ranges import Bytes, RangeReader
from ltx2.runtime.files.tensors import file_header, raw_bytes
from ltx2.runtime.model.layout import CONFIG, FORMAT_METADATA, INDEX

WEIGHTS = "model.safetensors"
HEADER_BYTES = 160  # at most, for one tensor's entry beside its name
Block = tuple[int, memoryview]  # place in the file, bytes
Blocks = Callable[[], tuple[Block, ...]]

Stored = TypeVar("Stored", Move, Asset, Move | Asset)


@dataclass(frozen=True)
class PlannedFile(ABC):
    """One file of the model folder: a header that is known, then data made of pieces of the sources."""

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

    @property
    def header(self) -> bytes:
        """The file's first bytes."""
        return b""

    def pieces(self) -> Iterator[tuple[Move | Asset | None, Piece]]:
        """The pieces in order, each with the plan's entry that it belongs to."""
        return iter(())

    def begin(self, piece: Piece) -> int:
        """The place in the file up to which all bytes stand once the pieces before this one are written."""
        return 0

    def prepare(self, piece: Piece, raw: Bytes) -> Callable[[], Blocks]:
        """The blocks to write, made of a piece and its bytes (n,); called as `Rows.prepare`."""
        return lambda: tuple


@dataclass(frozen=True)
class TextFile(PlannedFile):
    """A small file made here."""

    content: bytes

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def header(self) -> bytes:
        return self.content


@dataclass(frozen=True)
class CopiedFile(PlannedFile):
    """Bytes [start, end) of a file as they are: a whole file beside a source, or a tensor that is one (tokenizer)."""

    reader: RangeReader
    start: int
    end: int
    asset: Asset | None = None

    @property
    def size(self) -> int:
        return self.end - self.start

    def pieces(self) -> Iterator[tuple[Move | Asset | None, Piece]]:
        return ((self.asset, piece) for piece in bytes_of(self.reader, self.start, self.end))

    def begin(self, piece: Piece) -> int:
        return piece.start - self.start

    def prepare(self, piece: Piece, raw: Bytes) -> Callable[[], Blocks]:
        return lambda: lambda: ((piece.start - self.start, raw.data),)


@dataclass(frozen=True)
class WeightFile(PlannedFile):
    """A safetensors file."""

    moves: tuple[Move, ...]

    @cached_property
    def tensors(self) -> dict[str, Spec]:
        """Name, shape and dtype of every tensor, in the order of their data."""
        return {key: spec for move in self.moves for key, spec in move.stored().items()}

    @cached_property
    def header(self) -> bytes:
        return file_header({key: (spec.dtype, spec.shape) for key, spec in self.tensors.items()}, FORMAT_METADATA)

    @cached_property
    def size(self) -> int:
        return len(self.header) + sum(spec.nbytes for spec in self.tensors.values())

    @cached_property
    def _places(self) -> dict[str, int]:
        places, place = {}, len(self.header)
        for key, spec in self.tensors.items():
            places[key] = place
            place += spec.nbytes
        return places

    def pieces(self) -> Iterator[tuple[Move | Asset | None, Piece]]:
        for move in self.moves:
            yield from ((move, rows) for rows in rows_of(move))

    def begin(self, piece: Piece) -> int:
        assert isinstance(piece, Rows)
        return self._places[next(iter(piece.move.stored()))]

    def prepare(self, piece: Piece, raw: Bytes) -> Callable[[], Blocks]:
        assert isinstance(piece, Rows)
        prepared = piece.prepare(raw)
        return lambda: partial(self._blocks, piece, prepared())

    def _blocks(self, piece: Rows, parts: Parts) -> tuple[Block, ...]:
        blocks = tuple((self._place(key, piece.row), raw_bytes(part)) for key, part in parts().items())
        if (made := sum(len(block) for _, block in blocks)) != piece.stored:
            raise RuntimeError(f"{piece.move.key}: {made} bytes produced, {piece.stored} declared")
        return blocks

    def _place(self, key: str, row: int) -> int:
        spec = self.tensors[key]
        return self._places[key] + (spec.nbytes // spec.shape[0] * row if row else 0)


def component_files(plan: Plan, component: ComponentPlan, shard_bytes: int) -> list[PlannedFile]:
    """All files of one component: configuration, companions, assets, index, weights."""
    config = dict(component.config)
    if component.quantization is not None:  # twice, as mlx-lm writes it
        config |= {"quantization": component.quantization, "quantization_config": component.quantization}
    files: list[PlannedFile] = [TextFile(component.name, CONFIG, _json(config))]
    files += [CopiedFile(component.name, p.name, RangeReader(p), 0, p.stat().st_size) for p in component.companions]
    files += [TextFile(component.name, name, content) for name, content in component.made.items()]
    files += [
        CopiedFile(component.name, asset.name, asset.file.reader, asset.tensor.start, asset.tensor.end, asset)
        for asset in plan.assets(component.name)
    ]
    moves = stream_order(plan.moves(component.name))
    shards = list(_shards(moves, shard_bytes))
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [WEIGHTS]
    weights = [WeightFile(component.name, name, tuple(shard)) for name, shard in zip(names, shards, strict=True)]
    if len(weights) > 1:
        files.append(TextFile(component.name, INDEX, _index(moves, weights)))
    return files + weights


def main_dtype(moves: Iterable[Move]) -> str:
    """The float dtype that most bytes have before packing."""
    sizes: Counter[str] = Counter()
    for move in moves:
        if move.values.dtype in ("BF16", "F16", "F32"):
            sizes[move.values.dtype] += move.values.nbytes
    return max(sorted(sizes), key=lambda dtype: sizes[dtype])


def stream_order(entries: Iterable[Stored]) -> list[Stored]:
    """Entries by their place in the sources; a block's tensors stand together, where its largest one stands.

    (Files are sorted by dtype first, so a block's small float32 tables are far from its weights.) A block in two files
    stands where it does in the second: the end of the first can wait. Ordering twice changes nothing.
    """
    files: dict[int, int] = {}
    blocks: dict[tuple[str, str], list[tuple[tuple[int, int], Stored]]] = {}
    for entry in entries:
        place = files.setdefault(id(entry.file), len(files)), entry.tensor.start
        blocks.setdefault((entry.component, _block(entry)), []).append((place, entry))
    for block in blocks.values():
        block.sort(key=lambda item: item[0])

    def bulk(block: list[tuple[tuple[int, int], Stored]]) -> tuple[int, int]:
        last = [(entry.tensor.nbytes, place) for place, entry in block if place[0] == block[-1][0][0]]
        return max(last, key=lambda item: item[0])[1]

    return [entry for block in sorted(blocks.values(), key=bulk) for _, entry in block]


def _block(entry: Move | Asset) -> str:
    """The block of a tensor: its name up to the first part that ends with a number, else all of it."""
    if isinstance(entry, Asset):
        return entry.name
    match = re.match(r".*?\d{1,9}(?=\.)", entry.key)
    return match[0] if match else entry.key


def _shards(moves: list[Move], limit: int) -> Iterator[list[Move]]:
    """Files of at most `limit` bytes that end between blocks, each filled up; a block larger than a file is cut."""
    shard: list[Move] = []
    size = 0
    for _, block in groupby(moves, _block):
        group = list(block)
        for part in [group] if _bytes(group) <= limit else [[move] for move in group]:
            if shard and size + _bytes(part) > limit:
                yield shard
                shard, size = [], 0
            shard += part
            size += _bytes(part)
    if shard:
        yield shard


def _bytes(moves: list[Move]) -> int:
    return sum(spec.nbytes + len(key) + HEADER_BYTES for move in moves for key, spec in move.stored().items())


def _index(moves: list[Move], weights: list[WeightFile]) -> bytes:
    """model.safetensors.index.json as mlx-lm writes it."""
    where = {key: file.name for file in weights for key in file.tensors}
    total = {
        "total_size": sum(spec.nbytes for file in weights for spec in file.tensors.values()),
        "total_parameters": sum(prod(spec.shape) for spec in parameters(moves).values()),
    }
    return _json({"metadata": total, "weight_map": dict(sorted(where.items()))})


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
