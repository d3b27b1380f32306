"""Running `ltx2` in tests: in a process of its own, or in this one (the `here` and `generate` fixtures)."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPT = Path(sys.executable).with_name("ltx2")
SIZE = ["--width", "64", "--height", "64", "--frames", "9"]
SEED = ["--seed", "10"]
PARTS = ("error", "why: ", "fix: ")


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object that stdout holds, and nothing else."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found

    def failed(self, code: int, *said: str, shows: str = "") -> None:
        """It is an expected failure: three parts that say all of `said`, no traceback, nothing on stdout but a result
        that `shows` something."""
        assert self.code == code, self
        assert "Traceback" not in self.err and (shows in self.out if shows else self.out == ""), self
        parts = [line.strip().split(":")[0] for line in self.err.splitlines() if line.lstrip()[:5] in PARTS]
        assert parts == ["error", "why", "fix"], self.err
        for text in said:
            assert text in self.err, self.err


Here = Callable[..., Done]


def script(*args: str | Path, cwd: Path | None = None, **environment: str) -> Done:
    """The installed script, in a process of its own."""
    command = [str(SCRIPT), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | environment)
    return Done(done.returncode, done.stdout, done.stderr)
