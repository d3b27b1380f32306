"""Sources: published files and folders, opened and recognised by their content, never by their name alone."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltx2.convert.names.release import Release, recognise_releases
from ltx2.convert.sources.foreign import check_is_tensorfile
from ltx2.convert.sources.lora import check_lora, recognise_lora
from ltx2.convert.sources.textmodels import check_text_config, check_text_model
from ltx2.runtime.errors import CheckpointError, InputError, UnsupportedError
from ltx2.runtime.files.jsonfile import parse_object, read_object
from ltx2.runtime.files.paths import check_regular, is_base_name
from ltx2.runtime.files.tensors import FLOATS, NUMPY_DTYPES, TensorFile, open_tensorfile
from ltx2.runtime.model.layout import CONFIG, INDEX, MANIFEST
from ltx2.runtime.model.lorafile import ADAPTER_NAMES

TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "special_tokens_map.json", TOKENIZER, "tokenizer.model", "tokenizer_config.json",
)  # fmt: skip
DIFFUSERS_INDEX = "model_index.json"
# Some tensor's name contains the pattern, and the configuration has the key, if one is named: the file is of this kind.
# First match wins.
KINDS = (
    (ADAPTER_NAMES, "", "lora"),
    (r"^model\.", "gemma_version", "text_encoder"),
    (r"^language_model\.model\.|^model\.language_model\.|^vision_tower\.", "", "gemma"),
    (r"^(vae\.)?decoder\.det_stages\.", "vae", "diffusion_vae"),
    (r"^(model\.diffusion_model|text_embedding_projection|vae|audio_vae|vocoder|duration_head)\.", "", "checkpoint"),
    (r"^(encoder|decoder|per_channel_statistics)\.", "vae", "checkpoint"),
    (r"^upsampler\.", "", "upscaler"),
)
# Special storage: a dtype that only it has, or a pattern in tensor names; first match wins.
STORAGES = (
    ("FP8 (E5M2)", "F8_E5M2", ""),
    ("NVFP4", "F4", r"\.weight_scale_2$"),
    ("int8", "I8", ""),
    ("FP8 (E4M3)", "F8_E4M3", r"\.scale_weight$"),
    ("MLX-quantized", "U32", r"\.scales$"),
    ("DoRA", "", r"\.dora_scale$|\.lora_magnitude_vector"),
)
BYTES = "U8"  # of tokenizers and other things that are no weights
CONVERTED_STORAGES = ("NVFP4", "FP8 (E4M3)", "FP8 (E5M2)")  # or refused by name of the tensor (convert/scales.py)
# What is not converted: why, and what to use instead.
REFUSED_STORAGES = {
    "int8": (
        "ComfyUI's int8 weights are rotated before they are rounded (convrot), a form that MLX does not have; any "
        "other would lose precision a second time",
        "use the bf16 file of the same model, or the NVFP4 one if there is one; --bits 8 makes it as small",
    ),
    "MLX-quantized": ("it was quantized for MLX already, by another tool", "use the file as it was published"),
}
VARIANTS = ("dev", "distilled")


@dataclass(frozen=True, eq=False)
class Source:
    """One recognised source. `kind` names its rules (convert/rules.py); `releases` are those it may belong to, none
    where nothing tells; `companions` are files copied along."""

    path: Path
    kind: str
    files: tuple[TensorFile, ...]
    config: Mapping[str, Any]
    releases: tuple[Release, ...] = ()
    companions: tuple[Path, ...] = ()

    @property
    def release(self) -> Release | None:
        """The release it belongs to, where that is certain."""
        return self.releases[0] if len(self.releases) == 1 else None

    def tensor_count(self) -> int:
        """Number of tensors in all its files."""
        return sum(len(file.tensors) for file in self.files)


def open_sources(paths: Iterable[Path]) -> list[Source]:
    """Open files and folders (headers only).

    Raises CheckpointError for malformed, incomplete or unknown files, UnsupportedError for published formats that
    this version does not convert, InputError when a path cannot be a source.
    """
    sources: list[Source] = []
    for path in paths:
        found = _open_folder(path) if path.is_dir() else [_open_file(path)]
        for source in found:
            if any(source.path.resolve() == other.path.resolve() for other in sources):
                raise InputError(f"{source.path} is given twice", "each source is converted once", "name it once")
            sources.append(source)
    if not sources:
        raise InputError("no source is given", "there is nothing to convert", "name a checkpoint file or folder")
    return sources


def variant_in_name(name: str) -> str | None:
    """`dev` or `distilled` when exactly one of them is a word of the file's name."""
    words = re.split(r"[^a-z]+", name.lower())
    found = [variant for variant in VARIANTS if variant in words]
    return found[0] if len(found) == 1 else None


