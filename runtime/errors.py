"""Expected failures. Each says what went wrong, why, and how to fix it; the command line prints the three parts
and exits with the class's code. Anything else that is raised is a bug and keeps its traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

PART_LENGTH = 4000  # characters of one part that are shown; names and values in it may come from a stranger's file


def printable(text: str) -> str:
    """On one line and without effect on a terminal: what is not printable is written as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shown(part: str) -> str:
    return printable(part if len(part) <= PART_LENGTH else part[:PART_LENGTH] + " ...")


class Ltx2Error(Exception):
    """An expected failure: `what` happened, `why`, and the `fix` the user can apply; each on one line, printable."""

    kind: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, why: str, fix: str) -> None:
        self.what, self.why, self.fix = map(_shown, (what, why, fix))
        super().__init__(what, why, fix)

    def __str__(self) -> str:
        return f"{self.what}: {self.why} ({self.fix})"

    def to_dict(self) -> dict[str, str]:
        """The `error` object of `--json`."""
        return {"kind": self.kind, "what": self.what, "why": self.why, "fix": self.fix}


class InputError(Ltx2Error):
    """A request or file that cannot be used as given."""

    kind = "input"


class UsageError(InputError):
    """Options that do not go together."""

    kind = "usage"
    exit_code = 2


class CheckpointError(Ltx2Error):
    """A source file that is malformed, incomplete or not what it should be."""

    kind = "checkpoint"


class MismatchError(Ltx2Error):
    """Two networks that were not trained together."""

    kind = "mismatch"


class DownloadError(Ltx2Error):
    """A published file that cannot be had: no access, not there, no connection, or it arrives damaged."""

    kind = "download"


class ConfigError(Ltx2Error):
    """A network configuration with an unknown, missing or wrongly typed key."""

    kind = "config"


class UnsupportedError(Ltx2Error):
    """Valid input that this version does not implement."""

    kind = "unsupported"


class ModelFolderError(Ltx2Error):
    """A model folder that is incomplete, damaged or not a model folder."""

    kind = "model"


class VerificationError(Ltx2Error):
    """A model folder that does not hold what it claims."""

    kind = "verification"


class NumericsError(Ltx2Error):
    """NaN, infinite or constant values where a picture or sound should be."""

    kind = "numerics"


class DeviceError(Ltx2Error):
    """Work that the GPU, or the system on its behalf, has ended."""

    kind = "device"


class MachinesError(Ltx2Error):
    """Machines that do not find each other, differ, or are lost."""

    kind = "machines"


class MediaError(Ltx2Error):
    """A picture, sound or video file that could not be read or written."""

    kind = "media"


class DoesNotFitError(Ltx2Error):
    """Not enough memory or disk, decided before the work starts."""

    kind = "does-not-fit"
    exit_code = 3


@contextmanager
def of(name: str) -> Iterator[None]:
    """An expected failure inside the block says whose it is, if it has a name."""
    try:
        yield
    except Ltx2Error as error:
        error.what = f"{name}: {error.what}" if name else error.what
        raise
