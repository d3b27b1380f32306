"""Attention to windows against the same position by position."""

import mlx.core as mx
import numpy as np
import pytest

from ltx2.runtime.layers import neighbourhood
from ltx2.runtime.layers.neighbourhood import Keys, Neighbourhood

HEADS, CHANNELS = 2, 16
Size = tuple[int, int, int]


def by_position(q: np.ndarray, k: np.ndarray, v: np.ndarray, kernel: Size) -> np.ndarray:
    """(T, H, W, C): the window of a position is centred on it, and shifted to lie in the clip."""
    out = np.zeros_like(q)
    for place in np.ndindex(*q.shape[:3]):
        starts = [min(max(p - n // 2, 0), side - n) for p, n, side in zip(place, kernel, q.shape[:3], strict=True)]
        window = tuple(slice(start, start + n) for start, n in zip(starts, kernel, strict=True))
        query = q[place].reshape(HEADS, -1)
        keys, values = (x[window].reshape(-1, HEADS, CHANNELS // HEADS) for x in (k, v))
        weights = np.exp(np.einsum("hd,khd->hk", query, keys))
        out[place] = np.einsum("hk,khd->hd", weights / weights.sum(axis=1, keepdims=True), values).reshape(-1)
    return out


def slabs(x: np.ndarray, start: int, stop: int, frames: int) -> list[mx.array]:
    return [mx.array(x[at : min(at + frames, stop)]) for at in range(start, stop, frames)]


@pytest.mark.parametrize("gathered", [1 << 28, 1 << 14], ids=["all rows at once", "row by row"])
@pytest.mark.parametrize(
    ("size", "kernel"),
    [
        ((9, 10, 13), (3, 5, 5)),  # no side is a multiple of the blocks
        ((3, 7, 7), (3, 7, 7)),  # one window for all
        ((12, 9, 11), (11, 5, 3)),  # nearly so, over time
        ((5, 3, 8), (3, 3, 3)),  # a side shorter than a block
        ((4, 12, 12), (2, 4, 1)),  # even windows reach further back
    ],
)
def test_windows(monkeypatch: pytest.MonkeyPatch, size: Size, kernel: Size, gathered: int) -> None:
    monkeypatch.setattr(neighbourhood, "GATHERED", gathered)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((*size, CHANNELS)).astype(np.float32) for _ in range(3))
    windows, found, start = Neighbourhood(size, kernel), [], 0
    for frames in [3, *[4] * 9]:  # slabs of queries, as an upsampled clip has them
        stop = min(start + frames, size[0])
        if start == stop:
            break
        reach = windows.frames(start, stop)
        early = max(0, reach.start - 1)  # slabs of keys need not begin where they are needed
        keys = Keys(early, slabs(k, early, reach.stop, 2), slabs(v, early, reach.stop, 2))
        rows = list(windows.attend(mx.array(q[start:stop]), keys, start, HEADS))
        found.append(np.concatenate([np.array(part) for part in rows], axis=1))
        start = stop
    np.testing.assert_allclose(np.concatenate(found), by_position(q, k, v, kernel), atol=2e-5)
