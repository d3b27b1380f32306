"""Shares, and what is joined of them; without processes."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ltx2.runtime.distributed.machines import ALONE, Machines, join
from ltx2.runtime.distributed.ranks import share_of
from ltx2.runtime.distributed.split import GUIDANCE, NONE, SEQUENCE, TILES, of_stage, of_tiles
from ltx2.runtime.errors import MachinesError, UnsupportedError

Together = Callable[[list[Any]], list[Machines]]


class Rank(Machines):
    """One of several machines in one process: what the others send is there already."""

    def __init__(self, rank: int, size: int, others: list[mx.array]) -> None:
        super().__init__()
        self.rank, self.size, self._group, self._others = rank, size, self, others

    def stack(self, x: mx.array) -> mx.array:
        assert all(x.shape == other.shape for other in self._others), "an exchange is of one shape"
        return mx.stack(self._others)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("total", [0, 1, 2, 3, 26, 27, 28, 1000])
def test_shares_follow_one_another_and_are_even(total: int, size: int) -> None:
    shares = [share_of(total, rank, size) for rank in range(size)]
    assert [i for share in shares for i in range(total)[share]] == list(range(total))
    lengths = [share.stop - share.start for share in shares]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("total", "size"), [(6, 2), (7, 3), (8, 3), (5, 4), (2, 3)])
def test_shares_are_joined_to_the_whole(axis: int, total: int, size: int) -> None:
    shape = [2, 3, 4]
    shape[axis] = total
    whole = mx.random.normal(shape, key=mx.random.key(1)).astype(mx.bfloat16)
    shares = [share_of(total, rank, size) for rank in range(size)]
    parts = [whole[(*(slice(None),) * axis, share)] for share in shares]
    longest = max(part.shape[axis] for part in parts)
    padded = [
        mx.pad(part, [(0, longest - part.shape[axis] if number == axis else 0) for number in range(3)])
        for part in parts
    ]
    for rank, part in enumerate(parts):
        assert mx.array_equal(Rank(rank, size, padded).joined(part, axis, total), whole)


def test_alone_nothing_is_exchanged() -> None:
    machines = join({}, lambda _: None)
    assert machines is ALONE and machines.leads and not machines.several
    x = mx.arange(6)
    assert machines.joined(x, 0, 6) is x and machines.everyone({"a": 1}) == [{"a": 1}]
    assert np.array_equal(np.array(machines.stack(x)), np.arange(6)[None])
    assert (machines.sent_bytes, machines.seconds) == (0, 0.0) and machines.share(6) == slice(0, 6)


@pytest.mark.parametrize(
    ("size", "passes", "tokens", "wanted", "split"),
    [
        (1, 4, 96, None, NONE),
        (2, 4, 96, None, GUIDANCE),
        (4, 4, 96, None, GUIDANCE),
        (4, 3, 96, None, SEQUENCE),
        (2, 1, 96, None, SEQUENCE),
        (2, 4, 96, SEQUENCE, SEQUENCE),
        (4, 3, 96, GUIDANCE, GUIDANCE),
        (2, 4, 96, NONE, NONE),
        (2, 1, 96, GUIDANCE, NONE),  # there is nothing to share
        (3, 1, 2, None, NONE),  # fewer tokens than machines
        (2, 1, 0, None, NONE),  # a sound alone
    ],
)
def test_how_a_stage_is_shared(size: int, passes: int, tokens: int, wanted: str | None, split: str) -> None:
    assert of_stage(size, passes, tokens, wanted) == split


def test_how_tiles_are_shared() -> None:
    assert of_tiles(2, 2) == of_tiles(2, 9, SEQUENCE) == TILES
    assert of_tiles(1, 9) == of_tiles(2, 1) == of_tiles(2, 9, NONE) == NONE


def test_machines_that_do_not_find_each_other(tmp_path: Any) -> None:
    with pytest.raises(MachinesError) as caught:
        join({"MLX_RANK": "1", "MLX_IBV_DEVICES": str(tmp_path)}, lambda _: None)
    assert "hostfile" in caught.value.fix


def test_an_mlx_that_may_wait_for_ever_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.32.3")
    with pytest.raises(UnsupportedError) as caught:
        join({"MLX_RANK": "0", "MLX_HOSTFILE": "hosts.json"}, lambda _: None)
    assert "0.32.3" in caught.value.why and "0.32.4" in caught.value.fix
