"""What people see of a run, on a terminal and in a file."""

import io
import re
import threading
import time
from collections.abc import Iterator
from typing import ClassVar

import pytest
from rich.console import Console

from ltx2 import render
from ltx2.convert.fetch.catalogue import catalogue
from ltx2.render import Progress, print_table
from ltx2.runtime.events import BytesDone, PhaseDone, PhaseStarted, Section, StepDone, Warned
from tests.support.command import Here
from tests.support.official import MONOLITH
from tests.support.waiting import until

MB = 10**6
DONE = PhaseDone("stage1", 12.34, 1.0, (1.0, 2.0), 3 << 30, 4 << 30)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What came on stderr so far; stdout stays empty."""
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats after 0.1 s of silence."""
    monkeypatch.setattr(render, "SILENCE_SECONDS", 0.1)
    monkeypatch.setattr(render, "BEAT_SECONDS", 0.02)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    yield now


class TestPlain:
    def test_five_seconds_of_silence_are_not_reached(self) -> None:
        """A beat that comes just too early is followed by one in time."""
        assert render.SILENCE_SECONDS + 2 * render.BEAT_SECONDS <= 5

    @pytest.mark.usefixtures("quick")
    def test_a_long_step_is_followed_by_heartbeats(self, capsys: pytest.CaptureFixture[str]) -> None:
        seen: list[str] = []

        def beats() -> list[str]:
            seen.extend(lines(capsys))
            return [line for line in seen if line.startswith("stage1 ... ")]

        threads = threading.active_count()
        with Progress() as progress:
            progress.show(PhaseStarted("stage1"))
            until(lambda: len(beats()) >= 2)
        assert threading.active_count() == threads, "none after the end"

    @pytest.mark.usefixtures("quick")
    def test_also_before_the_first_event(self, capsys: pytest.CaptureFixture[str]) -> None:
        with Progress():
            until(lambda: any(line.startswith("starting ... ") for line in lines(capsys)))

    @pytest.mark.usefixtures("quick")
    def test_the_heart_stops_when_the_work_fails(self, capsys: pytest.CaptureFixture[str]) -> None:
        threads = threading.active_count()
        with pytest.raises(KeyboardInterrupt), Progress():
            raise KeyboardInterrupt
        assert threading.active_count() == threads

    def test_steps_at_most_one_line_a_second(self, capsys: pytest.CaptureFixture[str], late: list[float]) -> None:
        with Progress() as progress:
            for step in range(1, 9):
                late[0] += 0.4
                progress.show(StepDone("stage1", step, 8, 0.4, 7 * MB))
        assert [line.split()[2] for line in lines(capsys)] == ["3/8", "6/8"]

    def test_step_says_how_long_it_will_take(self, capsys: pytest.CaptureFixture[str], late: list[float]) -> None:
        """The first step reads the weights too and is left out of the estimate."""
        with Progress() as progress:
            for step, seconds in ((1, 30.0), (2, 2.0), (3, 2.0)):
                late[0] += seconds
                progress.show(StepDone("stage1", step, 8, seconds, 36 << 30))
        assert lines(capsys) == [
            "stage1: step 1/8  30.00 s/step  ETA 210 s  38.7 GB",
            "stage1: step 2/8  2.00 s/step  ETA 12 s  38.7 GB",
            "stage1: step 3/8  2.00 s/step  ETA 10 s  38.7 GB",
        ]

    def test_events(self, capsys: pytest.CaptureFixture[str], late: list[float]) -> None:
        with Progress() as progress:
            progress.show(DONE)
            late[0] += 2
            progress.show(BytesDone("transformer/model.safetensors", 10 * MB, 40 * MB))
            progress.show(Warned("the prompt is 3 tokens too long; [its] end is ignored"))
            progress.show(Section("convert", "ltx2 convert a -o b"))
        assert lines(capsys) == [
            "stage1: done in 12.3 s  2 steps  peak 3.2 GB",
            "transformer/model.safetensors: 25 % of 40 MB",
            "warning: the prompt is 3 tokens too long; [its] end is ignored",
            "",
            "convert",
            "$ ltx2 convert a -o b",
        ]

    def test_bytes_say_how_long_they_will_take(self, capsys: pytest.CaptureFixture[str], late: list[float]) -> None:
        """From what this run has done: a continued one starts with bytes that took no time."""
        with Progress() as progress:
            for done, total in ((40, 100), (50, 100), (60, 100), (10, 500)):
                late[0] += 1.5
                progress.show(BytesDone("transformer/model.safetensors", done * MB, total * MB))
        assert [line.split(": ")[1] for line in lines(capsys)] == [
            "40 % of 100 MB",
            "50 % of 100 MB",
            "60 % of 100 MB  7 MB/s  ETA 6 s",
            "2 % of 500 MB",
        ]

    def test_long_times_are_minutes(self, capsys: pytest.CaptureFixture[str], late: list[float]) -> None:
        with Progress() as progress:
            for done in (0, 1):
                progress.show(BytesDone("ltx-2.safetensors", done * 10**9, 43 * 10**9))
                late[0] += 100
        assert lines(capsys)[-1] == "ltx-2.safetensors: 2 % of 43.0 GB  10 MB/s  ETA 70 min"

    def test_checking_after_fetching_is_another_stream(
        self, capsys: pytest.CaptureFixture[str], late: list[float]
    ) -> None:
        """Of as many bytes."""
        with Progress() as progress:
            for name, done in (("a", 0), ("a", 90), ("checking a", 0), ("checking a", 50)):
                late[0] += 3
                progress.show(BytesDone(name, done * MB, 100 * MB))
        assert lines(capsys)[-2:] == ["checking a: 0 % of 100 MB", "checking a: 50 % of 100 MB  17 MB/s  ETA 3 s"]

    def test_long_lines_are_not_broken(self, capsys: pytest.CaptureFixture[str]) -> None:
        with Progress() as progress:
            progress.show(Section("convert", "ltx2 convert " + "long " * 60))
        assert len(lines(capsys)) == 3

    @pytest.mark.usefixtures("quick")
    def test_silent(self, capsys: pytest.CaptureFixture[str]) -> None:
        threads = threading.active_count()
        with Progress(silent=True) as progress:
            progress.show(PhaseStarted("stage1"))
            progress.show(DONE)
            progress.show(Warned("careful"))
            assert threading.active_count() == threads, "its heart does not beat"
        assert lines(capsys) == []


