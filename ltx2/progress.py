"""The progress of a run for people, on stderr: one live line on a terminal, plain lines elsewhere.

Every line tells the progress of the whole work. A file or pipe gets a line at least every five seconds in the first
minute, and then once a minute."""

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ltx2.render import download_lines
from ltx2.runtime.errors import printable
from ltx2.runtime.events import (
    BytesDone,
    DownloadPlanned,
    Event,
    Finishing,
    Loaded,
    Noted,
    PhaseDone,
    PhaseStarted,
    PlannedPhase,
    PromptStarted,
    Section,
    StepDone,
    Warned,
    WorkPlanned,
)

SILENCE_SECONDS = 4.0  # five are promised
LATER_SECONDS = 60.0  # the same after the first minute
BEAT_SECONDS = 0.5
KNOWN = 0.01  # share of all work that must be measured before the time left is told


class Progress:
    """Shows events; use as a context manager."""

    def __init__(self, silent: bool = False) -> None:
        self.silent = silent
        self.console = Console(stderr=True, highlight=False)
        self._line = "starting"
        self._begun = self._since = self._printed = time.monotonic()
        self._work = Work()
        self._pace = Pace()
        self._live: Live | None = None
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Progress":
        if not self.silent:
            if self.console.is_terminal and not self.console.is_dumb_terminal:
                live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4, transient=True)
                self._live = live
                self._live.__enter__()
            else:
                self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._heart.is_alive():
            self._heart.join()  # it may be about to print
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    def show(self, event: Event) -> None:
        """Show one event."""
        if self.silent:
            return
        match event:
            case WorkPlanned():
                self._work.plan(event)
            case PhaseStarted():
                self._set(self._work.started(event))
            case Loaded():
                self._set(self._work.loaded())
            case StepDone():
                self._set(self._work.stepped(event))
                self._plain()
            case PhaseDone():
                line = self._work.done(event)
                if event.step_seconds:  # else another clip's has done it
                    self._print(line)
            case Finishing(message=message):
                self._set(message)
            case BytesDone():
                share = 100 * event.done / max(1, event.total)
                self._set(f"{event.file}: {share:.0f} % of {size_text(event.total)}{self._pace.text(event)}")
                self._plain()
            case DownloadPlanned():
                for line in download_lines(event):
                    self._print(line)
            case Noted(message=message):
                self._set(message)
                self._print(message)
            case Warned(message=message):
                self._print(f"warning: {message}")
            case PromptStarted():
                self._print(f"prompt {event.number} of {event.count}: {event.prompt}")
            case Section(title=title, command=command):
                self._print("", title, f"$ {command}")

    def _set(self, line: str) -> None:
        self._line = printable(line)
        self._since = time.monotonic()

    def _print(self, *lines: str) -> None:
        self._printed = time.monotonic()
        self.console.print("\n".join(map(printable, lines)), markup=False, soft_wrap=True)

    def _plain(self) -> None:
        """Print the line if there is no live one: at most once a second, later once a minute."""
        if self._live is None and time.monotonic() - self._printed > (1 if self._early else LATER_SECONDS):
            self._print(self._line)

    @property
    def _early(self) -> bool:
        return time.monotonic() - self._begun < LATER_SECONDS

    def _render(self) -> Text:
        return Text(self._waiting() if time.monotonic() - self._since >= 1 else self._line)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            if time.monotonic() - self._printed >= (SILENCE_SECONDS if self._early else LATER_SECONDS):
                self._print(self._waiting())

    def _waiting(self) -> str:
        """The line, and for how long it has been the same."""
        return f"{self._line} ... {time.monotonic() - self._since:.0f} s"


