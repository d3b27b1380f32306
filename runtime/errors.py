"""Expected failures. Each says what went wrong, why, and how to fix it; the command line prints the three parts
and exits with the class's code. Anything else that is raised is a bug and keeps its traceback."""

import errno
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import ClassVar

PART_LENGTH = 4000  # characters of one part that are shown; names and values in it may come from a stranger's file
LISTED = 4  # names in an error

# What the system answers, in plain words.
ANSWERS = {
    errno.ENOENT: "there is no such file or folder", errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.EISDIR: "it is a folder", errno.EEXIST: "it is already there", errno.ELOOP: "its links lead in a circle",
    errno.EACCES: "permission denied", errno.EPERM: "permission denied", errno.EROFS: "the disk is read-only",
    errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "it is too large",
    errno.EIO: "the disk failed", errno.ENAMETOOLONG: "the name is too long", errno.EBUSY: "it is in use",
    errno.EMFILE: "too many files are open", errno.ENFILE: "too many files are open",
    errno.ESTALE: "the network drive is gone", errno.ENODEV: "the drive is gone", errno.ENOEXEC: "it is no program",
}  # fmt: skip


def reason(error: Exception) -> str:
    """Why reading or writing something failed, in plain words; the path is for whoever says what failed."""
    if isinstance(error, OSError):
        return ANSWERS.get(error.errno or 0) or error.strerror or str(error) or type(error).__name__
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if "\n" in error.doc else ""
        return f"it is no JSON: {error.msg[:1].lower()}{error.msg[1:]} in {line}column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    if isinstance(error, KeyError):
        return f"it has no {error}"
    if isinstance(error, TypeError | AttributeError):
        return f"a value in it is of the wrong kind ({error})"
    return str(error) or type(error).__name__


def answered(said: str) -> str:
    """What the system answered, in plain words, where another program says that; else nothing."""
    return next((words for code, words in ANSWERS.items() if os.strerror(code) in said), "")


def listed(names: Sequence[str], between: str = ", ") -> str:
    """The first names, and how many more there are."""
    return between.join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def nearest(name: str, known: Iterable[str], others: str) -> str:
    """The fix for an unknown name: those that are spelt nearly so, else where the `others` are."""
    near = get_close_matches(name, list(known), n=3, cutoff=0.7)
    return f"did you mean {' or '.join(near)}?" if near else others


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
    exit_code: int = 1

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
    """Options that do not go together, or a value that an option never has."""

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
def of(name: str | None) -> Iterator[None]:
    """An expected failure inside the block says whose it is, if it has a name."""
    try:
        yield
    except Ltx2Error as error:
        error.what = f"{name}: {error.what}" if name else error.what
        raise
