"""`ltx2 bench`: suites, the order of runs, what a receipt says, and verdicts on two of them."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from ltx2.bench.speed import cases as speed_cases
from ltx2.bench.speed import ceilings, host, trace
from ltx2.bench.speed.cases import RandomWeights, bench_cases
from ltx2.bench.speed.compare import compare, read_receipt, table
from ltx2.bench.speed.receipt import tables
from ltx2.bench.speed.run import Benched, Case, run_bench
from ltx2.bench.speed.suite import PARTS, Schedule, Suite, Task, load_suite, suite_names
from ltx2.bench.speed.trace import MemoryTrace
from ltx2.runtime.errors import DoesNotFitError, InputError
from ltx2.runtime.events import Event, Noted, PhaseDone, Warned
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.generate.options.table import COSTS, ROWS
from ltx2.runtime.machine.process import disk_bytes_read, memory_now, process_peak_memory
from ltx2.runtime.model.layout import ModelFolder
from tests.support.command import SIZE, Here
from tests.support.machine import small_ceilings
from tests.support.sampling import short_texts
from tests.support.waiting import until

Receipt = dict[str, Any]
SMALL = (("width", 64), ("height", 64), ("frames", 1))
STEPS = ["stage1", "spatial_upscaler", "stage2"]


@pytest.fixture
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    small_ceilings(monkeypatch)


def ran(events: Iterator[Event]) -> tuple[list[Event], Receipt]:
    """All events, and the last receipt."""
    seen = list(events)
    assert isinstance(seen[-1], Benched)
    return seen, seen[-1].receipt


class TestSuites:
    @pytest.mark.parametrize("name", suite_names())
    def test_that_come_with_it(self, name: str) -> None:
        suite = load_suite(name)
        for task in suite.tasks:
            Request.from_options(dict(task.options))
        assert suite.name == name and suite.schedule.warmup and suite.schedule.repeat > 1

    def test_names(self) -> None:
        assert {"quick", "full", "parts", "sizes", "bits", "machines", "guided"} == set(suite_names())
        assert {task.part for name in suite_names() for task in load_suite(name).tasks} == set(PARTS)

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            ({"cases": []}, "no cases"),
            ({}, "cases"),
            ({"cases": [{"part": "sound"}]}, "no part 'sound'"),
            ({"cases": [{"seed": 1}]}, "no option 'seed'"),
            ({"cases": [{}], "repeats": 3}, "no setting 'repeats'"),
            ({"cases": [{}], "bits": "many"}, "invalid literal"),
        ],
    )
    def test_malformed(self, tmp_path: Path, data: Any, said: str) -> None:
        path = tmp_path / "suite.json"
        path.write_text(json.dumps(data))
        with pytest.raises(InputError, match=said):
            load_suite(str(path))

    def test_unknown(self) -> None:
        with pytest.raises(InputError, match="no suite 'none'"):
            load_suite("none")

    def test_a_users_choice_replaces_the_suites(self) -> None:
        tasks = (Task("clip", (("frames", 9), ("width", 64))), Task("clip", (("frames", 17), ("width", 64))))
        suite = Suite("two", tasks, Schedule(5, 2, 1.0))
        changed = suite.changed("decode", {"frames": 25, "height": None}, {"repeat": 2, "cooldown": None})
        assert changed.tasks == (Task("decode", (("frames", 25), ("width", 64))),), "cases that became one"
        assert changed.schedule == Schedule(2, 2, 1.0)

    @pytest.mark.parametrize("wrong", [{"repeat": 0}, {"warmup": -1}, {"cooldown": -1.0}, {"cooldown": 1e9}])
    def test_schedules_without_sense(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(InputError):
            Schedule(**wrong)

    def test_bits_are_for_random_weights(self, demo_f32: Path) -> None:
        with pytest.raises(InputError, match="for random weights"):
            bench_cases([demo_f32], None, load_suite("bits"))


@pytest.fixture(scope="module")
def parts(demo_f32: Path) -> tuple[list[Event], Receipt]:
    """Every part of a generation by itself, once."""
    model = ModelFolder.open(demo_f32)
    tasks = [Task("text", SMALL), Task("denoise", SMALL), Task("decode", (*SMALL, ("no_upscale", True)))]
    with pytest.MonkeyPatch.context() as patch:
        small_ceilings(patch)
        short_texts(patch)
        return ran(run_bench([Case(model, task) for task in tasks], Schedule(1, 0)))


@pytest.mark.usefixtures("quick_ceilings")
class TestRuns:
    def test_in_turns_and_without_warm_up(self, demo_f32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rests: list[float] = []
        monkeypatch.setattr(time, "sleep", rests.append)
        model = ModelFolder.open(demo_f32)
        options = (*SMALL, ("no_audio", True))
        cases = [Case(model, Task("decode", (*options, ("low_memory", low)))) for low in (False, True)]
        events, receipt = ran(run_bench(cases, Schedule(repeat=2, warmup=1, cooldown=30), "mine"))
        notes = [event.message for event in events if isinstance(event, Noted)]
        runs = [(note[:10], "low memory" in note) for note in notes if note.startswith("run")]
        assert runs == [
            ("run 1 of 3", False), ("run 1 of 3", True), ("run 2 of 3", True), ("run 2 of 3", False),
            ("run 3 of 3", False), ("run 3 of 3", True),
        ]  # fmt: skip
        assert rests == [30] * 6
        assert (receipt["suite"], receipt["repeat"], receipt["warmup"]) == ("mine", 2, 1)
        for case in receipt["cases"]:
            assert case["total_seconds"]["repetitions"] == 2
            assert all(phase["seconds"]["repetitions"] == 2 for phase in case["phases"])
        kept = [event.receipt for event in events if isinstance(event, Benched)]
        assert [r["cases"][0]["total_seconds"]["repetitions"] for r in kept] == [1, 2], "one after every round"

    def test_parts_are_what_they_say(self, parts: tuple[list[Event], Receipt]) -> None:
        phases = [[phase["name"] for phase in case["phases"]] for case in parts[1]["cases"]]
        assert phases[:2] == [["text_encoder", "connectors"], STEPS]
        assert sorted(phases[2]) == ["audio_vae", "video_vae", "vocoder"]
        steps = {phase["name"]: phase["steps"] for phase in parts[1]["cases"][1]["phases"]}
        assert (steps["stage1"], steps["stage2"]) == (8, 3)

    def test_what_a_receipt_says(self, parts: tuple[list[Event], Receipt]) -> None:
        events, receipt = parts
        case = receipt["cases"][1]
        done = {event.name: event for event in events if isinstance(event, PhaseDone)}
        defaults = {name: ROWS[name].default for name in COSTS}
        assert case["options"] == defaults | dict(SMALL) | {"fps": 24.0, "pipeline": "distilled", "vae": "conv"}
        (ceiling,) = receipt["ceilings"]
        assert ceiling["dtype"] == "float32" and case["model"]["dtypes"]["transformer"] == "F32"
        for phase in case["phases"]:
            seconds = done[phase["name"]].seconds - done[phase["name"]].load_seconds
            share = phase["flops"] / seconds / ceiling["matmul_flops_per_second"]
            assert phase["matmul_share"] == pytest.approx(share, abs=1e-4)
            assert phase["mlx_peak_bytes"] == done[phase["name"]].mlx_peak_bytes
            assert phase["process_peak_bytes"] >= phase["mlx_peak_bytes"] and phase["planned_bytes"] > 0
        samples = case["memory"]
        assert [phase["name"] for phase in samples["phases"]] == STEPS
        assert len(samples["seconds"]) == len(samples["mlx_bytes"]) == len(samples["process_bytes"]) > 1
        assert json.loads(json.dumps(receipt))["machine"]["cores"]
        for verbose in (False, True):
            title, columns, rows = tables(receipt, verbose)[1]
            assert "denoise: 1 frames of 64x64" in title and [row[0] for row in rows] == [*STEPS, "total"]
            assert {len(row) for row in rows} == {len(columns)} and ("eval" in title) == verbose

    def test_a_lora_on_all_layers(self, demo_dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """In both stages of a guided pipeline, from embeddings that have the negative contexts too."""
        short_texts(monkeypatch)
        task = Task("denoise", (*SMALL, ("steps", 1), ("pipeline", "hq")), lora_rank=4)
        events, receipt = ran(run_bench([Case(ModelFolder.open(demo_dev), task)], Schedule(1, 0)))
        (case,) = receipt["cases"]
        assert "denoise, hq, LoRA of rank 4" in case["name"] and case["options"]["lora_rank"] == 4
        assert [phase["name"] for phase in case["phases"]] == STEPS
        assert any(isinstance(event, Noted) and "changes 194 layers" in event.message for event in events)

    def test_what_does_not_fit_is_left_out(self, demo_f32: Path) -> None:
        model = ModelFolder.open(demo_f32)
        small, large = (Case(model, Task("decode", (*SMALL, ("memory_limit", gb)))) for gb in (1e-6, 1.0))
        events, receipt = ran(run_bench([small, large], Schedule(1, 0)))
        assert any(isinstance(event, Warned) and "left out" in event.message for event in events)
        assert [case["options"]["memory_limit"] for case in receipt["cases"]] == [1.0]
        with pytest.raises(DoesNotFitError):
            next(run_bench([small], Schedule(1, 0)))

    def test_command(self, here: Here, demo_f32: Path, tmp_path: Path) -> None:
        """A receipt, then another one compared with it and drawn."""
        old, plot = tmp_path / "old.json", tmp_path / "bench.png"
        args = ["bench", demo_f32, *SIZE, "--part", "decode", "--warmup", "0", "--repeat", "1"]
        assert here(*args, "--out", old, "-q").code == 0
        found = here(*args, "--compare", old, "--plot", plot, "--json").json["comparison"]
        assert found["verdicts"][-1]["phase"] == "in all" and found["warnings"] == []
        assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        args[args.index("--frames") + 1] = "1"
        here(*args, "--compare", old).failed(1, "different cases", "decode: 9 frames of 64x64")

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--bits", "4"], "--bits has no effect without --random"),
            (["--seed", "4"], "--seed has no effect without --quality"),
            (["--quality", "x", "--reference", "y", "--suite", "full"], "--suite has no effect"),
        ],
    )
    def test_options_without_effect(self, here: Here, options: Sequence[str], said: str) -> None:
        done = here("bench", "model", *options)
        assert done.code == 2 and said in done.err


def phase(name: str, seconds: float, spread: float, repetitions: int = 3) -> dict[str, Any]:
    timing = {"median": seconds, "spread": spread, "repetitions": repetitions}
    return {"name": name, "seconds": timing, "step_seconds": dict(timing), "steps": 3}


@pytest.fixture
def receipt() -> Receipt:
    """One case of two phases, 10 and 1 s, with spreads of 4 and 0 %."""
    phases = [phase("stage1", 10.0, 0.04), phase("vocoder", 1.0, 0.0)]
    total = {"median": 11.0, "spread": 0.03, "repetitions": 3}
    case: dict[str, Any] = {"name": "m: 9 frames", "part": "clip", "options": {"width": 64}, "model": {"release": "x"}}
    case |= {"phases": phases, "total_seconds": total}
    machine = {"chip": "M4", "mlx": "0.32", "ltx2": "1.0"}
    return {"kind": "bench", "created": "2026-01-02T03", "machine": machine, "environment": {}, "cases": [case]}


def changed(receipt: Receipt, change: Callable[[Receipt], object]) -> Receipt:
    new = deepcopy(receipt)
    change(new)
    return new


def timing(receipt: Receipt, index: int) -> dict[str, Any]:
    return dict(receipt)["cases"][0]["phases"][index]["seconds"]


class TestVerdicts:
    @pytest.mark.parametrize(
        ("index", "seconds", "spread", "text"),
        [
            (0, 10.3, 0.04, "within noise (4.0 %)"),
            (0, 10.5, 0.04, "slower by 5.0 %"),
            (0, 9.5, 0.04, "faster by 5.0 %"),
            (0, 10.5, 0.10, "within noise (7.0 %)"),
            (1, 1.009, 0.0, "within noise (1.0 %)"),
            (1, 1.011, 0.0, "slower by 1.1 %"),
        ],
    )
    def test_noise_is_half_of_both_spreads(
        self, receipt: Receipt, index: int, seconds: float, spread: float, text: str
    ) -> None:
        new = changed(receipt, lambda r: timing(r, index).update(median=seconds, spread=spread))
        name = receipt["cases"][0]["phases"][index]["name"]
        verdicts = {verdict.phase: verdict.text for verdict in compare(receipt, new).verdicts}
        assert verdicts.pop(name) == text
        assert all(other.startswith("within noise") for other in verdicts.values())

    def test_one_run_says_nothing_of_noise(self, receipt: Receipt) -> None:
        new = changed(receipt, lambda r: timing(r, 0).update(median=20.0, repetitions=1))
        first, *_ = compare(receipt, new).verdicts
        assert first.text == "+100.0 %, noise not known"

    def test_phases_steps_and_all(self, receipt: Receipt) -> None:
        phases = [verdict.phase for verdict in compare(receipt, receipt).verdicts]
        assert phases == ["stage1", "stage1, a step", "vocoder", "in all"]

    def test_what_is_compared(self, receipt: Receipt) -> None:
        new = changed(receipt, lambda r: r["machine"].update(mlx="0.33"))
        found = compare(receipt, new).to_dict()
        assert found["older"] == {"created": "2026-01-02T03", "mlx": "0.32", "ltx2": "1.0"} and not found["warnings"]
        title, columns, rows = table(found)
        assert title == "compared with 2026-01-02 (mlx 0.32, ltx2 1.0)" and rows[-1][0] == "in all"
        assert len(columns) == len(rows[0]) and rows[0][3].startswith("within noise")

    @pytest.mark.parametrize(("name", "value"), [("part", "text"), ("options", {"width": 128}), ("model", {})])
    def test_other_cases_are_refused(self, receipt: Receipt, name: str, value: Any) -> None:
        new = changed(receipt, lambda r: r["cases"][0].update({name: value}))
        with pytest.raises(InputError, match="different cases"):
            compare(receipt, new)

    def test_warnings(self, receipt: Receipt) -> None:
        assert compare(receipt, receipt).warnings == ()
        other = changed(receipt, lambda r: r["machine"].update(chip="M1"))
        assert compare(receipt, other).warnings == ("another machine: chip was M4, is M1",)
        assert "power mode was None, is low" in str(
            compare(receipt, changed(receipt, lambda r: r["machine"].update(power_mode="low"))).warnings
        )
        more = changed(receipt, lambda r: r["cases"].append({**r["cases"][0], "part": "text"}))
        assert compare(receipt, more).warnings == ("1 cases are in one of the receipts only",)

    @pytest.mark.parametrize("text", ["{}", "[]", "not json", '{"kind": "bench", "cases": [{}]}', '{"kind": "memory"}'])
    def test_other_files_are_refused(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "old.json"
        path.write_text(text)
        with pytest.raises(InputError, match="cannot compare"):
            read_receipt(path)
        with pytest.raises(InputError, match="no such file"):
            read_receipt(tmp_path / "none.json")


class TestMachine:
    def test_power_and_cores(self) -> None:
        assert host.power_source("Now drawing from 'Battery Power'\n -InternalBattery-0\t80%; discharging") == (
            "Battery Power"
        )
        assert host.power_mode("Currently in use:\n standby              1\n lowpowermode         1\n") == "low"
        assert host.power_mode("Currently in use:\n powermode            2\n sleep 1\n") == "high"
        assert host.gpu_cores('    "gpu-core-count" = 40\n') == 40
        assert [host.power_source(""), host.power_mode(" lowpowermode none"), host.gpu_cores("")] == [None] * 3

    def test_a_missing_program_is_not_known(self) -> None:
        assert host._output("/nowhere/pmset", "-g") == ""

    def test_mlx_settings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "20")
        monkeypatch.setenv("OTHER", "1")
        assert host.mlx_environment()["MLX_MAX_OPS_PER_BUFFER"] == "20" and "OTHER" not in host.mlx_environment()

    def test_the_best_of_all_sizes_until_one_takes_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        speeds = {100: 0.001, 400: 0.002, 1000: 0.1, 4000: 0.1}
        monkeypatch.setattr(ceilings, "_seconds", lambda call: call.seconds)
        tried = []

        def works() -> Iterator[Any]:
            for amount, seconds in speeds.items():
                tried.append(amount)

                def call() -> mx.array:
                    return mx.zeros(1)

                call.seconds = seconds  # type: ignore[attr-defined]
                yield amount, call

        assert ceilings._fastest(works()) == 200_000 and tried == [100, 400, 1000]

    @pytest.mark.usefixtures("quick_ceilings")
    def test_ceilings(self) -> None:
        found = ceilings.measure_ceilings(mx.float32)
        assert found.dtype == "float32" and found.matmul_flops_per_second > 1e6 and found.copy_bytes_per_second > 1e6

    def test_process(self) -> None:
        before = disk_bytes_read()
        assert before is None or before >= 0
        ballast = b"x" * (50 << 20)
        assert process_peak_memory() >= memory_now() > len(ballast)


class TestTrace:
    def test_samples_are_bounded_and_keep_the_most(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trace, "INTERVAL_SECONDS", 0.0005)
        monkeypatch.setattr(trace, "MOST_SAMPLES", 8)
        samples = [*[0] * 10, 5000, *[0] * 40]
        monkeypatch.setattr(mx, "get_active_memory", lambda: samples.pop(0) if samples else 0)
        with MemoryTrace() as taken:
            taken.begin("stage1")
            ballast = b"x" * (50 << 20)
            until(lambda: not samples)
            assert taken.end() > len(ballast)
        data = taken.to_dict()
        assert 4 <= len(data["seconds"]) < 8 and data["seconds"] == sorted(data["seconds"])
        assert max(data["mlx_bytes"]) == 5000
        ((name, start, stop),) = (tuple(phase.values()) for phase in data["phases"])
        assert name == "stage1" and 0 <= start < stop


def test_widths_of_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's bits, else the suite's, else none packed."""
    asked: list[Any] = []
    monkeypatch.setattr(speed_cases, "random_folder", lambda name, settings: asked.append(settings))
    for bits, usual in (((), ()), ((), (16, 4)), ((8,), (16, 4))):
        list(RandomWeights("any", bits).folders(usual))
    assert [settings and settings.bits for settings in asked] == [None, None, 4, 8]
