"""What `generate` does around the pipeline: finds the model, names the clip, repeats an earlier run's options, and says
which command continues a run that ended early."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ltx2.runtime.distributed.machines import ALONE, Machines
from ltx2.runtime.errors import InputError
from ltx2.runtime.events import Event, Warned
from ltx2.runtime.generate.job import LATENTS
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.generate.places import state_path
from ltx2.runtime.generate.planning import MemoryPlan
from ltx2.runtime.generate.request import Request, draw_seed
from ltx2.runtime.generate.sidecar import Sidecar
from ltx2.weights import find_model

OUTPUTS = Path("outputs")  # clips that are given no name
NAME_LENGTH = 40


class Generation:
    """One clip to be made at `target`, of the `given` options and, with a `sidecar`, of those of an earlier run.

    Without a target the clip gets a name of its prompt and seed in `outputs/`, or, where latents are saved, is not
    decoded. `dry`: nothing is written, as on `machines` that do not lead.
    """

    def __init__(
        self,
        target: Path | None,
        model: Path | None,
        sidecar: Path | None,
        given: Mapping[str, Any],
        dry: bool = False,
        machines: Machines = ALONE,
    ) -> None:
        self.machines = machines
        earlier = Sidecar.read(sidecar) if sidecar else None
        if target is not None:
            state_path(target)  # raises for what is no name
        request = self._request(target, earlier, given)
        if target is None and request.save_latents is None:
            target = _free_name(request, dry or not machines.leads)
        place = target or Path(str(request.save_latents))
        self.target, self.state, self._found = target, state_path(place), _stamp(state_path(place))
        self.request = replace(request, output=target, state=self.state)
        folder = _earlier_model(earlier, sidecar) if model is None and earlier else find_model(model)
        self.pipeline = Pipeline(folder, machines=machines)
        self._begun = False
        self._changed = sidecar if earlier and earlier.files != self.pipeline.folder.hashes() else None

    def _request(self, target: Path | None, earlier: Sidecar | None, given: Mapping[str, Any]) -> Request:
        """With its seed, unless an earlier run's is continued."""
        state = state_path(target or Path("clip.mp4"))
        options = dict(given) | {"output": target, "state": state}
        request = Request.again(earlier.request, options) if earlier else Request.from_options(options)
        if earlier is not None:
            earlier.check_inputs(request, given)
        continued = request.resume and state.exists()
        if request.seed is None and request.noise is None and not continued and self.machines.leads:
            request = replace(request, seed=draw_seed())
        return request

    @property
    def until(self) -> str | None:
        """Where the run ends, if not with a clip."""
        return None if self.target is not None else LATENTS

    @property
    def left(self) -> bool:
        """Whether there is a state that this run has written, or was continuing."""
        now = _stamp(self.state)
        continuing = self._begun and self.request.resume
        return now is not None and (now != self._found or continuing)

    def continuing(self) -> dict[str, str | None]:
        """Options that a command needs to go on with this run: its name and seed, if they were not given."""
        name = {} if self.target is None else {"-o": str(self.target)}
        seed = {} if self.request.seed is None else {"--seed": str(self.request.seed)}
        return name | seed | ({"--resume": None} if self.left else {})

    def plan(self) -> MemoryPlan:
        """Of memory."""
        return self.pipeline.planned(self.request, self.until)

    def events(self) -> Iterator[Event]:
        """Those of the pipeline."""
        if self._changed is not None:
            yield Warned(f"this is not the model that {self._changed} was made with, so the clip will be another one")
        for event in self.pipeline.events(self.request, self.until):
            self._begun = True
            yield event


def _free_name(request: Request, dry: bool) -> Path:
    """A name that no clip has, made of the prompt and the seed. Its folder is made, unless nothing is to be written."""
    text = request.prompt or Path(str(request.latents or request.embeddings or "clip")).stem
    words = "-".join(re.findall(r"\w+", text.lower()))[:NAME_LENGTH].strip("-") or "clip"
    stem, suffix = words if request.seed is None else f"{words}-{request.seed}", ".wav" if request.no_video else ".mp4"
    if dry:
        return Path(f"{stem}{suffix}")
    OUTPUTS.mkdir(exist_ok=True)
    names = (OUTPUTS / f"{stem}{end}{suffix}" for end in ("", *(f"-{number}" for number in range(2, 10**6))))
    return next(path for path in names if not path.exists())


def _stamp(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _earlier_model(earlier: Sidecar, sidecar: Path | None) -> Path:
    """The earlier run's model folder, which may have moved."""
    if not earlier.model.exists():
        why = f"the clip was made with {earlier.model}, which is not there any more"
        raise InputError(f"the model of {sidecar} is missing", why, "say where the model is now: -m MODEL")
    return earlier.model
