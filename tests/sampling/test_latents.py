"""Presets, noise levels, sampler steps, noise, and the grids, order and positions of latents."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from ltx2.runtime.errors import NumericsError, UnsupportedError
from ltx2.runtime.generate.job import Job
from ltx2.runtime.generate.options.preset import load_preset, pipeline_row
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.transformer.inputs import Skips, StreamInput
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.sampling.denoise import check_latents
from ltx2.runtime.sampling.latents import Grid, audio_latent_count, audio_positions, video_positions
from ltx2.runtime.sampling.samplers import SAMPLERS, Tools
from ltx2.runtime.sampling.state import begin_states
from ltx2.runtime.streams import Streams
from tests.support.parity import require
from tests.support.sampling import SCALES, sampled

GRID = Grid(channels=4, frames=3, height=2, width=5, audio_channels=2, audio_frames=7)
DISTILLED = pipeline_row("distilled")


def normal(shape: tuple[int, ...], seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def latents(seed: int, grid: Grid = GRID) -> Streams[mx.array]:
    return Streams(normal(grid.video_shape, seed), normal(grid.audio_shape, seed + 1))


class TestPresets:
    def test_distilled_noise_levels(self) -> None:
        """Stage 1 at half size, stage 2 at full size."""
        first, second = DISTILLED.stages
        assert first.schedule.fixed == (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
        assert second.schedule.fixed == (0.909375, 0.725, 0.421875, 0.0)
        assert (first.downscale, second.downscale, second.enter) == (2, 1, "spatial_upscaler")

    def test_distilled_noise_levels_equal_diffusers(self) -> None:
        theirs = require("diffusers.pipelines.ltx2.utils")
        first, second = DISTILLED.stages
        assert [*theirs.DISTILLED_SIGMA_VALUES, 0.0] == list(first.schedule.fixed)
        assert [*theirs.STAGE_2_DISTILLED_SIGMA_VALUES, 0.0] == list(second.schedule.fixed)

    @pytest.mark.parametrize(("release", "named"), [("9.9", "9.9"), (None, "not known")])
    def test_what_cannot_be_sampled_is_named(self, release: str | None, named: str) -> None:
        with pytest.raises(UnsupportedError, match=named):
            load_preset(release)


class TestSteps:
    @pytest.mark.parametrize("number", [0, 1])
    def test_euler_equals_diffusers(self, number: int, figure: Callable[..., None]) -> None:
        """Whole trajectories along a stage's noise levels, with random velocities."""
        torch = require("torch")
        diffusers = require("diffusers")
        sigmas = DISTILLED.stages[number].schedule.fixed
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift_terminal=None)
        scheduler.set_timesteps(sigmas=list(sigmas[:-1]))
        states = begin_states(GRID, 24.0, SCALES)
        ours = states.map(lambda state: normal(state.clean.shape, 0))
        theirs, worst = torch.tensor(np.array(ours.video)), 0.0
        for i, span in enumerate(pairwise(sigmas)):
            velocity = Streams(*(normal(state.clean.shape, 10 + i) for state in states.values()))

            def predict(x: Streams[mx.array], sigma: float, again: bool, v: Any = velocity) -> Streams[mx.array]:
                return x.zip(v).map(lambda both, state: state.denoised(*both, sigma), states)  # noqa: B023

            ours, _ = SAMPLERS["euler"].step(ours, span, Tools(states, predict, lambda *_: mx.zeros(())))
            theirs = scheduler.step(torch.tensor(np.array(velocity.video)), scheduler.timesteps[i], theirs).prev_sample
            worst = max(worst, float(np.abs(np.array(ours.video) - theirs.numpy()).max()))
        assert ours.get("video").dtype == mx.float32
        figure(f"Euler steps of stage {number + 1} vs diffusers, max abs difference", worst, limit=1e-6)

    def test_mixing_noise(self) -> None:
        start, noise = latents(0), latents(5)
        for sigma in (0.0, 0.909375, 1.0):
            for name, state in begin_states(GRID, 24.0, SCALES, start).items():
                drawn = partial(lambda value, _: value, noise.get(name))
                mixed = state.latents(state.noisy(sigma, drawn))
                want = sigma * np.array(noise.get(name)) + (1 - sigma) * np.array(start.get(name))
                np.testing.assert_allclose(mixed, want, rtol=1e-6, atol=1e-6)

    def test_denoise_gives_both_streams_the_noise_level_and_keeps_float32(self) -> None:
        """A transformer in bf16 whose velocity is known: constant, so that every step is known too."""
        seen: list[float] = []

        class Constant:
            def ropes(self, positions: Streams[Any]) -> Streams[Any]:
                return positions

            def project(self, contexts: Streams[mx.array], kept: bool) -> Streams[mx.array]:
                return contexts

            def __call__(self, inputs: Streams[StreamInput], skips: Skips) -> Streams[mx.array]:
                assert all(stream.tokens.dtype == mx.float32 for stream in inputs.values())
                given = [stream.levels for stream in inputs.values()]
                levels = {float(np.float32(level)) for s in given for level in (np.array(s.values).item(), s.sigma)}
                seen.append(levels.pop())
                assert not levels, "the four levels are one"
                speeds = Streams(mx.array(0.5, mx.bfloat16), mx.array(-2.0, mx.bfloat16))
                return inputs.map(lambda stream, speed: mx.broadcast_to(speed, stream.tokens.shape), speeds)

        sigmas, text = (1.0, 0.725, 0.421875, 0.0), mx.zeros((1, 1, 1))
        noise = latents(3)
        steps = list(sampled(cast(Transformer, Constant()), GRID, Streams(text, text), sigmas, noise))
        np.testing.assert_allclose(seen, sigmas[:-1], rtol=1e-6)
        for step, level in zip(steps, sigmas[1:], strict=True):
            travelled = sigmas[0] - level
            np.testing.assert_allclose(step.get("video"), noise.get("video") - travelled * 0.5, atol=1e-6)
            np.testing.assert_allclose(step.get("audio"), noise.get("audio") + travelled * 2.0, atol=1e-6)


