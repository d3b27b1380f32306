"""Samplers and guidance against the formulas, written out again in numpy float64."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
import pytest

from ltx2.runtime.sampling.denoise import Course
from ltx2.runtime.sampling.guidance import Guidance, passes
from ltx2.runtime.sampling.latents import Segment
from ltx2.runtime.sampling.noise import Injected, Seeded, standardised
from ltx2.runtime.sampling.samplers import SAMPLERS, Tools
from ltx2.runtime.sampling.schedule import Schedule, shifted
from ltx2.runtime.sampling.state import StreamState
from ltx2.runtime.streams import Streams
from tests.support.res2s import res_2s

Array = np.ndarray[Any, Any]
SIGMAS = (1.0, 0.9, 0.6, 0.25, 0.0)
SEGMENT = Segment("video", (1, 4, 2, 3, 2))
RANDOM = np.random.default_rng(3)
MATRIX = RANDOM.normal(size=(4, 4)) / 3


def guess(x: Array, sigma: float) -> Array:
    """A prediction of x0 that depends on the tokens and on the noise level."""
    return np.tanh(x @ MATRIX) * (1.2 - sigma) + 0.3 * sigma


def state(mask: Array | None = None) -> StreamState:
    begun = StreamState.begin(SEGMENT, None, np.zeros((3, SEGMENT.tokens), np.float32))
    clean = mx.array(np.random.default_rng(5).normal(size=(1, SEGMENT.tokens, 4)).astype(np.float32))
    return begun if mask is None else begun.pinning(clean, mask.astype(np.float32))


def run(name: str, given: StreamState, noise: Callable[[str, int], Array], start: Array) -> Array:
    """All steps of a sampler over one stream; `noise(purpose, step)` is (tokens, channels)."""
    sampler = SAMPLERS[name]
    x: Streams[mx.array] = Streams(mx.array(start.astype(np.float32)))
    for number, span in enumerate(pairwise(sampler.sigmas(SIGMAS))):

        def predict(x: Streams[mx.array], sigma: float, again: bool) -> Streams[mx.array]:
            tokens = np.array(x.get("video"), np.float64)
            return Streams(given.pinned(mx.array(guess(tokens, sigma).astype(np.float32))))

        def draw(purpose: str, stream: str, number: int = number) -> mx.array:
            return mx.array(noise(purpose, number)[None].astype(np.float32))

        x, _ = sampler.step(x, span, Tools(Streams(given), predict, draw))
    return np.array(x.get("video"), np.float64)


def draws(purpose: str, step: int) -> Array:
    seed = {"ancestral": 100, "substep": 200, "step": 300}[purpose] + step
    return np.random.default_rng(seed).normal(size=(SEGMENT.tokens, 4))


def pins(given: StreamState) -> Callable[[Array], Array]:
    if given.mask is None:
        return lambda x: x
    mask, clean = given.mask[None, :, None].astype(np.float64), np.array(given.clean, np.float64)
    return lambda x: x * mask + clean * (1 - mask)


def euler(given: StreamState, x: Array) -> Array:
    pin = pins(given)
    for sigma, following in pairwise(SIGMAS):
        velocity = (x - pin(guess(x, sigma))) / sigma
        x = x + velocity * (following - sigma)
    return x


def ancestral(given: StreamState, x: Array) -> Array:
    pin = pins(given)
    for number, (sigma, following) in enumerate(pairwise(SIGMAS)):
        x0 = pin(guess(x, sigma))
        if following == 0:
            return x0
        down = following * (1 + (following / sigma - 1))
        x = down / sigma * x + (1 - down / sigma) * x0
        x = (1 - following) / (1 - down) * x
        amount = following**2 - down**2 * (1 - following) ** 2 / (1 - down) ** 2
        x = pin(x + draws("ancestral", number) * np.sqrt(max(amount, 0)))
    raise AssertionError


def second_order(given: StreamState, x: Array) -> Array:
    return res_2s(x, SIGMAS[:-1], guess, draws, pins(given))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "reference"), [("euler", euler), ("ancestral", ancestral), ("res_2s", second_order)])
def test_formula(name: str, reference: Callable[[StreamState, Array], Array], masked: bool) -> None:
    given = state(np.array([0.0] * 6 + [0.3] * 2 + [1.0] * 4) if masked else None)
    start = pins(given)(np.random.default_rng(8).normal(size=(1, SEGMENT.tokens, 4)))
    got, want = run(name, given, draws, start), reference(given, start)
    assert np.linalg.norm(got - want) <= 2e-6 * np.linalg.norm(want)
    assert not np.allclose(got, start)


def test_rows_and_predictions() -> None:
    counts = {name: (s.rows(s.sigmas(SIGMAS)), s.predictions, s.draws) for name, s in SAMPLERS.items()}
    assert counts == {
        "euler": (0, 1, ()),
        "ancestral": (3, 1, ("ancestral",)),
        "res_2s": (4, 2, ("substep", "step")),
    }


class TestGuidance:
    X0: ClassVar = {n: RANDOM.normal(size=(1, 5, 3)) for n in ("text", "negative", "perturbed", "apart")}

    @pytest.mark.parametrize("rescale", [0.0, 0.7])
    @pytest.mark.parametrize("scales", [(3, 0, 1), (1, 1, 1), (1, 0, 3), (7, 1, 3), (1, 0, 1)])
    def test_formula(self, scales: tuple[float, float, float], rescale: float) -> None:
        cfg, stg, modality = scales
        c, u, s, m = self.X0.values()
        want = c + (cfg - 1) * (c - u) + stg * (c - s) + (modality - 1) * (c - m)
        if rescale:
            want = want * (rescale * c.std(ddof=1) / want.std(ddof=1) + 1 - rescale)
        got = Guidance(cfg, stg, modality, rescale).combined({n: mx.array(v) for n, v in self.X0.items()})
        assert np.abs(np.array(got) - want).max() < 1e-5

    def test_only_what_is_needed_runs(self) -> None:
        video = Guidance(cfg=3, stg=1, blocks=(2,))
        calls = passes(Streams(video, Guidance(cfg=7)), Streams(False, False))
        assert list(calls) == ["text", "negative", "perturbed"]
        assert calls["negative"].contexts == Streams("negative", "negative")
        assert calls["perturbed"].skips.values == Streams(frozenset({2}), frozenset())
        calls = passes(Streams(Guidance(), Guidance(modality=3)), Streams(False, False))
        assert list(calls) == ["text", "apart"] and calls["apart"].skips.exchange
        assert list(passes(Streams(Guidance(), Guidance()), Streams(False, False))) == ["text"]

    def test_a_frozen_stream_keeps_its_text(self) -> None:
        calls = passes(Streams(Guidance(cfg=3), Guidance()), Streams(False, True))
        assert calls["negative"].contexts == Streams("negative", "text")

    def test_steps_between_guided_ones(self) -> None:
        both = Streams(Guidance(cfg=3, skip=2), Guidance(cfg=7, skip=1))
        found = [passes(both, Streams(False, False), step) for step in range(4)]
        guided = ["text", "negative"]
        assert [list(calls) for calls in found] == [guided, [], guided, guided]
        assert found[2]["text"].skips.idle == Streams(True, False)
        assert found[3]["text"].skips.idle == Streams(False, True)


class TestSchedule:
    def test_published_numbers(self) -> None:
        assert np.allclose(shifted(8, 4096), [1, 0.96571, 0.92187, 0.86386, 0.78345, 0.66458, 0.471, 0.1, 0], atol=6e-6)
        levels = shifted(15, 8160)
        want = [0.993491, 0.986015, 0.97734, 0.673897, 0.503378, 0.1, 0]
        assert np.allclose([*levels[1:4], *levels[-4:]], want, atol=1e-6)

    def test_own_tokens(self) -> None:
        own = Schedule.from_dict({"tokens": "own", "steps": 15})
        assert own.sigmas(8160) == shifted(15, 8160) != own.sigmas(4096)
        assert Schedule.from_dict([1.0, 0.5, 0.0]).sigmas(99) == (1.0, 0.5, 0.0)


class TestNoise:
    def test_no_draw_depends_on_another(self) -> None:
        noise = Seeded(7)
        shape = (1, 3, 4)
        names = ("stage1.video", "stage1.audio", "stage2.video", "stage3.video", "ancestral.video")
        drawn = {name: np.array(noise(name, shape)) for name in names}
        drawn |= {f"row {row}": np.array(noise("ancestral.video", shape, row)) for row in range(2)}
        values = list(drawn.values())
        assert all(not np.array_equal(a, b) for i, a in enumerate(values) for b in values[:i])
        assert np.array_equal(drawn["stage3.video"], noise("stage3.video", shape))
        assert not np.array_equal(drawn["stage3.video"], Seeded(8)("stage3.video", shape))

    def test_rows_of_a_file(self) -> None:
        value = mx.arange(24).reshape(2, 3, 4)
        assert np.array_equal(Injected({"step.video": value}.__getitem__)("step.video", (1, 3, 4), 1), value[1:2])

    def test_standardised_together(self) -> None:
        parts = standardised([mx.array([[1.0, 2.0]]), mx.array([[6.0, 9.0, 4.0]])])
        values = np.concatenate([np.array(part).ravel() for part in parts])
        assert abs(values.mean()) < 1e-6 and abs(values.std(ddof=1) - 1) < 1e-6

    def test_what_a_stage_draws(self) -> None:
        segments = Streams[tuple[Segment, ...]]((SEGMENT, Segment("keyframes", (1, 4, 1, 3, 2), noisy=False)))
        neutral = Streams(Guidance())
        euler = Course(2, SIGMAS, SAMPLERS["euler"], neutral).draws(segments)
        assert euler == {"stage2.video": (1, 4, 2, 3, 2)}
        hq = SAMPLERS["res_2s"]
        found = Course(1, hq.sigmas(SIGMAS), hq, neutral).draws(segments)
        assert found["stage1.substep.video"] == (4, 4, 2, 3, 2) and found["stage1.step.keyframes"] == (4, 4, 1, 3, 2)
        assert "stage1.keyframes" not in found
