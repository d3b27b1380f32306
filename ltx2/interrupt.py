"""What ends a command early: Ctrl-C, SIGTERM, and the SIGHUP of a closed terminal.

Before a command has begun any work it ends at once, quietly, whatever is being imported: an import that is interrupted
ends with a traceback, or goes on without what it was importing. There is nothing to keep or to tidy up then, so the
process ends where it stands. Later it is a KeyboardInterrupt. Loads nothing that takes time itself."""

import os
import signal
import stat
import sys
from contextlib import suppress

WHY = {
    signal.SIGINT: "Ctrl-C",
    signal.SIGTERM: "it was told to end (SIGTERM)",
    signal.SIGHUP: "its terminal was closed (SIGHUP)",
}
SHELL = 128  # an exit code that a signal causes is that and its number
SAID = ("interrupted", "{}, before anything was begun", "run the same command again")


def expect() -> None:
    """From now on each of them is that, unless it is ignored, as Ctrl-C by a shell's background job and SIGHUP by
    nohup."""
    for number in WHY:
        if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
            signal.signal(number, _end)


def begin() -> None:
    """Work begins: from now on each is a KeyboardInterrupt."""
    for number in WHY:
        if signal.getsignal(number) is _end:
            signal.signal(number, _interrupt)


def over() -> None:
    """All is done and said: they end what Python does last without a word. One that comes again changes nothing."""
    for number in WHY:
        if (handler := signal.getsignal(number)) in (_end, _interrupt, _again):
            signal.signal(number, signal.SIG_IGN if handler is _again else signal.SIG_DFL)


def cause(error: BaseException) -> signal.Signals:
    """The signal of a KeyboardInterrupt, or of what was raised from one."""
    origin = error.__cause__ or error
    known = isinstance(origin, KeyboardInterrupt) and origin.args
    return signal.Signals(origin.args[0]) if known else signal.SIGINT


def _end(number: int, _: object) -> None:
    _hang_up(number)
    what, why, fix = (part.format(WHY[signal.Signals(number)]) for part in SAID)
    os.write(2, f"error: {what}\n  why: {why}\n  fix: {fix}\n".encode())
    if "--json" in sys.argv:
        told = f'"kind": "{what}", "what": "{what}", "why": "{why}", "fix": "{fix}"'
        os.write(1, f'{{"error": {{{told}}}}}\n'.encode())
    os._exit(SHELL + number)


def _interrupt(number: int, _: object) -> None:
    _hang_up(number)
    if number != signal.SIGINT:  # these often come twice, and the second would cut off the tidying up
        signal.signal(signal.SIGTERM, _again)
        signal.signal(signal.SIGHUP, _again)
    raise KeyboardInterrupt(number)


def _again(*_: object) -> None:
    pass


def _hang_up(number: int) -> None:
    """Writing to a terminal that is closed would fail."""
    if number == signal.SIGHUP:
        nothing = os.open(os.devnull, os.O_WRONLY)
        for output in (1, 2):
            with suppress(OSError):
                if stat.S_ISCHR(os.fstat(output).st_mode):
                    os.dup2(nothing, output)
