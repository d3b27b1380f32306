"""Several machines on this one: processes that find each other over the loopback, started by environment variables as
any launcher would."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from tests.support.command import Done

# Runs commands one after the other, in processes that are ranks of one group: what each prints goes to
# FOLDER/COMMAND.RANK, its exit code after it. "{rank}" in an argument is the process's own.
COMMANDS = """
import contextlib, json, os, sys
from pathlib import Path
import mlx.core as mx
mx.set_default_device(mx.cpu)
from ltx2.cli import run

folder, commands, before = sys.argv[1:]
rank = os.environ["MLX_RANK"]
exec(before)
for number, arguments in enumerate(json.loads(commands)):
    outputs = [open(Path(folder, f"{number}.{rank}.{name}"), "w") for name in ("out", "err")]
    with contextlib.redirect_stdout(outputs[0]), contextlib.redirect_stderr(outputs[1]):
        code = run([argument.replace("{rank}", rank) for argument in arguments])
    for output in outputs:
        output.close()
    Path(folder, f"{number}.{rank}.code").write_text(str(code))
"""


def start(size: int, folder: Path, program: str, *arguments: str) -> list["subprocess.Popen[str]"]:
    """A program in so many processes, as ranks of MLX's ring. The ports are free when they are looked for."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(size)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        hosts = [[f"127.0.0.1:{each.getsockname()[1]}"] for each in sockets]
    hostfile = folder / "hosts.json"
    hostfile.write_text(json.dumps(hosts))
    command, pipe = [sys.executable, "-c", program, *arguments], subprocess.PIPE
    environment = os.environ | {"MLX_HOSTFILE": str(hostfile)}
    return [
        subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment | {"MLX_RANK": str(rank)})
        for rank in range(size)
    ]


def ended(process: "subprocess.Popen[str]") -> Done:
    """Waits for its end."""
    out, err = process.communicate()
    return Done(process.returncode, out, err)


def commands(size: int, folder: Path, lines: list[list[str]], before: str = "") -> list["subprocess.Popen[str]"]:
    """Commands of `ltx2` on so many machines; `before` is executed first."""
    folder.mkdir(exist_ok=True)
    return start(size, folder, COMMANDS, str(folder), json.dumps([list(map(str, line)) for line in lines]), before)


def said(folder: Path, number: int, rank: int) -> Done:
    """What came of command `number` on one machine; its code is -1 where it has not ended by itself."""
    out, err, code = (folder / f"{number}.{rank}.{name}" for name in ("out", "err", "code"))
    return Done(int(code.read_text()) if code.exists() else -1, out.read_text(), err.read_text())
