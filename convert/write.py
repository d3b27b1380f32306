"""Executes a plan: streams every tensor into a new model folder.

The folder grows under `<name>.partial` and takes its name when complete, so a killed run leaves nothing under the
final name and the same command continues it. Peak memory does not depend on the size of the files."""

import hashlib
import json
import shutil
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path

from ltx2 import __version__
from ltx2.convert.card import write_card
from ltx2.convert.output.files import PlannedFile, TextFile, component_files, main_dtype
from ltx2.convert.output.hashing import SourceHashes
from ltx2.convert.output.journal import JOURNAL, Partial, file_size, is_empty_folder, open_partial
from ltx2.convert.output.pieces import PIECE_BYTES
from ltx2.convert.output.stream import missing_bytes, stream
from ltx2.convert.plan.check import check_plan, check_tokenizer, incomplete_parts, missing_of_model
from ltx2.convert.plan.entries import Plan, plan_json
from ltx2.convert.sources.ggufmodel import loss
from ltx2.convert.tensors.gguf import GgufFile
from ltx2.runtime.errors import (
    CheckpointError,
    DoesNotFitError,
    InputError,
    ModelFolderError,
    NumericsError,
    UsageError,
)
from ltx2.runtime.events import Event, Warned, Written
from ltx2.runtime.files.atomic import PARTIAL, UNLOCKED, beside
from ltx2.runtime.files.paths import check_folder, check_room, write_failure
from ltx2.runtime.files.ranges import changed
from ltx2.runtime.files.tensors import FileRecord, TensorFile
from ltx2.runtime.model.layout import CARD, MANIFEST, ComponentRecord, Manifest, ModelFolder
from ltx2.runtime.model.origin import check_gemma

SHARD_GB = 5.0
RESERVE_BYTES = 16 << 20  # for folders, journal and manifest


@dataclass(frozen=True)
class WriteOptions:
    """The largest size of a weight file in GB (10^9 bytes), and whether a finished model may be replaced."""

    shard_gb: float = SHARD_GB
    force: bool = False


def write_plan(plan: Plan, out: Path, options: WriteOptions | None = None) -> Iterator[Event]:
    """Write the planned model folder to `out`; the last event is Written.

    Raises ModelFolderError when `out` holds something else, DoesNotFitError when the disk is too small, and what
    `check_plan` raises for a plan that does not fill its networks.
    """
    started = time.monotonic()
    options = options or WriteOptions()
    _check_options(plan, out, options)
    check_plan(plan)
    if any(isinstance(source, TensorFile) for source in plan.sources):  # what was converted before stays as it is
        check_tokenizer(plan)
    yield from _warnings(plan)
    files = [f for c in plan.components.values() for f in component_files(plan, c, int(options.shard_gb * 10**9))]
    if out.exists() and (yield from _already_there(plan, files, out, options)):
        (out / JOURNAL).unlink(missing_ok=True)  # a crash may have left it
        yield Written(str(out), _total(files), time.monotonic() - started, reused=True)
        return
    check_target(out, _total(files))
    try:
        with open_partial(unfinished(out), _fingerprint(plan, files)) as partial:
            if not partial.locked:
                yield Warned(UNLOCKED.format(out))
            try:
                _check_room(out, missing_bytes(files, partial))
            except DoesNotFitError:
                partial.abandon()
                raise
            try:
                yield from _fill(plan, files, partial)
            except (CheckpointError, NumericsError) as error:
                if not isinstance(error.__cause__, OSError):  # a disk may recover, a damaged source does not
                    partial.remove()
                raise
            _publish(partial, out, options.force)
    except OSError as error:
        raise write_failure(error, out) from error
    yield Written(str(out), _total(files), time.monotonic() - started)


def _warnings(plan: Plan) -> Iterator[Event]:
    """Of parts that generating will miss, and losses that nothing undoes."""
    text_encoder = plan.components.get("text_encoder")
    if text_encoder is not None:
        transformer = plan.components.get("transformer")
        if transformer is not None and (warning := check_gemma(transformer.config, text_encoder.config)):
            yield Warned(warning)
    for source in plan.sources:
        if isinstance(source, GgufFile) and (lost := loss(source)):
            yield Warned(lost)
    if missing := missing_of_model(plan):
        yield Warned(f"generating from a prompt also needs {', '.join(missing)}, which no source has")
    for part in incomplete_parts(plan):
        yield Warned(f"{part} is missing: it comes in another file of the release, which is not among the sources")


def _check_options(plan: Plan, out: Path, options: WriteOptions) -> None:
    if not 0 < options.shard_gb < inf:
        raise UsageError(f"--shard-size {options.shard_gb:g} is not possible", "files hold data", "use --shard-size 5")
    if out.name in ("", ".."):  # it gets its name when it is complete
        raise InputError(f"{out} has no name of its own", "the model is a new folder", "name it: -o MODEL")
    target = out.resolve()
    for path in {entry.file.path for entry in plan.entries}:
        if target in (path.resolve(), *path.resolve().parents):
            raise InputError(f"{out} holds the source {path.name}", "sources are never modified", "choose another -o")


