"""How far a generation has come, on disk: a run that was cut off continues there and ends with the same bits.

One tensor file beside the clip. It holds the running stage's latents, what the rest of the run needs (embeddings, the
later stages' noise), and, as metadata, the request and the model it belongs to. After the last denoise step it is a
latents file like any other."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ltx2.runtime.errors import InputError, Ltx2Error
from ltx2.runtime.events import PhaseDone
from ltx2.runtime.files.tensors import open_tensorfile
from ltx2.runtime.generate.exchange import Contexts, read_tensors, write_tensors
from ltx2.runtime.generate.job import Job
from ltx2.runtime.generate.kinds import File
from ltx2.runtime.generate.options import ROWS
from ltx2.runtime.sampling.latents import Latents

RECORD = "run"  # the metadata's key
START_AGAIN = "leave out --resume to start from the beginning"


def state_path(clip: Path) -> Path:
    """clip.mp4 -> clip.unfinished.safetensors"""
    return clip.with_name(f"{clip.stem}.unfinished.safetensors")


@dataclass(frozen=True)
class State:
    """A run after `step` steps of stage `stage` (from 1); `contexts` and `noises` (of later stages) only while there
    are steps left. `phases` are the finished ones, `seconds` the time all of it took."""

    stage: int
    step: int
    latents: Latents
    contexts: Contexts | None = None
    noises: Sequence[Latents] = ()
    phases: Sequence[PhaseDone] = ()
    seconds: float = 0.0

    @property
    def sampled(self) -> bool:
        """No step is left."""
        return self.contexts is None


@dataclass(frozen=True)
class Owner:
    """What made a state: the options that decide its values, contents of files in their place, and the model's hashes
    of every component in use."""

    options: Mapping[str, Any]
    model: Mapping[str, Any]

    @classmethod
    def of(cls, job: Job) -> "Owner":
        hashes = job.folder.hashes()
        return cls(job.request.identity(), {name: hashes[name] for name in sorted(job.components)})

    def check(self, given: "Owner", path: Path) -> None:
        """Raises InputError, naming the first difference, when `given` is not what made the state at `path`."""
        what = f"{path.name} cannot be continued"
        for name in sorted({*self.options, *given.options}):
            had, has = self.options.get(name), given.options.get(name)
            if had != has:
                why = f"it was started with {_shown(name, had)}, this is {_shown(name, has)}"
                raise InputError(what, why, f"use the same options, or {START_AGAIN}")
        for name in sorted(self.model.keys() & given.model.keys()):  # --no-audio may come or go
            if self.model[name] != given.model[name]:
                why = f"it was started with another model: the files of its {name} are not the same"
                raise InputError(what, why, f"use the same model folder, or {START_AGAIN}")


def _shown(name: str, value: Any) -> str:
    if isinstance(ROWS.get(name), File):
        return f"another {name} file" if value else f"no {name} file"
    return f"{name.replace('_', ' ')} {value!r}" if value is not None else f"no {name.replace('_', ' ')}"


class StateFile:
    """The one state of a run: every write replaces the last."""

    def __init__(self, path: Path, owner: Owner) -> None:
        self.path = path
        self.owner = owner

    def write(self, state: State) -> None:
        """The file appears whole or not at all, and is on the disk when this returns."""
        tensors = {"video": state.latents.video, "audio": state.latents.audio}
        if state.contexts is not None:
            tensors |= {"video_context": state.contexts.video, "audio_context": state.contexts.audio}
        for number, noise in enumerate(state.noises, start=state.stage + 1):
            tensors |= {f"stage{number}.video": noise.video, f"stage{number}.audio": noise.audio}
        record = {
            "options": self.owner.options,
            "model": self.owner.model,
            "stage": state.stage,
            "step": state.step,
            "phases": [asdict(phase) for phase in state.phases],
            "seconds": state.seconds,
        }
        write_tensors(self.path, tensors, {RECORD: json.dumps(record)})

    def read(self) -> State | None:
        """The state there is, None where there is no file.

        Raises InputError when it is not a state, or one of another request or model.
        """
        if not self.path.exists():
            return None
        try:
            file = open_tensorfile(self.path)
            record = json.loads(file.metadata[RECORD])
            owner, state = Owner(record["options"], record["model"]), self._state(record, set(file.tensors))
        except Ltx2Error as error:
            raise self._damaged(error.why) from error
        except (ValueError, LookupError, TypeError) as error:
            raise self._damaged("it is not the state of a run") from error
        owner.check(self.owner, self.path)
        return state

    def _damaged(self, why: str) -> InputError:
        return InputError(f"{self.path.name} cannot be continued", why, START_AGAIN)

    def _state(self, record: Mapping[str, Any], names: set[str]) -> State:
        tensors = read_tensors(self.path, tuple(names))
        contexts = Contexts(tensors["video_context"], tensors["audio_context"]) if "video_context" in names else None
        numbers = sorted({int(name[len("stage")]) for name in names if name.startswith("stage")})
        return State(
            record["stage"],
            record["step"],
            Latents(tensors["video"], tensors["audio"]),
            contexts,
            [Latents(tensors[f"stage{n}.video"], tensors[f"stage{n}.audio"]) for n in numbers],
            [PhaseDone(**phase | {"step_seconds": tuple(phase["step_seconds"])}) for phase in record["phases"]],
            record["seconds"],
        )
