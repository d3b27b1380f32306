"""How far a generation has come, on disk: a run that was cut off continues there and ends with the same bits.

One tensor file beside the clip. It holds the running stage's tokens, the embeddings and, as metadata, the request and
the model it belongs to. After the last denoise step it is a latents file like any other."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ltx2.runtime.errors import InputError, Ltx2Error
from ltx2.runtime.events import PhaseDone
from ltx2.runtime.files.jsonfile import read_object
from ltx2.runtime.files.tensors import open_tensorfile
from ltx2.runtime.generate.job import Job
from ltx2.runtime.generate.options.kinds import File, One, Option, Several
from ltx2.runtime.generate.options.table import ROWS
from ltx2.runtime.generate.phases.base import Made
from ltx2.runtime.generate.records.exchange import context_tensors, contexts_from, read_tensors, write_tensors
from ltx2.runtime.generate.records.sidecar import sidecar_path
from ltx2.runtime.networks.text.duration_head import Duration
from ltx2.runtime.sampling.denoise import Step
from ltx2.runtime.streams import Streams

ENCODED = "given."  # before the names of encoded pictures and sounds
RECORD = "run"  # the metadata's key
START_AGAIN = "leave out --resume to start from the beginning"


@dataclass(frozen=True)
class State:
    """How far a run has come: the `phase` that is running or comes next (None: no denoise step is left), all that is
    made so far, the phases that are done, and the seconds that they took."""

    phase: str | None
    made: Made
    done: Sequence[PhaseDone] = ()
    seconds: float = 0.0

    def tensors(self) -> dict[str, mx.array]:
        """The tensors that the rest of the run needs, of any shapes. Noise is drawn again."""
        found = dict(self.made.latents.items())
        if self.phase is None:
            return found
        found |= context_tensors(self.made.contexts)
        found |= {f"{ENCODED}{name}": value for name, value in self.made.encoded.items()}
        if self.made.sound is not None:
            found["sound"] = self.made.sound
        if (step := self.made.step) is not None:
            found |= {f"x.{name}": value for name, value in step.x.items()}
            found |= {f"x0.{name}": value for name, value in step.x0.items()}
        return found

    @classmethod
    def from_tensors(cls, record: Mapping[str, Any], tensors: Mapping[str, mx.array]) -> "State":
        """Inverse of `tensors` (any shapes); `record` is the metadata."""
        step = None
        if record["step"]:
            step = Step(record["step"], _streams(tensors, "x."), _streams(tensors, "x0."))
        encoded = {n.removeprefix(ENCODED): value for n, value in tensors.items() if n.startswith(ENCODED)}
        made = Made(
            encoded=encoded,
            latents=_streams(tensors),
            contexts=contexts_from(tensors),
            sound=tensors.get("sound"),
            step=step,
        )
        done = [PhaseDone(**phase | {"step_seconds": tuple(phase["step_seconds"])}) for phase in record["phases"]]
        return cls(record["phase"], made, done, record["seconds"])


def _streams(tensors: Mapping[str, mx.array], prefix: str = "") -> Streams[mx.array]:
    return Streams(tensors.get(f"{prefix}video"), tensors.get(f"{prefix}audio"))


@dataclass(frozen=True)
class Owner:
    """The origin of a state: the options that decide its values, with the contents of files in their place, and the
    hashes of the model's components in use."""

    options: Mapping[str, Any]
    model: Mapping[str, Any]

    @classmethod
    def of(cls, job: Job, components: Sequence[str]) -> "Owner":
        """`components`: those of the model folder that the run uses."""
        hashes = job.folder.hashes()
        options = json.loads(json.dumps(job.identity()))  # as they are read again: tuples are lists
        return cls(options, {name: hashes[name] for name in sorted(components)})

    def check(self, given: "Owner", path: Path) -> None:
        """Raises InputError, naming the first difference, when `given` is not what made the state at `path`."""
        what = f"{path.name} cannot be continued"
        for name in sorted({*self.options, *given.options}):
            had, has = self.options.get(name), given.options.get(name)
            if had != has:
                raise InputError(what, _difference(name, had, has), f"use the same options, or {START_AGAIN}")
        for name in sorted(self.model.keys() & given.model.keys()):  # --no-audio may come or go
            if self.model[name] != given.model[name]:
                why = f"it was started with another model: the files of its {name} are not the same"
                raise InputError(what, why, f"use the same model folder, or {START_AGAIN}")


