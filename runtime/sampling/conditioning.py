"""What a clip is given beside its text, as changes of a stage's states: which tokens are kept, and which are appended.
Facts: MODEL.md §8, §15.1 and §15.2. Latents come encoded; None stands for zeros, so that shapes are known before
anything is encoded."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import mlx.core as mx
import numpy as np

from ltx2.runtime.layers.rope import Positions
from ltx2.runtime.sampling.latents import Grid, Scales, Segment, causal_edges, spread_positions
from ltx2.runtime.sampling.state import StreamState
from ltx2.runtime.streams import Streams

States = Streams[StreamState]
KEYFRAMES, SLOTS, REFERENCE = "keyframes", "slots", "reference"  # names of appended tokens, as noise files have them


@dataclass(frozen=True)
class Place:
    """Where something is applied: the stage's number and grid, and the clip's rate."""

    number: int
    grid: Grid
    fps: float
    scales: Scales

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width in pixels."""
        grid, scales = self.grid, self.scales
        return (grid.frames - 1) * scales.temporal + 1, grid.height * scales.spatial, grid.width * scales.spatial


class Conditioning(ABC):
    """One thing that is given."""

    @abstractmethod
    def apply(self, states: States, place: Place, encoded: Streams[mx.array]) -> States:
        """The stage's states with it. `encoded`: normalised latents, shaped as the stage's grid unless a class says
        otherwise."""

    def appends(self, place: Place) -> int:
        """How many tokens it adds to the picture's own."""
        return 0


@dataclass(frozen=True)
class FirstFrame(Conditioning):
    """A picture in the place of the clip's first frame: (1, C, 1, h, w)."""

    strength: float = 1.0

    def apply(self, states: States, place: Place, encoded: Streams[mx.array]) -> States:
        state, count = states.get("video"), place.grid.frame_tokens
        mask = np.ones(state.own, np.float32) if state.mask is None else state.mask.copy()
        mask[:count] = 1 - self.strength
        clean = state.clean
        if encoded.video is not None:
            frame = encoded.video.transpose(0, 2, 3, 4, 1).flatten(1, 3).astype(mx.float32)
            clean = mx.concatenate([frame, clean[:, count:]], axis=1)
        return replace(states, video=state.pinning(clean, mask))


@dataclass(frozen=True)
class Keyframe(Conditioning):
    """A picture (1, C, 1, h, w) shown at a pixel frame: appended tokens."""

    frame: int
    strength: float = 1.0

    def apply(self, states: States, place: Place, encoded: Streams[mx.array]) -> States:
        segment = Segment(KEYFRAMES, _single_frames(place, 1), self.strength < 1)
        positions = frame_positions(place, [self.frame])
        state = states.get("video").appended(segment, encoded.video, positions, 1 - self.strength)
        return replace(states, video=state)

    def appends(self, place: Place) -> int:
        return place.grid.frame_tokens


@dataclass(frozen=True)
class Slots(Conditioning):
    """More single frames, which stage 1 makes along; they are dropped after it."""

    frames: tuple[int, ...]

    def apply(self, states: States, place: Place, encoded: Streams[mx.array]) -> States:
        if place.number > 1:
            return states
        segment, state = Segment(SLOTS, _single_frames(place, len(self.frames))), states.get("video")
        positions = frame_positions(place, self.frames)
        return replace(states, video=state.appended(segment, None, positions, 1.0, marked=True))

    def appends(self, place: Place) -> int:
        return 0 if place.number > 1 else len(self.frames) * place.grid.frame_tokens


