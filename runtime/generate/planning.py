"""The memory of a generation, phase by phase, from headers alone; the tiles with which the video decoder stays below a
limit; and, if nothing fits, the nearest settings that do."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import ceil, prod
from typing import Any

from ltx2.runtime.distributed.machines import ALONE, Machines
from ltx2.runtime.errors import DoesNotFitError, of
from ltx2.runtime.generate.job import Job
from ltx2.runtime.generate.phases.decode import DecodeVideo
from ltx2.runtime.generate.phases.order import merged, phases
from ltx2.runtime.generate.phases.text import Connect, EncodeText, hidden_bytes, texts_of
from ltx2.runtime.machine.facts import available_memory, device_memory
from ltx2.runtime.memory.activations import Activations
from ltx2.runtime.memory.meter import reusable
from ltx2.runtime.memory.plan import Headers, Need, PhasePlan
from ltx2.runtime.model.layout import TRANSFORMER
from ltx2.runtime.networks.video_vae.tiles import Tiling
from ltx2.runtime.sampling.latents import Sizes
from ltx2.runtime.units import GB, gb

FLOAT = 4  # bytes
ACTIVATIONS = ("needed", "queued", "largest")
PACKED = "packed"  # the way to multiply that unpacks no weights


@dataclass(frozen=True)
class MemoryPlan:
    """All phases against the limit. `tiling` is the video decoder's, None for one piece. `own`: the peak of the job by
    itself, where clips are planned together."""

    job: Job
    needs: tuple[Need, ...]
    limit: int
    tiling: Tiling | None
    own: int = 0

    @cached_property
    def phases(self) -> tuple[PhasePlan, ...]:
        if self.job.request.low_memory:
            # The least that the hungriest phase takes is taken anyway: the others may use as much.
            return tuple(need.within(_least(self.needs), 0) for need in self.needs)
        # Freed buffers count in the whole process: they stay within a little more than the hungriest phase takes.
        bare = [need.within(self.limit, 0).total for need in self.needs]
        peak = max(bare, default=0)
        room = [min(reusable(device_memory()), peak + reusable(peak) - total) for total in bare]
        planned = [need.within(self.limit, kept) for need, kept in zip(self.needs, room, strict=True)]
        kept = self._kept(planned)
        for index in kept:
            if not self.needs[index].blocks:
                planned[index] = replace(planned[index], beside=planned[kept[0]].weights, cache=0)
        return tuple(planned)

    def _kept(self, planned: Sequence[PhasePlan]) -> range:
        """The phases after which the transformer stays loaded, for the stages to come: where that takes no more memory
        than is taken anyway."""
        stages = [index for index, need in enumerate(self.needs) if need.blocks]
        if len(stages) < 2 or any(planned[index].streamed for index in stages) or not self._same_weights:
            return range(0)
        kept, peak = range(stages[0], stages[-1]), max(phase.total for phase in planned)
        between = (planned[index].total for index in kept if index not in stages)
        fits = all(total + planned[stages[0]].weights <= min(peak, self.limit) for total in between)
        return kept if fits else range(0)

    @property
    def _same_weights(self) -> bool:
        """Whether no stage needs weights that an earlier one has added LoRAs to."""
        strengths = [self.job.loras.strengths(number) for number in self.job.numbers]
        return all(not before or before == after for before, after in pairwise(strengths))

    @cached_property
    def keeps_transformer(self) -> frozenset[str]:
        """Names of the phases after which it stays loaded."""
        if self.job.request.low_memory:
            return frozenset()
        planned = [replace(phase, beside=0) for phase in self.phases]
        return frozenset(planned[index].name for index in self._kept(planned))

    def phase(self, name: str) -> PhasePlan:
        return next(phase for phase in self.phases if phase.name == name)

    @property
    def peak(self) -> int:
        return max((phase.total for phase in self.phases), default=0)

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit

    def check(self) -> None:
        """Raises DoesNotFitError, which names the nearest settings that fit."""
        if not self.fits:
            with of(self.job.request.name):
                raise _refusal(self)

    def warnings(self) -> Iterator[str]:
        """The price of staying within the limit."""
        reads = [f"{gb(phase.read)} in every step of {phase.name}" for phase in self.phases if phase.streamed]
        if reads:
            yield f"the transformer is not kept in memory as a whole: it is read from disk, {_and(reads)}"
        slowed = [phase.name for phase in self.phases if phase.held_back]
        if slowed:
            yield f"the limit leaves less memory than full speed takes: {_and(slowed)} will be slower"

    def to_dict(self) -> dict[str, Any]:
        """For `--json`; memory in bytes."""
        return {
            **asdict(self.job.sizes),
            "phases": [asdict(phase) | {"kept": phase.kept, "total": phase.total} for phase in self.phases],
            "peak": self.peak,
            "limit": self.limit,
            "tiling": asdict(self.tiling) if self.tiling else None,
            "fits": self.fits,
        }


def _least(needs: Iterable[Need]) -> int:
    """Bytes below which some phase cannot go."""
    return max((need.least for need in needs), default=0)


class Needs:
    """The needs of a job's phases, for any sizes and limit."""

    def __init__(self, job: Job, machines: Machines = ALONE) -> None:
        self.job = job
        self.machines = machines
        self.phases = phases(job)
        self.headers = Headers(job.folder, job.request.matmul != PACKED)

    def choose(self, sizes: Sizes, limit: int) -> tuple[Tiling | None, tuple[Need, ...]]:
        """The video decoder in one piece where that takes no more than the transformer's weights do, and the limit
        allows it at full speed: a quarter faster, without seams. Else with the first tiling that stays below the limit,
        else the one that takes least."""
        *_, last = self.phases
        if not isinstance(last, DecodeVideo):
            return None, self.of(sizes, None)
        latents, found = self.job.grid(sizes=self.job.output(sizes)).size, []
        if last.in_one_piece(latents):
            *_, whole = needs = self.of(sizes, None)
            if whole.weights + whole.activations.full + whole.clip <= min(limit, self.usual):
                return None, needs
        for tiling in last.tilings(latents):
            needs = self.of(sizes, tiling)
            if _least(needs) <= limit:
                return tiling, needs
            found.append((needs[-1].least, tiling, needs))
        _, tiling, needs = min(found, key=lambda choice: choice[0])
        return tiling, needs

    @cached_property
    def usual(self) -> int:
        """Bytes that making latents takes anyway: the transformer's, if there is one."""
        return self.headers.weights(TRANSFORMER) if self.job.folder.has(TRANSFORMER) else 0

    def of(self, sizes: Sizes, tiling: Tiling | None) -> tuple[Need, ...]:
        """The need of every phase, with the video decoded in these tiles."""
        needs = [phase.need(self.headers, sizes, tiling) for phase in self.phases]
        if self.machines.several and tiling is not None and isinstance(self.phases[-1], DecodeVideo):
            # Decoded tiles of all machines are there together, and this one's beside them.
            values = 3 * tiling.frames * min(tiling.height, sizes.height) * min(tiling.width, sizes.width)
            tiles = (self.machines.size + 1) * values * self.headers.itemsize(self.phases[-1].name)
            needs[-1] = replace(needs[-1], clip=needs[-1].clip + tiles)
        return tuple(needs)


