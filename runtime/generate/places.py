"""Where the files of a run go: their names, and that they can be written, made sure of before the work starts."""

from collections.abc import Iterator
from math import prod
from pathlib import Path

from ltx2.runtime.errors import InputError
from ltx2.runtime.files.atomic import beside
from ltx2.runtime.files.paths import check_folder, check_output, check_room
from ltx2.runtime.generate.job import Job
from ltx2.runtime.generate.sidecar import is_sidecar, sidecar_path
from ltx2.runtime.media.video import check_target
from ltx2.runtime.model.layout import TRANSFORMER
from ltx2.runtime.networks.transformer.config import TransformerConfig

FLOAT = 4  # bytes
LATENTS = ".safetensors"
FREE = "choose another name, or replace it with --force"
PIXEL = 0.1  # bytes of a clip's pixel, several times what is usual at DELIVERY's quality


def state_path(clip: Path) -> Path:
    """clip.mp4 -> clip.unfinished.safetensors. Raises InputError for what cannot be a file's name."""
    if not clip.name:
        raise InputError(f"cannot write {clip}", "it is a folder", f"name a file in it, such as {clip / 'clip.mp4'}")
    return beside(clip.with_suffix(""), ".unfinished.safetensors")


def check_places(job: Job) -> None:
    """Raises InputError for a place that cannot be written, or holds a clip and may not, and DoesNotFitError where the
    disk has no room for all that comes."""
    request = job.request
    if request.output is not None:
        clip, sidecar = Path(request.output), sidecar_path(Path(request.output))
        check_target(clip, ".wav" if request.no_video else ".mp4")
        check_output(sidecar)
        if not request.force:
            _check_free(clip, sidecar)
    for path in (request.save_embeddings, request.save_latents, request.state):
        if path is not None:
            check_output(path)
    if request.preview is not None:
        check_folder(Path(request.preview), request.preview)
    if request.upscale is not None and request.save_latents is not None:
        _check_latents(Path(request.save_latents), request.force)
    check_room(*_needs(job))


def _check_latents(path: Path, force: bool) -> None:
    """Of a command whose result they are."""
    if path.suffix != LATENTS:
        raise InputError(f"cannot write {path}", "latents become latents", f"use {path.with_suffix(LATENTS)}")
    if path.exists() and not force:
        raise InputError(f"{path} is already there", "no file is replaced unasked", FREE)


def _check_free(clip: Path, sidecar: Path) -> None:
    if clip.exists():
        raise InputError(f"{clip} is already there", "a clip is never replaced unasked", FREE)
    if sidecar.exists() and not is_sidecar(sidecar):
        raise InputError(f"{sidecar} is already there", f"it would become the record of {clip.name}", FREE)


def _needs(job: Job) -> Iterator[tuple[Path, int]]:
    """Files to be written, and at most how many bytes each takes."""
    request, sizes, grid = job.request, job.output(), job.grid()
    latents = FLOAT * (prod(grid.video_shape) + prod(grid.audio_shape))
    if request.output is not None:
        yield Path(request.output), int(PIXEL * sizes.frames * sizes.height * sizes.width)
    if request.save_embeddings is not None:
        yield Path(request.save_embeddings), _context_bytes(job)
    if request.save_latents is not None:
        yield Path(request.save_latents), latents
    if request.state is not None and request.latents is None:
        yield Path(request.state), 2 * (3 * latents + _context_bytes(job))  # the new one is written beside the last


def _context_bytes(job: Job) -> int:
    """Of the prompt's contexts and the negative prompt's, of both streams."""
    config = TransformerConfig.from_dict(job.folder.config(TRANSFORMER))
    return 2 * FLOAT * job.preset.text_tokens * (config.video.context_dim + config.audio.context_dim)
