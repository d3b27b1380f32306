"""What people see of a run, on a terminal and in a file."""

import io
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from ltx2 import progress as progress_module
from ltx2.console import Output
from ltx2.progress import Progress
from ltx2.runtime.events import (
    BytesDone,
    Event,
    Finishing,
    Loaded,
    Noted,
    PhaseDone,
    PhaseStarted,
    PlannedPhase,
    Section,
    StepDone,
    Warned,
    WorkPlanned,
)  # fmt: skip
from ltx2.runtime.machine import process
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
    monkeypatch.setattr(progress_module, "SILENCE_SECONDS", 0.1)
    monkeypatch.setattr(progress_module, "BEAT_SECONDS", 0.02)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    yield now


class TestPlain:
    def test_five_seconds_of_silence_are_not_reached(self) -> None:
        """A beat that comes just too early is followed by one in time."""
        assert progress_module.SILENCE_SECONDS + 2 * progress_module.BEAT_SECONDS <= 5

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
        assert [line.split()[2] for line in lines(capsys)] == ["3/8,", "6/8,"]

    def test_step_says_how_long_it_will_take(self, capsys: pytest.CaptureFixture[str], late: list[float]) -> None:
        """The first step reads the weights too and is left out of the estimate."""
        with Progress() as progress:
            for step, seconds in ((1, 30.0), (2, 2.0), (3, 2.0)):
                late[0] += seconds
                progress.show(StepDone("stage1", step, 8, seconds, 36 << 30))
        assert lines(capsys) == [
            "stage1: step 1/8, 30.00 s, 4 min left, 38.7 GB",
            "stage1: step 2/8, 2.00 s, 12 s left, 38.7 GB",
            "stage1: step 3/8, 2.00 s, 10 s left, 38.7 GB",
        ]

    def test_events(self, capsys: pytest.CaptureFixture[str], late: list[float]) -> None:
        with Progress() as progress:
            progress.show(DONE)
            late[0] += 2
            progress.show(BytesDone("transformer/model.safetensors", 10 * MB, 40 * MB))
            progress.show(Warned("the prompt is 3 tokens too long; [its] end is ignored"))
            progress.show(Section("convert", "ltx2 convert a -o b"))
        assert lines(capsys) == [
            "stage1: done in 12.3 s, 2 steps, peak 3.2 GB",
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
            "60 % of 100 MB, 7 MB/s, 6 s left",
            "2 % of 500 MB",
        ]

    def test_bytes_that_take_unequally_long(self, capsys: pytest.CaptureFixture[str], late: list[float]) -> None:
        """The first half of them in 3 s, the other half is nine tenths of the work."""
        with Progress() as progress:
            for done, share in ((0, 0.0), (50, 0.1)):
                progress.show(BytesDone("transformer/model.safetensors", done * MB, 100 * MB, share))
                late[0] += 3
        assert lines(capsys)[-1].endswith("50 % of 100 MB, 17 MB/s, 27 s left")

    def test_long_times_are_minutes(self, capsys: pytest.CaptureFixture[str], late: list[float]) -> None:
        with Progress() as progress:
            for done in (0, 1):
                progress.show(BytesDone("ltx-2.safetensors", done * 10**9, 43 * 10**9))
                late[0] += 100
        assert lines(capsys)[-1] == "ltx-2.safetensors: 2 % of 43.0 GB, 10 MB/s, 70 min left"

    def test_checking_after_fetching_is_another_stream(
        self, capsys: pytest.CaptureFixture[str], late: list[float]
    ) -> None:
        """Of as many bytes."""
        with Progress() as progress:
            for name, done in (("a", 0), ("a", 90), ("checking a", 0), ("checking a", 50)):
                late[0] += 3
                progress.show(BytesDone(name, done * MB, 100 * MB))
        assert lines(capsys)[-2:] == ["checking a: 0 % of 100 MB", "checking a: 50 % of 100 MB, 17 MB/s, 3 s left"]

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


PLAN = WorkPlanned(
    (
        PlannedPhase("text_encoder", "reading the prompt", 0.004, 0),
        PlannedPhase("text_encoder", "reading the prompt", 0.004, 1),
        PlannedPhase("stage1", "denoising", 0.4, 0),
        PlannedPhase("stage1", "denoising", 0.4, 1),
        PlannedPhase("video_vae", "decoding the picture", 0.092, 0),
        PlannedPhase("video_vae", "decoding the picture", 0.1, 1),
    ),
    24 * 10**9,
    2,
)