def _difference(name: str, had: Any, has: Any) -> str:
    """The values of an option, in words: files are known by their content."""
    if not isinstance(row := ROWS.get(name), File | One | Several):
        return f"it was started with {_shown(name, had)}, this is {_shown(name, has)}"
    if not had or not has:
        return f"it was started {'with' if had else 'without'} {row.flag}, this is {'with' if has else 'without'} it"
    if _contents(row, had) != _contents(row, has):
        return f"what {row.flag} names is not what it was started with"
    return f"{row.flag} names the same as when it was started, but says something else of it ({row.metavar})"


def _contents(row: Option[Any, Any], value: Any) -> list[str]:
    if isinstance(row, File):
        return [value]
    return [value[0]] if isinstance(row, One) else [form[0] for form in value]


def _shown(name: str, value: Any) -> str:
    return f"{name.replace('_', ' ')} {value!r}" if value is not None else f"no {name.replace('_', ' ')}"


@dataclass(frozen=True)
class Started:
    """The drawn seed and the predicted length of a run that left a state, or the seed of one that made the clip."""

    seed: int | None = None
    length: Duration | None = None

    @classmethod
    def read(cls, path: Path, clip: str | None = None) -> "Started":
        """Empty without such a state or `clip`; `StateFile.read` says what is wrong with it."""
        try:
            if clip is not None and Path(clip).exists() and not path.exists():
                return cls(read_object(sidecar_path(Path(clip)))["request"]["seed"])
            record = json.loads(open_tensorfile(path).metadata[RECORD])
            seed, length = record["options"]["seed"], record["length"]
            return cls(None if seed is None else int(seed), None if length is None else Duration(**length))
        except (OSError, Ltx2Error, ValueError, LookupError, TypeError):
            return cls()


def finished(job: Job) -> Mapping[str, Any] | None:
    """The record of the clip, where a run that is continued has made it already: there, with no state left, and as it
    is asked for."""
    request = job.request
    if not request.resume or request.output is None or request.state is None:
        return None
    clip, decided = Path(request.output), [name for name, row in ROWS.items() if row.decides and row.recorded] + ["crf"]
    if not clip.exists() or Path(request.state).exists():
        return None
    try:
        record = read_object(sidecar_path(clip))
        if job.waits:
            request = job.lasting(float(record["duration"]["seconds"])).request
        recorded, asked = record["request"], json.loads(json.dumps(request.recorded()))
        same = all(recorded[name] == asked[name] for name in decided)
        return record if same and record["model"]["files"] == job.folder.hashes() else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


class StateFile:
    """The one state of a run: every write replaces the last. `length` is the clip's where it was predicted."""

    def __init__(self, path: Path, owner: Owner, length: Duration | None = None) -> None:
        self.path = path
        self.owner = owner
        self.length = length

    def write(self, state: State) -> None:
        """The file appears whole or not at all, and is on the disk when this returns."""
        step = state.made.step
        record = {
            "options": self.owner.options,
            "model": self.owner.model,
            "length": None if self.length is None else asdict(self.length),
            "phase": state.phase,
            "step": 0 if step is None else step.number,
            "phases": [asdict(phase) for phase in state.done],
            "seconds": state.seconds,
        }
        write_tensors(self.path, state.tensors(), {RECORD: json.dumps(record)})

    def read(self) -> State | None:
        """The state, None without a file.

        Raises InputError for another kind of file, and a state of another request or model.
        """
        if not self.path.exists():
            return None
        try:
            file = open_tensorfile(self.path)
            record = json.loads(file.metadata[RECORD])
            owner = Owner(record["options"], record["model"])
            state = State.from_tensors(record, read_tensors(self.path, tuple(file.tensors)))
        except Ltx2Error as error:
            raise self._damaged(error.why) from error
        except (ValueError, LookupError, TypeError) as error:
            raise self._damaged("it is not the state of a run") from error
        owner.check(self.owner, self.path)
        return state

    def _damaged(self, why: str) -> InputError:
        return InputError(f"{self.path.name} cannot be continued", why, START_AGAIN)
