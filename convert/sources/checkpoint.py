"""Opens sources and recognises them by their content, never by their name alone: a file by its tensors, a folder by its
files."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ltx2.convert.names.release import recognise_releases
from ltx2.convert.names.rules import prefixed
from ltx2.convert.sources.ggufmodel import read_gguf
from ltx2.convert.sources.lora import check_lora, recognise_lora
from ltx2.convert.sources.ours import check_is_ours
from ltx2.convert.sources.source import AGAIN, GEMMA, Source, read_json
from ltx2.convert.sources.textencoder import holds_text_files, text_encoder
from ltx2.convert.sources.textmodels import check_text_model
from ltx2.convert.tensors.gguf import GgufFile, is_gguf
from ltx2.runtime.errors import CheckpointError, InputError, UnsupportedError, reason
from ltx2.runtime.files.jsonfile import parse_object
from ltx2.runtime.files.paths import visible
from ltx2.runtime.files.tensors import FLOATS, NUMPY_DTYPES, TensorFile, open_tensorfile
from ltx2.runtime.model.layout import CONFIG, MANIFEST
from ltx2.runtime.model.lorafile import ADAPTER_NAMES

DIFFUSERS_INDEX = "model_index.json"
USE = "sources are published files; use the folder itself with ltx2 generate, or shrink it with ltx2 quantize"
# Some tensor's name contains the pattern, and the configuration has the key, if one is named: the file is of this kind.
# First match wins.
KINDS = (
    (ADAPTER_NAMES, "", "lora"),
    (r"^model\.", "gemma_version", "text_encoder"),
    (r"^(vae\.)?decoder\.det_stages\.", "vae", "diffusion_vae"),
    (r"^(model\.)?(language_model\.)?(model\.)?(embed_tokens|layers\.\d+\.(self_attn|mlp))\.", "", GEMMA),
    (r"^(language_model|model\.language_model|(model\.)?(vision_tower|multi_modal_projector))\.", "", GEMMA),
    (r"^(model\.diffusion_model|text_embedding_projection|vae|audio_vae|vocoder|duration_head)\.", "", "checkpoint"),
    (r"^((video|audio)_embeddings_connector|transformer_blocks\.\d+\.audio_attn1)\.", "", "checkpoint"),
    (r"^(encoder|decoder|per_channel_statistics)\.", "vae", "checkpoint"),
    (r"^upsampler\.", "", "upscaler"),
)
# Special storage: a dtype that only it has, or a pattern in tensor names; first match wins.
STORAGES = (
    ("FP8 (E5M2)", "F8_E5M2", ""),
    ("NVFP4", "F4", r"\.weight_scale_2$"),
    ("bitsandbytes", "", r"\.absmax$|bitsandbytes__"),
    ("GPTQ or AWQ", "", r"\.qweight$|\.weight_packed$"),
    ("int8", "I8", ""),
    ("MXFP8", "F8_E8M0", ""),
    ("FP8 (E4M3)", "F8_E4M3", r"\.scale_weight$"),
    ("MLX-quantized", "U32", r"\.scales$"),
    ("DoRA", "", r"\.dora_scale$|\.lora_magnitude_vector"),
)
BYTES = "U8"  # the dtype of tokenizers and other files in tensors
# Converted, or refused by a tensor's name (tensors/scales.py).
CONVERTED_STORAGES = ("NVFP4", "int8", "MXFP8", "FP8 (E4M3)", "FP8 (E5M2)")
# Storage that is not converted -> why, and the alternative.
REFUSED_STORAGES = {
    "MLX-quantized": ("another tool has quantized it for MLX, under names of its own", "use the file as published"),
    "": (
        "bf16, f16, f32, FP8, MXFP8, NVFP4 and int8 weights are converted",
        "use the bf16 file of the same model",
    ),
}


def open_sources(paths: Iterable[Path]) -> list[Source]:
    """Open files and folders (headers only).

    Raises CheckpointError for malformed, incomplete or unknown files, UnsupportedError for published formats that
    this version does not convert, InputError when a path cannot be a source.
    """
    paths = list(paths)
    for path in paths:
        if path.is_dir():
            _check_folder(path)
        _check_part(path)
    beside = [path for path in paths if path.is_dir() and not _weights(path) and holds_text_files(path)]
    sources: list[Source] = []
    for path in paths:
        for source in recognise(path, beside) if path not in beside else ():
            check_source(source)
            if any(source.path.resolve() == other.path.resolve() for other in sources):
                raise InputError(f"{source.path} is given twice", "each source is converted once", "name it once")
            sources.append(source)
    if not sources:
        why = f"{beside[0]} has no weights" if beside else "there is nothing to convert"
        raise InputError("no source is given", why, "name a checkpoint file or folder")
    return sources


def recognise(path: Path, beside: Iterable[Path] = ()) -> list[Source]:
    """The sources in a file or a folder, whether this version converts them or not. `kind` is empty for a foreign file.
    `beside` may hold a text encoder's configuration and tokenizer.

    Raises as `open_sources`.
    """
    if path.is_dir() and not _weights(path):
        _check_folder(path)
        why = "it has no .safetensors or .gguf files"
        raise CheckpointError(f"{path} holds no checkpoint", why, "name a file or its folder")
    paths = _weights(path) if path.is_dir() else [path]
    files = [read_gguf(file) if is_gguf(file) else open_tensorfile(file) for file in paths]
    kinds = {file.path: _kind(file) for file in files}
    language = [file for file in files if kinds[file.path] == GEMMA]
    shards = [file for file in language if not isinstance(file, GgufFile)]  # a GGUF is a whole model
    found = [text_encoder(path, shards, beside)] if shards else []
    found += [text_encoder(file.path, [file], beside) for file in language if file not in shards]
    return found + [_recognised(file, kinds[file.path]) for file in files if file not in language]


def described_source(file: TensorFile) -> Source:
    """The source of a file's header alone; the file itself is not read."""
    return _recognised(file, _kind(file))


