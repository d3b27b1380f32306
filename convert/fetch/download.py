"""Download published files into the weights folder: ask the hub, check the free space, fetch in pieces so that an
interrupted download resumes, check the hub's hashes. Complete files are neither fetched nor read again."""

import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from ltx2.convert.fetch import hub
from ltx2.convert.fetch.catalogue import Published
from ltx2.convert.fetch.hub import UnreachableError, Wanted
from ltx2.convert.fetch.partfile import Hashing, PartFile, Records, Span
from ltx2.convert.fetch.transfer import Pacing, fetch
from ltx2.runtime.errors import DownloadError, InputError
from ltx2.runtime.events import BytesDone, Downloaded, DownloadPlanned, Event, FetchedFile, PlannedFile, Warned
from ltx2.runtime.files.atomic import PARTIAL, beside
from ltx2.runtime.files.paths import check_folder, check_room, free_bytes, write_failure

QUESTIONS = 8  # to the hub at once
MORE_BITS, LEAST_BITS = 3, 8  # per quantized weight, for scales and for layers that keep more bits


@dataclass(frozen=True)
class Options:
    """`model`: the folder that the files will be converted to, with `bits` if quantized; there must be room for it too.
    A dry run ends with its plan."""

    model: Path | None = None
    bits: int | None = None
    dry_run: bool = False
    pacing: Pacing = field(default_factory=Pacing)


def download(chosen: Sequence[Published], weights: Path, options: Options | None = None) -> Iterator[Event]:
    """Download files into the weights folder; the last event is Downloaded, or DownloadPlanned of a dry run.

    Raises DownloadError when the hub is not reached, refuses or lacks a file or sends a damaged one, DoesNotFitError
    when the disk is too small, InputError when the folder cannot be written or other files are in the way.
    """
    started = time.monotonic()
    options = options or Options()
    check_folder(weights, weights)
    records = Records(weights)
    wanted = yield from _ask_all(chosen, weights, records, options.dry_run)
    missing = yield from _missing(wanted, records)
    plan = _plan(wanted, missing, weights, options)
    yield plan
    check_room((weights, plan.missing), (options.model or weights, plan.converted))
    if options.dry_run:
        return
    try:
        yield from _check_unknown([file for file in wanted if file not in missing], records)
        yield from _fetch(missing, records, options.pacing)
    except OSError as error:
        raise write_failure(error, weights) from error
    yield Downloaded(tuple(_found(file, file in missing, records) for file in wanted), time.monotonic() - started)


def _ask_all(
    chosen: Sequence[Published], weights: Path, records: Records, dry_run: bool
) -> Generator[Event, None, list[Wanted]]:
    """The files on the hub. Where it is not reached, files known to be complete are enough, for a dry run any."""
    questions = [(p, file, weights / p.folder / file.path) for p in chosen for file in p.files]
    try:
        with ThreadPoolExecutor(QUESTIONS) as pool:
            return list(pool.map(hub.ask, *zip(*questions, strict=True)))
    except DownloadError as error:
        known = [records.find(target) for *_, target in questions]
        unreachable = isinstance(error, UnreachableError)
        if not dry_run and not (unreachable and all(known)):
            raise
        yield Warned(f"{error.what}: {error.why}; sizes are those last known")
        return [
            Wanted(published, file.path, target, found.size if found else file.bytes, found.etag if found else "")
            for (published, file, target), found in zip(questions, known, strict=True)
        ]


def _missing(wanted: Sequence[Wanted], records: Records) -> Generator[Event, None, list[Wanted]]:
    """The files to fetch. Raises InputError for a file here that we have no record of and that has another size."""
    missing = []
    for file in wanted:
        known = records.find(file.target)
        if not file.target.exists():
            missing.append(file)
        elif known and file.etag not in ("", known.etag):
            yield Warned(f"{file.target} has changed on the hub since it was downloaded; it is fetched again")
            missing.append(file)
        elif not known and file.etag and not (file.target.is_file() and file.target.stat().st_size == file.size):
            raise _another_file(file, f"its size is not the published {file.size} bytes")
    return missing


def _plan(wanted: Sequence[Wanted], missing: Sequence[Wanted], weights: Path, options: Options) -> DownloadPlanned:
    files = (PlannedFile(str(w.target), w.size, _part(w).held() if w in missing else w.size) for w in wanted)
    return DownloadPlanned(tuple(files), str(weights), free_bytes(weights), _converted(wanted, options))


def _converted(wanted: Sequence[Wanted], options: Options) -> int:
    """Bytes that the converted model will add, at most: `bits` and MORE_BITS per quantized weight, at least LEAST_BITS,
    and never more than published. Converting knows it exactly, and checks again."""
    if options.model is None or options.model.exists():
        return 0
    width = max(options.bits + MORE_BITS, LEAST_BITS) if options.bits else 16
    total = sum(file.size * min(width, file.published.bits) // file.published.bits for file in wanted)
    partial = beside(options.model, PARTIAL)
    return max(0, total - sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()))


def _check_unknown(present: Sequence[Wanted], records: Records) -> Iterator[Event]:
    """Hash the files that we have no record of. Raises InputError for another hash than the published one."""
    for file in present:
        if records.find(file.target) is None:
            hashing = Hashing(file.target, file.size, file.etag)
            for done in accumulate(hashing):
                yield BytesDone(f"checking {file.target.name}", done, file.size)
            if hashing.sha256 is None:
                raise _another_file(file, "its hash is not the published one")
            records.add(file.target, file.etag, hashing.sha256)


def _fetch(missing: Sequence[Wanted], records: Records, pacing: Pacing) -> Iterator[Event]:
    files = {file.target: file for file in missing}

    def read(part: PartFile, span: Span) -> Iterator[bytes]:
        return hub.read(files[part.target], span)

    def finished(part: PartFile, sha256: str) -> None:
        records.add(part.target, part.etag, sha256)

    return fetch([_part(file) for file in missing], read, finished, pacing)


def _part(file: Wanted) -> PartFile:
    return PartFile(file.target, file.size, file.etag)


def _found(file: Wanted, fetched: bool, records: Records) -> FetchedFile:
    known = records.find(file.target)
    assert known is not None, "every file was checked"
    return FetchedFile(str(file.target), file.size, known.sha256, fetched)


def _another_file(file: Wanted, why: str) -> InputError:
    return InputError(f"{file.target} is another file than the published one", why, "move it away, then run this again")