def plan_memory(job: Job, machines: Machines = ALONE, needs: Needs | None = None) -> MemoryPlan:
    """The plan of a checked job on this machine, from what it `needs`. Its tiles are the first that stay below the
    limit, from Lightricks' choice down; with `low_memory` below what is taken in any case. Of several machines the
    smallest decides tiles: all decode the same ones."""
    given, needs = job.request.memory_limit, needs or Needs(job, machines)
    limit = available_memory() if given is None else int(given * GB)
    low = job.request.low_memory
    most = _least(needs.choose(job.sizes, 0)[1]) if low else limit
    tiling, found = needs.choose(job.sizes, min(machines.everyone(most)))
    return MemoryPlan(job, found, limit, tiling)


def plan_all(jobs: Sequence[Job], machines: Machines = ALONE) -> list[MemoryPlan]:
    """The plans of jobs whose phases follow one another, clip by clip: each phase takes what it does for the largest of
    them, beside what the other clips keep for later."""
    plans = [plan_memory(job, machines) for job in jobs]
    if len(jobs) < 2:
        return plans
    names = merged([[need.name for need in plan.needs] for plan in plans])
    needs = tuple(_largest(name, plans, _waiting(jobs, name)) for name in names)
    return [replace(plan, needs=needs, own=plan.peak) for plan in plans]


