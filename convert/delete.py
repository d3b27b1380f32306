"""Removes sources whose model folder is complete: only what was given, and only after the folder was verified."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ltx2.convert.plan.check import missing_of_model
from ltx2.convert.plan.entries import Plan
from ltx2.convert.verify import verify
from ltx2.runtime.errors import InputError
from ltx2.runtime.events import Event, Warned
from ltx2.runtime.files.tensors import FileRecord, TensorFile
from ltx2.runtime.model.layout import CONFIG, INDEX, ModelFolder


@dataclass(frozen=True)
class SourcesDeleted(Event):
    """Last event: the files that were removed, and the disk they have freed."""

    files: tuple[str, ...]
    bytes: int


def removable(plan: Plan, given: Iterable[Path]) -> list[Path]:
    """The plan's sources and the files beside them that went into the model (configuration, tokenizer, index), as far
    as they lie in what was `given` and are no links."""
    roots = [path.absolute() for path in given]
    found = [source.path for source in plan.sources if isinstance(source, TensorFile)]
    found += [path for component in plan.components.values() for path in component.companions]
    found += [own for path in found for name in (CONFIG, INDEX) if (own := path.parent / name).is_file()]
    here = [path.absolute() for path in found if not path.is_symlink()]
    return sorted({path for path in here if any(root in (path, *path.parents) for root in roots)})


def check_deletion(plan: Plan) -> None:
    """Raises InputError for a model that would need the same sources once more to become whole."""
    if missing := missing_of_model(plan):
        why = f"the model has no {', '.join(missing)}, and to add that takes all sources again"
        raise InputError(
            "the sources are still needed", why, "name the file or folder of what it lacks too, or keep the sources"
        )


def delete_sources(plan: Plan, given: Iterable[Path], model: Path) -> Iterator[Event]:
    """Verify the finished `model`, then remove the sources it was made from; the last event is SourcesDeleted.

    Folders that are empty then go too. Raises VerificationError, and then removes nothing; InputError for a file that
    is not the one that was converted.
    """
    given = list(given)
    yield from verify(model)
    files = removable(plan, given)
    _check_same(plan, ModelFolder.open(model).manifest.sources)
    size = sum(path.stat().st_size for path in files)
    for path in files:
        path.unlink()
    for folder in (path for path in given if path.is_dir() and not path.is_symlink() and not any(path.iterdir())):
        folder.rmdir()
    if kept := [str(path) for path in given if path.exists() or path.is_symlink()]:
        yield Warned(f"not removed, or not whole: {', '.join(kept)} (links, and files that no network was made of)")
    yield SourcesDeleted(tuple(map(str, files)), size)


def _check_same(plan: Plan, records: Iterable[FileRecord]) -> None:
    """Raises InputError when a source has another size than the one that became the model."""
    sizes = {(record.name, record.size) for record in records}
    for source in (source for source in plan.sources if isinstance(source, TensorFile)):
        if (source.path.name, source.path.stat().st_size) not in sizes:
            what = f"{source.path} has changed since it was converted"
            raise InputError(what, "it is not what the model was made of", "look at it, and remove it yourself")
