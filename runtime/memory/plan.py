"""The memory of a run's phases, each planned within a limit; and sizes of a model folder's networks from headers."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import mlx.core as mx

from ltx2.runtime.files.tensors import FLOATS, TensorInfo, item_bytes
from ltx2.runtime.layers.packed import UNPACKABLE
from ltx2.runtime.memory.activations import Activations
from ltx2.runtime.memory.meter import limited
from ltx2.runtime.memory.streaming import block_of, choose_streamed, held_bytes
from ltx2.runtime.model.layout import TRANSFORMER, ModelFolder

# MLX checks its limit after it has queued an operation, so it exceeds it by one array and a command buffer's content.
COMMAND_BUFFER = 100 * 10**6
CODES = "U32"  # the dtype of packed weights


@dataclass(frozen=True)
class Need:
    """What one phase takes, in bytes: weights, activations, and the clip's finished frames. `blocks`: parts of the
    weights that can be streamed: read from disk in every step instead of kept. `text`: the text's keys and values,
    which are kept over the steps where there is room. `factors`: of LoRAs; they stay beside streamed weights, and are
    added to kept ones."""

    name: str
    weights: int
    activations: Activations
    clip: int = 0
    blocks: tuple[int, ...] = ()
    text: int = 0
    factors: int = 0

    @property
    def least_weights(self) -> int:
        return min(self.weights, self.held(range(len(self.blocks))))

    @property
    def least(self) -> int:
        return self.least_weights + self.activations.needed + self.clip

    def held(self, streamed: Collection[int]) -> int:
        """Bytes of weights in memory when these blocks are streamed."""
        kept = self.weights - sum(self.blocks) + held_bytes(self.blocks, streamed)
        return kept + self.factors if streamed else kept

    def within(self, limit: int, reusable: int) -> "PhasePlan":
        """Plan the phase within a limit; `reusable`: bytes of freed buffers worth keeping.

        Blocks are streamed first: it costs no time as long as the disk is faster than the device. Only then less is
        queued: waiting for the device at every operation takes about twice the time. The text's keys and values save
        least, so they are kept last.
        """
        room = limit - self.clip - (self.weights - sum(self.blocks)) - self.activations.full
        streamed = choose_streamed(self.blocks, room)
        if streamed and self.factors:
            streamed = choose_streamed(self.blocks, room - self.factors)
        weights, read = self.held(streamed), sum(self.blocks[i] for i in streamed)
        room = limit - self.clip - weights
        text = self.text if not streamed and self.activations.full + self.text <= room else 0
        room -= text
        used = max(self.activations.needed, min(self.activations.full, room))
        held_back = self.activations.largest + COMMAND_BUFFER if used < self.activations.full else 0
        cache = 0 if held_back else max(0, min(reusable, room - used))
        return PhasePlan(self.name, weights, used, self.clip, cache, held_back, streamed, read, text=text)


@dataclass(frozen=True)
class PhasePlan:
    """One phase within a limit, in bytes. `cache` bounds freed memory that is kept for reuse; MLX frees it when needed.
    `held_back` is not 0 where the limit leaves less than full speed takes: MLX waits so many bytes early. The blocks in
    `streamed` are not kept: every step reads `read` bytes from disk. `beside`: of the transformer that stays loaded for
    a later stage. `text`: of the text's keys and values that are kept."""

    name: str
    weights: int
    activations: int
    clip: int
    cache: int
    held_back: int
    streamed: tuple[int, ...] = ()
    read: int = 0
    beside: int = 0
    text: int = 0

    @property
    def kept(self) -> int:
        """Bytes that are kept to save time later."""
        return self.beside + self.text

    @property
    def total(self) -> int:
        """Bytes in all, without the cache."""
        return self.weights + self.activations + self.clip + self.kept

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Hold MLX to the plan. Only memory that stays for the whole phase is wired."""
        stays = self.weights + self.kept
        memory = stays + self.activations + self.cache - self.held_back
        with limited(memory, self.activations + self.cache, stays):
            yield


class Headers:
    """Sizes of a model folder's networks from headers and configurations. `unpacks`: packed weights are unpacked to
    multiply with them."""

    def __init__(self, folder: ModelFolder, unpacks: bool = True) -> None:
        self.folder = folder
        self.unpacks = unpacks
        self._tensors: dict[str, dict[str, TensorInfo]] = {}
        self._weights: dict[tuple[str, str], int] = {}

    def tensors(self, component: str) -> dict[str, TensorInfo]:
        """By name."""
        if component not in self._tensors:
            files = self.folder.tensor_files(component)
            self._tensors[component] = {name: tensor for file in files for name, tensor in file.tensors.items()}
        return self._tensors[component]

    def weights(self, component: str, prefix: str = "") -> int:
        """Bytes of the tensors whose names begin with `prefix`."""
        key = component, prefix
        if key not in self._weights:  # one folder serves many plans
            tensors = self.tensors(component).items()
            self._weights[key] = sum(tensor.nbytes for name, tensor in tensors if name.startswith(prefix))
        return self._weights[key]

    def itemsize(self, component: str) -> int:
        """Bytes of an activation's value; tables may be wider, packed weights narrower."""
        dtypes = {tensor.dtype for tensor in self.tensors(component).values()}
        return min(map(item_bytes, dtypes & set(FLOATS.values())))

    def config(self, component: str) -> dict[str, Any]:
        """The component's config.json."""
        return self.folder.config(component)

    def unpacked(self, component: str) -> int:
        """The number of values in the largest packed weight that is unpacked to multiply with it."""
        if not self.unpacks:
            return 0
        quantization = self.folder.quantization(component)
        counts = [0]
        for name, tensor in self.tensors(component).items():
            if tensor.dtype == CODES:
                bits = quantization.of(name.removesuffix(".weight")).bits
                counts.append(prod(tensor.shape) * 32 // bits)
        return max(count for count in counts if count <= UNPACKABLE)

    def rotates(self, component: str) -> bool:
        """Whether layers rotate their inputs."""
        quantization = self.folder.quantization(component)
        return any(form and form.rotation for form in (quantization.common, *quantization.others.values()))

    @cached_property
    def text_parts(self) -> tuple[int, int]:
        """Bytes of the text encoder's embedding and of its largest layer, which are read and released one by one."""
        layers: dict[str, int] = {}
        for name, tensor in self.tensors("text_encoder").items():
            part = ".".join(name.split(".")[:3]) if ".layers." in name else "embedding and last norm"
            layers[part] = layers.get(part, 0) + tensor.nbytes
        return layers.pop("embedding and last norm"), max(layers.values())

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """Bytes of the transformer's blocks."""
        sizes: dict[int, int] = {}
        for name, tensor in self.tensors(TRANSFORMER).items():
            if (index := block_of(name)) is not None:
                sizes[index] = sizes.get(index, 0) + tensor.nbytes
        return tuple(sizes[index] for index in sorted(sizes))


_GPU = ContextVar("_GPU", default=False)  # whether plans are for a Mac with a GPU, whatever this machine is


@contextmanager
def on_another_mac() -> Iterator[None]:
    """Plan for a Mac with a GPU."""
    before = _GPU.set(True)
    try:
        yield
    finally:
        _GPU.reset(before)


def uses_cpu() -> bool:
    """Whether MLX computes on the CPU of the machine that is planned for."""
    return not _GPU.get() and bool(mx.default_device() == mx.Device(mx.cpu))


def on_cpu(size: int) -> int:
    """`size` where MLX computes on the CPU, else 0."""
    return size if uses_cpu() else 0


def on_metal(size: int) -> int:
    """`size` where MLX computes on a Mac's GPU, else 0."""
    return size if _GPU.get() or (not uses_cpu() and mx.metal.is_available()) else 0
