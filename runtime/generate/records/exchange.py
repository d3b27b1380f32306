"""The tensor files users exchange with other engines: noise, latents, embeddings. All float32 safetensors, channels
first, batch 1."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from ltx2.runtime.errors import InputError, listed
from ltx2.runtime.files.atomic import Claim
from ltx2.runtime.files.paths import check_output
from ltx2.runtime.files.tensors import FORMAT, TensorFile, open_tensorfile, write_tensorfile
from ltx2.runtime.sampling.guidance import NEGATIVE, TEXT
from ltx2.runtime.sampling.latents import AUDIO_FREQUENCIES
from ltx2.runtime.streams import Streams

LATENTS, EMBEDDINGS = "latents", "embeddings"  # what a file says that it holds
MOST_BYTES = 10**9  # of one tensor; a minute of 4K has 0.75 GB of latents
MOST_NOISE = 10**12  # its shape is compared first; a canvas for pixels is larger than latents


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, mx.array],
    metadata: Mapping[str, str] | None = None,
    claim: Claim | None = None,
) -> None:
    """Write tensors of any shape as float32; the file appears under its name only when complete."""
    check_output(path)
    values = {name: ("F32", np.array(value.astype(mx.float32))) for name, value in tensors.items()}
    write_tensorfile(Path(path), values, metadata or {}, claim)


def _opened(path: str | Path) -> TensorFile:
    if not Path(path).is_file():
        raise InputError(f"cannot read {path}", "there is no such file", "check the path")
    return open_tensorfile(Path(path))


def read_tensors(path: str | Path, names: tuple[str, ...], most: int = MOST_BYTES) -> dict[str, mx.array]:
    """The named float32 tensors, of any shape. Raises InputError when one is missing, of another dtype, larger than
    `most` bytes, or not finite."""
    file, tensors = Path(path), _opened(path)
    result = {}
    for name in names:
        if name not in tensors.tensors:
            have = listed(sorted(tensors.tensors)) or "nothing"
            raise InputError(f"{file.name} has no tensor {name!r}", f"it holds {have}", "use a file of the right kind")
        if tensors.tensors[name].dtype != "F32":
            why = f"it is {tensors.tensors[name].dtype}"
            raise InputError(f"{name} in {file.name} is not float32", why, "save the tensors as float32")
        if (size := tensors.tensors[name].nbytes) > most:
            why = f"it has {size / 1e9:.3g} GB, and no clip needs more than {most / 1e9:g}"
            raise InputError(f"{name} in {file.name} is too large", why, "use a file of the right kind")
        values = np.array(tensors.array(name))
        if not np.isfinite(values).all():
            why = f"{name} holds NaN or infinite values"
            raise InputError(f"{file.name} is damaged", why, "make the file again")
        result[name] = mx.array(values)
    return result


def check_noise(path: str | Path, draws: Mapping[str, tuple[int, ...]]) -> None:
    """A noise file has all tensors that a run draws, by name and shape. Raises InputError when one is missing, unknown
    or misshapen, or has other faults that `read_tensors` finds."""
    file = _opened(path)
    if unknown := sorted(file.tensors.keys() - draws.keys()):
        why = f"this run draws {', '.join(draws) or 'no noise'}"
        raise InputError(f"{file.path.name} holds {unknown[0]}, which this run does not draw", why, "leave it out")
    for name, shape in draws.items():
        if name in file.tensors:
            _check_shape(path, name, file.tensors[name].shape, shape)
        read_noise(path, name)


def read_noise(path: str | Path, name: str) -> mx.array:
    """One draw of a noise file with all its rows, in the shape of the latents that it is for."""
    return read_tensors(path, (name,), MOST_NOISE)[name]


def read_latents(path: str | Path, channels: int, audio_channels: int | None) -> Streams[mx.array]:
    """`video` (1, channels, F, H, W) and `audio` (1, audio_channels, T, 16); without audio_channels the video alone."""
    tensors = read_tensors(path, ("video",) if audio_channels is None else ("video", "audio"))
    video, audio = tensors["video"], tensors.get("audio")
    _check_shape(path, "video", video.shape, (1, channels, *(video.shape[2:] if video.ndim == 5 else (1, 1, 1))))
    if audio is not None:
        shape = (1, audio_channels or 0, audio.shape[2] if audio.ndim == 4 else 1, AUDIO_FREQUENCIES)
        _check_shape(path, "audio", audio.shape, shape)
    return Streams(video, audio)


def write_latents(path: str | Path, latents: Streams[mx.array], fps: float, claim: Claim | None = None) -> None:
    """Write the streams that exist, (1, C, F, H, W) and (1, A, T, 16), and the clip's frames per second."""
    write_tensors(path, dict(latents.items()), {FORMAT: LATENTS, "fps": f"{fps:g}"}, claim)


def read_embeddings(
    path: str | Path, widths: Streams[int], prompts: Sequence[str] = (TEXT,)
) -> dict[str, Streams[mx.array]]:
    """The connectors' outputs by the name of their prompt, (1, tokens, width) each, of these prompts."""
    tensors = read_tensors(path, tuple(_name(prompt, stream) for prompt in prompts for stream, _ in widths.items()))
    for name, value in tensors.items():
        width = widths.get(name.split("_")[-2])
        if value.ndim != 3 or value.shape[0] != 1 or value.shape[2] != width:
            why = f"its shape is {list(value.shape)}, this model needs [1, tokens, {width}]"
            raise InputError(f"{name} in {Path(path).name} cannot be used", why, "use a file from --save-embeddings")
    return contexts_from(tensors)


def write_embeddings(path: str | Path, contexts: Mapping[str, Streams[mx.array]]) -> None:
    """Write contexts (1, tokens, width) for `read_embeddings`."""
    write_tensors(path, context_tensors(contexts), {FORMAT: EMBEDDINGS})


def context_tensors(contexts: Mapping[str, Streams[mx.array]]) -> dict[str, mx.array]:
    """video_context, audio_context and, of a negative prompt, negative_video_context, negative_audio_context; each
    (1, tokens, width)."""
    return {_name(prompt, stream): c for prompt, streams in contexts.items() for stream, c in streams.items()}


def contexts_from(tensors: Mapping[str, mx.array]) -> dict[str, Streams[mx.array]]:
    """Inverse of `context_tensors`; other tensors are left out."""
    found = {p: Streams(*(tensors.get(_name(p, stream)) for stream in ("video", "audio"))) for p in (TEXT, NEGATIVE)}
    return {prompt: streams for prompt, streams in found.items() if any(True for _ in streams.items())}


def _name(prompt: str, stream: str) -> str:
    return f"{stream}_context" if prompt == TEXT else f"{prompt}_{stream}_context"


def _check_shape(path: str | Path, name: str, has: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if has != shape:
        raise InputError(
            f"{name} in {Path(path).name} has the wrong shape",
            f"it is {list(has)}, this model and size need {list(shape)}",
            "use a file made for the same model, size, frame count and frame rate",
        )
