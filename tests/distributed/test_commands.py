"""`ltx2 generate` on two machines: the same clip as on one, refusals before any work, and runs in which a machine is
lost."""

import json
import shlex
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ltx2
from ltx2.cli import run
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.transformer.config import TransformerConfig
from tests.support.command import Here
from tests.support.ranks import commands, ended, said

SIZE = ["--width", "64", "--height", "64", "--frames", "9", "--seed", "3", "--no-metadata"]
LARGE = ["--width", "512", "--height", "512", "--frames", "97"]
LATENTS = "latents.safetensors"
GUIDED = ["--pipeline", "one-stage", "--steps", "2"]
CASE = {"part": "denoise", "pipeline": "one-stage", "steps": 1, "width": 64, "height": 64, "frames": 9}
SUITE = {"warmup": 0, "repeat": 1, "cases": [CASE]}
LEFT = "unfinished.safetensors"
STATE = f"clip.{LEFT}"
QUICK = """
import pytest
from tests.support.machine import small_ceilings
from tests.support.sampling import short_texts
patch = pytest.MonkeyPatch()
small_ceilings(patch)
short_texts(patch)
"""
# Rank `who` sends itself a signal after the first step of stage 1. From then on the other waits so many seconds.
SIGNALLED = """
import signal, threading
from ltx2.runtime.distributed import machines
from ltx2.runtime.events import StepDone
from ltx2.runtime.generate.run import Run
events = Run.events

def watched(self):
    for event in events(self):
        if isinstance(event, StepDone) and event.step == 1:
            machines.PATIENCE, machines.TIMES, machines.GRACE = {patience}, 0.0, 0.1
            if rank == "{who}":
                os.kill(os.getpid(), {number})
            elif {interrupted}:
                signal.signal({interrupted}, signal.default_int_handler)
                threading.Timer(0.5, os.kill, (os.getpid(), {interrupted})).start()
        yield event

Run.events = watched
"""


def signalled(number: signal.Signals, patience: float = 1.0, interrupted: int = 0, who: int = 1) -> str:
    """`interrupted`: the signal that the other one gets while it waits."""
    return SIGNALLED.format(number=int(number), patience=patience, interrupted=int(interrupted), who=who)


