"""Planning before a download: the numbers are those of `generate --dry-run` on what would be made."""

import re
from pathlib import Path
from typing import Any

import pytest

import ltx2
from ltx2 import render
from ltx2.bench.plan import rows
from ltx2.bench.plan.models import PROMPT, PlannedBundle
from ltx2.bench.plan.rows import NOT, PRESETS, RESIDENT, STREAMED, ModelRows, Row, plan_models
from ltx2.convert.fetch.catalogue import catalogue
from ltx2.convert.names import header
from ltx2.convert.plan.folder import described_folder
from ltx2.quant.apply import Settings, quantize_plan
from ltx2.quant.choose.budget import gpu_bytes
from ltx2.runtime.errors import InputError, UsageError
from ltx2.runtime.generate.job import Job
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.generate.planning import plan_memory
from tests.support import published
from tests.support.command import SIZE, Here
from tests.support.official import plan_of

GB = 10**9


@pytest.fixture(scope="module")
def quantized(demo_f32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plan") / "q4"
    ltx2.quantize(demo_f32, out, recipe="q4")
    return out


@pytest.mark.parametrize("limit", ["1", "0.04", "0.03"])
def test_a_folder_takes_what_its_dry_run_says(
    here: Here, demo_f32: Path, quantized: Path, limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is, and quantized before it is; on this machine, resident, streamed and too large."""
    monkeypatch.setattr(rows, "available_memory", lambda: int(float(limit) * GB))
    (model,) = here("plan", demo_f32, "--json", *SIZE).json["models"]
    found = {row["preset"]: row for row in model["rows"]}
    for preset, folder in (("16 bit", demo_f32), ("q4", quantized)):
        args = [PROMPT, "-m", folder, "-o", tmp_path / "c.mp4", *SIZE, "--memory-limit", limit, "--dry-run", "--json"]
        told = here("generate", *args)
        row = found[preset]
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.name != "ltx2.json")
        assert row["size"] == pytest.approx(size, rel=0.02)
        assert (row["runs"] == NOT) == (told.code == 3)
        if told.code == 0:
            plan = told.json["plan"]
            assert row["peak"] == plan["peak"]
            assert row["read"] == max(phase["read"] for phase in plan["phases"])
            assert row["runs"] == (STREAMED if row["read"] else RESIDENT)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("ltx-2.3-dev-fp8", "q4"), ("ltx-2.5-distilled-nvfp4", None), ("ltx-2.5-distilled-int8", None)],
)
def test_a_bundle_takes_what_its_files_would(name: str, recipe: str | None, tmp_path: Path) -> None:
    """A few blocks stand for all: against the plan of sparse files with every block, LoRA and all."""
    bundle, settings = catalogue().bundles[name], Settings(recipe=recipe) if recipe else None
    files, lora = _look_alikes(bundle.names, tmp_path)
    plan = plan_of(*files, variant=bundle.variant)
    folder = described_folder(plan if settings is None else quantize_plan(plan, settings), tmp_path)
    options: dict[str, Any] = {"prompt": PROMPT, "output": "c.mp4", "memory_limit": 17.2, "frames": 121}
    full = plan_memory(Job(folder, Request.from_options(options | ({"distilled_lora": str(lora)} if lora else {}))))
    model = PlannedBundle(bundle)
    found = model.memory(settings, Request.from_options(options))
    assert found.phases == full.phases and found.tiling == full.tiling
    loras = sum(tensor.nbytes for tensor in plan_of(lora).entries[0].file.tensors.values()) if lora else 0
    beside = sum(f.bytes for p in catalogue().choose(["gemma-3-12b-it"]) for f in p.files if "model-0" not in f.path)
    assert model.size(settings) == pytest.approx(folder.nbytes + loras, abs=beside)


def _look_alikes(names: tuple[str, ...], folder: Path) -> tuple[list[Path], Path | None]:
    """Sparse files of a bundle, and its LoRA."""
    known = {header.header_of(name) for name in names if not name.startswith("gemma-3")}
    written = {path.name: path for each in known for path in published.write_published(folder, each)}
    paths = [published.write_gemma(folder / "gemma") if n.startswith("gemma-3") else written[n] for n in names]
    return [p for p in paths if "lora" not in p.name], next((p for p in paths if "lora" in p.name), None)


@pytest.fixture(scope="module")
def planned() -> dict[float, ModelRows]:
    return {gb: plan_models(["ltx-2-distilled"], gb).models[0] for gb in (8, 24, 128)}


class TestRows:
    def test_all_presets(self, planned: dict[float, ModelRows]) -> None:
        assert [row.preset for row in planned[24].rows] == ["16 bit", *PRESETS]
        peaks = [row.size for row in planned[24].rows]
        assert peaks == sorted(peaks, reverse=True)

    def test_disk(self, planned: dict[float, ModelRows]) -> None:
        for row in planned[24].rows:
            assert row.downloading == catalogue().size("ltx-2-distilled")
            assert row.converting == row.downloading + row.size and row.after == row.size

    def test_memory(self, planned: dict[float, ModelRows]) -> None:
        """As much as the GPU of such a Mac gets, on any machine."""
        assert {row.runs for row in planned[128].rows} == {RESIDENT}
        runs = [row.runs for row in planned[24].rows]
        assert runs == sorted(runs, key=[STREAMED, RESIDENT].index) and set(runs) == {STREAMED, RESIDENT}
        for row in planned[24].rows:
            assert row.peak <= gpu_bytes(24) and (row.read > 0) == (row.runs == STREAMED)

    def test_the_best_row(self, planned: dict[float, ModelRows]) -> None:
        """Most bits that stay in memory; better read 4 bits from disk than keep 3."""
        assert (planned[128].best or planned[8].rows[0]).preset == "16 bit"
        first = next(row for row in planned[24].rows if row.runs == RESIDENT)
        assert planned[24].best == first

        def row(preset: str, runs: str, read: int) -> Row:
            return Row(preset, runs, read, 1, 1, 1, 1, 1, "")

        few = (row("q4", STREAMED, 3), row("q4-small", STREAMED, 2), row("q3", RESIDENT, 0))
        assert ModelRows("m", "", None, None, 16, few).best == few[1]
        assert ModelRows("m", "", None, None, 16, few[2:]).best == few[2]
        assert ModelRows("m", "", None, None, 16, (row("q4", NOT, 0),)).best is None

    def test_one_row_is_recommended(self) -> None:
        """Of several models."""
        plan = plan_models(["ltx-2-distilled", "ltx-2-dev"], 64)
        assert plan.recommended is not None
        model, best = plan.recommended
        assert model.name == "ltx-2-distilled" and best.runs == RESIDENT
        assert [row.recommended for m in plan.models for row in m.rows].count(True) == 1


def test_bits(here: Here) -> None:
    """Also those that no preset has; 16: as it is."""
    for bits, preset in ((5, "q5"), (16, "16 bit")):
        (model,) = here("plan", "ltx-2-distilled", "--memory", "24", "--bits", str(bits), "--json").json["models"]
        assert [row["preset"] for row in model["rows"]] == [preset]


def test_python() -> None:
    made = ltx2.plan("ltx-2-distilled", memory=24, bits=4, width=512, height=320, frames=49)
    assert made["clip"] == {"width": 512, "height": 320, "frames": 49, "fps": 24.0}
    assert made["recommended"]["name"] == "ltx-2-distilled"
    with pytest.raises(UsageError):
        ltx2.plan(bits=7)


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("ltx-2-destilled",), 1, "did you mean ltx-2-distilled or"),
        (("ltx-2-spatial-upscaler-x2-1.0",), 1, "it is a part of one"),
        (("--memory", "0"), 2, "it is a Mac's memory in GB"),
        (("--bits", "7"), 2, "2, 3, 4, 5, 6, 8 or 16 bits"),
        (("ltx-2-distilled", "--memory", "24", "--width", "70"), 1, "64"),
    ],
)
def test_what_cannot_be_planned(here: Here, args: tuple[str, ...], code: int, said: str) -> None:
    here("plan", *args).failed(code, said)


def test_tables(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bundles, then the recommended one: no number is folded, no cell is empty, however narrow the terminal."""
    made = plan_models((), 24)
    monkeypatch.setattr(rows, "plan_models", lambda *_: made)
    for width in (60, 80, 100):
        monkeypatch.setattr(render, "FILE_WIDTH", width)
        done = here("plan", "--memory", "24")
        assert done.code == 0 and "ltx2 download" in done.out
        assert all(len(line.rstrip()) <= width for line in done.out.splitlines() if "  " in line.strip())
        for name in catalogue().bundles:
            lines = [re.split(" {2,}", line.strip("* ")) for line in done.out.splitlines() if f" {name}  " in line]
            assert sum(len(line) - 1 for line in lines) == 1 + len(PRESETS), name
        (row,) = [line for line in done.out.splitlines() if line.startswith(" * q")][:1]
        assert re.fullmatch(r" \* \S+ +(yes|reads [\d.]+ a step) .*\d+\.\d *", row)


def test_a_bundle_without_headers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "_names", dict)
    with pytest.raises(InputError, match="is not known before it is downloaded"):
        PlannedBundle(catalogue().bundles["ltx-2-distilled"])
