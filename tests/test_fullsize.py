"""Published sizes with random weights, on a GPU: `make test-fullsize`. Not part of the default run."""

from typing import Any

import mlx.core as mx
import pytest

from ltx2.bench import fullsize

pytestmark = pytest.mark.fullsize


def test_every_network_is_finite_at_its_published_size() -> None:
    """The text path, one stage-1 and one stage-2 step of the transformer, the upscaler and both decoders."""
    if mx.default_device() == mx.Device(mx.cpu):
        pytest.fail("full-size checks need a GPU (Metal or CUDA) with 48 GB or more")
    rows: list[dict[str, Any]] = []
    fullsize.run([], rows.append)
    assert {"stage 1 step", "stage 2 step", "video decode, tiled", "vocoder"} <= {row["case"] for row in rows}
    for row in rows:
        assert row["finite"], row
        assert row["seconds"]["median"] > 0 and row["mlx_peak_bytes"] > 1 << 20, row
