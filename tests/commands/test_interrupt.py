"""Ctrl-C, SIGTERM and a closed terminal at any moment of a command: the exit code that a shell expects, three parts, no
traceback, nothing half done."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.support.command import SCRIPT, SEED, SIZE
from tests.support.folders import contents
from tests.support.official import DEMO
from tests.support.stopped import listen

# Python names every module that it has imported: a moment to be interrupted in.
MOMENTS = ["click.core", "ltx2.console", "numpy", "mlx.core", "ltx2.runtime.version"]
SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "told to end (SIGTERM)", signal.SIGHUP: "closed (SIGHUP)"}
# Sends itself a signal when so much is done; SIGTERM and SIGHUP come together, and again while it tidies up.
WORKING = """
import os, signal, sys
from ltx2 import cli
from ltx2.progress import Progress
from ltx2.runtime.events import BytesDone, StepDone
from ltx2.runtime.files import atomic

number, seen = int(sys.argv.pop(1)), []
show, unlink = Progress.show, atomic.Path.unlink

def shown(self, event):
    show(self, event)
    seen.extend([event] if isinstance(event, BytesDone | StepDone) else [])
    if len(seen) == 12:
        again()

def again(*_, **__):
    os.kill(os.getpid(), number)
    if number == signal.SIGHUP:
        os.kill(os.getpid(), signal.SIGTERM)

def unlinked(self, **options):
    if len(seen) >= 12 and number != signal.SIGINT:
        again()
    unlink(self, **options)

Progress.show, atomic.Path.unlink = shown, unlinked
cli.main()
"""


def interrupted(
    command: list[str], moment: str, folder: Path, number: signal.Signals = signal.SIGINT
) -> tuple[int, str, str]:
    """How a command ended that got a signal as soon as it had imported a module: its code, stdout, and stderr without
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
                process.send_signal(number)
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


@pytest.mark.parametrize("number", SIGNALS)
def test_by_every_signal(tmp_path: Path, number: signal.Signals) -> None:
    code, out, err = interrupted(["inspect", "x", "--json"], "ltx2.commands.group", tmp_path, number)
    assert code == 128 + number and err.startswith("error: interrupted\n  why: ")
    assert f"{SIGNALS[number]}, before anything was begun" in err
    assert json.loads(out)["error"]["why"] in err


@pytest.mark.parametrize("command", ["generate", "convert", "quantize"])
def test_at_work(demo_f32: Path, tmp_path: Path, command: str) -> None:
    """Every signal leaves what Ctrl-C leaves: what a run continues with, and nothing else."""
    arguments = {
        "generate": ["generate", "a red square", "-m", demo_f32, "-o", "clip.mp4", *SIZE, *SEED],
        "convert": ["convert", *DEMO, "-o", "model", "--variant", "distilled"],
        "quantize": ["quantize", demo_f32, "-o", "model"],
    }[command]
    for number, why in SIGNALS.items():
        folder = tmp_path / number.name
        folder.mkdir()
        process = [sys.executable, "-c", WORKING, str(int(number)), *map(str, arguments)]
        done = subprocess.run(process, cwd=folder, capture_output=True, text=True, preexec_fn=listen)
        assert done.returncode == 128 + number and "Traceback" not in done.stderr and "ignored" not in done.stderr, done
        assert "error: interrupted" in done.stderr and why in done.stderr
        left = {path.parts[0] for path in map(Path, contents(folder))}
        assert left == ({"clip.unfinished.safetensors"} if command == "generate" else {"model.partial"}), number


def test_a_terminal_that_is_closed(demo_f32: Path, tmp_path: Path) -> None:
    """There is nobody to tell, and nothing stays behind."""
    terminal, end = os.openpty()

    def begin() -> None:
        listen()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    command = [SCRIPT, "generate", "a red square", "-m", demo_f32, "-o", tmp_path / "clip.mp4", *SEED]
    with subprocess.Popen(
        [*map(str, command), "--width", "384", "--height", "256", "--frames", "49"],
        stdin=end, stdout=end, stderr=end, start_new_session=True,
        preexec_fn=begin,
    ) as process:  # fmt: skip
        os.close(end)
        said = b""
        while b"preparing the prompt" not in said:
            said += os.read(terminal, 1 << 16)
        assert (tmp_path / "clip.mp4.partial").exists()
        os.close(terminal)
    assert process.returncode == 128 + signal.SIGHUP and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", SIGNALS)
def test_where_it_is_ignored_it_stays_so(number: signal.Signals) -> None:
    """As in a shell's background job, or after nohup."""
    code = "import os, signal, sys\nfrom ltx2 import cli\nsys.argv = ['ltx2', '--version']\ncli.main()"
    ignoring = f"import signal\nsignal.signal({int(number)}, signal.SIG_IGN)\n"
    checking = f"import atexit\natexit.register(lambda: print(signal.getsignal({int(number)}) is signal.SIG_IGN))\n"
    done = subprocess.run(
        [sys.executable, "-c", ignoring + checking + code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "True"


def test_the_script_begins_with_it() -> None:
    """What it imports first takes no time."""
    code = "import sys, ltx2.cli; print(*(sys.modules.keys() & {'click', 'json', 'ltx2.console'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n" and SCRIPT.read_text().count("ltx2.cli") == 1
