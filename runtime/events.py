"""Typed progress events. Generating, converting and quantizing are generators of these; whoever drives them
decides what to show."""

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """Base class of all events."""


@dataclass(frozen=True)
class PlannedPhase:
    """One phase of a clip, by its number from 0: its name, what it does in plain words, and its share of all work."""

    name: str
    title: str
    share: float
    clip: int = 0


@dataclass(frozen=True)
class WorkPlanned(Event):
    """All that a run will do, before it begins: the phases of its clips in order, and the memory that it may take in
    bytes. `again`: the running one's, with what is done already, where that becomes known later."""

    phases: tuple[PlannedPhase, ...]
    limit: int
    clips: int = 1
    again: bool = False


@dataclass(frozen=True)
class PhaseStarted(Event):
    """One network is about to be loaded and used for a clip, by its number from 0."""

    name: str
    clip: int = 0


@dataclass(frozen=True)
class Loaded(Event):
    """The running phase has its network: its use begins."""

    phase: str
    seconds: float


@dataclass(frozen=True)
class Finishing(Event):
    """What goes on after the last phase, for people."""

    message: str


@dataclass(frozen=True)
class StepDone(Event):
    """One unit of the running phase (a denoise step, a layer, a group of frames). `steps` is 0 where their number is
    not known."""

    phase: str
    step: int
    steps: int
    seconds: float
    active_bytes: int = 0


@dataclass(frozen=True)
class Previewed(Event):
    """What the clip will show, as far as this denoise step of the phase says: a small `picture` (H, W, 3) uint8 of its
    middle, in a file at `path`."""

    phase: str
    step: int
    path: str
    picture: Any = field(repr=False, compare=False)


@dataclass(frozen=True)
class PhaseDone(Event):
    """The phase's network is freed. Peaks are bytes: MLX's during this phase, the process's since it began. The longest
    evaluation is None where no single one was waited for. On several machines: bytes that this one has sent, and the
    seconds that exchanging took, with the time that it has waited for others."""

    name: str
    seconds: float
    load_seconds: float
    step_seconds: tuple[float, ...]
    mlx_peak_bytes: int
    process_peak_bytes: int
    longest_eval_seconds: float | None = None
    sent_bytes: int = 0
    exchange_seconds: float = 0.0


@dataclass(frozen=True)
class Section(Event):
    """One part of several begins; `command` is what a user would type for it."""

    title: str
    command: str


@dataclass(frozen=True)
class Noted(Event):
    """What goes on beside phases and steps, for people."""

    message: str


@dataclass(frozen=True)
class PromptStarted(Event):
    """The next of several prompts begins."""

    number: int
    count: int
    prompt: str


@dataclass(frozen=True)
class Warned(Event):
    """Something the user should know that does not stop the work."""

    message: str


@dataclass(frozen=True)
class BytesDone(Event):
    """Progress of a conversion: bytes of output written so far, of the total. `share`, from 0 to 1, says how much of
    the work that is, where bytes take unequally long."""

    file: str
    done: int
    total: int
    share: float | None = None


@dataclass(frozen=True)
class Written(Event):
    """Last event of a conversion or quantization: the finished model folder. `reused` says it was already there."""

    path: str
    bytes: int
    seconds: float
    reused: bool = False


@dataclass(frozen=True)
class PlannedFile:
    """A file, its size, and how much of it is here already."""

    path: str
    bytes: int
    held: int


@dataclass(frozen=True)
class DownloadPlanned(Event):
    """What will be fetched, said before it begins. `free` is the room where the files go, `converted` what the model
    made of them will need."""

    files: tuple[PlannedFile, ...]
    weights: str
    free: int
    converted: int = 0

    @property
    def missing(self) -> int:
        return sum(file.bytes - file.held for file in self.files)


@dataclass(frozen=True)
class FetchedFile:
    """A file that is here now, whole. `fetched`: this run brought it."""

    path: str
    bytes: int
    sha256: str
    fetched: bool


@dataclass(frozen=True)
class Downloaded(Event):
    """Last event of a download."""

    files: tuple[FetchedFile, ...]
    seconds: float


def watched(events: Iterable[Event], watch: Callable[[Event], object] | None) -> Generator[Event, None, None]:
    """The events, each shown to `watch` first, if there is one. Closing ends what makes them too."""
    try:
        for event in events:
            if watch is not None:
                watch(event)
            yield event
    finally:
        if isinstance(events, Generator):
            events.close()
