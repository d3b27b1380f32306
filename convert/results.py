"""Files that ltx2 has made and that are no sources: clips and sounds with their settings, the records beside them,
receipts of benchmarks, and the files of a model folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ltx2.convert.sources.source import read_json
from ltx2.runtime.errors import MediaError
from ltx2.runtime.files.foreign import foreign_kind
from ltx2.runtime.files.jsonfile import parse_object, read_object
from ltx2.runtime.generate.records.sidecar import is_sidecar, sidecar_path
from ltx2.runtime.media.source import count_packets, media_facts, read_comment
from ltx2.runtime.model.layout import MANIFEST, ModelFolder

MADE = ("request", "model")  # keys of a record: the options, and the model that made it
RECEIPT = ("suite", "created", "machine")


def result(path: Path) -> dict[str, Any]:
    """`kind` and facts of a media file, a record or a receipt; empty for other files. Raises InputError for a media
    file that cannot be read."""
    foreign = (foreign_kind(path) or ("",))[0]
    if foreign in ("is a video", "is a sound"):
        return _media(path) | _settings(path)
    if foreign != "is a JSON file":
        return {}
    data = read_json(path)
    if "request" in data:
        return {"kind": "sidecar"} | _made(data)
    if isinstance(data.get("kind"), str) and isinstance(data.get("machine"), dict):
        return {"kind": "receipt", "of": data["kind"]} | {name: data[name] for name in RECEIPT if name in data}
    return {}


def _media(path: Path) -> dict[str, Any]:
    facts = media_facts(path)
    sound = {"sound_rate": facts.rate or None}
    if not facts.width:
        return {"kind": "sound"} | sound
    picture = {"width": facts.width, "height": facts.height, "frames": count_packets(path), "fps": facts.fps}
    return {"kind": "clip"} | picture | sound


def _settings(path: Path) -> dict[str, Any]:
    """The settings in a clip, else those in the record beside it; empty where neither has any of ours."""
    try:
        return _made(parse_object(read_comment(path)))
    except (ValueError, MediaError):
        beside = sidecar_path(path)
        return _made(read_object(beside)) if is_sidecar(beside) else {}


def _made(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in MADE if isinstance(record.get(name), dict)}


def component(path: Path) -> tuple[ModelFolder, str] | None:
    """The model folder that a file is a part of, and its component. Raises ModelFolderError for a folder that is not
    usable."""
    for folder in path.absolute().parents[1:3]:
        name = path.absolute().parent.relative_to(folder).as_posix()
        if (folder / MANIFEST).is_file() and name in (opened := ModelFolder.open(folder)).manifest.components:
            return opened, name
    return None
