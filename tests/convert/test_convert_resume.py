"""Conversions that are killed, run out of disk, or may not write: what is kept, and that the bytes are those of one
run. Kills are SIGKILL at system calls, in processes of their own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ltx2.convert.output import pieces, stream
from ltx2.convert.output.journal import JOURNAL
from ltx2.convert.plan.entries import Plan
from ltx2.convert.write import WriteOptions, write_plan
from ltx2.quant.apply import Settings, quantize
from ltx2.quant.plan import step
from ltx2.runtime.errors import CheckpointError
from ltx2.runtime.events import BytesDone, Event, Written
from tests.support import published
from tests.support.folders import contents
from tests.support.official import DEMO, GEMMA, MONOLITH, UPSCALER, plan_of

ROOT = Path(__file__).parent.parent.parent
SMALL_SHARDS = WriteOptions(shard_gb=0.001)
MARK_BYTES = 1 << 20  # for the demo model


def demo_plan() -> Plan:
    return plan_of(*DEMO, variant="distilled")


def run(plan: Plan, out: Path, options: WriteOptions | None = None) -> list[BytesDone]:
    """Convert; returns the progress."""
    *events, last = write_plan(plan, out, options)
    assert isinstance(last, Written)
    return [event for event in events if isinstance(event, BytesDone) and "checksums" not in event.file]


@pytest.fixture
def small_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks for the demo model; one at least is on the disk when two portions are written."""
    monkeypatch.setattr(stream, "MARK_BYTES", MARK_BYTES)
    monkeypatch.setattr(stream, "MOST_BYTES", MARK_BYTES)


def lines(partial: Path) -> list[dict[str, Any]]:
    """The journal."""
    return [json.loads(line) for line in (partial / JOURNAL).read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in shards of 1 MB, converted without interruption."""
    out = tmp_path_factory.mktemp("whole") / "model"
    run(demo_plan(), out, SMALL_SHARDS)
    return out


# Forks once for every point, "CALL:N" = at the N-th such call: the child ends itself there by SIGKILL.
KILLED = """
import os, signal, sys
from collections import Counter
from pathlib import Path
from ltx2.convert.output import stream
from ltx2.quant.apply import Settings
from tests.convert.test_convert_resume import MARK_BYTES, SMALL_SHARDS, demo_plan, quantize, write_plan

def deadly(name, nth):
    call, calls = getattr(os, name), Counter()
    def wrapped(*args, **options):
        calls[name] += 1
        if calls[name] == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **options)
    setattr(os, name, wrapped)