def _already_there(
    plan: Plan, files: list[PlannedFile], out: Path, options: WriteOptions
) -> Generator[Event, None, bool]:
    """Whether `out` is this very model. Raises ModelFolderError when it is something else that must stay."""
    if is_empty_folder(out):
        return False
    if not (out / MANIFEST).is_file():
        raise ModelFolderError(
            f"{out} exists and is not a model folder", f"it has no {MANIFEST}", "choose another -o; it is not touched"
        )
    if options.force:
        return False
    difference = yield from _difference(plan, files, ModelFolder.open(out))
    if difference:
        raise ModelFolderError(
            f"{out} already holds a different model", difference, "choose another -o, or replace it with --force"
        )
    return True


def _difference(plan: Plan, files: list[PlannedFile], folder: ModelFolder) -> Generator[Event, None, str]:
    """What tells the folder from the plan, or an empty text. Sources are hashed only when all else is equal."""
    have = folder.manifest
    records = {f"{name}/{f.name}": f for name, record in have.components.items() for f in record.files}
    if records.keys() != {f.path for f in files}:
        return "it has other files"
    for file in files:
        path, record = folder.path / file.path, records[file.path]
        if record.size != file.size or file_size(path) != file.size:
            return f"{file.path} is another one or damaged"
        if isinstance(file, TextFile) and record.sha256 != hashlib.sha256(file.content).hexdigest():
            return f"{file.path} is another one"
    if _manifest(plan, files, records, have.sources) != replace(have, card=None):
        return "it was made with other options or another version of ltx2"
    named = [(s.name, s.size) if isinstance(s, FileRecord) else (s.path.name, s.size) for s in plan.sources]
    if named != [(s.name, s.size) for s in have.sources]:
        return "it was made from other sources"
    with SourceHashes(plan.sources, {}) as hashes:
        yield from hashes.wait()
        list(hashes.collect())
        return "" if hashes.records() == have.sources else "it was made from other sources"


def _fill(plan: Plan, files: list[PlannedFile], partial: Partial) -> Iterator[Event]:
    """Write all missing files, card and manifest last. Raises CheckpointError for a source that changed meanwhile."""
    before = _states(plan)
    sources = yield from stream(plan, files, partial)
    for path, state in _states(plan).items():
        if state != before[path]:
            raise changed(path, "another program wrote to it")
    (partial.path / CARD).unlink(missing_ok=True)  # a killed run may have left it
    write_card(ModelFolder(partial.path, _manifest(plan, files, partial.files, sources)))


def _manifest(
    plan: Plan, files: list[PlannedFile], records: dict[str, FileRecord], sources: tuple[FileRecord, ...]
) -> Manifest:
    components = {
        name: ComponentRecord(
            component.cls,
            tuple(records[f.path] for f in files if f.component == name),
            main_dtype(plan.moves(name)),
            component.quantization,
            component.statistics,
            component.method,
            component.fused,
        )
        for name, component in plan.components.items()
    }
    return Manifest(plan.release, plan.variant, __version__, components, sources, sizes=plan.sizes)


def _publish(partial: Partial, out: Path, force: bool) -> None:
    """Give the finished folder its name; only then remove the model that it replaces."""
    old = beside(out, ".replaced")
    if out.exists():
        if not (force or is_empty_folder(out)):
            raise ModelFolderError(
                f"{out} appeared while its model was written", "another program made it", "run the command again"
            )
        _remove_model(old)  # a crash may have left it
        out.rename(old)
    partial.finish(out)
    _remove_model(old)


def _remove_model(folder: Path) -> None:
    if (folder / MANIFEST).is_file() or is_empty_folder(folder):
        shutil.rmtree(folder)


def unfinished(out: Path) -> Path:
    """The path at which a model folder grows until it is complete."""
    return beside(out, PARTIAL)


def check_target(out: Path, size: int) -> None:
    """Check before any work that a folder of `size` bytes can be written to `out`.

    Raises InputError for links and for places that cannot be written, DoesNotFitError for a disk that is too small,
    unless a part is there already: writing checks the room for the rest.
    """
    if out.is_symlink():
        raise InputError(f"{out} is a link", f"it points to {out.readlink()}", "name the folder itself with -o")
    check_folder(out.absolute().parent, out)
    if not unfinished(out).exists():
        _check_room(out, size)


def _check_room(out: Path, needed: int) -> None:
    check_room((out.absolute().parent, needed + RESERVE_BYTES), else_=", or pack to fewer --bits")


def _states(plan: Plan) -> dict[Path, tuple[int, int]]:
    """Size and time of the last change of every source."""
    files = [*(entry.file for entry in plan.entries), *(file for file in plan.sources if isinstance(file, TensorFile))]
    states = {path: path.stat() for path in dict.fromkeys(file.path for file in files)}
    return {path: (state.st_size, state.st_mtime_ns) for path, state in states.items()}


def _fingerprint(plan: Plan, files: list[PlannedFile]) -> str:
    """Identifies a conversion: its plan, its files, and the state of its sources."""
    facts = [
        __version__, plan.release, plan.variant, dict(plan.sizes), plan_json(plan),
        [(f.path, f.size, f.content.hex() if isinstance(f, TextFile) else "") for f in files],
        [(str(path), *state) for path, state in _states(plan).items()],
        [PIECE_BYTES, *sorted({m.packing.piece_bytes for n in plan.components for m in plan.moves(n) if m.packing})],
        [asdict(s) for s in plan.sources if isinstance(s, FileRecord)],
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _total(files: list[PlannedFile]) -> int:
    return sum(f.size for f in files)