def _open_folder(path: Path) -> list[Source]:
    if (path / MANIFEST).is_file():
        raise InputError(
            f"{path} is already a model folder",
            f"it has an {MANIFEST}",
            "use it with ltx2 generate, or shrink it with ltx2 quantize",
        )
    if (path / DIFFUSERS_INDEX).is_file():
        raise _diffusers(f"{path} is a model laid out for diffusers")
    if is_gemma_folder(path):
        source = gemma_source(path)
        check_source(source)
        return [source]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{path} holds no checkpoint",
            "it has neither safetensors files nor a config.json",
            "name the file, or the folder that holds it",
        )
    return [_open_file(file) for file in files]


def _open_file(path: Path) -> Source:
    source = recognise_file(path)
    check_source(source)
    return source


def check_source(source: Source) -> None:
    """Raises CheckpointError, InputError or UnsupportedError for a recognised source that cannot be converted."""
    for file in source.files:
        check_lora(file) if source.kind == "lora" else _check_storage(file)
    if not source.path.is_dir():
        _check_kind(source)


def recognise_file(path: Path) -> Source:
    """One file's kind and release, whether this version converts them or not. `kind` is empty for a foreign file.

    Raises CheckpointError for a malformed file, UnsupportedError for another format.
    """
    file = _open(path)
    config = _embedded(file, "config") or _embedded(file, "gemma_config")
    kind = _kind(file, config)
    found = recognise_lora(file, config) if kind == "lora" else recognise_releases(file, config)
    return Source(path, kind, (file,), config, found)


def _open(path: Path) -> TensorFile:
    check_is_tensorfile(path)
    return open_tensorfile(path)


def _embedded(file: TensorFile, key: str) -> dict[str, Any]:
    """The JSON object under a key of the file's metadata; empty where there is none (LoRAs, Gemma shards)."""
    try:
        return parse_object(file.metadata.get(key, "{}"))
    except ValueError as error:
        raise CheckpointError(
            f"{file.path.name} has an unreadable configuration", str(error), "download the file again"
        ) from error


def _check_storage(file: TensorFile) -> None:
    """Refuse by name weights in a form that cannot be kept and not be unpacked without loss."""
    name = special_storage(file)
    if name is not None and name not in CONVERTED_STORAGES:
        why = "bf16, f16, f32, FP8 and NVFP4 weights are converted", "use the bf16 file of the same model"
        raise UnsupportedError(f"{file.path.name} holds {name} weights", *REFUSED_STORAGES.get(name, why))
    foreign = next((tensor for tensor in file.tensors.values() if tensor.dtype not in NUMPY_DTYPES), None)
    if foreign is not None:
        raise UnsupportedError(
            f"{file.path.name} holds {foreign.dtype} values",
            f"ltx2 reads {', '.join(NUMPY_DTYPES)}; {foreign.name} is the first of another type",
            "use the file as it was published",
        )


def special_storage(file: TensorFile) -> str | None:
    """The name of a file's quantized or otherwise special storage; None for plain bf16, f16 and f32."""
    dtypes, names = {t.dtype for t in file.tensors.values()}, "\n".join(file.tensors)
    for name, dtype, pattern in STORAGES:
        if dtype in dtypes or (pattern and re.search(pattern, names, re.MULTILINE)):
            return name
    return ", ".join(sorted(dtypes - {BYTES, *FLOATS.values()})) or None


def _kind(file: TensorFile, config: Mapping[str, Any]) -> str:
    names = "\n".join(file.tensors)
    found = (kind for pattern, key, kind in KINDS if (not key or key in config) and re.search(pattern, names, re.M))
    kind = next(found, "")
    if kind != "upscaler":
        return kind
    spatial, temporal = bool(config.get("spatial_upsample")), bool(config.get("temporal_upsample"))
    if spatial == temporal:
        return kind
    return "spatial_upscaler" if spatial else "temporal_upscaler"


