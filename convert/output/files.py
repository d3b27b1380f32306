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
from pathlib import Path
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
    """One file of the model folder: a header that is known, then what is made of pieces of the sources."""

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
        """The pieces in order, each with the plan's entry that it is a part of."""
        return iter(())

    def begin(self, piece: Piece) -> int:
        """A place in the file before which all bytes stand when the pieces before this one are written."""
        return 0

    def prepare(self, piece: Piece, raw: Bytes) -> Callable[[], Blocks]:
        """What to write where, made of a piece and its bytes; see `Rows.prepare`."""
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
    """A source's bytes [start, end) taken over as they are: a file beside it, or one inside it (tokenizer)."""

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

    @cached_property
    def _begins(self) -> dict[str, int]:
        return {move.key: min(self._places[key] for key in move.stored()) for move in self.moves}

    def pieces(self) -> Iterator[tuple[Move | Asset | None, Piece]]:
        for move in self.moves:
            yield from ((move, rows) for rows in rows_of(move))

    def begin(self, piece: Piece) -> int:
        assert isinstance(piece, Rows)
        return self._begins[piece.move.key]

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
    files += [_companion(component.name, path) for path in component.companions]
    files += [TextFile(component.name, name, content) for name, content in component.made.items()]
    files += [_asset_file(asset) for asset in plan.assets(component.name)]
    moves = stream_order(plan.moves(component.name))
    shards = list(_shards(moves, shard_bytes))
    weights = [
        WeightFile(component.name, shard_name(n, len(shards)), tuple(shard)) for n, shard in enumerate(shards, 1)
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


def stream_order(entries: Iterable[Stored]) -> list[Stored]:
    """The order of entries by their place in the sources, in which a block's tensors stand where its largest stands.

    (Files are sorted by dtype first, so a block's small float32 tables are far from its weights.) Of a block in two
    files it is the second that counts: the end of the first can wait. The order of what is in this order is the same.
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
    """What a tensor belongs to: the first part of its name that ends with a number, else itself."""
    name = entry.key if isinstance(entry, Move) else entry.name
    match = re.match(r".*?\d{1,9}(?=\.)", name) if isinstance(entry, Move) else None
    return match[0] if match else name


def _companion(component: str, path: Path) -> CopiedFile:
    return CopiedFile(component, path.name, RangeReader(path), 0, path.stat().st_size)


def _asset_file(asset: Asset) -> CopiedFile:
    return CopiedFile(asset.component, asset.name, asset.file.reader, asset.tensor.start, asset.tensor.end, asset)


def _shards(moves: list[Move], limit: int) -> Iterator[list[Move]]:
    """Greedy files of at most `limit` bytes that end between blocks; a block larger than a file is cut."""
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
