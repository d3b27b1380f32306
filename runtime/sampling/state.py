"""One stream of one stage, in tokens: what it starts from, which of its tokens are made and which are given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import mlx.core as mx
import numpy as np

from ltx2.runtime.layers.rope import Positions
from ltx2.runtime.networks.transformer.inputs import Levels
from ltx2.runtime.sampling.latents import Grid, Scales, Segment, audio_positions, video_positions
from ltx2.runtime.sampling.noise import standardised
from ltx2.runtime.streams import Streams


@dataclass(frozen=True)
class StreamState:
    """One stream of one stage: its own tokens, then those that conditionings append.

    `start` and `clean` are (1, tokens, channels) float32: the latents that the sampler starts from (zeros in a first
    stage), and the values of pinned tokens. `mask` (tokens,) is each token's share of noise: 1 made, 0 pinned,
    1 - strength between; None: all are made. `positions` (axes, tokens): seconds, pixel rows and pixel columns; seconds
    alone for a sound. `marked` (1, tokens, 1) is 1 for tokens that are one single frame. `attention` (1, 1, tokens,
    tokens) is added to the scores of self-attention. A `frozen` stream is kept whole, at noise level 0 towards the text
    and the other stream.
    """

    segments: tuple[Segment, ...]
    start: mx.array
    clean: mx.array
    positions: Positions
    mask: np.ndarray | None = None
    marked: mx.array | None = None
    attention: mx.array | None = None
    frozen: bool = False

    @classmethod
    def begin(cls, segment: Segment, start: mx.array | None, positions: Positions) -> "StreamState":
        """A stream whose tokens are all made, from latents `start` shaped as the segment; None is zeros."""
        latents = mx.zeros(segment.shape) if start is None else start
        tokens = segment.to_tokens(latents.astype(mx.float32))
        return cls((segment,), tokens, tokens, positions)

    @property
    def own(self) -> int:
        """Tokens of the stage's grid; the others are dropped after the last step."""
        return self.segments[0].tokens

    @property
    def tokens(self) -> int:
        return self.clean.shape[1]

    @cached_property
    def _levels(self) -> tuple[mx.array, mx.array, mx.array] | None:
        """The distinct shares of noise (n,), every token's index into them (tokens,), and its share (1, tokens, 1)."""
        if self.mask is None:
            return None
        mask = self.mask.astype(np.float32)
        shares, index = np.unique(mask, return_inverse=True)
        return mx.array(shares), mx.array(index.reshape(-1).astype(np.int32)), mx.array(mask)[None, :, None]

    def pinning(self, clean: mx.array, mask: np.ndarray) -> "StreamState":
        """The state with own tokens given: `clean` (1, own, channels), `mask` (own,)."""
        assert self.tokens == self.own, "options come in an order that pins own tokens before any are appended"
        return replace(self, clean=clean, mask=mask)

    def appended(
        self, segment: Segment, clean: mx.array | None, positions: Positions, share: float, *, marked: bool = False
    ) -> "StreamState":
        """The state with more tokens: latents `clean` shaped as the segment (None is zeros), with a `share` of noise;
        `marked`: they are single frames. Segments of one name become one."""
        shape = (1, segment.tokens, self.clean.shape[2])
        tokens = mx.zeros(shape) if clean is None else segment.to_tokens(clean.astype(mx.float32))
        made = np.ones(self.tokens, np.float32) if self.mask is None else self.mask
        marks = mx.full((1, segment.tokens, 1), float(marked))
        return replace(
            self,
            segments=_joined(self.segments, segment),
            start=mx.concatenate([self.start, mx.zeros(shape)], axis=1),
            clean=mx.concatenate([self.clean, tokens], axis=1),
            positions=np.concatenate([self.positions, positions], axis=1),
            mask=np.concatenate([made, np.full(segment.tokens, share, np.float32)]),
            marked=None if self.marked is None else mx.concatenate([self.marked, marks], axis=1),
        )

    def levels(self, sigma: float) -> Levels:
        """Each token's noise level where the step's is `sigma`."""
        if self.frozen:
            return Levels(mx.zeros((1,)), None, 0.0)
        if self._levels is None:
            return Levels(mx.full((1,), sigma, dtype=mx.float32), None, sigma)
        shares, index, _ = self._levels
        return Levels(shares * sigma, index, sigma)

    def denoised(self, x: mx.array, velocity: mx.array, sigma: float) -> mx.array:
        """x0 = x - level * velocity, all (1, tokens, channels), in float32, by each token's own noise level."""
        if self.frozen:
            return self.clean
        if self._levels is None:
            return x - sigma * velocity.astype(mx.float32)
        return x - (self._levels[2] * sigma) * velocity.astype(mx.float32)

    def pinned(self, x: mx.array) -> mx.array:
        """x (1, tokens, channels) with pinned tokens at their given values."""
        if self.frozen:
            return self.clean
        if self._levels is None:
            return x
        column = self._levels[2]
        return x * column + self.clean * (1 - column)

    def noisy(self, sigma: float, draw: Callable[[Segment], mx.array]) -> mx.array:
        """The tokens (1, tokens, channels) that a stage starts from at its first noise level, `sigma`; `draw` gives a
        segment's noise, shaped as its latents."""
        if self.frozen:
            return self.clean
        noise = mx.concatenate(self.drawn(draw), axis=1)
        return self.pinned(sigma * noise + (1 - sigma) * self.start)

    def drawn(self, draw: Callable[[Segment], mx.array]) -> list[mx.array]:
        """Noise of every segment, (1, its tokens, channels); zeros where no token of it has any."""
        return [
            s.to_tokens(draw(s)) if s.noisy else mx.zeros((1, s.tokens, self.clean.shape[2])) for s in self.segments
        ]

    def drawn_standardised(self, draw: Callable[[Segment], mx.array]) -> mx.array:
        """Noise (1, tokens, channels) of mean 0 and deviation 1 over all tokens, the appended ones included."""
        return mx.concatenate(standardised([s.to_tokens(draw(s)) for s in self.segments]), axis=1)

    def latents(self, tokens: mx.array) -> mx.array:
        """The own ones of (1, tokens, channels), as latents shaped as the segment."""
        return self.segments[0].from_tokens(tokens[:, : self.own])


def _joined(segments: Sequence[Segment], more: Segment) -> tuple[Segment, ...]:
    *others, last = segments
    if last.name != more.name:
        return (*segments, more)
    batch, channels, frames, *rest = last.shape
    shape = (batch, channels, frames + more.shape[2], *rest)
    return (*others, Segment(last.name, shape, last.noisy or more.noisy))


def begin_states(
    grid: Grid, fps: float, scales: Scales, start: Streams[mx.array] | None = None
) -> Streams[StreamState]:
    """Both streams of a stage, all of their tokens to be made, from latents shaped as the grid says; None is zeros."""
    positions = Streams(video_positions(grid, fps, scales), audio_positions(grid, scales))
    given = start or Streams[mx.array]()
    return grid.segments.named(
        lambda name, segment: StreamState.begin(segment, getattr(given, name), positions.get(name))
    )
