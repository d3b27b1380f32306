"""Ctrl-C at any moment of a command: exit code 130, three parts, no traceback, nothing half done."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import SCRIPT
from tests.support.stopped import listen

# Python names every module that it has imported: a moment to be interrupted in.
MOMENTS = ["click.core", "ltx2.console", "numpy", "mlx.core", "ltx2.runtime.version"]


def interrupted(command: list[str], moment: str, folder: Path) -> tuple[int, str, str]:
    """How a command ended that got a Ctrl-C as soon as it had imported a module: its code, stdout, and stderr without
    the modules' names."""
    importing = [sys.executable, "-X", "importtime", "-m", "ltx2", *command]
    pipe, said, sent = subprocess.PIPE, list[str](), False
    with subprocess.Popen(
        importing, cwd=folder, stdout=pipe, stderr=pipe, text=True, preexec_fn=listen, env=os.environ
    ) as process:
        assert process.stderr is not None and process.stdout is not None
        for line in process.stderr:
            if not line.startswith("import time:"):
                said.append(line)
            elif not sent and line.split("|")[-1].strip() == moment:
                process.send_signal(signal.SIGINT)
                sent = True
        out = process.stdout.read()
    assert sent, f"{moment} is not imported"
    return process.returncode, out, "".join(said)


@pytest.mark.parametrize("moment", MOMENTS)
def test_while_importing(demo_f32: Path, tmp_path: Path, moment: str) -> None:
    command = ["generate", "a red square", "-m", str(demo_f32), "--frames", "9", "--json"]
    code, out, err = interrupted(command, moment, tmp_path)
    assert code == 130 and "Traceback" not in err
    assert err.splitlines()[:1] == ["error: interrupted"] and "fix: " in err
    assert json.loads(out)["error"]["kind"] == "interrupted"


@pytest.mark.parametrize("command", [["inspect", "x"], ["plan", "--memory", "24"], ["convert", "x", "-o", "y"]])
def test_of_other_commands(tmp_path: Path, command: list[str]) -> None:
    code, out, err = interrupted(command, "ltx2.commands.group", tmp_path)
    assert (code, out) == (130, "") and list(tmp_path.iterdir()) == []
    assert err == "error: interrupted\n  why: Ctrl-C, before anything was begun\n  fix: run the same command again\n"


def test_where_it_is_ignored_it_stays_so(tmp_path: Path) -> None:
    """As in a shell's background job."""
    code = "import os, signal, sys\nfrom ltx2 import cli\nsys.argv = ['ltx2', '--version']\ncli.main()"
    ignoring = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    checking = "import atexit\natexit.register(lambda: print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN))\n"
    done = subprocess.run(
        [sys.executable, "-c", ignoring + checking + code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "True"


def test_the_script_begins_with_it() -> None:
    """What it imports first takes no time."""
    code = "import sys, ltx2.cli; print(*(sys.modules.keys() & {'click', 'json', 'ltx2.console'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n" and SCRIPT.read_text().count("ltx2.cli") == 1