def test_a_terminal_shows_one_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phases stay above it; it is gone at the end."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, highlight=False)
    monkeypatch.setattr(render, "Console", lambda **_: console)
    with Progress() as progress:
        progress.show(PhaseStarted("stage1"))
        progress.show(StepDone("stage1", 1, 8, 0.5, MB))
        until(lambda: "stage1: step 1/8" in screen.getvalue())
        progress.show(DONE)
    shown = screen.getvalue()
    assert "stage1: step 1/8" in shown and "\x1b[" in shown
    assert "stage1: done in 12.3 s" in shown
    assert shown.rstrip("\n").endswith("\x1b[2K"), "the last thing is that the live line is wiped"


@pytest.mark.usefixtures("quick")
def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, highlight=False, _environ={"TERM": "dumb"})
    monkeypatch.setattr(render, "Console", lambda **_: console)
    with Progress() as progress:
        progress.show(PhaseStarted("stage1"))
        until(lambda: "stage1 ... " in screen.getvalue())
        progress.show(DONE)
    shown = screen.getvalue()
    assert "\x1b" not in shown and "\r" not in shown
    assert shown.endswith("stage1: done in 12.3 s  2 steps  peak 3.2 GB\n")


class TestTable:
    def test_in_a_file(self, capsys: pytest.CaptureFixture[str]) -> None:
        print_table("bench", ["phase", "seconds"], [["spatial_upscaler", "1.25"], ["total", "3.50"]])
        shown = lines(capsys)
        assert shown[0].strip() == "bench"
        (row,) = (line for line in shown if "total" in line)
        assert row.index("total") < row.index("3.50")

    COLUMNS: ClassVar = ["phase", "seconds", "spread", "s/step", "steps", "peak GB (MLX)", "peak GB (process)"]
    ROW: ClassVar = ["spatial_upscaler", "1234.56 ± 0.12", "100 %", "123.456", "40", "123.45", "123.45"]

    @pytest.mark.parametrize("width", [40, 60, 80, 100, 120])
    def test_numbers_are_whole_at_every_width(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
    ) -> None:
        """Columns that do not fit follow below, beside the same names."""
        monkeypatch.setattr(render, "FILE_WIDTH", width)
        print_table("x" * 30, self.COLUMNS, [self.ROW, ["total", "1.00", *[""] * 5]])
        shown = lines(capsys)
        assert all(len(line.rstrip()) <= width for line in shown)
        cells = [cell for line in shown if line.startswith(" spatial_upscaler ") for cell in re.split("   +", line)[1:]]
        assert [cell.strip() for cell in cells] == self.ROW[1:]
        heads = [cell for line in shown if line.startswith(" phase ") for cell in re.split("   +", line)[1:]]
        assert [head.strip() for head in heads] == self.COLUMNS[1:]

    def test_no_cell_is_empty(self, capsys: pytest.CaptureFixture[str]) -> None:
        print_table("t", ["phase", "seconds", "s/step"], [["stage1", "2.00", "0.25"], ["total", "3.50", ""]])
        (row,) = (line for line in lines(capsys) if "total" in line)
        assert row.split() == ["total", "3.50", "-"]

    @pytest.mark.parametrize("width", [60, 80])
    def test_long_names_are_folded_not_cut(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
    ) -> None:
        monkeypatch.setattr(render, "FILE_WIDTH", width)
        name = "transformer.transformer_blocks.0.audio_to_video_attn.to_out"
        print_table("t", ["layer", "stored as", "error"], [[name, "affine 4, 64", "12.3 %"]])
        shown = "\n".join(lines(capsys))
        assert "12.3 %" in shown and "affine 4, 64" in shown and "…" not in shown
        folded = "".join(line[1:].split("   ")[0].strip() for line in shown.splitlines()[3:])
        assert name in folded


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_lists_fit_the_terminal(here: Here, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Facts that do not fit beside a name stand below it; no number is broken."""
    monkeypatch.setattr(render, "_room", lambda: width)
    listed, inspected = here("download", "--list").out, here("inspect", MONOLITH).out
    bodies = listed.split("\ngated: ")[0].splitlines() + inspected.splitlines()[2:]
    assert all(len(line) <= width for line in bodies)
    for bundle in catalogue().bundles.values():
        assert f"{catalogue().size(bundle.name) / 1e9:.1f} GB" in listed
    assert re.search(r"\btransformer\s+\d+ tensors\s+[\d.]+ [MG] parameters\s+[\d.]+ [MG]B", inspected)