stream.MARK_BYTES = stream.MOST_BYTES = MARK_BYTES
folder, model, points = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
plan = demo_plan()
for point in points:
    child = os.fork()
    if not child:
        name, nth = point.split(":")
        deadly(name, int(nth))
        if model:
            list(quantize(Path(model), folder / point, Settings(), SMALL_SHARDS))
        else:
            list(write_plan(plan, folder / point, SMALL_SHARDS))
        os._exit(0)
    print(point, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
POINTS = [f"{call}:{n}" for call, at in (("pwrite", (1, 700)), ("fdatasync", (1, 40)), ("rename", (1, 20))) for n in at]
MORE_POINTS = [*(f"pwrite:{n}" for n in (2, 60, 300, 1000)), "fdatasync:9", "rename:8"]


def killed(folder: Path, model: str, points: Sequence[str]) -> None:
    """Start in folder/POINT for every point, and be killed there."""
    command = [sys.executable, "-c", KILLED, str(folder), model, *points]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert dict(line.split() for line in done.stdout.splitlines()) == dict.fromkeys(points, str(-signal.SIGKILL))


def test_a_slow_disk_is_not_waited_for_at_once(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written while a portion goes to the disk belongs to the next one, up to a limit."""
    monkeypatch.setattr(stream, "MARK_BYTES", MARK_BYTES)
    monkeypatch.setattr(stream, "MOST_BYTES", 4 * MARK_BYTES)
    ready, waited = threading.Event(), list[int]()
    sync, finish = stream.Writer._sync, stream.Writer.finish

    def slow(self: stream.Writer, *portion: Any) -> None:
        ready.wait()
        sync(self, *portion)

    def finishing(self: stream.Writer) -> None:
        if not all(task.done() for task in self._tasks):
            waited.append(self._unsynced)
            ready.set()
        finish(self)

    monkeypatch.setattr(stream.Writer, "_sync", slow)
    monkeypatch.setattr(stream.Writer, "finish", finishing)
    run(demo_plan(), tmp_path / "out", SMALL_SHARDS)
    assert 4 * MARK_BYTES <= waited[0] < 5 * MARK_BYTES
    assert contents(tmp_path / "out") == contents(whole)


class TestKilled:
    @pytest.mark.parametrize("points", [POINTS, pytest.param(MORE_POINTS, marks=pytest.mark.thorough)], ids=len)
    def test_converting(self, whole: Path, tmp_path: Path, small_marks: None, points: list[str]) -> None:
        """Nothing stands under the final name, what is marked is not done again, and the bytes are those of one run."""
        killed(tmp_path, "", points)
        before = {path: path.read_bytes() for path in (*DEMO[:2], *GEMMA.iterdir())}
        for point in points:
            out = tmp_path / point
            partial = out.with_name(out.name + ".partial")
            assert not out.exists()
            kept = [line for line in lines(partial) if "file" in line]
            inodes = {line["file"]: (partial / line["file"]).stat().st_ino for line in kept}
            run(demo_plan(), out, SMALL_SHARDS)
            assert contents(out) == contents(whole) and not partial.exists(), point
            assert {name: (out / name).stat().st_ino for name in inodes} == inodes, point
        assert before == {path: path.read_bytes() for path in before}

    def test_little_is_done_again(self, tmp_path: Path, small_marks: None) -> None:
        """At most two portions between marks, and what was under way."""
        killed(tmp_path, "", ["pwrite:1000"])
        plan = demo_plan()
        *_, mark = [line["pieces"] for line in lines(tmp_path / "pwrite:1000.partial") if "pieces" in line]
        jobs = self.jobs(plan)
        written = self.until(jobs, 1000)
        first = run(plan, tmp_path / "pwrite:1000", SMALL_SHARDS)[0]
        assert mark > 0 and first.done > 0
        assert first.done >= sum(job.piece.stored for job in jobs[:mark])
        assert written - first.done < 3 * MARK_BYTES

    @staticmethod
    def jobs(plan: Plan) -> list[stream.Job]:
        from ltx2.convert.output.files import component_files

        files = [f for c in plan.components.values() for f in component_files(plan, c, 10**6)]
        return stream.make_jobs(plan, files)

    @staticmethod
    def until(jobs: list[stream.Job], writes: int) -> int:
        """Bytes of pieces that so many writes have written: one for each, after one for each file's header."""
        return sum(job.piece.stored for job in jobs[: writes - len({job.file.path for job in jobs})])

    @pytest.mark.parametrize(
        "points",
        [
            ("pwrite:400", "fdatasync:12", "rename:6"),
            pytest.param(("pwrite:50", "pwrite:1500"), marks=pytest.mark.thorough),
        ],
        ids=len,
    )
    def test_quantizing(self, demo_model: Path, tmp_path: Path, small_marks: None, points: tuple[str, ...]) -> None:
        """In the middle of layers too; the report says of every layer what one run says."""
        killed(tmp_path, str(demo_model), points)
        expected = list(quantize(demo_model, tmp_path / "q", Settings(), SMALL_SHARDS))
        for point in points:
            assert not (tmp_path / point).exists()
            events = list(quantize(demo_model, tmp_path / point, Settings(), SMALL_SHARDS))
            assert contents(tmp_path / point) == contents(tmp_path / "q"), point
            for ours, theirs in zip(report(events), report(expected), strict=True):
                assert ours == pytest.approx(theirs, rel=2e-3)

    def test_the_command_itself(self, tmp_path: Path) -> None:
        """250 MB, killed when a mark is on the disk; the same command goes on from there."""
        source, out = published.write_upscaler(tmp_path / "up.safetensors", 512), tmp_path / "out"
        journal, command = tmp_path / "out.partial" / JOURNAL, [sys.executable, "-m", "ltx2", "convert", "--quiet"]
        process = subprocess.Popen([*command, str(source), "-o", str(out)], cwd=ROOT)
        while process.poll() is None and not (journal.is_file() and '"pieces"' in journal.read_text()):
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL and not out.exists()
        first = run(plan_of(source), out)[0]
        assert first.done > stream.MARK_BYTES
        run(plan_of(source), tmp_path / "once")
        weights = "spatial_upscaler/model.safetensors"
        assert subprocess.run(["cmp", out / weights, tmp_path / "once" / weights]).returncode == 0
        assert (out / "ltx2.json").read_bytes() == (tmp_path / "once" / "ltx2.json").read_bytes()


def report(events: list[Event]) -> list[float]:
    """Every layer's error."""
    return [layer.relative_error for event in events if hasattr(event, "report") for layer in event.report.layers]


class TestInterrupted:
    def interrupted(self, out: Path, events: int = 600, **options: Any) -> Path:
        """The unfinished folder after some events."""
        running = write_plan(plan_of(GEMMA, MONOLITH, **options), out, SMALL_SHARDS)
        for _ in range(events):
            next(running)
        running.close()  # type: ignore[attr-defined]  # what Ctrl-C does
        return out.with_name(out.name + ".partial")

    def finish(self, whole: Path, out: Path) -> list[BytesDone]:
        events = run(plan_of(GEMMA, MONOLITH, variant="distilled"), out, SMALL_SHARDS)
        expected = {name: data for name, data in contents(whole).items() if "upscaler" not in name}
        about_all = {"ltx2.json": b"", "README.md": b""}  # what all components and sources are
        assert contents(out) | about_all == expected | about_all
        return events

    def test_what_is_done_is_kept(self, whole: Path, tmp_path: Path, small_marks: None) -> None:
        partial = self.interrupted(tmp_path / "out", variant="distilled")
        kept = sum((partial / line["file"]).stat().st_size for line in lines(partial) if "file" in line)
        assert kept > 10**6
        assert self.finish(whole, tmp_path / "out")[0].done > kept

    def test_threads_end(self, tmp_path: Path) -> None:
        self.interrupted(tmp_path / "out", 5, variant="distilled")
        assert [thread.name for thread in threading.enumerate() if thread.name.startswith("ThreadPool")] == []

    def test_other_options_start_anew(self, tmp_path: Path) -> None:
        partial = self.interrupted(tmp_path / "out", variant="dev", dtype="f32")
        (partial / "stray").mkdir()
        self.interrupted(tmp_path / "out", 1, variant="dev")
        assert not (partial / "stray").exists() and "pieces" not in str(lines(partial)[:2])

    def test_changed_source_starts_anew(self, tmp_path: Path) -> None:
        copy = Path(shutil.copy(UPSCALER, tmp_path))
        running = write_plan(plan_of(copy), tmp_path / "out", SMALL_SHARDS)
        for _ in range(20):
            next(running)
        running.close()  # type: ignore[attr-defined]
        os.utime(copy, ns=(0, 0))
        before = lines(tmp_path / "out.partial")
        next(iter(write_plan(plan_of(copy), tmp_path / "out", SMALL_SHARDS)))
        assert lines(tmp_path / "out.partial")[0] != before[0]

    def test_other_pieces_start_anew(self, demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A GPU takes larger ones, and a mark counts pieces."""
        begun = list[dict[str, Any]]()
        for gpu in (False, True):
            monkeypatch.setattr(step, "is_gpu", lambda gpu=gpu: gpu)
            running = quantize(demo_model, tmp_path / "q", Settings())
            next(event for event in running if isinstance(event, BytesDone))
            running.close()  # type: ignore[attr-defined]
            begun.append(lines(tmp_path / "q.partial")[0])
        assert begun[0] != begun[1]

    def test_half_a_journal_line(self, whole: Path, tmp_path: Path) -> None:
        partial = self.interrupted(tmp_path / "out", variant="distilled")
        with (partial / JOURNAL).open("a") as f:
            f.write('{"file": "transfor')
        self.interrupted(tmp_path / "out", 100, variant="distilled")
        self.finish(whole, tmp_path / "out")

    def test_finished_file_that_shrank_is_written_again(self, whole: Path, tmp_path: Path, small_marks: None) -> None:
        partial = self.interrupted(tmp_path / "out", variant="distilled")
        finished = next(line["file"] for line in lines(partial) if line.get("file", "").endswith(".safetensors"))
        os.truncate(partial / finished, 10)
        self.finish(whole, tmp_path / "out")

    @pytest.mark.parametrize("damage", ["gone", "short"])
    def test_a_file_of_marked_pieces_is_missing(
        self, whole: Path, tmp_path: Path, small_marks: None, damage: str
    ) -> None:
        """Its pieces are written again, and the mark is taken back before that."""
        partial = self.interrupted(tmp_path / "out", variant="distilled")
        *_, mark = [line["pieces"] for line in lines(partial) if "pieces" in line]
        begun = max(partial.rglob("*.safetensors.partial"), key=lambda path: path.stat().st_mtime_ns)
        os.truncate(begun, 10) if damage == "short" else begun.unlink()
        self.interrupted(tmp_path / "out", 1, variant="distilled")
        *_, lower = [line["pieces"] for line in lines(partial) if "pieces" in line]
        assert lower <= mark
        self.finish(whole, tmp_path / "out")

    def test_a_source_that_changes_meanwhile(self, tmp_path: Path) -> None:
        copy = Path(shutil.copy(UPSCALER, tmp_path))
        running = write_plan(plan_of(copy), tmp_path / "out")
        next(running)
        os.utime(copy, ns=(0, 0))
        with pytest.raises(CheckpointError, match="changed while it was read"):
            list(running)
        assert not (tmp_path / "out").exists()

    def test_a_source_that_shrinks_meanwhile(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        copy = Path(shutil.copy(MONOLITH, tmp_path / "demo-distilled.safetensors"))
        running = write_plan(plan_of(copy), tmp_path / "out")
        monkeypatch.setattr(pieces, "WINDOW_BYTES", 1)
        next(running)
        os.truncate(copy, 10**6)
        with pytest.raises(CheckpointError, match="became shorter"):
            list(running)
