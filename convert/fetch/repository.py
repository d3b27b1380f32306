"""Model folders that others have published: repositories on the hub with an ltx2.json, which lists their files."""

from collections.abc import Sequence
from pathlib import Path

from ltx2.convert.fetch import hub
from ltx2.convert.fetch.catalogue import HUB, HubFile, Published, catalogue
from ltx2.convert.fetch.transfer import BrokenConnectionError
from ltx2.runtime.errors import DownloadError, reason
from ltx2.runtime.events import Downloaded
from ltx2.runtime.files.paths import is_base_name
from ltx2.runtime.files.tensors import FileRecord
from ltx2.runtime.model.layout import MANIFEST, Manifest, ModelFolder

MANIFEST_BYTES = 4 << 20  # the largest that is read


def choose(names: Sequence[str]) -> tuple[Published, ...]:
    """The catalogue's files of some names, and the model folders of OWNER/NAME, which the hub is asked for; each once.

    Raises InputError for an unknown name, DownloadError for a repository that is no model folder or cannot be read.
    """
    chosen: dict[str, Published] = {}
    for name in names:
        found = [_shared(name)] if is_repository(name) else catalogue().choose([name])
        chosen |= {published.name: published for published in found}
    return tuple(chosen.values())


def is_repository(name: str) -> bool:
    """Whether a name is spelled OWNER/NAME."""
    owner, slash, own = name.partition("/")
    return bool(slash) and is_base_name(owner) and is_base_name(own)


def check_whole(chosen: Sequence[Published], weights: Path, done: Downloaded) -> None:
    """Compare fetched model folders with their own ltx2.json. Raises DownloadError for a file that was changed after
    its folder was written; only the card may be."""
    hashes = {Path(file.path): file.sha256 for file in done.files}
    for published in (published for published in chosen if is_repository(published.name)):
        folder = published.source(weights)
        for path, record in _records(ModelFolder.open(folder).manifest).items():
            if hashes.get(folder / path) != record.sha256:
                raise DownloadError(
                    f"{folder / path} is not the file that {MANIFEST} lists",
                    f"it was changed after its folder was written, or {published.name} is being replaced right now",
                    "try again later, or tell its owner",
                )


def _shared(name: str) -> Published:
    probe = _published(name, Manifest(None, None, "", {}))
    try:
        wanted = hub.ask(probe, probe.files[0], Path(MANIFEST))
    except hub.MissingError as error:
        fix = "if it holds a checkpoint: hf download, then ltx2 convert"
        raise DownloadError(f"{name} is not a model folder of ltx2", f"it has no {MANIFEST}", fix) from error
    try:
        if wanted.size > MANIFEST_BYTES:
            raise ValueError(f"it has {wanted.size} bytes")
        manifest = Manifest.from_json(b"".join(hub.read(wanted, (0, wanted.size))).decode())
    except (ValueError, BrokenConnectionError) as error:
        raise DownloadError(
            f"{MANIFEST} of {name} cannot be read", reason(error), "try again, or update ltx2"
        ) from error
    return _published(name, manifest)


def _published(name: str, manifest: Manifest) -> Published:
    card = [HubFile(manifest.card.name, manifest.card.size, exact=False)] if manifest.card else []
    files = [HubFile(path, record.size) for path, record in _records(manifest).items()]
    return Published(
        name, manifest.release or "", name, name.partition("/")[2], "a model folder", f"{HUB}/{name}", "its own terms",
        gated=False, files=(HubFile(MANIFEST, 0, exact=False), *card, *files), is_folder=True,
    )  # fmt: skip


def _records(manifest: Manifest) -> dict[str, FileRecord]:
    return {f"{name}/{file.name}": file for name, record in manifest.components.items() for file in record.files}