def check_source(source: Source) -> None:
    """Raises CheckpointError, InputError or UnsupportedError for a recognised source that cannot be converted."""
    for file in source.files:
        check_lora(file) if source.kind == "lora" else _check_storage(file, source.kind)
    _check_kind(source)


def special_storage(file: TensorFile) -> str | None:
    """The name of a file's quantized or otherwise special storage; None for plain bf16, f16 and f32."""
    if isinstance(file, GgufFile):
        return f"GGUF ({', '.join(file.block_types)})" if file.block_types else None
    dtypes, names = {t.dtype for t in file.tensors.values()}, "\n".join(file.tensors)
    for name, dtype, pattern in STORAGES:
        if dtype in dtypes or (pattern and re.search(pattern, names, re.MULTILINE)):
            return name
    return ", ".join(sorted(dtypes - {BYTES, *FLOATS.values()})) or None


def _weights(folder: Path) -> list[Path]:
    return sorted([*visible(folder, "*.safetensors"), *visible(folder, "*.gguf")])


def _check_folder(path: Path) -> None:
    """Refuse a model folder, ours or diffusers', and one network of diffusers'."""
    if (path / MANIFEST).is_file():
        raise InputError(f"{path} is already a model folder", f"it has an {MANIFEST}", USE)
    config = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    if (path / DIFFUSERS_INDEX).is_file() or "_diffusers_version" in config:
        raise UnsupportedError(
            f"{path} is a model laid out for diffusers, or one network of it",
            "its tensors have other names; ltx2 converts the checkpoints as Lightricks publishes them",
            "name the .safetensors file as Lightricks publishes it",
        )


def _check_part(path: Path) -> None:
    """Refuse one network of our model folder, and a file of it; a text encoder is a source wherever it stands."""
    part = (path if path.is_dir() else path.parent).absolute()
    model = next((folder for folder in part.parents[:2] if (folder / MANIFEST).is_file()), None)
    if model is not None and (part / CONFIG).is_file() and part.name != "text_encoder":
        raise InputError(f"{path} is one network of a model", f"{model} is the model folder, converted already", USE)


def _config(file: TensorFile) -> dict[str, Any]:
    """The file's own configuration; empty for files without one (LoRAs, Gemma shards)."""
    try:
        embedded = (parse_object(file.metadata.get(key, "{}")) for key in ("config", "gemma_config"))
        return next(filter(None, embedded), {})
    except ValueError as error:
        raise CheckpointError(f"{file.path.name} has an unreadable configuration", reason(error), AGAIN) from error


def _kind(file: TensorFile) -> str:
    config, names = _config(file), "\n".join(file.tensors)
    found = (kind for pattern, key, kind in KINDS if (not key or key in config) and re.search(pattern, names, re.M))
    kind = next(found, "")
    spatial, temporal = bool(config.get("spatial_upsample")), bool(config.get("temporal_upsample"))
    if kind != "upscaler" or spatial == temporal:
        return kind
    return "spatial_upscaler" if spatial else "temporal_upscaler"


def _recognised(file: TensorFile, kind: str) -> Source:
    config = _config(file)
    if kind == "lora":
        found = recognise_lora(file, config)
    else:
        published = {prefixed(name): tensor for name, tensor in file.tensors.items()}
        found = recognise_releases(replace(file, tensors=published), config)
    return Source(file.path, kind, (file,), config, found)


def _check_storage(file: TensorFile, kind: str) -> None:
    """Refuse by name weights that can neither be kept nor decoded exactly."""
    if isinstance(file, GgufFile):
        return  # what cannot be decoded was refused when it was opened
    name = special_storage(file)
    if name is not None and name not in CONVERTED_STORAGES and (kind, name) != (GEMMA, "MLX-quantized"):
        refusal = REFUSED_STORAGES.get(name, REFUSED_STORAGES[""])
        raise UnsupportedError(f"{file.path.name} holds {name} weights", *refusal)
    foreign = next((tensor for tensor in file.tensors.values() if tensor.dtype not in NUMPY_DTYPES), None)
    if foreign is not None:
        why = f"ltx2 reads {', '.join(NUMPY_DTYPES)}; {foreign.name} is the first of another type"
        raise UnsupportedError(f"{file.path.name} holds {foreign.dtype} values", why, "use the file as published")


def _check_kind(source: Source) -> None:
    name, file = source.path.name, source.files[0]
    if source.kind == "upscaler":
        raise CheckpointError(
            f"{name} is not a usable upscaler",
            "its metadata does not say whether it upscales space or time",
            "use the upscaler as published; its metadata holds the configuration",
        )
    blocks = [key for key in file.tensors if re.match(r"(model\.diffusion_model\.)?transformer_blocks\.0\.", key)]
    if source.kind in ("checkpoint", "") and blocks and not any("audio" in key for key in file.tensors):
        why = "it is the older model without sound, whose networks are others"
        raise UnsupportedError(f"{name} is an LTX-Video checkpoint", why, "use one of LTX-2: ltx2 download --list")
    if not source.kind:
        check_is_ours(file)
        if any(re.match(r"(shared|encoder\.embed_tokens|encoder\.block)\b", key) for key in file.tensors):
            check_text_model(source.path, {}, file.tensors)
        tensors = sorted(file.tensors)
        raise CheckpointError(
            f"{name} is not an LTX-2 file",
            f"its {len(tensors)} tensors ({', '.join(tensors[:3])}, ...) belong to no known network",
            "name an LTX-2 checkpoint, upscaler or LoRA, or a Gemma 3 folder",
        )
