"""Published sizes with random weights, on a GPU: `make test-fullsize`. Not part of the default run."""

import mlx.core as mx
import pytest

from ltx2.bench.speed.cases import RandomWeights, bench_cases
from ltx2.bench.speed.run import Benched, run_bench
from ltx2.bench.speed.suite import Schedule, Suite, Task

pytestmark = pytest.mark.fullsize


def test_a_clip_at_its_published_size() -> None:
    """Every network, in one piece and in the smallest tiles; the pipeline itself refuses what is not finite."""
    if mx.default_device() == mx.Device(mx.cpu):
        pytest.fail("full-size checks need a GPU (Metal or CUDA) with 48 GB or more")
    tasks = (Task("clip"), Task("decode", (("low_memory", True),)))
    suite = Suite("fullsize", tasks, Schedule(repeat=1, warmup=1))
    *_, last = run_bench(bench_cases([], RandomWeights("ltx-2-distilled"), suite), suite.schedule)
    assert isinstance(last, Benched)
    clip, tiles = last.receipt["cases"]
    assert {"text_encoder", "stage1", "stage2", "video_vae", "vocoder"} <= {phase["name"] for phase in clip["phases"]}
    for phase in [*clip["phases"], *tiles["phases"]]:
        assert phase["seconds"]["median"] > 0 and phase["mlx_peak_bytes"] > 1 << 20, phase
        assert 0 < phase["matmul_share"] < 1, phase
