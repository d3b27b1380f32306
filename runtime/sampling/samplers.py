"""Samplers: one step from a noise level to the next, from predictions of x0. All arithmetic is float32: a step is a
difference of near-equal numbers (MODEL.md §3.4, §15.1)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from ltx2.runtime.sampling.state import StreamState
from ltx2.runtime.streams import Streams

ANCESTRAL, SUBSTEP, STEP = "ancestral", "substep", "step"  # what noise is drawn for, as its file names it
LAST = 0.0011  # the level that res_2s ends at, before a last prediction
BONG_BELOW, BONG_ABOVE = 0.5, 0.03  # of the step in log sigma, of sigma
ETA = 0.5  # share of the noise that res_2s replaces
Tokens = Streams[mx.array]  # (1, tokens, channels) each


@dataclass(frozen=True)
class Tools:
    """What a step works with. `predict(x, sigma, again)` gives guided, pinned x0s; `again`: it is not the step's first
    prediction. `noise(purpose, stream)` gives a stream's noise, (1, tokens, channels)."""

    states: Streams[StreamState]
    predict: Callable[[Tokens, float, bool], Tokens]
    noise: Callable[[str, str], mx.array]

    def each(
        self, step: Callable[[str, mx.array, mx.array], mx.array], x: Tokens, x0: Tokens, noised: bool = False
    ) -> Tokens:
        """`step(stream, x, x0)` of all streams that are made; frozen ones keep their x. `noised`: the step added noise,
        so given tokens are pinned again."""

        def one(name: str, pair: tuple[tuple[mx.array, mx.array], StreamState]) -> mx.array:
            (before, predicted), state = pair
            if state.frozen:
                return before
            after = step(name, before, predicted)
            return state.pinned(after) if noised else after

        return x.zip(x0).zip(self.states).named(one)


class Sampler(ABC):
    """How a step is made."""

    predictions: ClassVar[int] = 1  # of x0, in a step
    draws: ClassVar[tuple[str, ...]] = ()  # purposes of the noise that a step adds

    def sigmas(self, schedule: Sequence[float]) -> tuple[float, ...]:
        """The noise levels to go through, for a schedule that ends with 0."""
        return tuple(schedule)

    def rows(self, sigmas: Sequence[float]) -> int:
        """Steps that draw noise; the last one never does."""
        return len(sigmas) - 2 if self.draws else 0

    @abstractmethod
    def step(self, x: Tokens, span: tuple[float, float], tools: Tools) -> tuple[Tokens, Tokens]:
        """From noise level span[0] to span[1]: the tokens there, and the (first) x0 that was predicted."""


class Euler(Sampler):
    """A straight line towards x0."""

    def step(self, x: Tokens, span: tuple[float, float], tools: Tools) -> tuple[Tokens, Tokens]:
        sigma, following = span
        x0 = tools.predict(x, sigma, False)
        ratio = following / sigma
        return tools.each(lambda _, before, predicted: predicted + (before - predicted) * ratio, x, x0), x0


class Ancestral(Sampler):
    """Euler to a lower level, then noise up to the wanted one; eta 1."""

    draws = (ANCESTRAL,)

    def step(self, x: Tokens, span: tuple[float, float], tools: Tools) -> tuple[Tokens, Tokens]:
        sigma, following = span
        x0 = tools.predict(x, sigma, False)
        if following == 0:
            return x0, x0
        down = following * following / sigma
        ratio, keep = down / sigma, (1 - following) / (1 - down)
        added = math.sqrt(max(following**2 - (down * keep) ** 2, 0.0))

        def one(name: str, before: mx.array, predicted: mx.array) -> mx.array:
            euler = ratio * before + (1 - ratio) * predicted
            return keep * euler + added * tools.noise(ANCESTRAL, name)

        return tools.each(one, x, x0, noised=True), x0


class Res2s(Sampler):
    """A second-order exponential integrator with noise at the midpoint and at the end of every step."""

    predictions = 2
    draws = (SUBSTEP, STEP)

    def sigmas(self, schedule: Sequence[float]) -> tuple[float, ...]:
        return (*schedule[:-1], LAST, 0.0)

    def step(self, x: Tokens, span: tuple[float, float], tools: Tools) -> tuple[Tokens, Tokens]:
        sigma, following = span
        first = tools.predict(x, sigma, False)
        if following == 0:
            return first, first
        h = math.log(sigma / following)
        middle = math.sqrt(sigma * following)
        half = h * 0.5 * _phi1(-h / 2)
        weight2 = 2 * _phi2(-h)
        weight1 = _phi1(-h) - weight2

        def to_middle(name: str, anchor: mx.array, x0: mx.array) -> mx.array:
            return _noised(anchor + half * (x0 - anchor), anchor, (sigma, middle), tools.noise(SUBSTEP, name))

        between = tools.each(to_middle, x, first, noised=True)
        anchors = x
        if h < BONG_BELOW and sigma > BONG_ABOVE:
            # The fixed point of anchor = between - half * (x0 - anchor), which Lightricks iterates 100 times.
            anchors = tools.each(lambda _, between, x0: (between - half * x0) / (1 - half), between, first)
        second = tools.predict(between, middle, True)

        def to_end(name: str, anchor: mx.array, x0s: mx.array) -> mx.array:
            step = anchor + h * (weight1 * (x0s[0] - anchor) + weight2 * (x0s[1] - anchor))
            return _noised(step, anchor, span, tools.noise(STEP, name))

        both = first.zip(second).map(lambda pair: mx.stack(list(pair)))
        return tools.each(to_end, anchors, both, noised=True), first


def _noised(y: mx.array, anchor: mx.array, span: tuple[float, float], noise: mx.array) -> mx.array:
    """y at the level span[1] with some of its noise replaced; `anchor` is at span[0]. All (1, tokens, channels)."""
    sigma, level = span
    up = ETA * level
    kept = math.sqrt(level**2 - up**2)
    alpha = (1 - level) + kept
    slope = (anchor - y) / (sigma - level)
    return alpha * ((anchor - sigma * slope) + kept / alpha * slope) + up * noise


def _phi1(z: float) -> float:
    return math.expm1(z) / z


def _phi2(z: float) -> float:
    return (math.expm1(z) - z) / z**2


SAMPLERS: Mapping[str, Sampler] = {"euler": Euler(), "ancestral": Ancestral(), "res_2s": Res2s()}
