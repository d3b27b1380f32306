"""How much memory a generation takes, phase by phase, before anything but headers is read; in which tiles the video
decoder stays below a limit; and, where nothing does, the nearest settings that would."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import mlx.core as mx

from ltx2.runtime.errors import DoesNotFitError
from ltx2.runtime.files.tensors import FLOATS, TensorInfo, item_bytes
from ltx2.runtime.generate.job import Job
from ltx2.runtime.generate.presets import Stage
from ltx2.runtime.layers.packed import UNPACKABLE
from ltx2.runtime.machine.facts import available_memory
from ltx2.runtime.media.video import encoding_memory
from ltx2.runtime.memory import activations as network
from ltx2.runtime.memory import cpu as cpu
from ltx2.runtime.memory.activations import Activations
from ltx2.runtime.memory.meter import limited, reusable_memory
from ltx2.runtime.memory.streaming import block_of, choose_streamed, held_bytes
from ltx2.runtime.networks.audio.bandwidth import vocoder_config
from ltx2.runtime.networks.text.config import ConnectorsConfig, gemma_config
from ltx2.runtime.networks.transformer.config import TransformerConfig
from ltx2.runtime.networks.upsampler import UpsamplerConfig
from ltx2.runtime.networks.video_vae.tiles import Tiles, Tiling, tilings
from ltx2.runtime.sampling.latents import Sizes

GB = 10**9
FULL = Stage(1, ())
PACKED = "packed"  # the way to multiply that unpacks no weights
# MLX looks at its limit after it has queued an operation: it passes it by one array and what a command buffer holds.
COMMAND_BUFFER = 100 * 10**6


@dataclass(frozen=True)
class Need:
    """What one phase takes: bytes of weights, of what it computes with, and of the clip's finished frames. `blocks`:
    bytes of those parts of the weights that can be read from disk in every step instead of being kept."""

    name: str
    weights: int
    activations: Activations
    clip: int = 0
    blocks: tuple[int, ...] = ()

    @property
    def least_weights(self) -> int:
        return min(self.weights, self.held(range(len(self.blocks))))

    @property
    def least(self) -> int:
        return self.least_weights + self.activations.needed + self.clip

    def held(self, streamed: Collection[int]) -> int:
        """Bytes of weights in memory when these blocks are read in every step."""
        return self.weights - sum(self.blocks) + held_bytes(self.blocks, streamed)

    def within(self, limit: int, reusable: int) -> "PhasePlan":
        """At full speed if the limit allows it, with as many blocks in memory as it allows; else with as much queued.

        Blocks make way first: reading them costs no time as long as the disk is faster than the device, and waiting
        for the device at every operation takes about twice the time.
        """
        kept = self.weights - sum(self.blocks)
        streamed = choose_streamed(self.blocks, limit - self.clip - kept - self.activations.full)
        weights, read = self.held(streamed), sum(self.blocks[i] for i in streamed)
        room = limit - self.clip - weights
        used = max(self.activations.needed, min(self.activations.full, room))
        held_back = self.activations.largest + COMMAND_BUFFER if used < self.activations.full else 0
        cache = 0 if held_back else max(0, min(reusable, room - used))
        return PhasePlan(self.name, weights, used, self.clip, cache, held_back, streamed, read)


@dataclass(frozen=True)
class PhasePlan:
    """One phase within a limit. `cache` bounds freed memory that is kept for reuse, and makes way when it is needed.
    `held_back` is not 0 where the limit leaves less than full speed takes: MLX is told to wait so many bytes early.
    The blocks in `streamed` are not kept: `read` bytes are read from disk in every step."""

    name: str
    weights: int
    activations: int
    clip: int
    cache: int
    held_back: int
    streamed: tuple[int, ...] = ()
    read: int = 0

    @property
    def total(self) -> int:
        """Without the cache."""
        return self.weights + self.activations + self.clip

    @contextmanager
    def applied(self) -> Iterator[None]:
        """MLX keeps to the plan."""
        memory = self.weights + self.activations + self.cache - self.held_back
        with limited(memory, self.activations + self.cache):
            yield


@dataclass(frozen=True)
class MemoryPlan:
    """All phases against the limit. `tiling` is the video decoder's, None for one piece."""

    job: Job
    needs: tuple[Need, ...]
    limit: int
    tiling: Tiling | None

    @cached_property
    def phases(self) -> tuple[PhasePlan, ...]:
        if not self.job.request.low_memory:
            return tuple(need.within(self.limit, reusable_memory()) for need in self.needs)
        # What the hungriest phase takes at least is taken anyway: the others may use as much.
        return tuple(need.within(_least(self.needs), 0) for need in self.needs)

    def phase(self, name: str) -> PhasePlan:
        return next(phase for phase in self.phases if phase.name == name)

    @property
    def peak(self) -> int:
        return max(phase.total for phase in self.phases)

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit

    def check(self) -> None:
        """Raises DoesNotFitError, which names the nearest settings that fit."""
        if not self.fits:
            raise _refusal(self)

    def warnings(self) -> Iterator[str]:
        """What staying within the limit costs."""
        reads = [f"{phase.read / GB:.1f} GB in every step of {phase.name}" for phase in self.phases if phase.streamed]
        if reads:
            yield f"the transformer is not kept in memory as a whole: it is read from disk, {' and '.join(reads)}"

    def to_dict(self) -> dict[str, Any]:
        """For `--json`; memory in bytes."""
        return {
            **asdict(self.job.sizes),
            "phases": [asdict(phase) | {"total": phase.total} for phase in self.phases],
            "peak": self.peak,
            "limit": self.limit,
            "tiling": asdict(self.tiling) if self.tiling else None,
            "fits": self.fits,
        }


