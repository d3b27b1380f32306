"""Several machines in a receipt: the speed of their link, and the busiest machine's share of a phase's work."""

import time
from dataclasses import dataclass, replace
from statistics import median

import mlx.core as mx

from ltx2.runtime.distributed.machines import Machines
from ltx2.runtime.distributed.split import GUIDANCE, SEQUENCE, TILES
from ltx2.runtime.generate.phases.together import splits, tile_count
from ltx2.runtime.generate.planning import MemoryPlan
from ltx2.runtime.memory.flops import denoise_step
from ltx2.runtime.sampling.guidance import passes

SMALL, LARGE = 256, 64 << 20  # bytes of an exchange that latency decides, and of one that bandwidth decides
CALLS = 5


@dataclass(frozen=True)
class Link:
    """An exchange of all machines with all: seconds of a small one, and bytes per second that a machine sends in a
    large one."""

    machines: int
    latency_seconds: float
    bytes_per_second: float


def measure_link(machines: Machines) -> Link | None:
    """None on one machine. Takes about a second over 10 Gbit/s."""
    if not machines.several:
        return None
    return Link(machines.size, _seconds(machines, SMALL), LARGE * (machines.size - 1) / _seconds(machines, LARGE))


def _seconds(machines: Machines, size: int) -> float:
    x, times = mx.zeros((size,), mx.uint8), []
    machines.stack(x)  # waits until all machines are here
    for _ in range(CALLS):
        began = time.perf_counter()
        machines.stack(x)
        times.append(time.perf_counter() - began)
    return median(times)


def busiest(plan: MemoryPlan, machines: Machines) -> dict[str, float]:
    """The busiest machine's share of operations, by name of every shared phase. Where tokens are shared, every machine
    computes the sound, and the keys and values of the text."""
    job, size, found = plan.job, machines.size, dict[str, float]()
    for phase, split in splits(job, machines, plan.tiling).items():
        if split == GUIDANCE:
            count = len(passes(job.course(int(phase.removeprefix("stage"))).guidance, job.frozen))
            found[phase] = -(-count // size) / count
        if split == SEQUENCE:
            grid, text = job.stage_grid(int(phase.removeprefix("stage"))), job.preset.text_tokens
            whole = denoise_step(job.transformer_config, grid, text).flops
            everywhere = denoise_step(job.transformer_config, replace(grid, frames=0), text).flops
            found[phase] = (everywhere + (whole - everywhere) / size) / whole
        if split == TILES:
            count = tile_count(job, plan.tiling)
            found[phase] = -(-count // size) / count
    return found
