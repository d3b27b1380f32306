"""The benchmark of converting: its file has the published names, and its figures are what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ltx2.bench import convert
from ltx2.bench.convert import Case, Run, anonymous_memory, timed
from ltx2.bench.random import synthetic
from ltx2.convert.names.header import BLOCK, quantized_layer
from ltx2.runtime.files.tensors import TensorFile, TensorInfo, open_tensorfile, tensor_bytes
from tests.support.official import MONOLITH


@pytest.mark.parametrize("bits", [16, 8])
def test_it_is_a_published_file_with_fewer_blocks(bits: int) -> None:
    file = synthetic.checkpoint(2, bits)
    blocks = {match[1] for name in file.tensors if (match := BLOCK.search(name))}
    assert blocks == {"0", "1"} and json.loads(file.metadata["config"])["transformer"]["num_layers"] == 2
    assert {name.split(".")[0] for name in file.tensors} == {"model", "audio_vae", "vocoder"}
    assert ("F8_E4M3" in {tensor.dtype for tensor in file.tensors.values()}) == (bits == 8)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo model in place of the published one; its linear layers may be in FP8."""

    def described(header: str, skip: range) -> TensorFile:
        file = open_tensorfile(MONOLITH)
        tensors = {name: (t.dtype, t.shape) for name, t in file.tensors.items() if _block(name) not in skip}
        for name, (_, shape) in list(tensors.items()) if header.endswith("fp8") else ():
            if BLOCK.search(name) and name.endswith(".weight") and len(shape) == 2:
                tensors |= quantized_layer(name.removesuffix(".weight"), "float8_e4m3fn", shape)
        infos = {name: TensorInfo(name, *spec, 0, tensor_bytes(*spec)) for name, spec in tensors.items()}
        return TensorFile(file.path, file.metadata, infos)

    monkeypatch.setattr(synthetic, "described_file", described)


def _block(name: str) -> int:
    return int(match[1]) if (match := BLOCK.search(name)) else -1


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
    row = convert._row(Case("x", 16), 6 * 10**9, 3 * 10**9, runs)
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