def plan_memory(job: Job) -> MemoryPlan:
    """The plan of a checked job on this machine. Its tiles are the first that stay below the limit, from Lightricks'
    choice down; with `low_memory` below what is taken in any case."""
    given, model = job.request.memory_limit, Model(job)
    limit = available_memory() if given is None else int(given * GB)
    low = job.request.low_memory
    tiling, needs = model.choose(job.sizes, _least(model.choose(job.sizes, 0)[1]) if low else limit)
    return MemoryPlan(job, needs, limit, tiling)


def _least(needs: Iterable[Need]) -> int:
    """Bytes below which some phase cannot go."""
    return max(need.least for need in needs)


class Model:
    """What headers and configurations say of a job's networks."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tensors = {name: _tensors(job, name) for name in job.components}
        self._weights: dict[tuple[str, str], int] = {}

    def weights(self, component: str, prefix: str = "") -> int:
        """Bytes of the tensors whose names begin with `prefix`."""
        key = component, prefix
        if key not in self._weights:  # many plans are made of one model
            tensors = self.tensors[component].items()
            self._weights[key] = sum(tensor.nbytes for name, tensor in tensors if name.startswith(prefix))
        return self._weights[key]

    def itemsize(self, component: str) -> int:
        """Bytes of a value that the network computes with; its tables may be wider, packed weights narrower."""
        return min(item_bytes(t.dtype) for t in self.tensors[component].values() if t.dtype in FLOATS.values())

    def config(self, component: str) -> dict[str, Any]:
        return self.job.folder.config(component)

    def choose(self, sizes: Sizes, limit: int) -> tuple[Tiling | None, tuple[Need, ...]]:
        """The first tiling that stays below the limit, else the one that takes least."""
        grid, config = self.job.grid(FULL, sizes), self.job.video_config
        found = []
        for tiling in tilings(config, (grid.frames, grid.height, grid.width)):
            needs = tuple(self.needs(sizes, tiling))
            least = next(need.least for need in needs if need.name == "video_vae")
            if _least(needs) <= limit:
                return tiling, needs
            found.append((least, tiling, needs))
        _, tiling, needs = min(found, key=lambda choice: choice[0])
        return tiling, needs

    def needs(self, sizes: Sizes, tiling: Tiling | None) -> Iterator[Need]:
        """Of all phases, in order."""
        request = self.job.request
        if request.latents is None:
            if request.embeddings is None:
                yield from self._text()
            yield from self._stages(sizes)
        yield from self._decoders(sizes, tiling)

    def _text(self) -> Iterator[Need]:
        tokens, length = int(self.job.tokens.mask.sum()), self.job.preset.text_tokens
        embedding, layer = self._text_parts
        gemma = gemma_config(self.config("text_encoder"))
        used = network.text_encoder(gemma, layer, embedding, tokens, self.itemsize("text_encoder"))
        yield Need("text_encoder", max(embedding, layer), used)
        config = ConnectorsConfig.from_dict(self.config("connectors"))
        width = self.itemsize("connectors")
        used = network.connectors(config, tokens, length, width, unpacked=width * self._unpacked("connectors"))
        used = used.beside(on_cpu(cpu.connectors(config, length, width)))
        yield Need("connectors", self.weights("connectors"), used)

    @cached_property
    def _text_parts(self) -> tuple[int, int]:
        """Bytes of the text encoder's embedding and of its largest layer: they are read and released one by one."""
        layers: dict[str, int] = {}
        for name, tensor in self.tensors["text_encoder"].items():
            part = ".".join(name.split(".")[:3]) if ".layers." in name else "embedding and last norm"
            layers[part] = layers.get(part, 0) + tensor.nbytes
        return layers.pop("embedding and last norm"), max(layers.values())

    def _stages(self, sizes: Sizes) -> Iterator[Need]:
        config = TransformerConfig.from_dict(self.config("transformer"))
        text, width = self.job.preset.text_tokens, self.itemsize("transformer")
        stages = self.job.preset.stages
        for number, stage in enumerate(stages, start=1):
            if number > 1:
                upscaler = UpsamplerConfig.from_dict(self.config("spatial_upscaler"))
                grid = self.job.grid(stages[number - 2], sizes)
                itemsize = self.itemsize("spatial_upscaler")
                used = network.upscale(upscaler, grid, itemsize)
                used = used.beside(on_cpu(cpu.upscale(upscaler, used.largest, itemsize)))
                yield Need("spatial_upscaler", self.weights("spatial_upscaler"), used)
            grid = self.job.grid(stage, sizes)
            used = network.denoise_step(config, grid, text, width, unpacked=width * self._unpacked("transformer"))
            used = used.beside(on_cpu(cpu.denoise_step(config, grid, text, width)))
            yield Need(f"stage{number}", self.weights("transformer"), used, blocks=self._blocks)

    @cached_property
    def _blocks(self) -> tuple[int, ...]:
        """Bytes of the transformer's blocks."""
        sizes: dict[int, int] = {}
        for name, tensor in self.tensors["transformer"].items():
            if (index := block_of(name)) is not None:
                sizes[index] = sizes.get(index, 0) + tensor.nbytes
        return tuple(sizes[index] for index in sorted(sizes))

    def _unpacked(self, component: str) -> int:
        """Values of the largest packed weight that is unpacked to multiply with it."""
        if self.job.request.matmul == PACKED:
            return 0
        quantization = self.job.folder.quantization(component)
        counts = [0]
        for name, tensor in self.tensors[component].items():
            if tensor.dtype == "U32":
                bits = quantization.of(name.removesuffix(".weight")).bits
                counts.append(prod(tensor.shape) * 32 // bits)
        return max(count for count in counts if count <= UNPACKABLE)

    def _decoders(self, sizes: Sizes, tiling: Tiling | None) -> Iterator[Need]:
        grid = self.job.grid(FULL, sizes)
        if not self.job.request.no_audio:
            audio = self.job.audio_config
            used = network.decode_audio(audio, grid.audio_frames)
            used = used.beside(on_cpu(cpu.decode_audio(audio, grid.audio_frames)))
            yield Need("audio_vae", self.weights("audio_vae", "decoder."), used)
            vocoder = vocoder_config(self.config("vocoder"))
            used = network.vocode(vocoder, grid.audio_frames * audio.temporal_scale)
            used = used.beside(on_cpu(cpu.vocode(vocoder, used.largest)))
            yield Need("vocoder", self.weights("vocoder"), used)
        video, width = self.job.video_config, self.itemsize("video_vae")
        tiles = Tiles((grid.frames, grid.height, grid.width), tiling, video)
        used = network.decode_video(video, tiles, width, uses_cpu()).beside(on_cpu(cpu.decode_video(video, width)))
        yield Need("video_vae", self.weights("video_vae", "decoder."), used, self._clip(sizes))

    def _clip(self, sizes: Sizes) -> int:
        """Bytes of finished frames: all of them, or what their encoder holds."""
        if self.job.request.output is not None:
            return encoding_memory(sizes.width, sizes.height)
        return sizes.frames * sizes.height * sizes.width * 3


def uses_cpu() -> bool:
    """Whether MLX computes on the CPU here."""
    return bool(mx.default_device() == mx.Device(mx.cpu))


def on_cpu(size: int) -> int:
    """What is held on a CPU only."""
    return size if uses_cpu() else 0


def _tensors(job: Job, component: str) -> dict[str, TensorInfo]:
    return {name: tensor for file in job.folder.tensor_files(component) for name, tensor in file.tensors.items()}


def _refusal(plan: MemoryPlan) -> DoesNotFitError:
    """Says what is too large, and what would fit."""
    job, sizes = plan.job, plan.job.sizes
    worst = max(plan.needs, key=lambda need: need.least)
    has = f"this computer has {plan.limit / GB:.1f} GB for it"
    if job.request.memory_limit is not None:
        has = f"the limit is {plan.limit / GB:.1f} GB"
    if worst.least_weights > plan.limit:
        component = "transformer" if worst.name.startswith("stage") else worst.name
        why = f"{worst.least_weights / GB:.1f} GB of its weights must be there at once, and {has}"
        return DoesNotFitError(f"the {component} does not fit in memory", why, job.folder.how_to_shrink())
    what = f"{sizes.frames} frames of {sizes.width}x{sizes.height} do not fit in memory"
    why = f"{worst.name} takes {worst.least / GB:.1f} GB, {worst.least_weights / GB:.1f} GB of it weights, and {has}"
    found = [] if job.request.latents else list(_smaller(plan))
    return DoesNotFitError(what, why, f"use {', or '.join(found)}" if found else job.folder.how_to_shrink())


def _smaller(plan: MemoryPlan) -> Iterator[str]:
    """The most frames that fit at this size, and the largest picture of nearly this shape at these frames."""
    job, sizes, model = plan.job, plan.job.sizes, Model(plan.job)
    scale = job.scales.spatial * max(stage.downscale for stage in job.preset.stages)
    least = -(-job.video_config.smallest_side // scale) * scale

    def fits(other: Sizes) -> bool:
        return _least(model.choose(other, plan.limit)[1]) <= plan.limit

    def shorter(count: int) -> Sizes:
        return replace(sizes, frames=(count - 1) * job.scales.temporal + 1)

    def narrower(count: int) -> Sizes:
        height = max(least, round(sizes.height * count * scale / sizes.width / scale) * scale)
        return replace(sizes, width=count * scale, height=height)

    frames = _most(lambda count: fits(shorter(count)), 1, (sizes.frames - 1) // job.scales.temporal + 1)
    if frames is not None:
        yield f"--frames {shorter(frames).frames}"
    width = _most(lambda count: fits(narrower(count)), least // scale, sizes.width // scale)
    if width is not None:
        yield f"--width {narrower(width).width} --height {narrower(width).height}"


def _most(fits: Callable[[int], bool], least: int, too_many: int) -> int | None:
    """The largest number from `least` on, below `too_many`, that fits; None where none does."""
    if least >= too_many or not fits(least):
        return None
    while too_many - least > 1:
        middle = (least + too_many) // 2
        least, too_many = (middle, too_many) if fits(middle) else (least, middle)
    return least