@pytest.fixture(scope="module")
def arguments(demo_f32: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a run begins with: short texts that are there already."""
    widths = TransformerConfig.from_dict(ModelFolder.open(demo_f32).config("transformer")).context_dims
    draw = np.random.default_rng(0)
    contexts = {
        f"{prompt}{name}_context": draw.normal(size=(1, 8, width)).astype(np.float32)
        for prompt in ("", "negative_")
        for name, width in widths.items()
    }
    path = tmp_path_factory.mktemp("several") / "embeddings.safetensors"
    save_file(contexts, path)
    return ["generate", "-m", str(demo_f32), "--embeddings", str(path), *SIZE]


@pytest.fixture(scope="module")
def alone(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a guided clip of one machine, and its latents."""
    folder = tmp_path_factory.mktemp("alone")
    assert run([*arguments, *GUIDED, "-q", "-o", f"{folder}/clip.mp4", "--save-latents", f"{folder}/{LATENTS}"]) == 0
    return folder


def same(a: Path, b: Path) -> bool:
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def left_off(arguments: list[str], output: Path) -> None:
    """What a run alone leaves that ends after its first step."""
    options: dict[str, Any] = {"embeddings": arguments[4], "width": 64, "height": 64, "frames": 9, "seed": 3}
    options |= {"pipeline": "one-stage", "steps": 2, "no_metadata": True, "output": output}
    options["state"] = output.with_name(f"{output.stem}.{LEFT}")
    for event in ltx2.load(arguments[2]).stream(**options):
        if isinstance(event, ltx2.events.StepDone) and event.step == 1:
            return


def test_two_machines(alone: Path, arguments: list[str], demo_25: Path, tmp_path: Path) -> None:
    """One start of two processes for all that ends well or is refused."""
    left_off(arguments, tmp_path / "later.mp4")
    chosen = ["generate", "a red circle", "-m", str(demo_25), *SIZE[:4], "--seed", "3", "--frames", "auto:1.2-1.4"]
    chosen += ["--no-audio", "--no-upscale"]
    lines = [
        [*arguments, "--cfg", "2{rank}", *GUIDED, "--json", "-o", f"{tmp_path}/never.mp4"],
        [*arguments, "--dry-run", "--json", "--split", "sequence"],
        [*arguments[: -len(SIZE)], *LARGE, "--dry-run", "-q", "--memory-limit", "1e-{rank}"],  # 1 GB, 0.1 GB
        [*arguments, *GUIDED, "--json", "-o", f"{tmp_path}/clip.mp4", "--save-latents", f"{tmp_path}/{LATENTS}"],
        ["bench", arguments[2], "--suite", f"{tmp_path}/suite.json", "--json", "--out", f"{tmp_path}/bench.json"],
        [*arguments, *GUIDED, "--resume", "-o", f"{tmp_path}/later.mp4"],
        [*chosen, "-o", f"{tmp_path}/chosen.mp4", "--save-latents", f"{tmp_path}/chosen.safetensors"],
        ["generate", "-m", f"{tmp_path}/model{{rank}}", *arguments[3:], "-o", f"{tmp_path}/never.mp4"],
        [*arguments, *GUIDED, "-o", f"{tmp_path}/gone/never.mp4"],
        [*arguments, *GUIDED, "--resume", "--json", "-o", f"{tmp_path}/later.mp4"],
    ]
    (tmp_path / "model0").symlink_to(arguments[2])
    (tmp_path / "suite.json").write_text(json.dumps(SUITE))
    for process in commands(2, tmp_path / "said", lines, QUICK):
        assert ended(process).code == 0
    results = [[said(tmp_path / "said", number, rank) for rank in range(2)] for number in range(len(lines))]

    refused = results[0]
    assert [done.code for done in refused] == [1, 1] and not (tmp_path / "never.mp4").exists()
    error = refused[0].json["error"]
    assert error["kind"] == "machines" and "(rank 1)" in error["what"] and "request" in error["why"]
    assert "(rank 1): error: " in refused[1].err and refused[1].out == ""

    planned = results[1]
    assert [done.code for done in planned] == [0, 0] and planned[1].out == planned[1].err == ""
    plan = planned[0].json
    assert ["rank 0" in plan["machines"][0]["name"], "rank 1" in plan["machines"][1]["name"]] == [True, True]
    assert plan["splits"]["stage1"] == "sequence" and all(machine["phases"] for machine in plan["machines"])

    unfit = results[2]
    unfit[0].failed(3, "it does not fit on", "(rank 1)")
    assert unfit[1].code == 3 and "(rank 1): error: 97 frames of 512x512 do not fit" in unfit[1].err

    made = results[3]
    assert [done.code for done in made] == [0, 0] and made[1].out == made[1].err == ""
    assert (tmp_path / "clip.mp4").read_bytes() == (alone / "clip.mp4").read_bytes()
    assert same(tmp_path / LATENTS, alone / LATENTS) and not (tmp_path / STATE).exists()
    record = json.loads((tmp_path / "clip.json").read_text())
    assert record["machines"] == {"count": 2, "splits": {**record["machines"]["splits"], "stage1": "guidance"}}
    (stage,) = (phase for phase in record["phases"] if phase["name"] == "stage1")
    assert stage["sent_bytes"] > 0 and stage["exchange_seconds"] > 0

    measured = results[4]
    assert [done.code for done in measured] == [0, 0] and measured[1].out == measured[1].err == ""
    receipt = measured[0].json
    assert receipt["machines"] == receipt["link"]["machines"] == 2 and receipt["link"]["bytes_per_second"] > 0
    (case,) = receipt["cases"]
    (stage,) = case["phases"]
    assert stage["busiest_share"] == 0.5 and 0 < stage["exchange_share"] < 1
    # Two passes, float32: 8 tokens of the picture and 9 of the sound, 32 channels each.
    assert stage["sent_bytes"] == 2 * 4 * (8 + 9) * 32
    assert json.loads((tmp_path / "bench.json").read_text()) == receipt

    continued = results[5]
    assert [done.code for done in continued] == [0, 0], continued
    assert "from the beginning" not in continued[0].err and continued[1].out == continued[1].err == ""
    assert not (tmp_path / f"later.{LEFT}").exists()
    assert (tmp_path / "later.mp4").read_bytes() == (alone / "clip.mp4").read_bytes(), "a run that was begun alone"

    lengths = results[6]
    assert [done.code for done in lengths] == [0, 0], lengths
    assert "--frames allows 1.2 to 1.4 s: " in lengths[0].err
    assert load_file(tmp_path / "chosen.safetensors")["video"].shape[2] == 5, "33 frames"

    lacking = results[7]
    assert [done.code for done in lacking] == [1, 1]
    assert "(rank 1) cannot begin" in lacking[0].err and f"there is no model folder {tmp_path}/model1" in lacking[0].err
    assert "(rank 1): error: there is no model folder" in lacking[1].err

    without_place = results[8]
    without_place[0].failed(1, f"{tmp_path}/gone")
    assert without_place[1].code == 1 and "(rank 0) cannot begin" in without_place[1].err
    assert "--resume" not in without_place[1].err, "nothing has begun"

    again = results[9]
    assert [done.code for done in again] == [0, 0] and again[1].out == again[1].err == "", again
    assert again[0].err == "later.mp4 is finished: nothing of it is left to do\n"
    assert again[0].json["clip"] == f"{tmp_path}/later.mp4"


def test_a_machine_that_is_killed(alone: Path, arguments: list[str], tmp_path: Path, here: Here) -> None:
    """The others end at once, and one machine alone goes on with the same bits."""
    line = [*arguments, *GUIDED, "-o", f"{tmp_path}/clip.mp4", "--save-latents", f"{tmp_path}/{LATENTS}"]
    first, second = commands(2, tmp_path / "said", [line], signalled(signal.SIGKILL))
    assert ended(second).code == -signal.SIGKILL and ended(first).code == 0
    done = said(tmp_path / "said", 0, 0)
    done.failed(1, "another machine is lost", "--resume")
    command = shlex.split(done.err.split("this continues: ")[1])
    assert (tmp_path / STATE).exists() and not (tmp_path / "clip.mp4").exists()
    assert here(*command[1:]).code == 0
    assert same(tmp_path / LATENTS, alone / LATENTS)
    assert (tmp_path / "clip.mp4").read_bytes() == (alone / "clip.mp4").read_bytes()


def test_a_leading_machine_that_is_killed(arguments: list[str], tmp_path: Path) -> None:
    """The other one says its error, and no command of its own, though it sees the state where they share a disk."""
    line = [*arguments, *GUIDED, "-o", f"{tmp_path}/clip.mp4"]
    first, second = commands(2, tmp_path / "said", [line], signalled(signal.SIGKILL, who=0))
    assert ended(first).code == -signal.SIGKILL and ended(second).code == 0 and (tmp_path / STATE).exists()
    done = said(tmp_path / "said", 0, 1)
    assert done.code == 1 and "(rank 1): error: another machine is lost" in done.err
    assert "the same command again with --resume" in done.err and "this continues" not in done.err


def test_a_machine_that_sleeps(arguments: list[str], tmp_path: Path) -> None:
    """The others wait for a while, then end and say how to go on."""
    line = [*arguments, *GUIDED, "-o", f"{tmp_path}/clip.mp4"]
    first, second = commands(2, tmp_path / "said", [line], signalled(signal.SIGSTOP))
    assert ended(first).code == 1
    second.kill()
    ended(second)
    done = said(tmp_path / "said", 0, 0)
    for text in ("a machine does not answer", "an exchange has taken", "--resume", "this continues: ltx2 generate"):
        assert text in done.err
    assert (tmp_path / STATE).exists()


@pytest.mark.parametrize(("number", "why"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_while_a_machine_sleeps(arguments: list[str], tmp_path: Path, number: int, why: str) -> None:
    """It is heard, though MLX waits, and says how to go on."""
    line = [*arguments, *GUIDED, "-o", f"{tmp_path}/clip.mp4"]
    first, second = commands(2, tmp_path / "said", [line], signalled(signal.SIGSTOP, 300.0, number))
    assert ended(first).code == 128 + number
    second.kill()
    ended(second)
    done = said(tmp_path / "said", 0, 0)
    for text in ("error: interrupted", f"why: {why}, while", "what is done is kept, this continues: ltx2 generate"):
        assert text in done.err
    assert done.err.count("what is done is kept") == 1 and (tmp_path / STATE).exists()
