"""The work of `generate` around the pipeline: finding the model, counting and naming clips, repeating an earlier run's
options, and the command that continues a run that ended early."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ltx2.runtime.distributed.machines import ALONE, Machines
from ltx2.runtime.errors import InputError, UsageError, of, reason
from ltx2.runtime.events import Event, PhaseStarted, Warned
from ltx2.runtime.generate.job import LATENTS
from ltx2.runtime.generate.options.prompts import OUTPUT, read_clips
from ltx2.runtime.generate.options.request import Request, draw_seed
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.generate.planning import MemoryPlan
from ltx2.runtime.generate.records.places import check_distinct, state_path
from ltx2.runtime.generate.records.sidecar import Sidecar
from ltx2.weights import find_model

OUTPUTS = Path("outputs")  # of clips without a given name
NAME_LENGTH = 40
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Wanted:
    """The clips to make: of the prompts in a file, `count` of each or one with each of the seeds; and their name."""

    target: Path | None = None
    prompts: Path | None = None
    count: int | None = None
    seeds: Sequence[int] = ()

    @property
    def several(self) -> bool:
        return self.prompts is not None or self.count is not None or len(self.seeds) > 1

    def clips(self, given: Options, earlier: Options | None) -> list[dict[str, Any]]:
        """The options of every clip. Seeds count on from the only one that is given, else from that of an `earlier`
        run; a line of the file may have its own. Raises UsageError and what `read_clips` raises."""
        if self.count is not None and len(self.seeds) > 1:
            raise UsageError("--count and several --seed do not go together", "both say how many", "leave out one")
        if "latents" in given and self.several:
            why, fix = "they have no seed or prompt any more", "leave out --count, --prompts and more than one --seed"
            raise UsageError("--latents make one clip", why, fix)
        if self.prompts is not None and "prompt" in given:
            why, fix = "the file has the prompts", "leave out one of them"
            raise UsageError("PROMPT and --prompts do not go together", why, fix)
        lines = [dict(given)]
        if self.prompts is not None:
            lines = read_clips(self.prompts, given, prompted=earlier is not None)
        if len(self.seeds) > 1:
            return [{"seed": seed, **line} for line in lines for seed in self.seeds]
        first = earlier.get("seed") if earlier and self.several else None
        seed, count = (self.seeds[0] if self.seeds else first), self.count or 1
        found = list[dict[str, Any]]()
        for line in lines:
            for number in range(count):
                own = line.get("seed", None if seed is None else seed + len(found) - number)
                found.append(line | ({} if own is None else {"seed": own + number}))
        return found


class Generation:
    """The clips that are `wanted`, of the `given` options and, with a `sidecar`, of those of an earlier run.

    Without a target a clip gets a name of its prompt and seed in `outputs/`, or, where latents are saved, is not
    decoded. Of several clips the target is a folder, or a name that is numbered.
    """

    def __init__(
        self,
        wanted: Wanted,
        model: Path | None,
        sidecar: Path | None,
        given: Options,
        machines: Machines = ALONE,
    ) -> None:
        self.machines = machines
        with machines.all_or_none():
            self._prepare(wanted, model, sidecar, given)
        self._begun = False
        said = {"-o": wanted.target, "--seed": wanted.seeds or given.get("seed"), "--resume": given.get("resume")}
        self._said = {option for option, value in said.items() if value not in (None, ())}

    def _prepare(self, wanted: Wanted, model: Path | None, sidecar: Path | None, given: Options) -> None:
        earlier = Sidecar.read(sidecar) if sidecar else None
        self.several, target = wanted.several, wanted.target
        requests, self._drawn = _requests(earlier, given, wanted, target, draws=self.machines.leads)
        self.requests = _named(requests, target) if self.several else [_with_place(requests[0], target)]
        self._folder = None if self.until else _own_folder(self.several, target)
        self._found = {path: _stamp(path) for path in self._states}
        folder = _earlier_model(earlier, sidecar) if model is None and earlier else find_model(model)
        self.pipeline = Pipeline(folder, machines=self.machines)
        self._changed = sidecar if earlier and earlier.files != self.pipeline.folder.hashes() else None

    @property
    def _states(self) -> list[Path]:
        return [Path(str(request.state)) for request in self.requests]

    @property
    def until(self) -> str | None:
        """The end of a run that makes no clip."""
        return None if self.requests[0].output is not None else LATENTS

    @property
    def left(self) -> bool:
        """Whether the leading machine has a state that this run wrote or was continuing: none before it holds the names
        of its clips, while another run may write them."""
        if not self._begun:
            return False
        continuing = self.requests[0].resume
        now = {path: _stamp(path) for path in self._states if self.machines.leads}
        return any(now[path] is not None and (now[path] != self._found[path] or continuing) for path in now)

    def continuing(self) -> dict[str, str | None]:
        """The options that a command needs to continue this run: its name and seed, if they were not given."""
        first = self.requests[0]
        name = {} if first.output is None or self.several else {"-o": first.output}
        number = self._drawn if self.several else first.seed
        seed = {} if number is None else {"--seed": str(number)}
        added: dict[str, str | None] = {**name, **seed, **({"--resume": None} if self.left else {})}
        return {option: value for option, value in added.items() if option not in self._said}

    @property
    def finished(self) -> bool:
        """Whether the clips are continued, and all there."""
        return self.pipeline.finished(self.requests, self.until)

    def plan(self) -> MemoryPlan:
        """The memory plan."""
        return self.pipeline.planned_all(self.requests, self.until, self._folder)

    def events(self) -> Iterator[Event]:
        """The events of the pipeline."""
        if self._changed is not None:
            yield Warned(f"this is not the model that {self._changed} was made with, so the clip will be another one")
        with _made(self._folder if self.machines.leads else None):
            for event in self.pipeline.events_all(self.requests, self.until):
                self._begun = self._begun or isinstance(event, PhaseStarted)  # all names are held then
                yield event


def _requests(
    earlier: Sidecar | None, given: Options, wanted: Wanted, target: Path | None, draws: bool
) -> tuple[list[Request], int | None]:
    """The requests with their seeds, unless an earlier run's seed is continued or another machine `draws` it; and the
    drawn seed, from which the others count on."""
    state = state_path(Path("clip.mp4") if target is None or wanted.several else target)  # raises for what is no name
    clips = wanted.clips(given, earlier.request if earlier else None)

    def request_of(options: Options) -> Request:
        # What needs a state or an output is checked before they are named.
        options = {OUTPUT: target, "state": state, **options}
        return Request.again(earlier.request, options) if earlier else Request.from_options(options)

    request_of(given)  # what is wrong with these is no line's
    found = []
    for options in clips:
        with of(options.get("name")):
            found.append(request_of(options))
            if earlier is not None:
                earlier.check_inputs(found[-1], options)
    known = not wanted.several and found[0].resume and (state.exists() or (target is not None and target.exists()))
    without = [number for number, request in enumerate(found) if request.seed is None and request.noise is None]
    if not without or known or not draws:
        return found, None
    if wanted.several and found[0].resume:
        why, fix = "it is in the clips' names, and says which are continued", "use the one that was printed"
        raise UsageError("--resume of several clips needs --seed", why, fix)
    drawn = draw_seed()
    for number in without:
        found[number] = replace(found[number], seed=drawn + number)
    return found, drawn


def _with_place(request: Request, target: Path | None) -> Request:
    """The only clip, with its name and state."""
    if target is None and request.save_latents is None:
        target = next(path for path in _names(request, OUTPUTS) if not path.exists())
    return replace(request, output=target, state=state_path(target or Path(str(request.save_latents))))


def _named(requests: Sequence[Request], target: Path | None) -> list[Request]:
    """Several clips, with names and states."""
    folder = _own_folder(True, target)
    place = folder or Path()
    found, taken = [], set[Path]()
    check_distinct(place / r.output for r in requests if r.output and Path(r.output) != target)
    for number, request in enumerate(requests, 1):
        if request.output is not None and Path(request.output) != target:
            clip = place / request.output  # the line's own
        elif target is not None and folder is None:
            clip = target.with_stem(f"{target.stem}-{number:0{len(str(len(requests)))}d}")
        else:
            clip = next(name for name in _names(request, place) if name not in taken)
        taken.add(clip)
        found.append(replace(request, output=clip, state=state_path(clip)))
    return found


def _own_folder(several: bool, target: Path | None) -> Path | None:
    """The folder of clips without names, or with names in that folder."""
    if several:
        return (target or OUTPUTS) if target is None or target.is_dir() or not target.suffix else None
    return OUTPUTS if target is None else None


def _names(request: Request, folder: Path) -> Iterator[Path]:
    text = request.prompt or Path(str(request.latents or request.embeddings or "clip")).stem
    words = "-".join(re.findall(r"\w+", text.lower()))[:NAME_LENGTH].strip("-") or "clip"
    stem, suffix = words if request.seed is None else f"{words}-{request.seed}", ".wav" if request.no_video else ".mp4"
    yield from (folder / f"{stem}{end}{suffix}" for end in ("", *(f"-{number}" for number in range(2, 10**6))))


@contextmanager
def _made(folder: Path | None) -> Iterator[None]:
    """Make a folder, and remove it after the block if it is empty. Raises InputError if it cannot be made."""
    if folder is None or folder.is_dir():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}", reason(error), "choose another -o") from error
    try:
        yield
    finally:
        with suppress(OSError):  # it holds something
            folder.rmdir()


def _stamp(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _earlier_model(earlier: Sidecar, sidecar: Path | None) -> Path:
    """The earlier run's model folder, which may have moved."""
    if not earlier.model.exists():
        why = f"the clip was made with {earlier.model}, which is not there any more"
        raise InputError(f"the model of {sidecar} is missing", why, "say where the model is now: -m MODEL")
    return earlier.model
