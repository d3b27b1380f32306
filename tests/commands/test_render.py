"""Tables, at any width."""

import re
from typing import ClassVar

import pytest

from ltx2 import render
from ltx2.convert.fetch.catalogue import catalogue
from ltx2.render import print_table
from tests.support.command import Here
from tests.support.official import MONOLITH


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What came on stdout so far; stderr stays empty."""
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


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