def _largest(name: str, plans: Sequence[MemoryPlan], waiting: int) -> Need:
    """The largest need of a phase in several plans, beside the bytes of clips that are `waiting`."""
    found = [need for plan in plans for need in plan.needs if need.name == name]
    needed, queued, largest = (max(getattr(need.activations, part) for need in found) for part in ACTIVATIONS)
    used, clip = Activations(needed, queued, largest), max(need.clip for need in found) + waiting
    weights, text = max(need.weights for need in found), max(need.text for need in found)
    factors = max(need.factors for need in found)
    return Need(name, weights, used, clip, found[0].blocks, text, factors)


def _waiting(jobs: Sequence[Job], name: str) -> int:
    """Bytes that all clips but one keep while that one is at a phase: hidden states of prompts, equal ones once, then
    contexts and latents."""
    prompts = {texts_of(job): job for job in jobs if job.encodes_text}
    if name in (EncodeText.name, Connect.name):
        return sum(sorted(map(hidden_bytes, prompts.values()))[:-1])
    from_files = [job for job in jobs if job.request.embeddings is not None]
    contexts = sorted(map(context_bytes, [*prompts.values(), *from_files]))[:-1]
    return sum(contexts) + 3 * sum(sorted(map(latent_bytes, jobs))[:-1])


def latent_bytes(job: Job) -> int:
    """Bytes of the clip's latents."""
    grid = job.grid()
    return FLOAT * (prod(grid.video_shape) + prod(grid.audio_shape))


def context_bytes(job: Job) -> int:
    """Bytes of the contexts of the prompt and the negative prompt, for both streams."""
    return 2 * FLOAT * job.preset.text_tokens * sum(job.transformer_config.context_dims.values())


def _refusal(plan: MemoryPlan) -> DoesNotFitError:
    """The error that names the hungriest phase and the nearest settings that fit."""
    job, sizes = plan.job, plan.job.sizes
    worst = max(plan.needs, key=lambda need: need.least)
    has = f"this computer has {gb(plan.limit)} for it"
    if job.request.memory_limit is not None:
        has = f"the limit is {gb(plan.limit)}"
    if worst.least_weights > plan.limit:
        component = "transformer" if worst.name.startswith("stage") else worst.name
        why = f"{gb(worst.least_weights)} of its weights must be there at once, and {has}"
        return DoesNotFitError(f"`{component}` does not fit in memory", why, _more_room(plan))
    what = f"{sizes.frames} frames of {sizes.width}x{sizes.height} do not fit in memory"
    why = f"{worst.name} takes {gb(worst.least)}, {gb(worst.least_weights)} of it weights, and {has}"
    if job.clip is not None:
        return DoesNotFitError(what, why, "give a shorter or smaller clip")
    found = [] if job.request.latents else list(_smaller(plan))
    less = "" if job.request.latents else ", or make a clip that is both smaller and shorter"
    return DoesNotFitError(what, why, f"use {', or '.join(found)}" if found else _more_room(plan, less))


def _more_room(plan: MemoryPlan, less: str = "") -> str:
    """The fix where neither fewer frames nor a smaller picture would do: smaller weights where the rest of every phase
    fits, else more memory, or what takes `less` of it."""
    if all(need.least - (need.least_weights if _shrinks(need) else 0) <= plan.limit for need in plan.needs):
        return plan.job.folder.how_to_shrink()
    least = f"{ceil(100 * _least(plan.needs) / GB) / 100:g}"
    limited = plan.job.request.memory_limit is not None
    return (f"use --memory-limit {least} or more" if limited else f"use a computer with {least} GB for it") + less


def _shrinks(need: Need) -> bool:
    """Whether the phase's weights are a network's that is quantized."""
    return bool(need.blocks) or need.name in (EncodeText.name, Connect.name)


def _and(parts: Sequence[str]) -> str:
    """Parts of a sentence."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def _smaller(plan: MemoryPlan) -> Iterator[str]:
    """The most frames that fit at this size, and the largest picture of nearly this shape at these frames."""
    job, sizes, needs = plan.job, plan.job.sizes, Needs(plan.job)
    scale = job.scales.spatial * max(stage.downscale for stage in job.stages)
    least = -(-job.video_config.smallest_side // scale) * scale

    def fits(other: Sizes) -> bool:
        return _least(needs.choose(other, plan.limit)[1]) <= plan.limit

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
