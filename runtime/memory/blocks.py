"""Blocks of a component, each read at once into one array; its tensors are views of that.

MLX waits for the device after every few arrays that it evaluates, and a transformer's block has a hundred. So MLX sees
a block as a file of one tensor, whose bytes come from the places of the block's tensors; on a Mac they go straight to
memory that the GPU shares, with CUDA MLX copies them on."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, cast

import mlx.core as mx

from ltx2.runtime.errors import Ltx2Error
from ltx2.runtime.files.ranges import RangeReader
from ltx2.runtime.files.tensors import MLX_DTYPES, TensorInfo, file_header
from ltx2.runtime.model.layout import ModelFolder

ALIGNMENT = 256  # bytes, as allocators use; kernels read 16 at once
PIECE_BYTES = 32 << 20
THREADS = 4  # a disk is fastest with several requests at once
TENSOR = "block"
Weights = list[tuple[str, mx.array]]
Names = Mapping[str, str]


@dataclass(frozen=True)
class Place:
    """A tensor in its file, and its offset in the block's array."""

    tensor: TensorInfo
    file: RangeReader
    offset: int


class Source(Protocol):
    """A block that can be read repeatedly; `size` in bytes."""

    @property
    def size(self) -> int: ...
    def read(self) -> Any:
        """Read the block into memory. Raises CheckpointError when it cannot be read."""

    def views(self, memory: Any, /) -> Weights:
        """The tensors in the result of `read`, by their names in the network; the thread that uses them must call
        it."""


class Block:
    """Tensors of files that are read together, by their names in the network."""

    def __init__(self, tensors: Mapping[str, tuple[TensorInfo, RangeReader]]) -> None:
        self._places: dict[str, Place] = {}
        self.size = 0
        by_place = sorted(tensors.items(), key=lambda item: (str(item[1][1].path), item[1][0].start))
        for name, (tensor, file) in by_place:
            self._places[name] = Place(tensor, file, self.size)
            self.size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT

    def read(self) -> mx.array:
        """All bytes, uint8 (size,). Raises CheckpointError when they cannot be read."""
        source = _OneTensor(file_header({TENSOR: ("U8", (self.size,))}, {}), self)
        try:
            loaded = mx.load(cast(Any, source), format="safetensors")
        except RuntimeError as error:
            raise source.error or error from None
        return cast(dict[str, mx.array], loaded)[TENSOR]

    def views(self, memory: mx.array) -> Weights:
        """The tensors, in their shapes, of bytes (size,)."""
        return [(name, _view(memory, place)) for name, place in self._places.items()]

    def fill(self, memory: memoryview) -> None:
        """Read all tensors into `memory` (size,), in several threads."""
        tasks = [_threads().submit(_read, piece, memory) for piece in self._pieces()]
        wait(tasks)
        for task in tasks:
            task.result()

    def _pieces(self) -> list[list[Place]]:
        """Runs of tensors that are adjacent in a file, of at most PIECE_BYTES unless one tensor has more."""
        pieces: list[list[Place]] = []
        size = 0
        for place in self._places.values():
            last = pieces[-1][-1] if pieces else None
            beside = last is not None and last.file is place.file and last.tensor.end == place.tensor.start
            if not beside or size + place.tensor.nbytes > PIECE_BYTES:
                pieces.append([])
                size = 0
            pieces[-1].append(place)
            size += place.tensor.nbytes
        return pieces


class _OneTensor:
    """A safetensors file of one tensor for `mx.load`: a header, then a block's bytes. MLX may call from its own thread,
    where an exception would lose its class: `error` keeps it."""

    closed = False

    def __init__(self, header: bytes, block: Block) -> None:
        self.error: Ltx2Error | None = None
        self._header = header
        self._block = block
        self._position = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        end = len(self._header) + self._block.size
        self._position = offset + (0, self._position, end)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        """Part of the header, or all bytes behind it."""
        start, memory = self._position, buffer.cast("B")
        self._position += len(memory)
        if start < len(self._header):
            memory[:] = self._header[start : self._position]
            return len(memory)
        try:
            self._block.fill(memory)
        except Ltx2Error as error:
            self.error = error
            return 0
        return len(memory)


def open_blocks(folder: ModelFolder, component: str, names: Mapping[int, Names]) -> Mapping[int, Source]:
    """The blocks of a component by number; `names` of their tensors: in the network -> in the files. Raises
    ModelFolderError when files are missing, LookupError when tensors are."""
    if (made := folder.blocks(component, names)) is not None:
        return made
    files = [(file, RangeReader(file.path, cached=True)) for file in folder.tensor_files(component)]
    found = {name: (tensor, reader) for file, reader in files for name, tensor in file.tensors.items()}
    return {index: Block({name: found[stored] for name, stored in tensors.items()}) for index, tensors in names.items()}


def _read(piece: Sequence[Place], memory: memoryview) -> None:
    first = piece[0]
    first.file.fill(first.tensor.start, [memory[p.offset : p.offset + p.tensor.nbytes] for p in piece])


def _view(memory: mx.array, place: Place) -> mx.array:
    """A tensor of its shape and dtype in a block's bytes, uint8 (size,)."""
    tensor = place.tensor
    part = memory[place.offset : place.offset + tensor.nbytes]
    return part.view(getattr(mx, MLX_DTYPES[tensor.dtype])).reshape(tensor.shape)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, "ltx2-disk")
