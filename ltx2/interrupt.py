"""Ctrl-C before a command has begun any work: it ends at once, quietly, whatever is being imported.

An import that is interrupted ends with a traceback, or goes on without what it was importing. There is nothing to keep
or to tidy up then, so the process ends where it stands. Loads nothing that takes time itself."""

import os
import signal
import sys

EXIT_INTERRUPTED = 130
SAID = ("interrupted", "Ctrl-C, before anything was begun", "run the same command again")


def expect() -> None:
    """From now on Ctrl-C is that, unless it is ignored, as by a shell's background job."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def begin() -> None:
    """Work begins: from now on Ctrl-C is a KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def over() -> None:
    """All is done and said: Ctrl-C ends what Python does last without a word."""
    if signal.getsignal(signal.SIGINT) in (_end, signal.default_int_handler):
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(*_: object) -> None:
    what, why, fix = SAID
    os.write(2, f"error: {what}\n  why: {why}\n  fix: {fix}\n".encode())
    if "--json" in sys.argv:
        told = f'"kind": "{what}", "what": "{what}", "why": "{why}", "fix": "{fix}"'
        os.write(1, f'{{"error": {{{told}}}}}\n'.encode())
    os._exit(EXIT_INTERRUPTED)
