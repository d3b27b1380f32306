"""A Gemma 3 as a source, in any wrapping: Google's folder, one file, diffusers' or our own `text_encoder`, one of MLX.

Weights, configuration and tokenizer may stand together or apart: beside each other, in the folder `tokenizer` next to
theirs, inside the file, or in another source that holds only these."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ltx2.convert.names.release import recognise_releases
from ltx2.convert.sources.ggufmodel import header_config
from ltx2.convert.sources.source import AGAIN, GEMMA, Source, read_json
from ltx2.convert.sources.textmodels import check_text_model, shape_config, text_kind
from ltx2.convert.tensors.gguf import GgufFile
from ltx2.runtime.errors import CheckpointError, reason
from ltx2.runtime.files.paths import check_regular, is_base_name
from ltx2.runtime.files.tensors import TensorFile
from ltx2.runtime.model.layout import CONFIG, INDEX

TOKENIZER, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
TOKENIZER_FILES = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "special_tokens_map.json", TOKENIZER, SENTENCEPIECE, "tokenizer_config.json",
)  # fmt: skip
SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")


def text_encoder(path: Path, files: Sequence[TensorFile], beside: Iterable[Path]) -> Source:
    """The source of a language model's files, all those in the folder `path` or the one file `path`. Folders `beside`
    may hold its configuration and tokenizer.

    Raises CheckpointError when a part is missing or malformed, UnsupportedError for another model.
    """
    home = path if path.is_dir() else path.parent
    _check_whole(home, files, whole=path.is_dir())
    places = [home, home.parent / "tokenizer", *beside]
    companions = _companions(places)
    config = next(filter(None, (_config(place) for place in (home, *beside))), {})
    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    check_text_model(path, config, tensors)
    if not config:
        stated = header_config(files[0]) if isinstance(files[0], GgufFile) else {}
        config = {"model_type": f"{text_kind(tensors)}_text", **shape_config(tensors), **stated}
    return Source(path, GEMMA, tuple(files), config, recognise_releases(files[0], config), companions)


def holds_text_files(folder: Path) -> bool:
    """Whether a folder has at least a tokenizer or a configuration."""
    return any((folder / name).is_file() for name in (CONFIG, TOKENIZER, SENTENCEPIECE))


def _config(folder: Path) -> Mapping[str, Any] | None:
    """The folder's config.json if it is a language model's, else None."""
    path = folder / CONFIG
    config = read_json(path) if path.is_symlink() or path.exists() else {}
    return config if isinstance(config.get("model_type"), str) else None


def _companions(places: Iterable[Path]) -> tuple[Path, ...]:
    """The tokenizer's files, by name: all of the first place that has one, and what only others have."""
    found: dict[str, Path] = {}
    for place in places:
        here = [place / name for name in TOKENIZER_FILES if (place / name).exists() or (place / name).is_symlink()]
        tokenizer = found.keys() & {TOKENIZER, SENTENCEPIECE}
        for path in () if tokenizer else here:
            try:
                check_regular(path)  # no link to nowhere, as a part of a download leaves it
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read", reason(error), AGAIN) from error
            found.setdefault(path.name, path)
    return tuple(found[name] for name in sorted(found))


def _check_whole(folder: Path, files: Sequence[TensorFile], whole: bool) -> None:
    """Raises CheckpointError that names a missing shard, and for an index that does not fit. Unless `whole`, the folder
    holds other files too, and its index may be theirs."""
    index = folder / INDEX
    here = {file.path.name for file in files}
    where: dict[str, str] = {}
    if index.is_symlink() or index.exists():
        where = read_json(index).get("weight_map") or {}
        if not isinstance(where, dict) or not where or not all(map(is_base_name, where.values())):
            why = "its weight_map does not name a file of this folder for every tensor"
            raise CheckpointError(f"{index} cannot be used", why, AGAIN)
        if not whole and not here & set(where.values()):
            where = {}  # of other files
    names = here | set(where.values())
    for name in here:
        if match := SHARD.fullmatch(name):
            names |= {f"{match[1]}-{n:05d}-of-{match[2]}.safetensors" for n in range(1, int(match[2]) + 1)}
    for name in sorted(names - here):
        if not (folder / name).is_file():
            why = f"the model consists of {len(names)} files"
            raise CheckpointError(f"{folder / name} is missing", why, "download the missing file")
    if names - here:
        why = f"the model consists of {len(names)} files"
        raise CheckpointError(f"{sorted(here)[0]} is a part of a text encoder", why, f"name its folder: {folder}")
    if where:
        stored = {name: file.path.name for file in files for name in file.tensors}
        wrong = sorted(name for name in where.keys() | stored.keys() if where.get(name) != stored.get(name))
        if wrong:
            why = f"{len(wrong)} tensors are elsewhere than it says, the first is {wrong[0]}"
            raise CheckpointError(f"{index} does not fit the files", why, "download the whole folder again")
