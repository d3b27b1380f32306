"""A request meets a model folder: pipeline, configurations and sizes, and everything that can be known to be wrong
before the work starts."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ltx2.runtime.errors import InputError, of
from ltx2.runtime.generate.given import Given, Setting, SourceClip, gather, sound_track
from ltx2.runtime.generate.options.choices import (
    asked_length,
    chosen_pipeline,
    defaults_of,
    doubts,
    grown,
    samples,
    stages_of,
)
from ltx2.runtime.generate.options.preset import DISTILLED, pipeline_row, preset_of
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.generate.options.values import Auto, Lora
from ltx2.runtime.generate.records.exchange import check_noise, read_embeddings, read_latents, read_noise
from ltx2.runtime.media.source import read_sound
from ltx2.runtime.media.video import AudioTrack
from ltx2.runtime.model.layout import DIFFUSION_VAE, TRANSFORMER, VIDEO_VAE, ModelFolder
from ltx2.runtime.model.loras import LoraSet, LoraUse, find_lora
from ltx2.runtime.model.origin import check_text_encoder
from ltx2.runtime.networks.audio.config import AudioVAEConfig
from ltx2.runtime.networks.load import build_network, check_network, encode_prompt, parameter_shapes
from ltx2.runtime.networks.text.duration_head import Duration, duration
from ltx2.runtime.networks.text.tokenizer import Encoded
from ltx2.runtime.networks.transformer.config import TransformerConfig
from ltx2.runtime.networks.video_vae.diffusion_config import DiffusionVAEConfig
from ltx2.runtime.networks.video_vae.encode import VIDEO_VAES
from ltx2.runtime.sampling.conditioning import Place, token_bounds
from ltx2.runtime.sampling.denoise import Course
from ltx2.runtime.sampling.guidance import NEGATIVE, NEUTRAL, TEXT, Guidance, passes
from ltx2.runtime.sampling.latents import Grid, Scales, Segment, Sizes
from ltx2.runtime.sampling.noise import Injected, Noise, Seeded
from ltx2.runtime.sampling.samplers import SAMPLERS
from ltx2.runtime.sampling.state import StreamState, begin_states
from ltx2.runtime.streams import Streams

LATENTS, CONTEXTS, LENGTH = "latents", "contexts", "length"  # what a run may end with, in place of a clip
CANVAS = "decoder.video"  # the noise that the diffusion decoder starts from


class Job:
    """One generation, complete: the request with its defaults, the model's folder, the pipeline's stages and geometry.
    `until` LATENTS, CONTEXTS or LENGTH ends it before the clip is decoded or sampled. Where the duration head chooses
    the clip's `length`, that is what it has chosen; before, the clip is the shortest possible.

    Raises InputError, UnsupportedError, ConfigError or ModelFolderError for what does not go together; `check` looks
    at files and tensors too.
    """

    def __init__(
        self, folder: ModelFolder, request: Request, until: str | None = None, length: Duration | None = None
    ) -> None:
        self.folder = folder
        self.until = until
        self.asked = request
        self.clip: SourceClip | None = None  # where one is given
        self.preset = preset_of(folder.manifest)
        self.row = pipeline_row(chosen_pipeline(folder, request)) if samples(request) else None
        first = self.preset.distilled_sampler if self.row is not None and self.row.name == DISTILLED else "euler"
        self.stages = stages_of(self.row.stages if self.row else (), request, first)
        self.coder = next((name for name in VIDEO_VAES if folder.has(name)), VIDEO_VAE)  # encodes, has the statistics
        self.video_config = VIDEO_VAES[self.coder].from_dict(folder.config(self.coder))
        self.audio_config = AudioVAEConfig.from_dict(folder.config("audio_vae"))
        self.scales = Scales(
            self.video_config.spatial_scale,
            self.video_config.temporal_scale,
            self.audio_config.hop_seconds,
            self.audio_config.temporal_scale,
        )
        if request.latents is not None:
            video = self.read_latents(request.latents).video
            assert video is not None, "a latents file has a picture"
            request = request.for_latents(video.shape, self.scales)
        if request.source is not None:
            self.clip = SourceClip.open(Path(request.source), self.scales, request.fps)
            self.clip.check(self.scales, self.video_config.smallest_side)
            request = replace(request, **asdict(grown(self.clip.sizes, request, self.scales)))
            if request.upscale is not None and self.clip.latents:
                self.until = self.until or LATENTS
        self.auto = asked_length(folder, request) if until != CONTEXTS else None
        self.length = length if self.auto is not None else None
        if self.auto is not None:
            request = replace(request, frames=(length or self.predicted(self.auto.least)).frames)
        layers = self.transformer_config.num_layers if self.row is not None and self.row.guided else 0
        vae = "conv" if self.coder == VIDEO_VAE else "diffusion"
        self.request = request.with_defaults(defaults_of(self.preset, self.row, request, layers) | {"vae": vae})
        self.sizes = self.request.sizes
        multiple = max((stage.downscale for stage in self.stages), default=1)
        self.sizes.check(self.scales, multiple, self.video_config.smallest_side)

    def identity(self) -> dict[str, Any]:
        """The options that decide the latents: a length that was predicted follows from the others."""
        return self.request.identity() | ({} if self.auto is None else {"frames": str(self.auto)})

    @property
    def waits(self) -> bool:
        """For its length to be predicted."""
        return self.auto is not None and self.length is None

    def lasting(self, seconds: float) -> "Job":
        """The job with the length for the duration head's answer."""
        return Job(self.folder, replace(self.asked, seed=self.request.seed), self.until, self.predicted(seconds))

    def longest(self) -> "Job":
        """The job with the most frames that the duration head may give it; made to a sound, no more than that has."""
        assert self.auto is not None, "it waits for its length"
        most, sound = self.auto.most, self.request.audio
        if sound is not None:
            with of(self.request.name):
                track = read_sound(Path(sound.path), sound.start, most)
            fps = self.sizes.fps
            most = min(most, int(track.samples.shape[1] / track.sample_rate * fps) / fps)
        return self.lasting(most)

    def predicted(self, seconds: float) -> Duration:
        """The clip's length for the duration head's answer."""
        auto, fps = self.auto or Auto(), self.asked.fps or self.preset.defaults["fps"]
        return duration(seconds, fps, auto.least, auto.most, self.scales.temporal)

    @cached_property
    def given(self) -> tuple[Given, ...]:
        """The pictures, clips and sounds of the request. Raises InputError for those that do not go together."""
        if not self.stages:
            return ()
        if self.request.keyframe_slots and not self.transformer_config.use_keyframes_abs_pos_embedding:
            why = "its transformer has no embedding for single frames"
            raise InputError("this model makes no keyframe slots", why, "leave out --keyframe-slots")
        return gather(Setting(self.request, self.clip, self.sizes, self.scales, self.loras.reference_factors))

    def place(self, number: int, sizes: Sizes | None = None) -> Place:
        """Where things are given in stage `number`."""
        return Place(number, self.stage_grid(number, sizes), (sizes or self.sizes).fps, self.scales)

    def warnings(self) -> Iterator[str]:
        """Warnings about results that may not be as expected."""
        if self.row is not None:
            reach = self.transformer_config.video.max_positions[0]
            yield from doubts(self.folder, self.row, self.asked, self.sizes, reach)
            yield from self.loras.doubts(bool(self.request.reference))
        if self.clip is not None:
            yield from self.clip.doubts(self.request.retake)
        if (span := self.request.retake) is not None and self.request.keep is None and self.clip is not None:
            bounds = token_bounds("video", self.place(1))
            if bounds[1] > span.start and bounds[-2] < span.end:
                clip = f"all of {self.clip.path.name}"
                yield f"--retake {span.start:g}-{span.end:g} touches {clip}: nothing of its picture is kept"
        inside, slots = max(0, self.sizes.frames - 2), self.request.keyframe_slots or 0
        if slots > inside and self.stages and not self.waits:
            yield f"--keyframe-slots {slots}: the clip has {inside} frames inside, so some are made more than once"
        if self.encodes_text and self.folder.has("text_encoder") and (message := check_text_encoder(self.folder)):
            yield message

    def notes(self) -> Iterator[str]:
        """What the options come to."""
        if self.clip is not None and self.request.extend is not None:
            yield self.clip.added(self.sizes, self.request.extend)
        for name, count, others in self.loras.facts():
            beside = f"; {others} layers of other networks stay as they are" if others else ""
            yield f"{name} changes {count} layers of the transformer{beside}"

    @property
    def sound_stage(self) -> int:
        """The stage that the clip's sound is from. Pictures that are shown as keyframes are in stage 2's."""
        last = len(self.stages)
        return last if self.row is None or self.request.keyframe else min(self.row.sound, last)

    @cached_property
    def transformer_config(self) -> TransformerConfig:
        return TransformerConfig.from_dict(self.folder.config(TRANSFORMER))

    @property
    def numbers(self) -> range:
        """The stages' numbers, from 1."""
        return range(1, len(self.stages) + 1)

    def output(self, sizes: Sizes | None = None) -> Sizes:
        """The sizes of the written clip if the stages make one of these `sizes` (None: the job's)."""
        sizes = sizes or self.sizes
        if not self.request.temporal_upscale:
            return sizes
        return replace(sizes, frames=2 * sizes.frames - 1, fps=2 * sizes.fps)

    def grid(self, downscale: int = 1, sizes: Sizes | None = None) -> Grid:
        """The latents of the output, each side divided by `downscale`; also for other `sizes` than the job's."""
        channels = self.video_config.latent_channels, self.audio_config.latent_channels
        sizes = sizes or self.sizes
        if self.request.no_video:
            sizes = replace(sizes, width=0, height=0)
        return sizes.grid(downscale, self.scales, *channels)

    def stage_grid(self, number: int, sizes: Sizes | None = None) -> Grid:
        """The latents of a stage."""
        return self.grid(self.stages[number - 1].downscale, sizes)

    def course(self, number: int) -> Course:
        """How stage `number` is sampled."""
        row, grid = self.stages[number - 1], self.stage_grid(number)
        sampler = SAMPLERS[row.sampler or "euler"]
        schedule = row.schedule if row.schedule.fixed else replace(row.schedule, steps=self.request.steps or 1)
        guidance = self._guidance() if row.guided else Streams(NEUTRAL, NEUTRAL)
        return Course(number, sampler.sigmas(schedule.sigmas(grid.tokens)), sampler, guidance)

    def _guidance(self) -> Streams[Guidance]:
        """The request's, of both streams; a kept one is not guided."""
        guided = Streams(self._guided(""), self._guided("audio_"))
        return guided.map(lambda guidance, kept: NEUTRAL if kept else guidance, self.frozen)

    def _guided(self, prefix: str) -> Guidance:
        names = ("cfg", "stg", "modality_scale", "rescale")
        cfg, stg, modality, rescale = (float(getattr(self.request, prefix + name)) for name in names)
        blocks, skip = tuple(self.request.stg_blocks or ()), int(getattr(self.request, f"{prefix}skip_steps"))
        return Guidance(cfg, stg, modality, rescale, blocks, skip)

    @cached_property
    def loras(self) -> LoraSet:
        """The user's LoRAs, then the distilled one. Raises InputError for one that does not fit the transformer."""
        uses = [self._lora_use(lora) for lora in self.request.lora] if self.stages else []
        if self.row is not None and (distilled := self._distilled_lora()) is not None:
            uses.append(distilled)
        if not uses:
            return LoraSet()
        record = self.folder.record(TRANSFORMER)
        plain = parameter_shapes(build_network(record.cls, self.folder.config(TRANSFORMER)))
        return LoraSet.open(uses, plain, self.folder.manifest.release)

    def _lora_use(self, lora: Lora) -> LoraUse:
        first = 1.0 if lora.strength is None else lora.strength
        # An IC-LoRA is made to see its reference, which stage 2 does not have.
        second = lora.second if lora.second is not None else 0.0 if self.request.reference else first
        return LoraUse(find_lora(lora.path, self.folder), (first, second))

    def _distilled_lora(self) -> LoraUse | None:
        """The LoRA that makes a dev model a distilled one, in the pipeline's stages that take it."""
        assert self.row is not None, "latents are not sampled"
        lora, own = self.request.distilled_lora, self.folder.distilled_lora
        distilled = self.folder.manifest.variant == DISTILLED
        if all(row.lora is None for row in self.stages) or (lora is None and (distilled or own is None)):
            return None
        given = self.row.lora
        if lora is not None and lora.strength is not None:
            # One number is all stages', but for a pipeline that has none in its first stage.
            first = 0.0 if self.row.stages[0].lora is None else lora.strength
            given = (first, lora.strength) if lora.second is None else (lora.strength, lora.second)
        strengths = tuple(0.0 if row.lora is None else given[row.lora] for row in self.stages)
        return LoraUse(find_lora(lora.path if lora is not None else str(own), self.folder), strengths)

    @cached_property
    def frozen(self) -> Streams[bool]:
        """The streams that are kept whole."""
        return self.states(1, Streams()).map(lambda state: state.frozen)

    def calls(self, number: int) -> int:
        """Calls of the transformer in stage `number`."""
        course, frozen = self.course(number), self.frozen
        counts = (len(passes(course.guidance, frozen, step)) for step in range(course.steps))
        return course.sampler.predictions * sum(counts)

    def states(
        self, number: int, start: Streams[mx.array], encoded: Mapping[str, mx.array] | None = None
    ) -> Streams[StreamState]:
        """The streams of stage `number` before its first step: from the last stage's latents, (1, C, F, H, W) and
        (1, A, T, 16), with all that is given. `encoded`: by the Encode phases; None for shapes alone."""
        states = self._own_states(number, start)
        for index, given in enumerate(self.given):
            if given.in_stage(number):
                latents = given.latents(self.place(number)) if encoded is not None else None
                if latents is None:
                    latents = Streams(*((encoded or {}).get(f"{index}.{number}.{name}") for name in ("video", "audio")))
                states = given.conditioning.apply(states, self.place(number), latents)
        return states

    def _own_states(self, number: int, start: Streams[mx.array]) -> Streams[StreamState]:
        grid = self.stage_grid(number)
        states = begin_states(grid, self.sizes.fps, self.scales, start)
        if self.request.no_video:
            return Streams(None, states.audio)
        if self.request.upscale is not None and self.clip is not None and not self.clip.sound:
            states = Streams(states.video)
        if states.video is None or not self.transformer_config.use_keyframes_abs_pos_embedding:
            return states
        # The first latent frame stands for one single frame.
        single = np.arange(grid.tokens) < grid.height * grid.width
        marked = mx.array(single.astype(np.float32))[None, :, None]
        return Streams(replace(states.video, marked=marked), states.audio)

    def segments(self, number: int) -> Streams[tuple[Segment, ...]]:
        """Each stream's tokens in stage `number`, for the noise that they need."""
        return self.states(number, Streams()).map(lambda state: () if state.frozen else state.segments)

    def draws(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of all noise that the run draws."""
        found: dict[str, tuple[int, ...]] = {}
        for number in self.numbers:
            found |= self.course(number).draws(self.segments(number))
        if self.decoder == DIFFUSION_VAE:
            config = DiffusionVAEConfig.from_dict(self.folder.config(DIFFUSION_VAE))
            found[CANVAS] = config.canvas(self.grid(sizes=self.output()).size)
        return found

    @property
    def decoder(self) -> str | None:
        """The component that makes frames of latents; None where none are made."""
        copied = self.request.video is not None and self.clip is not None and not self.clip.latents
        if self.until is not None or self.request.no_video or copied:
            return None
        return DIFFUSION_VAE if self.request.vae == "diffusion" else VIDEO_VAE

    def noise(self) -> Noise:
        """The request's file, or its seed."""
        if self.request.noise is not None:
            return Injected(partial(read_noise, self.request.noise))
        return Seeded(self.request.seed or 0)

    @property
    def encodes_text(self) -> bool:
        return self.row is not None and self.request.embeddings is None

    @property
    def prompts(self) -> dict[str, str]:
        """The texts that are encoded, by the name of their context."""
        assert self.request.prompt is not None, "checked in with_defaults"
        return {TEXT: self.request.prompt} | dict.fromkeys(self.negatives, self.request.negative_prompt or "")

    @property
    def negatives(self) -> tuple[str, ...]:
        """Names of the contexts that the clip is guided away from."""
        guided = any(stage.guided for stage in self.stages)
        return (NEGATIVE,) if guided and any(NEGATIVE in g.wanted for g in self._guidance().values()) else ()

    @cached_property
    def tokens(self) -> dict[str, Encoded]:
        """The tokens of every prompt."""
        return {name: encode_prompt(self.folder, text, self.preset.text_tokens) for name, text in self.prompts.items()}

    def read_latents(self, path: str, sound: bool = True) -> Streams[mx.array]:
        """Latents from a file, (1, C, F, H, W) and, with `sound`, (1, A, T, 16), checked against the model's
        channels."""
        channels = self.audio_config.latent_channels if sound else None
        return read_latents(path, self.video_config.latent_channels, channels)

    def read_contexts(self, path: str) -> dict[str, Streams[mx.array]]:
        """The prompts' contexts from a file, (1, tokens, width) of each stream."""
        return read_embeddings(path, self.transformer_config.context_dims, (TEXT, *self.negatives))

    def track(self) -> AudioTrack | None:
        """The given sound, as it goes into the clip. Raises InputError for one that cannot be used."""
        if (sound := self.request.audio) is not None:
            return sound_track(Path(sound.path), sound.start, self.sizes, self.scales)
        clip = self.clip
        if self.request.upscale is None or clip is None or clip.latents or not clip.sound or self.request.no_audio:
            return None
        return read_sound(clip.path, 0.0, clip.sizes.frames / clip.sizes.fps)

    def check(self, components: list[str]) -> dict[str, nn.Module]:
        """The components are whole, files to read fit. Reads headers, and small files. Returns the components'
        networks, uninitialised."""
        self.given  # noqa: B018 (opened with its LoRAs, and checked to fit)
        self.track()
        if self.clip is not None and self.clip.latents:
            self.read_latents(str(self.clip.path), sound=self.clip.sound)
        built: dict[str, nn.Module] = {}
        for component in components:
            if component.endswith("upscaler") and not self.folder.has(component):
                plain = "" if self.request.upscale or component != "spatial_upscaler" else ", or use --no-upscale"
                kind = component.removesuffix("_upscaler")
                raise InputError(
                    f"{self.folder.path} has no {component}",
                    "the second stage needs it" if plain else "it is what enlarges latents",
                    f"convert again with the {kind} upscaler file among the sources{plain}",
                )
            if component in VIDEO_VAES and not self.folder.has(component):
                raise InputError(
                    f"{self.folder.path} has no {component}",
                    f"--vae {self.request.vae} decodes with it",
                    "convert again with that VAE's file among the sources, or leave out --vae",
                )
            built[component] = check_network(self.folder, component)
        if "text_encoder" in components:
            check_text_encoder(self.folder)
        request = self.request
        if request.noise is not None:
            check_noise(request.noise, self.draws())
        if request.latents is None and request.embeddings is not None:
            self.read_contexts(request.embeddings)
        return built
