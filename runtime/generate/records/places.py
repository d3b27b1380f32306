"""The places of a run's files: their names, and checks before the work starts that they can be written."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ltx2.runtime.errors import InputError, Ltx2Error, UsageError, reason
from ltx2.runtime.events import Event, Warned
from ltx2.runtime.files.atomic import beside
from ltx2.runtime.files.paths import check_folder, check_output, check_room
from ltx2.runtime.files.tensors import SUFFIX, is_kind
from ltx2.runtime.generate.job import Job
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.generate.options.table import ROWS
from ltx2.runtime.generate.planning import context_bytes, latent_bytes
from ltx2.runtime.generate.records.exchange import EMBEDDINGS, LATENTS
from ltx2.runtime.generate.records.sidecar import is_sidecar, sidecar_path
from ltx2.runtime.media.formats import FORMATS, check_crf, format_of
from ltx2.runtime.media.video import check_target

FREE = "choose another name, or replace it with {}"
FORCE = "--force"


def state_path(clip: Path) -> Path:
    """clip.mp4 -> clip.unfinished.safetensors. Raises InputError for what cannot be a file's name."""
    if not clip.name:
        raise InputError(f"cannot write {clip}", "it is a folder", f"name a file in it, such as {clip / 'clip.mp4'}")
    return beside(clip.with_suffix(""), ".unfinished.safetensors")


def check_places(request: Request, model: Path, new: Path | None = None) -> None:
    """Raises InputError for a place that cannot be written, or holds what may not be replaced; `model`: the folder that
    is read, `new`: one that will be made."""
    for path in _written(request):
        check_output(path, new)
    if request.output is not None:
        clip, sidecar = Path(request.output), sidecar_path(Path(request.output))
        check_target(clip, sound=request.no_video)
        if sidecar.exists() and not is_sidecar(sidecar):  # `--force` or not
            _check_outside(sidecar, model)
        if not request.no_video:
            check_crf(clip, request.crf or 0)
        check_output(sidecar, new)
        if not request.force:
            check_free(clip)
    made = (request.output, request.save_latents, request.save_embeddings)
    for option, given in request.inputs():
        if Path(given).absolute() in {Path(path).absolute() for path in made if path is not None}:
            why = f"{ROWS[option].flag} takes it, and the result would replace it"
            raise InputError(f"{given} would be lost", why, "choose another name")
    if request.preview is not None:
        check_folder(Path(request.preview), request.preview)
    if request.upscale is not None and request.save_latents is not None:
        _check_latents(Path(request.save_latents), request.force)
    for saved, kind in ((request.save_latents, LATENTS), (request.save_embeddings, EMBEDDINGS)):
        if saved is not None:
            check_saved(Path(saved), kind, model, force=request.force)


def _written(request: Request) -> list[str]:
    paths = (request.output, request.save_embeddings, request.save_latents, request.state)
    return [path for path in paths if path is not None]


def check_space(jobs: Sequence[Job]) -> None:
    """Raises InputError if two clips would be one file, DoesNotFitError if the disk has no room for all files."""
    check_distinct(Path(path) for job in jobs for path in _written(job.request))
    check_room(*(need for job in jobs for need in _needs(job)))


def check_distinct(paths: Iterable[Path]) -> None:
    """Raises InputError if two of the paths are one."""
    counts = Counter(path.absolute() for path in paths)
    if twice := [path for path, count in counts.items() if count > 1]:
        raise InputError(f"{twice[0]} would be written more than once", "it is one file", "give each a name of its own")


def _check_latents(path: Path, force: bool) -> None:
    """Raises InputError for a place where latents, as a command's result, cannot be written."""
    if path.suffix != SUFFIX:
        raise InputError(f"cannot write {path}", "latents become latents", f"use {path.with_suffix(SUFFIX)}")
    if path.exists() and not force:
        raise InputError(f"{path} is already there", "no file is replaced unasked", FREE.format(FORCE))


def check_saved(path: Path, kind: str, model: Path, *, force: bool = False, fix: str = FREE.format(FORCE)) -> None:
    """Raises UsageError for a place of tensors of a kind without the suffix of safetensors; InputError for one in the
    model folder that is read, and, unless with `force`, for a file that does not say it is of that kind."""
    if path.suffix != SUFFIX:
        raise UsageError(
            f"cannot write {path}", f"{kind} are written as safetensors", f"use {path.with_suffix(SUFFIX)}"
        )
    _check_outside(path, model)
    if not force and path.exists() and not is_kind(path, kind):
        raise InputError(f"{path} is already there", f"it does not say that it holds {kind} of ltx2", fix)


def _check_outside(path: Path, model: Path) -> None:
    """Raises InputError for a place in the model folder: a clip's record could be its ltx2.json."""
    folder = path.absolute().parent.resolve()
    if model.resolve() in (folder, *folder.parents):
        raise InputError(f"cannot write {path}", f"the model folder {model} is only read", "choose another folder")


def check_free(clip: Path, force: str = FORCE) -> None:
    """Raises InputError if a clip exists, or a file in its record's place that is not the record of such a clip;
    `force`: the option that replaces it."""
    sidecar, fix = sidecar_path(clip), FREE.format(force)
    if clip.exists():
        raise InputError(f"{clip} is already there", "a clip is never replaced unasked", fix)
    if sidecar.exists() and not is_sidecar(sidecar):
        raise InputError(f"{sidecar} is already there", f"it would become the record of {clip.name}", fix)
    others = [clip.with_suffix(suffix) for suffix in (*FORMATS, ".wav") if suffix != clip.suffix]
    if sidecar.exists() and (other := next((path for path in others if path.exists()), None)) is not None:
        raise InputError(f"{sidecar} is already there", f"it is the record of {other.name}", fix)


def _needs(job: Job) -> Iterator[tuple[Path, int]]:
    """Files to be written, and at most how many bytes each takes."""
    request, sizes, latents = job.request, job.output(), latent_bytes(job)
    if request.output is not None:
        clip = Path(request.output)
        pixel = 0.0 if request.no_video else format_of(clip).bytes_of_a_pixel(request.crf or 0)
        yield clip, int(pixel * sizes.frames * sizes.height * sizes.width)
    if request.save_embeddings is not None:
        yield Path(request.save_embeddings), context_bytes(job)
    if request.save_latents is not None:
        yield Path(request.save_latents), latents
    if request.state is not None and request.latents is None:
        yield Path(request.state), 2 * (3 * latents + context_bytes(job))  # the new one is written beside the last


def write_beside(path: str | Path, write: Callable[[Any], object]) -> Iterator[Event]:
    """Write a file that the clip does not need: what prevents it is a warning."""
    try:
        write(path)
    except (Ltx2Error, OSError) as error:
        why = error.why if isinstance(error, Ltx2Error) else reason(error)
        yield Warned(f"{path} was not written: {why}")
