"""The events of a run, as `pipe.stream` yields them: frozen dataclasses."""

from ltx2.runtime.events import BytesDone, Event, Noted, PhaseDone, PhaseStarted, StepDone, Warned
from ltx2.runtime.generate.clip import Generated, Saved

__all__ = [
    "BytesDone", "Event", "Generated", "Noted", "PhaseDone", "PhaseStarted", "Saved", "StepDone", "Warned",
]  # fmt: skip
