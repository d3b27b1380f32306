"""The phases of a generation, in order: the one list that says what follows what. What runs, what the memory plan adds
up, which components are needed, what a benchmark names and counts, and where a resumed run goes on is read off it.

Each phase loads its network, uses it and frees it, so that networks are never in memory together. Clips that are made
together go through a phase one after the other before any is in the next: they share its network."""

from collections.abc import Callable, Mapping, Sequence

from ltx2.runtime.generate.job import LATENTS, Job
from ltx2.runtime.generate.phases.base import Phase
from ltx2.runtime.generate.phases.decode import CopyVideo, DecodeSound, DecodeVideo, DiffuseVideo, Vocode
from ltx2.runtime.generate.phases.encode import EncodeSound, EncodeSource, EncodeVideo
from ltx2.runtime.generate.phases.sample import Denoise, Upscale
from ltx2.runtime.generate.phases.text import Connect, EncodeText, PredictLength
from ltx2.runtime.memory.flops import PhaseWork
from ltx2.runtime.memory.plan import Headers
from ltx2.runtime.model.layout import DIFFUSION_VAE, VIDEO_VAE


def phases(job: Job) -> list[Phase]:
    """The phases of a job, in order."""
    request, found, samples = job.request, list[Phase](), job.until in (None, LATENTS)
    enlarged = job.clip if request.upscale is not None else None
    if request.latents is None:
        if job.encodes_text:
            found += [EncodeText(job), Connect(job)]
        found += [PredictLength(job)] if job.auto is not None else []
        if samples:
            found += [EncodeVideo(job)] if any(given.encodes_video for given in job.given) else []
            found += [EncodeSource(job)] if enlarged is not None and not enlarged.latents else []
            found += [EncodeSound(job)] if any(given.encodes_audio for given in job.given) else []
        before = 2  # what the sides of the last latents are divided by: a clip's that is enlarged, a stage's
        if enlarged is not None and not job.stages and not request.temporal_upscale:
            found.append(Upscale(job, "spatial_upscaler", before))
        for number, stage in enumerate(job.stages if samples else (), start=1):
            found += [Upscale(job, stage.enter, before)] if stage.enter is not None else []
            found.append(Denoise(job, number))
            before = stage.downscale
    if request.temporal_upscale and samples:
        found.append(Upscale(job, "temporal_upscaler"))
    if job.until is None:
        found += [] if request.no_audio or request.audio or request.upscale else [DecodeSound(job), Vocode(job)]
        if not request.no_video:
            decode: Mapping[str | None, Callable[[Job], Phase]]
            decode = {None: CopyVideo, VIDEO_VAE: DecodeVideo, DIFFUSION_VAE: DiffuseVideo}
            found.append(decode[job.decoder](job))
    return found


def count(job: Job) -> dict[str, PhaseWork]:
    """The work of every phase of a job by its name. Reads headers."""
    headers = Headers(job.folder)
    return {phase.name: phase.work(headers) for phase in phases(job)}


def merged(orders: Sequence[Sequence[str]]) -> list[str]:
    """Names of the phases of several clips, each once, in an order that is every clip's own."""
    left, names = [list(order) for order in orders], list[str]()
    while left := [order for order in left if order]:
        name = next(o[0] for o in left if not any(o[0] in other[1:] for other in left))
        names.append(name)
        left = [order[1:] if order[0] == name else order for order in left]
    return names


def components(steps: Sequence[Phase]) -> list[str]:
    """The components that phases need, each once."""
    return list(dict.fromkeys(name for phase in steps for name in phase.components))
