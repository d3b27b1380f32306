"""The benchmark of converting: its file has the published names, and its figures are what was measured."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ltx2.bench import convert
from ltx2.bench.convert import Case, Run, anonymous_memory, timed
from ltx2.bench.random import synthetic
from tests.support import published
from tests.support.official import MONOLITH, plan_of


def test_names_and_shapes_are_the_published_ones(tmp_path: Path) -> None:
    _, _, known = published.read_header(published.MONOLITH)
    tensors, _ = synthetic.checkpoint_tensors(2)
    blocks = re.compile(r"transformer_blocks\.(\d+)\.")
    expected = {
        name: spec
        for name, spec in known.items()
        if name.startswith(("model.diffusion_model.", "audio_vae.", "vocoder.")) and "_connector." not in name
        if not (match := blocks.search(name)) or int(match[1]) < 2
    }
    assert tensors == expected


def test_fp8_layers_are_the_published_ones() -> None:
    _, _, known = published.read_header("ltx-2-19b-fp8")
    tensors, _ = synthetic.checkpoint_tensors(3)
    block = "model.diffusion_model.transformer_blocks.2."
    made = dict(synthetic._scaled(tensors))
    assert {n: f for n, f in made.items() if n.startswith(block)} == {
        n: f for n, f in known.items() if n.startswith(block)
    }


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo model's networks in place of the published ones."""
    source = plan_of(MONOLITH, variant="dev")
    networks = {name: [c.cls, dict(c.config)] for name, c in source.components.items()}
    monkeypatch.setattr(synthetic, "published", lambda: {"networks": networks})


@pytest.mark.parametrize("name", [pytest.param("bf16, copied", marks=pytest.mark.thorough), "FP8 to bf16"])
def test_a_small_run(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    shown: list[convert.Row] = []
    receipt = convert.run(tmp_path, blocks=2, rounds=1, names=[name], show=shown.append)
    (row,) = shown
    assert receipt["results"] == [row] and row["case"] == name and receipt["machine"]["cores"]
    grows = row["bytes_written"] / row["bytes_read"]
    assert grows == pytest.approx(1, abs=0.01) if "copied" in name else 1.1 < grows < 2
    assert row["cp_seconds"]["median"] > 0 and row["seconds"]["median"] > 0
    assert list(tmp_path.iterdir()) == []


def test_figures() -> None:
    runs = {"convert": [Run(2.0, 10), Run(4.0, 30), Run(3.0, None)], "cp": [Run(n, None) for n in (4.0, 2.0, 3.0)]}
    row = convert._row(Case("x", "bf16"), 6 * 10**9, 3 * 10**9, runs)
    assert (row["ratio"], row["ratio_of_pairs"], row["peak_anonymous_bytes"]) == (1.0, 1.0, 30)
    assert row["gigabytes_per_second"] == {"read": 2.0, "written": 1.0}
    assert json.dumps(row)


def test_timed(tmp_path: Path) -> None:
    code = "import sys, time; x = bytearray(80 << 20); time.sleep(0.2); open(sys.argv[1], 'w').write('done')"
    done = timed([sys.executable, "-c", code, str(tmp_path / "out")], tmp_path / "out")
    assert done.seconds > 0.2, "as long as it sleeps, at least"
    if Path("/proc/self/status").exists():
        assert done.memory is not None and 80e6 < done.memory < 300e6
    with pytest.raises(subprocess.CalledProcessError):
        timed([sys.executable, "-c", "raise SystemExit(3)"], None)
    assert anonymous_memory(2**30) is None
