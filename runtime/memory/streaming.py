"""A transformer that is larger than memory: some of its blocks are streamed, that is read from disk in every step, each
while the blocks before it compute.

A thread reads. A block is used once it is complete, so that no GPU command waits for a disk (macOS ends those that do),
and dropped when the device is done with it: two are in memory, the one in use and the one that is being read."""

import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ltx2.runtime.memory.blocks import Source, Weights, open_blocks
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import read_arrays
from ltx2.runtime.networks.transformer.model import Transformer

IN_MEMORY = 2  # of the streamed blocks
BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")


def block_of(name: str) -> int | None:
    """The number of the transformer block that a parameter belongs to; None for other parameters."""
    found = BLOCK.fullmatch(name)
    return int(found[1]) if found else None


def held_bytes(sizes: Sequence[int], streamed: Collection[int]) -> int:
    """Bytes of all blocks that are in memory at once when those in `streamed` are; `sizes` by block."""
    read = [sizes[i] for i in streamed]
    return sum(sizes) - sum(read) + IN_MEMORY * max(read, default=0)


def choose_streamed(sizes: Sequence[int], room: int) -> tuple[int, ...]:
    """The blocks to stream so that all blocks fit in `room` bytes, with the fewest bytes to read; all of them where
    nothing fits. They are spread evenly, which gives reading the whole step's time.

    `sizes` are bytes by block. They may differ: blocks of more bits stay in memory where streaming smaller ones is
    enough.
    """
    every = tuple(range(len(sizes)))
    if sum(sizes) <= room:
        return ()
    choices = [every]
    for largest in sorted(set(sizes)):
        small = [i for i in every if sizes[i] <= largest]
        spread = (_spread(small, count) for count in range(1, len(small) + 1))
        choices += [next((chosen for chosen in spread if held_bytes(sizes, chosen) <= room), every)]
    return min(choices, key=lambda chosen: sum(sizes[i] for i in chosen))


def _spread(indices: Sequence[int], count: int) -> tuple[int, ...]:
    """`count` of the indices, at even distances."""
    return tuple(indices[(2 * k + 1) * len(indices) // (2 * count)] for k in range(count))


@contextmanager
def streamed(folder: ModelFolder, transformer: Transformer, blocks: Sequence[int]) -> Iterator["BlockStream | None"]:
    """Make a loaded transformer ready: `blocks` are streamed, all other weights are in memory. Yields the stream, or
    None where no block is streamed."""
    read_arrays(value for name, value in _parameters(transformer) if block_of(name) not in blocks)
    if not blocks:
        yield None
        return
    stream = BlockStream(transformer, open_blocks(folder, "transformer", _names(transformer, blocks)))
    transformer.supply = stream
    try:
        yield stream
    finally:
        transformer.supply = None
        stream.close()


def _names(transformer: Transformer, blocks: Sequence[int]) -> dict[int, dict[str, str]]:
    """The parameters of these blocks: name in the block -> name in the transformer."""
    names: dict[int, dict[str, str]] = {index: {} for index in blocks}
    for name, _ in _parameters(transformer):
        found = BLOCK.fullmatch(name)
        if found and int(found[1]) in names:
            names[int(found[1])][found[2]] = name
    return names


class BlockStream:
    """Reads a transformer's blocks before they are used. So far it has read `read_bytes`, and since the first block the
    transformer has waited `waited` seconds."""

    def __init__(self, transformer: Transformer, files: Mapping[int, Source]) -> None:
        self.read_bytes = 0
        self.waited = 0.0
        self._started: float | None = None
        self._blocks = transformer.transformer_blocks
        self._files = files
        # Arrays that are never evaluated take no memory: they replace a block's weights while it is not in use.
        self._absent = {index: _parameters(self._blocks[index]) for index in files}
        order = list(files)
        self._following = dict(zip(order, [*order[1:], order[0]], strict=True))
        self._used: tuple[int, Sequence[mx.array]] | None = None  # the last queued block, and its results
        self._reading: Future[Any] | None = None
        self._read(order[0])

    def ready(self, index: int) -> None:
        """Wait until the block's weights are in memory. Raises CheckpointError when they cannot be read."""
        if index not in self._absent:
            return
        if self._next != index:  # a pass over the blocks was left before its end
            self._read(index)
        assert self._reading is not None, "the next block is read while one is in use"
        asked = time.perf_counter()
        memory = self._reading.result()
        if self._started is None:
            self._started = time.perf_counter()
        else:
            self.waited += time.perf_counter() - asked
        self.read_bytes += self._files[index].size
        self._reading = None
        self._blocks[index].load_weights(self._files[index].views(memory), strict=True)

    def queued(self, index: int, results: Sequence[mx.array]) -> None:
        """The block's work is queued, with results (1, tokens, width): drop the block before it once the device is done
        with that."""
        if self._used is not None:
            last, computed = self._used
            mx.eval(computed)
            self._drop(last)
        self._used = (index, results) if index in self._absent else None
        if self._reading is None:
            self._read(self._following[self._next])

    @property
    def share(self) -> float:
        """The share of the time so far that the transformer has waited."""
        return self.waited / (time.perf_counter() - self._started) if self._started is not None else 0.0

    def close(self) -> None:
        """Drop all blocks, and stop reading."""
        if self._reading is not None and not self._reading.cancel():
            self._reading.exception()  # waits; nobody needs that block, nor how reading it ended
        self._reading = self._used = None
        for index in self._absent:
            self._drop(index)

    def _read(self, index: int) -> None:
        self._next, self._reading = index, _reader().submit(self._files[index].read)

    def _drop(self, index: int) -> None:
        self._blocks[index].load_weights(self._absent[index], strict=True)


@cache
def _reader() -> ThreadPoolExecutor:
    """One thread for all transformers, since MLX makes and keeps streams for every thread that uses it."""
    return ThreadPoolExecutor(1, "ltx2-reader")


def _parameters(module: nn.Module) -> Weights:
    return cast(Weights, tree_flatten(module.parameters()))
