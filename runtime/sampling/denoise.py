"""The sampler: noise in, latents out, one yield per step. Knows nothing of prompts, files or progress bars."""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import mlx.core as mx

from ltx2.runtime.layers.checks import check_varied
from ltx2.runtime.machine.bounded import evaluate
from ltx2.runtime.networks.transformer.inputs import Levels, Ropes, StreamInput
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.sampling.latents import Latents
from ltx2.runtime.streams import Streams


def mix_noise(start: Latents | None, noise: Latents, sigma: float) -> Latents:
    """sigma * noise + (1 - sigma) * start; `start` None is zeros."""
    if start is None:
        return Latents(sigma * noise.video, sigma * noise.audio)
    return Latents(
        sigma * noise.video + (1 - sigma) * start.video,
        sigma * noise.audio + (1 - sigma) * start.audio,
    )


def denoise(
    transformer: Transformer,
    tokens: Latents,
    sigmas: tuple[float, ...],
    prepared: Streams[tuple[mx.array, Ropes]],
) -> Iterator[Latents]:
    """Euler steps along `sigmas` from noisy `tokens` (video, audio), yielding the tokens after each step. `prepared`:
    text and rotary tables as the transformer makes them.

    State and arithmetic are float32 whatever the transformer's dtype: a step is a difference of near-equal numbers.
    """
    video, audio = tokens.video.astype(mx.float32), tokens.audio.astype(mx.float32)
    for sigma, following in pairwise(sigmas):
        inputs = Streams(video, audio).map(partial(_input, Levels(mx.array([sigma]), sigma=sigma)), prepared)
        velocity = transformer(inputs)
        assert velocity.video is not None and velocity.audio is not None
        video = euler_step(video, velocity.video, sigma, following)
        audio = euler_step(audio, velocity.audio, sigma, following)
        evaluate(video, audio)
        yield Latents(video, audio)


def _input(levels: Levels, tokens: mx.array, prepared: tuple[mx.array, Ropes]) -> StreamInput:
    return StreamInput(tokens, levels, *prepared)


def euler_step(x: mx.array, velocity: mx.array, sigma: float, following: float) -> mx.array:
    """From noise level `sigma` to `following` along the prediction x0 = x - sigma * velocity."""
    x0 = x - sigma * velocity.astype(mx.float32)
    return x0 + (x - x0) * (following / sigma)


def check_latents(latents: Latents, where: str) -> None:
    """Raises NumericsError when either stream is not finite or constant: neither can become a picture or sound."""
    check_varied(latents.video, f"the video latents after {where}")
    check_varied(latents.audio, f"the audio latents after {where}")
