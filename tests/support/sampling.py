"""Sampling without a pipeline: given noise, plain Euler steps, no guidance."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from ltx2.runtime.generate import job
from ltx2.runtime.generate.options.preset import PipelineRow, Preset, load_preset, pipeline_row
from ltx2.runtime.model.layout import Manifest
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.sampling.denoise import Course, Denoiser, begin, denoise
from ltx2.runtime.sampling.guidance import NEUTRAL, TEXT
from ltx2.runtime.sampling.latents import Grid, Scales
from ltx2.runtime.sampling.noise import Injected
from ltx2.runtime.sampling.samplers import SAMPLERS
from ltx2.runtime.sampling.schedule import Schedule
from ltx2.runtime.sampling.state import begin_states
from ltx2.runtime.streams import Streams

SCALES = Scales(spatial=32, temporal=8, audio_hop=0.01, audio_temporal=4)  # as published
PLAIN = Streams(NEUTRAL, NEUTRAL)


def sampled(
    transformer: Transformer,
    grid: Grid,
    contexts: Streams[mx.array],
    sigmas: Sequence[float],
    noise: Streams[mx.array],
    start: Streams[mx.array] | None = None,
    keep: bool = False,
) -> Iterator[Streams[mx.array]]:
    """Latents after each step from `noise` (and `start`), shaped as the grid says, at 24 frames per second.
    `keep`: with the text's keys and values kept over the steps."""
    states, course = begin_states(grid, 24.0, SCALES, start), Course(1, tuple(sigmas), SAMPLERS["euler"], PLAIN)
    drawn = Injected({f"stage1.{name}": value for name, value in noise.items()}.__getitem__)
    denoiser = Denoiser(transformer, texts(contexts), states, (TEXT,) if keep else ())
    for step in denoise(denoiser, course, drawn, begin(course, states, drawn)):
        yield states.zip(step.x).map(lambda pair: pair[0].latents(pair[1]))


def texts(contexts: Streams[mx.array]) -> Mapping[str, Streams[mx.array]]:
    """Contexts of one prompt, as a denoiser takes them."""
    return {TEXT: contexts}


def shorten(patch: pytest.MonkeyPatch, *sigmas: tuple[float, ...], **defaults: Any) -> None:
    """Fewer steps along these noise levels of the distilled stages, texts of 128 tokens, other default options: what is
    computed stays the same and takes a tenth of the time."""
    row = pipeline_row("distilled")
    stages = tuple(replace(stage, schedule=Schedule(levels)) for stage, levels in zip(row.stages, sigmas, strict=True))
    patch.setattr(job, "pipeline_row", lambda name: replace(row, stages=stages))
    short_texts(patch, **defaults)


def first_steps(patch: pytest.MonkeyPatch, steps: int, **defaults: Any) -> None:
    """So many steps a stage, from its first noise levels (one, where it has no levels of its own), whatever the
    pipeline and the release; texts of 128 tokens, other default options. For tests of what surrounds the computing: in
    one step, a small clip takes a quarter of its time."""

    def row(name: str) -> PipelineRow:
        found = pipeline_row(name)
        levels = [(*(stage.schedule.fixed[:-1][:steps] or (1.0,)), 0.0) for stage in found.stages]
        return replace(
            found,
            stages=tuple(replace(s, schedule=Schedule(taken)) for s, taken in zip(found.stages, levels, strict=True)),
        )

    patch.setattr(job, "pipeline_row", row)
    short_texts(patch, **defaults)


def short_texts(patch: pytest.MonkeyPatch, **defaults: Any) -> None:
    """Texts of 128 tokens, and other default options, whatever the release."""

    def preset(manifest: Manifest) -> Preset:
        found = load_preset(manifest.release)
        return replace(found, text_tokens=128, defaults={**found.defaults, **defaults})

    patch.setattr(job, "preset_of", preset)