@dataclass(frozen=True)
class Reference(Conditioning):
    """A control or source video for an IC-LoRA, (1, C, f, h, w) of its own size: appended in stage 1.

    Its sides are the stage's divided by `downscale`, and it has every `every`-th frame. `attention` (0 to 1): how much
    picture and reference see of each other; `name`: of its noise.
    """

    shape: tuple[int, int, int]  # latent frames, rows, columns
    downscale: int = 1
    every: int = 1
    strength: float = 1.0
    attention: float = 1.0
    name: str = REFERENCE

    def apply(self, states: States, place: Place, encoded: Streams[mx.array]) -> States:
        if place.number > 1:
            return states
        state = states.get("video")
        segment = Segment(self.name, (1, place.grid.channels, *self.shape), self.strength < 1)
        appended = state.appended(segment, encoded.video, self.positions(place), 1 - self.strength)
        if self.attention < 1:
            seen = _seen(state, segment.tokens, self.attention)
            with np.errstate(divide="ignore"):
                bias = np.maximum(np.log(seen), np.finfo(np.float32).min)
            appended = replace(appended, attention=mx.array(bias.astype(np.float32))[None, None])
        return replace(states, video=appended)

    def appends(self, place: Place) -> int:
        return 0 if place.number > 1 else prod(self.shape)

    def positions(self, place: Place) -> Positions:
        """(3, tokens): those of a clip with `every` times fewer frames and smaller sides, spread over the stage."""
        frames, height, width = self.shape
        edges = causal_edges(frames, place.scales.temporal) / np.float32(place.fps / self.every)
        if self.every != 1:
            edges = np.maximum(edges - np.float32((self.every - 1) / place.fps), 0)
        return spread_positions((edges[:-1] + edges[1:]) / 2, height, width, place.scales.spatial * self.downscale)


@dataclass(frozen=True)
class Kept(Conditioning):
    """The source's streams, kept except for the seconds from `start` to `end`; a stream without latents is made whole.
    Streams in `frozen` are kept as they are."""

    start: float
    end: float
    frozen: tuple[str, ...] = ()

    def apply(self, states: States, place: Place, encoded: Streams[mx.array]) -> States:
        def kept(name: str, state: StreamState) -> StreamState:
            latents = getattr(encoded, name)
            if name in self.frozen:
                return frozen(state, latents)
            if latents is None:
                return state
            bounds = token_bounds(name, place)
            mask = ((bounds[1:] > self.start) & (bounds[:-1] < self.end)).astype(np.float32)
            per_frame = state.own // len(mask)
            return state.pinning(state.segments[0].to_tokens(latents), np.repeat(mask, per_frame))

        return states.named(kept)


@dataclass(frozen=True)
class Frozen(Conditioning):
    """A given stream; the other one is made to fit it."""

    stream: str

    def apply(self, states: States, place: Place, encoded: Streams[mx.array]) -> States:
        given = frozen(states.get(self.stream), getattr(encoded, self.stream))
        return replace(states, **{self.stream: given})


def frozen(state: StreamState, latents: mx.array | None) -> StreamState:
    """The stream, kept whole; `latents` are shaped as its own segment, None: what it has."""
    clean = state.clean if latents is None else state.segments[0].to_tokens(latents.astype(mx.float32))
    return replace(state, clean=clean, frozen=True)


def slot_frames(count: int, frames: int) -> tuple[int, ...]:
    """Pixel frames of `count` slots, evenly spaced inside a clip."""
    return tuple(round(i * (frames - 1) / (count + 1)) for i in range(1, count + 1))


def frame_positions(place: Place, frames: Sequence[int]) -> Positions:
    """(3, tokens) of single pixel frames: each spans [frame, frame + 1) / fps."""
    times = (np.array(frames, np.float32) + 0.5) / np.float32(place.fps)
    return spread_positions(times, place.grid.height, place.grid.width, place.scales.spatial)


def token_bounds(stream: str, place: Place) -> np.ndarray:
    """Where the latents of a stream begin and end, in seconds: (latents along time + 1,)."""
    if stream == "audio":
        return causal_edges(place.grid.audio_frames, place.scales.audio_temporal) * np.float32(place.scales.audio_hop)
    return causal_edges(place.grid.frames, place.scales.temporal) / np.float32(place.fps)


def _single_frames(place: Place, count: int) -> tuple[int, ...]:
    """The shape of `count` single latent frames."""
    return (1, place.grid.channels, count, place.grid.height, place.grid.width)


def _seen(state: StreamState, more: int, attention: float) -> np.ndarray:
    """How much each token sees of each, (tokens, tokens), with `more` tokens of a reference: the clip's own tokens see
    `attention` of it, appended pictures see none; among the earlier tokens nothing changes."""
    before, own = state.tokens, state.own
    seen = np.zeros((before + more, before + more), np.float32)
    seen[:before, :before] = 1 if state.attention is None else np.exp(np.array(state.attention[0, 0]))
    seen[:own, before:] = seen[before:, :own] = attention
    seen[before:, before:] = 1
    return seen
