"""Published sizes with random weights, on a GPU: `make test-fullsize`. Not part of the default run."""

import json
from pathlib import Path

import mlx.core as mx
import pytest

from ltx2.bench import fullsize

pytestmark = pytest.mark.fullsize


def test_steps_and_decode_are_finite_at_full_size(tmp_path: Path) -> None:
    """One stage-1 and one stage-2 step of the published transformer and a full video decode."""
    if mx.default_device() == mx.Device(mx.cpu):
        pytest.fail("full-size checks need a GPU (Metal or CUDA) with 48 GB or more")
    receipt = fullsize.run(bits=[], sizes=[])
    (tmp_path / "fullsize.json").write_text(json.dumps(receipt))
    names = {row["case"] for row in receipt["results"]}
    assert {"stage 1, 512x768x121", "stage 2, 512x768x121", "video VAE decode, tiled"} <= names
    for row in receipt["results"]:
        assert row["finite"], row
        assert row["seconds"]["median"] > 0 and row["mlx_peak_bytes"] > 1 << 30, row
