"""A run on several machines: how each phase is shared, that all would make the same clip, and what the leading machine
tells the others."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from typing import Any

from ltx2 import __version__
from ltx2.runtime.distributed.machines import Machines
from ltx2.runtime.distributed.split import NONE, of_stage, of_tiles
from ltx2.runtime.errors import MachinesError
from ltx2.runtime.generate.job import Job
from ltx2.runtime.generate.options.kinds import digest
from ltx2.runtime.generate.phases.base import Made, Phase
from ltx2.runtime.generate.phases.decode import DecodeVideo
from ltx2.runtime.generate.phases.order import phases
from ltx2.runtime.generate.phases.sample import Denoise
from ltx2.runtime.generate.records.resume import Owner, State
from ltx2.runtime.machine.facts import machine_facts
from ltx2.runtime.networks.video_vae.tiles import Tiles, Tiling
from ltx2.runtime.sampling.guidance import passes

FIXES = {
    "version of ltx2 or MLX": "install the same versions everywhere",
    "model folder": "copy the folder of the leading machine, with rsync for example",
    "request": "start the same command everywhere; files that are given must be the same, too",
    "plan": "give the same --memory-limit everywhere",
}


def splits(job: Job, machines: Machines, tiling: Tiling | None) -> dict[str, str]:
    """How each phase is shared, by its name. What is not shared the leading machine does alone."""
    found = dict.fromkeys((phase.name for phase in phases(job)), NONE)
    if not machines.several:
        return found
    size, wanted = machines.size, job.request.split
    for phase in phases(job):
        if isinstance(phase, Denoise):
            tokens = 0 if job.request.no_video else job.stage_grid(phase.number).tokens
            calls = len(passes(job.course(phase.number).guidance, job.frozen))
            found[phase.name] = of_stage(size, calls, tokens, wanted)
        if isinstance(phase, DecodeVideo) and phase.spreads:
            found[phase.name] = of_tiles(size, tile_count(job, tiling), wanted)
    return found


def tile_count(job: Job, tiling: Tiling | None) -> int:
    """The number of the video decoder's tiles."""
    grid = job.grid(sizes=job.output())
    tiles = Tiles((grid.frames, grid.height, grid.width), tiling, job.video_config)
    return prod(map(len, (tiles.times, tiles.rows, tiles.columns)))


def check_same(machines: Machines, job: Job, used: Sequence[str], tiling: Tiling | None) -> None:
    """Raises MachinesError on all machines, before any work, if one would not do the same as the leading one.
    `used`: components of the model folder."""
    owner, shared = Owner.of(job, used), splits(job, machines, tiling)
    facts, latents = machine_facts(), job.request.latents
    parts = {
        "version of ltx2 or MLX": [__version__, facts["mlx"]],
        "model folder": owner.model,
        "request": [owner.options, None if latents is None else digest(latents)],
        "plan": [shared, None if tiling is None else asdict(tiling)],
    }
    digests = machines.everyone({name: _digest(part) for name, part in parts.items()})
    for name, theirs in zip(machines.names, digests, strict=True):
        for part, fix in FIXES.items():
            if theirs[part] != digests[0][part]:
                why = f"its {part} is not that of {machines.names[0]}"
                raise MachinesError(f"{name} would make another clip", why, fix)


def _digest(part: Any) -> str:
    return hashlib.sha256(json.dumps(part, sort_keys=True, default=str).encode()).hexdigest()


def begin_shared(machines: Machines, phase: Phase, made: Made) -> None:
    """The leading machine tells the others that a shared phase begins, and all that it needs."""
    step = made.step.number if made.step is not None else 0
    name = phase.name if isinstance(phase, Denoise) else None  # decoding needs no more than latents
    machines.told({"phase": phase.name, "step": step}, State(name, made).tensors())


def tell_seconds(machines: Machines, seconds: float) -> None:
    """The leading machine tells the others the duration head's answer, which decides for all."""
    machines.told({"phase": None, "seconds": seconds})


def keep_waiting(machines: Machines) -> None:
    """The leading machine, which works alone, is still there."""
    machines.told({"phase": None})


def finish(machines: Machines) -> None:
    """The leading machine has written all there is to write."""
    machines.told({"phase": None, "done": True})


def follow(machines: Machines) -> tuple[str, Made] | None:
    """The next phase that this machine has a share of, and what it needs; none but the clip's `seconds` where these
    become known; None when the run is over."""
    while True:
        message, tensors = machines.told()
        if message["phase"] is not None:
            record = {"phase": message["phase"], "step": message["step"], "phases": [], "seconds": 0.0}
            return message["phase"], State.from_tensors(record, tensors).made
        if "seconds" in message:
            return "", Made(seconds=message["seconds"])
        if message.get("done"):
            return None