def _check_kind(source: Source) -> None:
    name = source.path.name
    if source.kind == "gemma":
        raise InputError(
            f"{name} is a part of a Gemma text encoder",
            "its configuration and tokenizer are separate files",
            f"name its folder instead: {source.path.parent}",
        )
    if source.kind == "upscaler":
        raise CheckpointError(
            f"{name} is not a usable upscaler",
            "its metadata does not say whether it upscales space or time",
            "use the upscaler as published; its metadata holds the configuration",
        )
    if not source.kind:
        check_text_model(source.path, source.files[0].tensors)
        tensors = sorted(source.files[0].tensors)
        raise CheckpointError(
            f"{name} is not an LTX-2 file",
            f"its {len(tensors)} tensors ({', '.join(tensors[:3])}, ...) belong to no known network",
            "name an LTX-2 checkpoint, upscaler or LoRA, or a Gemma 3 folder",
        )


def is_gemma_folder(path: Path) -> bool:
    """Whether the folder is laid out like a transformers model: weights beside a config.json."""
    return os.path.lexists(path / CONFIG)


def gemma_source(folder: Path) -> Source:
    """Open a Gemma 3 folder.

    Raises CheckpointError when a file is missing or malformed, UnsupportedError for another model.
    """
    config = read_json(folder / CONFIG)
    _check_layout(folder, config)
    check_text_config(folder, config)
    where = _weight_map(folder / INDEX) if os.path.lexists(folder / INDEX) else None
    files = tuple(_open(path) for path in _shards(folder, where))
    if where is not None:
        _check_index(folder, where, files)
    companions = tuple(folder / name for name in TOKENIZER_FILES if os.path.lexists(folder / name))
    _check_there(companions)
    return Source(folder, "gemma", files, config, recognise_releases(files[0], config), companions)


def _check_layout(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse one network's folder of a larger model, ours or diffusers'."""
    what = f"{folder} holds one network of a model"
    if (folder.parent / MANIFEST).is_file():
        raise InputError(what, f"{folder.parent} is the model folder, converted already", f"name {folder.parent}")
    if "_diffusers_version" in config:
        raise _diffusers(what)


def _diffusers(what: str) -> UnsupportedError:
    why = "it is laid out for diffusers, with other names; ltx2 converts the checkpoints as Lightricks publishes them"
    return UnsupportedError(what, why, "name the .safetensors file as Lightricks publishes it")


def _check_there(files: Iterable[Path]) -> None:
    """Raises CheckpointError for a link to nowhere, as a part of a download leaves it, or another thing that is no
    file."""
    for path in files:
        try:
            check_regular(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read", str(error), "download the file again") from error


def _weight_map(index: Path) -> dict[str, str]:
    """Which of the files beside the index holds a tensor. Raises CheckpointError when it does not say that."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(map(is_base_name, where.values())):
        raise CheckpointError(
            f"{index} cannot be used",
            "its weight_map does not name a file of this folder for every tensor",
            "download the file again",
        )
    return where


def _shards(folder: Path, where: Mapping[str, str] | None) -> list[Path]:
    """The weight files of a Gemma folder whose index, if it has one, says `where` each tensor is.

    Raises CheckpointError that names a missing one.
    """
    if where is not None:
        names = set(where.values())
    else:
        names = {path.name for path in folder.glob("model*.safetensors")}
        for name in tuple(names):
            if match := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.safetensors", name):
                stem, count = match.groups()
                names |= {f"{stem}-{n:05d}-of-{count}.safetensors" for n in range(1, int(count) + 1)}
    if not names:
        raise CheckpointError(f"{folder} has no weights", "it has no model*.safetensors", "download the whole folder")
    for name in sorted(names):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder / name} is missing", f"the model consists of {len(names)} files", "download the missing file"
            )
    return [folder / name for name in sorted(names)]


def _check_index(folder: Path, where: Mapping[str, str], files: tuple[TensorFile, ...]) -> None:
    stored = {name: file.path.name for file in files for name in file.tensors}
    wrong = sorted(name for name in where.keys() | stored.keys() if where.get(name) != stored.get(name))
    if wrong:
        raise CheckpointError(
            f"{folder / INDEX} does not fit the files",
            f"{len(wrong)} tensors are elsewhere than it says, the first is {wrong[0]}",
            "download the whole folder again",
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError when the file cannot be read or holds something else."""
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read", str(error), "download the file again") from error
