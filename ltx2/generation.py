"""What `generate` does around the pipeline: repeats an earlier run's options, and knows whether a run that ended early
can be continued."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ltx2.runtime.errors import InputError
from ltx2.runtime.events import Event, Warned
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.generate.planning import MemoryPlan
from ltx2.runtime.generate.request import Request
from ltx2.runtime.generate.resume import state_path
from ltx2.runtime.generate.sidecar import Sidecar


class Generation:
    """One clip to be made at `target`, of the `given` options and, with a `sidecar`, of those of an earlier run."""

    def __init__(self, target: Path, model: Path | None, sidecar: Path | None, given: Mapping[str, Any]) -> None:
        self.state = state_path(target)
        self._found = _stamp(self.state)
        earlier = Sidecar.read(sidecar) if sidecar else None
        options = dict(given) | {"output": target, "state": self.state}
        self.request = Request.again(earlier.request, options) if earlier else Request.from_options(options)
        self.pipeline = Pipeline(model or _earlier_model(earlier, sidecar))
        self._begun = False
        self._changed = sidecar if earlier and earlier.files != self.pipeline.folder.hashes() else None

    @property
    def left(self) -> bool:
        """Whether there is a state that this run has written, or was continuing."""
        now = _stamp(self.state)
        continuing = self._begun and self.request.resume
        return now is not None and (now != self._found or continuing)

    def plan(self) -> MemoryPlan:
        return self.pipeline.planned(self.request)

    def events(self) -> Iterator[Event]:
        """Those of the pipeline."""
        if self._changed is not None:
            yield Warned(f"this is not the model that {self._changed} was made with, so the clip will be another one")
        for event in self.pipeline.events(self.request):
            self._begun = True
            yield event


def _stamp(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _earlier_model(earlier: Sidecar | None, sidecar: Path | None) -> Path:
    """The earlier run's model folder, which may have moved."""
    assert earlier is not None, "a command has a model or a sidecar"
    if not earlier.model.exists():
        why = f"the clip was made with {earlier.model}, which is not there any more"
        raise InputError(f"the model of {sidecar} is missing", why, "say where the model is now: -m MODEL")
    return earlier.model
