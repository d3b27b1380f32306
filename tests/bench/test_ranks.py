"""What ranks.py starts, and how it compares; the runs themselves are in tests/distributed."""

import json
from pathlib import Path
from typing import Any

from ltx2.bench.ranks import environments, speedups


def phase(name: str, step: float, work: float, **more: Any) -> dict[str, Any]:
    steps = {"steps": 2, "step_seconds": {"median": step}, "work_seconds": {"median": work}}
    return {"name": name, **steps, **more}


def receipt(machines: int, *phases: dict[str, Any]) -> dict[str, Any]:
    link = {"machines": machines, "latency_seconds": 0.001, "bytes_per_second": 1000.0}
    return {"machines": machines, "link": link, "cases": [{"name": "a case", "phases": list(phases)}]}


def test_speedups_of_what_is_shared() -> None:
    """A stage by its steps, tiles as a whole; what the busiest machine has, and what is sent, is expected to last."""
    alone = receipt(1, phase("stage1", 4.0, 9.0), phase("vocoder", 1.0, 1.0), phase("video_vae", 0.1, 6.0))
    shared = {"sent_bytes": 1000, "exchange_share": 0.1}
    several = receipt(
        2,
        phase("stage1", 2.5, 5.0, busiest_share=0.5, **shared),
        phase("vocoder", 1.0, 1.0),
        phase("video_vae", 0.1, 4.0, busiest_share=0.5, **shared),
    )
    stage, tiles = speedups(alone, several)
    assert (stage["phase"], stage["speedup"], stage["expected_speedup"]) == ("stage1", 1.6, 1.6)  # 4 / (2 + 500 / 1000)
    assert (tiles["phase"], tiles["speedup"], tiles["expected_speedup"]) == ("video_vae", 1.5, 1.5)
    assert stage["sent_bytes"] == 500 and tiles["sent_bytes"] == 1000


def test_ranks_find_each_other(tmp_path: Path) -> None:
    assert list(environments("nccl", 1, tmp_path)) == [{}]
    ring = list(environments("ring", 3, tmp_path))
    hosts = json.loads(Path(ring[0]["MLX_HOSTFILE"]).read_text())
    assert [each["MLX_RANK"] for each in ring] == ["0", "1", "2"]
    assert len({host for (host,) in hosts}) == 3 and all(host.startswith("127.0.0.1:") for (host,) in hosts)
    nccl = list(environments("nccl", 2, tmp_path))
    assert [each["CUDA_VISIBLE_DEVICES"] for each in nccl] == ["0", "1"]
    assert len({each["NCCL_PORT"] for each in nccl}) == 1 and {each["MLX_WORLD_SIZE"] for each in nccl} == {"2"}
