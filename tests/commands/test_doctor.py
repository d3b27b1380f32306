"""What `ltx2 doctor` finds: nothing wrong here, and a kernel that is."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import ltx2.doctor
from ltx2 import render
from ltx2.bench.doctor import checks, kernels
from ltx2.bench.doctor.checks import Check
from ltx2.bench.doctor.kernels import Checked, check_kernels
from ltx2.runtime.layers import matmul
from ltx2.runtime.model.forms import MODES
from tests.support.command import Here


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer rows, and few forms: the others differ in nothing here."""
    monkeypatch.setattr(checks, "ROWS", 160)
    monkeypatch.setattr(checks, "MODES", {name: replace(mode, bits=mode.bits[-2:]) for name, mode in MODES.items()})


@pytest.fixture
def quick(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first kernels of every group, and the embedded model's latents as they were."""
    groups = Counter[str]()

    def first() -> Iterator[Check]:
        groups.clear()
        for check in checks.checks():
            groups[check.group] += 1
            if groups[check.group] <= 3:
                yield check

    monkeypatch.setattr(kernels, "checks", first)
    right = tuple(Checked("the embedded model", name, "float32", 1e-7, 0.02) for name in ("video", "audio"))
    monkeypatch.setattr(ltx2.doctor, "_golden_latents", lambda: right)


def test_every_form_and_kernel_is_checked() -> None:
    found = list(checks.checks())
    names = {check.name for check in found}
    for mode, kind in MODES.items():
        for bits in kind.bits:
            for size in kind.group_sizes:
                assert {f"{mode}-{bits}-{size} {product}" for product in matmul.PRODUCTS} <= names
    groups = {check.group for check in found}
    assert {"attention", "neighbourhood attention", "convolutions", "norms", "rotary embedding", "FP8"} <= groups
    assert checks.ROWS > 1 << 15


@pytest.mark.usefixtures("few")
def test_all_are_right_here() -> None:
    for check in check_kernels():
        assert check.right and check.dtype == "float32", check


def test_the_embedded_model_is_right_here() -> None:
    for check in ltx2.doctor._golden_latents():
        assert check.right and (check.error or 1) < 1e-4, check


@pytest.mark.usefixtures("quick")
class TestCommand:
    def test_nothing_is_wrong(self, here: Here) -> None:
        found = here("doctor", "--json").json
        assert found["right"] is True and found["machine"]["mlx_packages"]["mlx"] == found["machine"]["mlx"]
        assert found["machine"]["limit_bytes"] > 0 and found["machine"]["ffmpeg"].startswith("ffmpeg version")
        quiet, shown = here("doctor", "-q"), here("doctor")
        assert quiet.out == quiet.err == "" and "this computer" in shown.out and "this computer" not in shown.err

    def test_a_damaged_kernel_is_named(self, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
        """As MLX before 0.32 was: wrong in the last rows."""

        def damaged(x: mx.array, codes: matmul.Codes, bias: mx.array | None = None) -> mx.array:
            made = matmul.packed(x, codes, bias)
            return mx.concatenate([made[:-32], mx.zeros_like(made[-32:])])

        monkeypatch.setattr(matmul, "PRODUCTS", {**matmul.PRODUCTS, "packed": damaged})
        monkeypatch.setattr(checks, "PRODUCTS", matmul.PRODUCTS)
        done = here("doctor")
        fixes = ["use generate --matmul dequantized", "pip install -U mlx"]
        done.failed(1, "affine-6-32 packed is wrong", *fixes, shows="WRONG")
        done = here("doctor", "--json")
        found = done.json
        assert done.code == 1 and found["error"]["kind"] == "verification" and found["right"] is False
        wrong = {check["name"] for check in found["kernels"] if not check["right"]}
        assert wrong and all(name.endswith(" packed") for name in wrong)

    @pytest.mark.parametrize(
        ("kernel", "named"),
        [
            ("scaled_dot_product_attention", "attention"),
            ("rms_norm", "norms: RMS"),
            ("rope", "rotary embedding: of a language model"),
        ],
    )
    def test_others(self, here: Here, monkeypatch: pytest.MonkeyPatch, kernel: str, named: str) -> None:
        whole: Callable[..., mx.array] = getattr(mx.fast, kernel)
        monkeypatch.setattr(mx.fast, kernel, lambda *args, **options: 1.1 * whole(*args, **options))
        here("doctor").failed(1, f"{named}", "is wrong on this", shows="WRONG")

    def test_a_kernel_that_fails(self, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
        def failing(*_: object, **__: object) -> mx.array:
            raise RuntimeError("[metal::Device] Unable to load kernel")

        monkeypatch.setattr(mx, "conv3d", failing)
        here("doctor").failed(1, "convolutions: 3-D is wrong", "Unable to load kernel", shows="WRONG")

    def test_no_ffmpeg(self, here: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "none"))
        here("doctor").failed(1, "ffmpeg was not found", "imageio-ffmpeg", shows="this computer")

    def test_tables(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """No number is folded, and no name lost, however narrow the terminal."""
        *_, found = ltx2.doctor.diagnose()
        assert isinstance(found, ltx2.doctor.Diagnosed)
        for width in (60, 80, 100):
            monkeypatch.setattr(render, "FILE_WIDTH", width)
            for table in ltx2.doctor.doctor_tables(found):
                render.print_table(*table)
            shown = capsys.readouterr().out.splitlines()
            assert all(len(line.rstrip()) <= width for line in shown)
            assert {check.group for check in found.kernels} <= {line.split("   ")[0].strip() for line in shown}


@pytest.mark.parametrize(
    ("found", "expected", "error"),
    [([1.0, 2.0], [1.0, 2.0], 0.0), ([np.nan, 2.0], [1.0, 2.0], None), ([1.0], [1.0, 2.0], None)],
)
def test_relative(found: Any, expected: Any, error: float | None) -> None:
    assert kernels.relative(np.array(found), np.array(expected)) == error