class Work:
    """The progress of a run: its phases by their place in the plan, the time of their steps, and the time left."""

    def __init__(self) -> None:
        self._phase = PlannedPhase("", "", 0)
        self._steps: list[float] = []
        self._seconds: list[tuple[str, int, float]] = []  # that phases of clips took
        self.plan(WorkPlanned((), 0))

    def plan(self, plan: WorkPlanned) -> None:
        """Begin a run by this plan, or go on by it if it is made `again`. The demo and the benchmark have several
        runs."""
        if not plan.again:
            self._seconds = []
        self._plan = plan
        self._names = list(dict.fromkeys(phase.name for phase in plan.phases))

    def _planned(self, name: str, clip: int) -> PlannedPhase:
        same = (phase for phase in self._plan.phases if (phase.name, phase.clip) == (name, clip))
        return next(same, PlannedPhase(name, name, 0, clip))

    @property
    def _measured(self) -> list[tuple[float, float]]:
        """Share of all work and seconds of the finished phases."""
        return [(self._planned(name, clip).share, seconds) for name, clip, seconds in self._seconds]

    @property
    def _finished(self) -> float:
        """The finished phases' share of all work."""
        return sum(share for share, _ in self._measured)

    def started(self, event: PhaseStarted) -> str:
        """The line while the network is loaded."""
        self._phase, self._steps = self._planned(event.name, event.clip), []
        return f"{self._head}: loading" if self._names else event.name

    def loaded(self) -> str:
        """The line until the first step is done."""
        return f"{self._head}: first step, which compiles kernels"

    def stepped(self, event: StepDone) -> str:
        """The line after a step."""
        if event.phase != self._phase.name:  # a unit of work that no phase announces
            self.started(PhaseStarted(event.phase))
        self._steps.append(event.seconds)
        # The first step also compiles kernels: leave it out of the estimate as soon as another is known.
        known = self._steps[1:] or self._steps
        pace, limit = sum(known) / len(known), f" of {size_text(self._plan.limit)}" if self._plan.limit else ""
        step = f"step {event.step}/{event.steps}" if event.steps else f"part {event.step}"
        parts = [f"{self._head}: {step}, {event.seconds:.2f} s", f"{size_text(event.active_bytes)}{limit}"]
        left, share = pace * max(0, event.steps - event.step), event.step / event.steps if event.steps else 0.0
        if self._names:
            parts.insert(1, self._whole(share, None if not event.steps else left, pace * event.steps))
        elif event.steps:
            parts.insert(1, f"{duration_text(left)} left")
        return ", ".join(parts)

    def done(self, event: PhaseDone) -> str:
        """The line for a finished phase."""
        if event.name != self._phase.name:
            self.started(PhaseStarted(event.name))
        self._seconds.append((self._phase.name, self._phase.clip, sum(event.step_seconds)))
        steps = f", {len(event.step_seconds)} steps" if len(event.step_seconds) > 1 else ""
        return f"{self._head}: done in {event.seconds:.1f} s{steps}, peak {size_text(event.mlx_peak_bytes)}"

    @property
    def _head(self) -> str:
        phase = self._phase
        if phase.name not in self._names:
            return phase.title
        clip = f", clip {phase.clip + 1} of {self._plan.clips}" if self._plan.clips > 1 else ""
        return f"[{self._names.index(phase.name) + 1}/{len(self._names)}] {phase.title}{clip}"

    def _whole(self, share: float, left: float | None, seconds: float) -> str:
        """The share of the whole run that is done, and the time left: `left` of the running phase (None: not known),
        which takes `seconds` in all, and for later phases by their share of all operations, at the pace of the phase
        with most of them so far."""
        done = self._finished + share * self._phase.share
        text = f"{100 * done:.0f} % of {'all clips' if self._plan.clips > 1 else 'the clip'}"
        most, took = max([*self._measured, (self._phase.share, seconds)])
        if most < KNOWN or left is None:
            return text
        later = max(0.0, 1 - self._finished - self._phase.share)
        return f"{text}, {duration_text(left + later * took / most)} left"


class Pace:
    """How fast a stream of bytes is, and how long the rest will take."""

    def __init__(self) -> None:
        self._total = 0
        self._first = 0
        self._last = 0
        self._start = 0.0
        self._share = 0.0  # when it began

    def text(self, event: BytesDone) -> str:
        """The end of a line; empty in a stream's first two seconds."""
        now = time.monotonic()
        if event.total != self._total or event.done < self._last:  # another stream begins
            self._total, self._first, self._start = event.total, event.done, now
            self._share = _share(event)
        self._last = event.done
        seconds, done = now - self._start, event.done - self._first
        share = _share(event)
        if seconds < 2 or done <= 0 or share <= self._share:
            return ""
        rest = (1 - share) * seconds / (share - self._share)
        return f", {size_text(round(done / seconds))}/s, {duration_text(rest)} left"


def _share(event: BytesDone) -> float:
    """The finished share of the work."""
    return event.done / max(1, event.total) if event.share is None else event.share


def duration_text(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def size_text(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
