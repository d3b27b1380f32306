"""The only sampling loop. It yields after every step, so that progress, previews, checkpoints and cancelling belong to
its caller. It knows nothing of prompts, files or progress bars."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx

from ltx2.runtime.layers.checks import check_varied
from ltx2.runtime.machine.bounded import evaluate
from ltx2.runtime.networks.transformer.inputs import StreamInput
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.sampling.guidance import Guidance, Pass, passes
from ltx2.runtime.sampling.latents import Segment
from ltx2.runtime.sampling.noise import Noise
from ltx2.runtime.sampling.samplers import ANCESTRAL, Sampler, Tokens, Tools
from ltx2.runtime.sampling.state import StreamState
from ltx2.runtime.streams import Streams


@dataclass(frozen=True)
class Course:
    """How one stage is sampled: its number, the noise levels to go through (the last one 0), sampler and guidance."""

    number: int
    sigmas: tuple[float, ...]
    sampler: Sampler
    guidance: Streams[Guidance]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def noise_name(self, purpose: str, segment: str) -> str:
        """The name of a draw in a noise file."""
        if purpose == ANCESTRAL:
            return f"{ANCESTRAL}.{segment}"
        return f"stage{self.number}.{purpose}.{segment}" if purpose else f"stage{self.number}.{segment}"

    def draws(self, states: Streams[tuple[Segment, ...]]) -> dict[str, tuple[int, ...]]:
        """Name and shape in a noise file, (1 or rows, channels, ...), of all draws for streams of these segments."""
        rows, found = self.sampler.rows(self.sigmas), {}
        for segments in states.values():
            for segment in segments:
                if segment.noisy:
                    found[self.noise_name("", segment.name)] = segment.shape
                for purpose in self.sampler.draws:
                    if segment.noisy or purpose != ANCESTRAL:
                        found[self.noise_name(purpose, segment.name)] = (rows, *segment.shape[1:])
        return found


class Step(NamedTuple):
    """After `number` steps of a stage: the noisy tokens, and the x0s that were predicted, (1, tokens, channels)."""

    number: int
    x: Tokens
    x0: Tokens


class Denoiser:
    """A stage's transformer, with text projected and rotary tables made once. `contexts` by name: (1, tokens, width) of
    both streams. `keep`: names of contexts whose keys and values stay as long as they are the same (`Text`)."""

    def __init__(
        self,
        transformer: Transformer,
        contexts: Mapping[str, Streams[mx.array]],
        states: Streams[StreamState],
        keep: Collection[str] = (),
    ) -> None:
        self.transformer = transformer
        self.states = states
        self._ropes = transformer.ropes(states.map(lambda state: state.positions))
        self._texts = {name: transformer.project(context, name in keep) for name, context in contexts.items()}

    def __call__(self, x: Tokens, sigma: float, call: Pass) -> Tokens:
        """x0s, (1, tokens, channels) float32, that the transformer predicts for tokens at this noise level. Given
        tokens are not pinned yet."""
        inputs = x.named(lambda name, tokens: self._input(name, tokens, sigma, call))
        velocities = self.transformer(inputs, call.skips)
        triples = x.zip(velocities).zip(self.states)
        return triples.map(lambda triple: triple[1].denoised(*triple[0], sigma))

    def _input(self, name: str, tokens: mx.array, sigma: float, call: Pass) -> StreamInput:
        state = self.states.get(name)
        text, ropes = self._texts[call.contexts.get(name)].get(name), self._ropes.get(name)
        return StreamInput(tokens, state.levels(sigma), text, ropes, state.marked, state.attention)

    def run(self, x: Tokens, sigma: float, calls: Mapping[str, Pass]) -> dict[str, Tokens]:
        """x0s of several calls by name, one call after the other: a batch of them would take more memory and no less
        time."""
        return {name: self(x, sigma, call) for name, call in calls.items()}


def begin(course: Course, states: Streams[StreamState], noise: Noise) -> Step:
    """The stage before its first step."""
    sigma = course.sigmas[0]

    def draw(segment: Segment) -> mx.array:
        return noise(course.noise_name("", segment.name), segment.shape)

    x = states.map(lambda state: state.noisy(sigma, draw))
    return Step(0, x, x)


def denoise(denoiser: Denoiser, course: Course, noise: Noise, after: Step) -> Iterator[Step]:
    """The steps of a stage that are left after step `after`."""
    x, x0 = after.x, after.x0
    for number, span in list(enumerate(pairwise(course.sigmas)))[after.number :]:
        x, x0 = course.sampler.step(x, span, _tools(denoiser, course, noise, number, x0))
        evaluate(*x.values())
        yield Step(number + 1, x, x0)


def _tools(denoiser: Denoiser, course: Course, noise: Noise, number: int, last: Tokens) -> Tools:
    """What step `number` (from 0) works with; `last`: the x0s of the step before."""
    states = denoiser.states
    frozen = states.map(lambda state: state.frozen)

    def predict(x: Tokens, sigma: float, again: bool) -> Tokens:
        turn = 0 if again else number  # a second prediction skips no guidance
        calls = passes(course.guidance, frozen, turn)
        return _guided(course, states, denoiser.run(x, sigma, calls), last, turn)

    def drawn(purpose: str, name: str) -> mx.array:
        def draw(segment: Segment) -> mx.array:
            return noise(course.noise_name(purpose, segment.name), segment.shape, row=number)

        state = states.get(name)
        if purpose == ANCESTRAL:
            return mx.concatenate(state.drawn(draw), axis=1)
        return state.drawn_standardised(draw)

    return Tools(states, predict, drawn)


def _guided(
    course: Course, states: Streams[StreamState], predicted: Mapping[str, Tokens], last: Tokens, number: int
) -> Tokens:
    """Guided and pinned x0s; a stream whose guidance skips step `number` keeps its last one."""

    def one(name: str, state: StreamState) -> mx.array:
        rule: Guidance = course.guidance.get(name)
        if state.frozen:
            return state.clean
        if rule.skipped(number):
            return last.get(name)
        return state.pinned(rule.combined({call: x0s.get(name) for call, x0s in predicted.items()}))

    return states.named(one)


def check_latents(latents: Streams[mx.array], where: str) -> None:
    """Raises NumericsError when a stream is not finite or constant: it cannot become a picture or sound."""
    for name, value in latents.items():
        check_varied(value, f"the {name} latents after {where}")
