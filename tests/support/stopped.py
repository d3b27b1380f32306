"""Runs of `ltx2 generate` that a signal ends at a point of theirs."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Sends itself a signal when a phase of a clip begins, or ends a step.
STOPPED = """
import os, sys
from ltx2.cli import run
from ltx2.runtime.events import PhaseStarted, StepDone
from ltx2.runtime.generate.run import Run

number, phase, step, clip, *args = sys.argv[1:]
events = Run.events

def watched(self):
    for event in events(self):
        begins = isinstance(event, PhaseStarted) and (event.name, "0") == (phase, step)
        ends = isinstance(event, StepDone) and (event.phase, str(event.step)) == (phase, step)
        if (begins or ends) and str(self.number) == clip:
            os.kill(os.getpid(), int(number))
        yield event

Run.events = watched
sys.exit(run(args))
"""


def stop(
    arguments: Sequence[str | Path], number: int, phase: str, step: int, clip: int = 0
) -> subprocess.CompletedProcess[str]:
    """How `ltx2 generate ...` ended that got this signal then. `step` 0 is the phase's begin. `clip`: of several, from
    0; where a phase begins, one waits for those before it."""
    command = [sys.executable, "-c", STOPPED, str(int(number)), phase, str(step), str(clip), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=listen)


def listen() -> None:
    """A shell's background job ignores Ctrl-C, as nohup's does a closed terminal, and so would a process that it
    starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