class TestNoise:
    def noises(self, model: Path, **options: Any) -> list[Any]:
        """Of both stages."""
        size = {"prompt": "x", "width": 128, "height": 64, "frames": 9, "seed": 0}
        job = Job(ModelFolder.open(model), Request.from_options(size | options))
        noise = job.noise()
        drawn = {name: noise(name, shape) for name, shape in job.draws().items()}
        return [Streams(drawn[f"stage{n}.video"], drawn[f"stage{n}.audio"]) for n in job.numbers]

    def test_is_of_the_seed(self, demo_f32: Path) -> None:
        first, again, other = (self.noises(demo_f32, seed=seed) for seed in (1, 1, 2))
        for a, b, c in zip(first, again, other, strict=True):
            np.testing.assert_array_equal(a.video, b.video)
            np.testing.assert_array_equal(a.audio, b.audio)
            assert not np.array_equal(a.video, c.video) and not np.array_equal(a.audio, c.audio)

    def test_all_64_bits_of_the_seed_count(self, demo_f32: Path) -> None:
        low, high, highest = (self.noises(demo_f32, seed=seed)[0].video for seed in (0, 1 << 32, (1 << 64) - 1))
        assert not np.array_equal(low, high) and not np.array_equal(high, highest)

    def test_is_standard_normal_and_independent(self, demo_f32: Path) -> None:
        parts = [np.array(part).ravel() for n in self.noises(demo_f32, frames=65) for part in (n.video, n.audio)]
        for values in parts:
            assert abs(values.mean()) < 5 / np.sqrt(values.size) and abs(values.std() - 1) < 5 / np.sqrt(values.size)
        size = min(len(values) for values in parts)
        correlation = np.corrcoef([values[:size] for values in parts]) - np.eye(len(parts))
        assert np.abs(correlation).max() < 5 / np.sqrt(size)

    def test_of_the_picture_does_not_depend_on_the_sound(self, demo_f32: Path) -> None:
        """Another frame rate changes the number of audio latents."""
        slow, fast = self.noises(demo_f32, fps=24), self.noises(demo_f32, fps=12)
        silent = self.noises(demo_f32, no_audio=True)
        for a, b, c in zip(slow, fast, silent, strict=True):
            assert a.audio.shape != b.audio.shape
            np.testing.assert_array_equal(a.video, b.video)
            np.testing.assert_array_equal(a.video, c.video)


