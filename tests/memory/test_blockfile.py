"""Tensors of files, read together into one array: the bytes of every one, wherever they lie."""

import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from ltx2.runtime.errors import CheckpointError
from ltx2.runtime.files.ranges import RangeReader
from ltx2.runtime.files.tensors import FileRecord, open_tensorfile
from ltx2.runtime.memory import blocks as blockfile
from ltx2.runtime.memory.blocks import Block, open_blocks
from ltx2.runtime.model.layout import ComponentRecord, Manifest, ModelFolder
from tests.support.memory import settled

RNG = np.random.default_rng(0)
# Sizes that leave others at odd places, nothing at all, and one value.
TENSORS: dict[str, np.ndarray] = {
    "one": np.array(3.5, np.float32),
    "odd": RNG.integers(0, 255, (7, 3), np.uint8),
    "words": RNG.integers(0, 1 << 32, (33, 5), np.uint32),
    "none": np.zeros((0, 4), np.float32),
    "half": RNG.standard_normal((5, 9)).astype(np.float16),
    "long": RNG.standard_normal((300, 21)).astype(np.float32),
}
OTHERS: dict[str, np.ndarray] = {"other": RNG.standard_normal((64,)).astype(np.float32)}


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    """A transformer in two files, with a tensor between those of the block."""
    (tmp_path / "transformer").mkdir()
    names = ["model-1.safetensors", "model-2.safetensors"]
    first = {"block.odd", "block.words", "block.one"}
    stored = {f"block.{name}": value for name, value in TENSORS.items()} | OTHERS
    save_file({n: v for n, v in stored.items() if n in first}, tmp_path / "transformer" / names[0])
    save_file({n: v for n, v in stored.items() if n not in first}, tmp_path / "transformer" / names[1])
    files = tuple(FileRecord(name, 0, "") for name in names)
    return ModelFolder(tmp_path, Manifest(None, None, "", {"transformer": ComponentRecord("", files, "F32")}))


def opened(folder: ModelFolder) -> Block:
    block = open_blocks(folder, "transformer", {4: {name: f"block.{name}" for name in TENSORS}})[4]
    assert isinstance(block, Block)
    return block


def check(block: Block) -> None:
    found = dict(block.views(block.read()))
    assert found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert tuple(found[name].shape) == value.shape
        assert np.array_equal(np.array(found[name]), value), name


@pytest.mark.parametrize("piece", [1, 100, 1 << 20])
def test_every_tensor(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """In pieces of any size; again and again."""
    monkeypatch.setattr(blockfile, "PIECE_BYTES", piece)
    block = opened(folder)
    check(block)
    check(block)


def test_neighbours_are_read_at_once(folder: ModelFolder) -> None:
    pieces = [[place.tensor.name for place in piece] for piece in opened(folder)._pieces()]
    between = open_tensorfile(folder.weight_files("transformer")[1]).tensors["other"]
    assert {"block.odd", "block.words", "block.one"} in [set(piece) for piece in pieces]
    assert all(piece[0].tensor.start != between.start for piece in opened(folder)._pieces())


def test_tensors_begin_where_kernels_may_read(folder: ModelFolder) -> None:
    assert all(place.offset % blockfile.ALIGNMENT == 0 for piece in opened(folder)._pieces() for place in piece)


def test_a_result_is_not_overwritten_by_the_next(folder: ModelFolder) -> None:
    """Arrays stay what they are, as everywhere in MLX, also when the file has changed."""
    block = opened(folder)
    views = dict(block.views(block.read()))
    path = folder.weight_files("transformer")[0]
    path.write_bytes(bytes(path.stat().st_size))
    again = dict(block.views(block.read()))
    assert np.array_equal(np.array(views["words"]), TENSORS["words"]) and not np.array(again["words"]).any()


def test_a_file_that_became_shorter(folder: ModelFolder) -> None:
    block = opened(folder)
    path = folder.weight_files("transformer")[1]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="became shorter"):
        block.read()


def test_buffers_are_filled_whatever_a_read_returns(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may return less than it was asked for, in the middle of a buffer or at its end."""
    path = folder.weight_files("transformer")[1]
    data, counts = path.read_bytes(), iter([3, 5, 1, 4, 100])
    preadv = os.preadv

    def short(descriptor: int, buffers: list[memoryview], start: int) -> int:
        return int(preadv(descriptor, [buffers[0][: next(counts)]], start))

    monkeypatch.setattr("ltx2.runtime.files.ranges.os.preadv", short)
    memory = bytearray(18)
    views = [memoryview(memory)[a:b] for a, b in ((0, 8), (8, 8), (8, 13), (13, 18))]
    RangeReader(path, cached=True).fill(10, views)
    assert bytes(memory) == data[10:28]


def test_memory_is_the_blocks(folder: ModelFolder) -> None:
    block = opened(folder)
    before = settled()
    memory = block.read()
    views = block.views(memory)
    mx.eval([value for _, value in views])
    assert mx.get_active_memory() - before < block.size + (1 << 15), "views take none"
