"""The phases of a generation, in order: the one list that says what follows what. What runs, what the memory plan adds
up, which components are needed, what a benchmark names and counts, and where a resumed run goes on is read off it.

Each phase loads its network, uses it and frees it, so that networks are never in memory together."""

from collections.abc import Callable, Mapping, Sequence

from ltx2.runtime.generate.job import LATENTS, Job
from ltx2.runtime.generate.phases.base import Phase
from ltx2.runtime.generate.phases.decode import CopyVideo, DecodeSound, DecodeVideo, DiffuseVideo, Vocode
from ltx2.runtime.generate.phases.encode import EncodeSound, EncodeVideo
from ltx2.runtime.generate.phases.sample import Denoise, Interpolate, Upscale
from ltx2.runtime.generate.phases.text import Connect, EncodeText, PredictLength
from ltx2.runtime.model.layout import DIFFUSION_VAE, VIDEO_VAE


def phases(job: Job) -> list[Phase]:
    """What a job's generation consists of, in order."""
    request, found, samples = job.request, list[Phase](), job.until in (None, LATENTS)
    if request.latents is None:
        if request.embeddings is None:
            found += [EncodeText(job), Connect(job)]
        found += [PredictLength(job)] if job.auto is not None else []
        if samples:
            found += [EncodeVideo(job)] if any(given.encodes_video for given in job.given) else []
            found += [EncodeSound(job)] if any(given.encodes_audio for given in job.given) else []
        for number in job.numbers if samples else ():
            found += [Upscale(job, number)] if job.stages[number - 1].enter and number > 1 else []
            found.append(Denoise(job, number))
    if request.temporal_upscale and samples:
        found.append(Interpolate(job))
    if job.until is None:
        found += [] if request.no_audio or request.audio is not None else [DecodeSound(job), Vocode(job)]
        if not request.no_video:
            decode: Mapping[str | None, Callable[[Job], Phase]]
            decode = {None: CopyVideo, VIDEO_VAE: DecodeVideo, DIFFUSION_VAE: DiffuseVideo}
            found.append(decode[job.decoder](job))
    return found


def components(steps: Sequence[Phase]) -> list[str]:
    """What phases need of the model folder, each once."""
    return list(dict.fromkeys(name for phase in steps for name in phase.components))