class TestWholeRun:
    """Phase n of m in plain words, step, share and time left of all there is to do, memory of the limit."""

    def test_two_clips(self, capsys: pytest.CaptureFixture[str], late: list[float]) -> None:
        with Progress() as progress:
            progress.show(PLAN)
            for clip in (0, 1):
                progress.show(PhaseStarted("text_encoder", clip))
                for step in (1, 2)[: 2 - 2 * clip]:
                    late[0] += 2
                    progress.show(StepDone("text_encoder", step, 2, 2.0, 5 * 10**9))
                # The second clip's prompt is the first one's: nothing was done, and nothing is said.
                progress.show(PhaseDone("text_encoder", 4.0, 1.0, (2.0, 2.0)[: 2 - 2 * clip], 9 * 10**9, 0))
            for clip in (0, 1):
                progress.show(PhaseStarted("stage1", clip))
                for step in (1, 2):
                    late[0] += 5
                    progress.show(StepDone("stage1", step, 2, 5.0, 12 * 10**9))
                progress.show(PhaseDone("stage1", 12.0, 1.0, (5.0, 5.0), 15 * 10**9, 0))
            progress.show(PhaseStarted("video_vae", 0))
            late[0] += 2
            progress.show(StepDone("video_vae", 1, 0, 0.5, 3 * 10**9))
        assert lines(capsys) == [
            "[1/3] reading the prompt, clip 1 of 2: step 1/2, 2.00 s, 0 % of all clips, 5.0 GB of 24.0 GB",
            "[1/3] reading the prompt, clip 1 of 2: step 2/2, 2.00 s, 0 % of all clips, 5.0 GB of 24.0 GB",
            "[1/3] reading the prompt, clip 1 of 2: done in 4.0 s, 2 steps, peak 9.0 GB",
            "[2/3] denoising, clip 1 of 2: step 1/2, 5.00 s, 21 % of all clips, 20 s left, 12.0 GB of 24.0 GB",
            "[2/3] denoising, clip 1 of 2: step 2/2, 5.00 s, 41 % of all clips, 15 s left, 12.0 GB of 24.0 GB",
            "[2/3] denoising, clip 1 of 2: done in 12.0 s, 2 steps, peak 15.0 GB",
            "[2/3] denoising, clip 2 of 2: step 1/2, 5.00 s, 61 % of all clips, 10 s left, 12.0 GB of 24.0 GB",
            "[2/3] denoising, clip 2 of 2: step 2/2, 5.00 s, 81 % of all clips, 5 s left, 12.0 GB of 24.0 GB",
            "[2/3] denoising, clip 2 of 2: done in 12.0 s, 2 steps, peak 15.0 GB",
            "[3/3] decoding the picture, clip 1 of 2: part 1, 0.50 s, 81 % of all clips, 3.0 GB of 24.0 GB",
        ]

    def test_shares_are_the_running_run_s(self, capsys: pytest.CaptureFixture[str], late: list[float]) -> None:
        """The demo and the benchmark have several; a run whose length becomes known on its way has one."""
        one = WorkPlanned((PlannedPhase("a", "a", 0.5), PlannedPhase("b", "b", 0.5)), 0)
        with Progress() as progress:
            for plan in (one, one, replace(one, again=True)):
                progress.show(plan)
                late[0] += 2
                progress.show(StepDone("b", 1, 2, 2.0, MB))
                progress.show(PhaseDone("a", 2.0, 0.0, (2.0,), MB, 0))
        assert [line.split(", ")[2] for line in lines(capsys) if "step 1/2" in line] == [
            "25 % of the clip", "25 % of the clip", "75 % of the clip",
        ]  # fmt: skip

    @pytest.mark.usefixtures("quick")
    @pytest.mark.parametrize(
        ("events", "said"),
        [
            ([PhaseStarted("stage1")], "[2/3] denoising, clip 1 of 2: loading ... "),
            ([PhaseStarted("stage1"), Loaded("stage1", 3.0)], "clip 1 of 2: first step, which compiles kernels ... "),
            ([PhaseStarted("video_vae", 1)], "[3/3] decoding the picture, clip 2 of 2: loading ... "),
            ([Finishing("writing the end of the file")], "writing the end of the file ... "),
        ],
    )
    def test_what_takes_long_says_what_it_is(
        self, capsys: pytest.CaptureFixture[str], events: list[Event], said: str
    ) -> None:
        with Progress() as progress:
            progress.show(PLAN)
            for event in events:
                progress.show(event)
            until(lambda: any(said in line for line in lines(capsys)))

    def test_after_a_minute_a_line_a_minute(
        self, capsys: pytest.CaptureFixture[str], late: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And what ends, and what is warned of, at once."""
        monkeypatch.setattr(progress_module, "BEAT_SECONDS", 1e9)  # only what is shown prints
        with Progress() as progress:
            for step in range(1, 31):
                late[0] += 10
                progress.show(StepDone("stage1", step, 30, 10.0, MB))
            progress.show(Warned("careful"))
        steps = [int(line.split()[2].split("/")[0]) for line in lines(capsys)[:-1]]
        assert steps == [1, 2, 3, 4, 5, 12, 19, 26]


def test_a_terminal_shows_one_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phases stay above it; it is gone at the end."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, highlight=False)
    monkeypatch.setattr(progress_module, "Console", lambda **_: console)
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
    monkeypatch.setattr(progress_module, "Console", lambda **_: console)
    with Progress() as progress:
        progress.show(PhaseStarted("stage1"))
        until(lambda: "stage1 ... " in screen.getvalue())
        progress.show(DONE)
    shown = screen.getvalue()
    assert "\x1b" not in shown and "\r" not in shown
    assert shown.endswith("stage1: done in 12.3 s, 2 steps, peak 3.2 GB\n")


def test_a_mac_stays_awake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a command works, and no longer."""
    said, keeper = tmp_path / "said", tmp_path / "caffeinate"
    keeper.write_text(f'#!/bin/sh\necho $$ "$@" > {said}.part; mv {said}.part {said}; exec sleep 1000\n')
    keeper.chmod(0o755)
    monkeypatch.setattr(process, "CAFFEINATE", str(keeper))

    def events() -> Iterator[Event]:
        until(said.exists)
        yield Noted("done")

    with monkeypatch.context() as mac:
        mac.setattr(sys, "platform", "darwin")
        Output(quiet=True, as_json=False).follow(events())
    number, *arguments = said.read_text().split()
    assert arguments == ["-i", "-w", str(os.getpid())]
    with pytest.raises(ProcessLookupError):
        os.kill(int(number), 0)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(process, "CAFFEINATE", str(tmp_path / "gone"))
    with process.awake():
        pass