class TestLatents:
    def test_token_order(self) -> None:
        """Video: frame by frame, rows, then columns. Audio: channel-major, so feature = channel * 16 + bin."""
        both = latents(0)
        video, audio = np.array(both.video), np.array(both.audio)
        tokens = GRID.segments.zip(both).map(lambda pair: pair[0].to_tokens(pair[1]))
        assert tokens.get("video").shape == (1, GRID.tokens, 4) and tokens.get("audio").shape == (1, 7, 32)
        for f, h, w in ((0, 0, 0), (0, 0, 4), (0, 1, 0), (2, 1, 3)):
            np.testing.assert_array_equal(tokens.get("video")[0, (f * 2 + h) * 5 + w], video[0, :, f, h, w])
        for t, c, mel in ((0, 0, 0), (3, 1, 0), (6, 0, 15)):
            assert tokens.get("audio")[0, t, c * 16 + mel].item() == audio[0, c, t, mel]

    def test_roundtrip(self) -> None:
        both = latents(2)
        back = GRID.segments.zip(both).map(lambda pair: pair[0].from_tokens(pair[0].to_tokens(pair[1])))
        np.testing.assert_array_equal(back.video, both.video)
        np.testing.assert_array_equal(back.audio, both.audio)

    def test_layout_does_not_depend_on_where_they_come_from(self) -> None:
        """Of a transposed matrix, OpenBLAS (with AVX-512) and GPUs may add products up in another order: a resumed run,
        whose latents come from a file, would differ by 1e-7 from one whose latents were computed."""
        for value, segment in zip(latents(0).values(), GRID.segments.values(), strict=True):
            tokens = segment.to_tokens(value)
            assert all(np.asarray(x).flags.c_contiguous for x in (tokens, segment.from_tokens(tokens)))

    def test_video_positions(self) -> None:
        """MODEL.md 2.5: midpoints; the first latent frame spans one pixel frame, the others eight."""
        time, rows, columns = video_positions(GRID, 24.0, SCALES).reshape(3, 3, 2, 5)
        np.testing.assert_allclose(time[:, 0, 0], np.array([0.5, 5, 13]) / 24, rtol=1e-6)
        np.testing.assert_allclose(rows[0, :, 0], [16, 48])
        np.testing.assert_allclose(columns[0, 0], [16, 48, 80, 112, 144])
        for axis, varying in ((time, 0), (rows, 1), (columns, 2)):
            others = tuple(i for i in range(3) if i != varying)
            assert np.ptp(axis, axis=others).max() == 0
        assert time.dtype == np.float32

    def test_audio_positions(self) -> None:
        """The first latent spans one mel frame of 10 ms, the others four: [0, 10), [10, 50), [50, 90) ms."""
        positions = audio_positions(GRID, SCALES)
        assert positions.shape == (1, 7)
        np.testing.assert_allclose(positions[0, :3], [0.005, 0.03, 0.07], rtol=1e-6)

    @pytest.mark.parametrize(
        ("frames", "fps", "count"),
        [
            (121, 24.0, 126),  # 126.04
            (25, 25.0, 25),
            (9, 50.0, 4),  # 4.5, half to even
            (27, 50.0, 14),  # 13.5, half to even
            (257, 24.0, 268),
            (121, 23.976, 126),
            (1, 24.0, 1),
            (1, 240.0, 1),  # a clip with sound has at least one
        ],
    )
    def test_audio_latent_count(self, frames: int, fps: float, count: int) -> None:
        assert audio_latent_count(frames, fps, SCALES) == count


class TestCheck:
    def test_sound_latents_pass(self) -> None:
        check_latents(latents(0), "a test")

    @pytest.mark.parametrize("stream", ["video", "audio"])
    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            (lambda x: mx.where(mx.arange(x.size).reshape(x.shape) == 7, mx.nan, x), "contain NaN or infinite"),
            (lambda x: mx.where(mx.arange(x.size).reshape(x.shape) == 7, -mx.inf, x), "contain NaN or infinite"),
            (lambda x: mx.zeros_like(x) + 3, "are constant"),
        ],
    )
    def test_garbage_is_named(self, stream: str, damage: Callable[[mx.array], mx.array], said: str) -> None:
        good = latents(0)
        bad = dict(good.items()) | {stream: damage(good.get(stream))}
        with pytest.raises(NumericsError, match=f"the {stream} latents after stage 1 {said}"):
            check_latents(Streams(**bad), "stage 1")
