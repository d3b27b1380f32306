"""The only loop: a request becomes a clip, phase by phase, as a stream of events.

Text encoder, connectors, transformer, upscaler and decoders are never in memory together: each phase loads its network,
uses it and frees it. Whoever consumes the events decides what to show."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ltx2.runtime.errors import InputError
from ltx2.runtime.events import Event, PhaseDone, PhaseStarted, Warned
from ltx2.runtime.generate.clip import Clip, FrameBuffer, Generated, Saved, conclude
from ltx2.runtime.generate.exchange import Contexts, write_embeddings, write_latents
from ltx2.runtime.generate.job import Job
from ltx2.runtime.generate.presets import Stage, check_release
from ltx2.runtime.generate.request import Request, takes
from ltx2.runtime.generate.resume import Owner, State, StateFile
from ltx2.runtime.generate.sidecar import make_record
from ltx2.runtime.layers.checks import check_finite
from ltx2.runtime.layers.matmul import Choice
from ltx2.runtime.layers.packed import choose_products
from ltx2.runtime.machine.facts import available_memory
from ltx2.runtime.media.video import AudioTrack, video_writer
from ltx2.runtime.memory.meter import Phase, explained
from ltx2.runtime.memory.plan import MemoryPlan, plan_memory
from ltx2.runtime.memory.streaming import streamed
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.model.origin import check_text_encoder
from ltx2.runtime.networks.audio.vae import AudioAutoencoder
from ltx2.runtime.networks.audio.vocoder import Vocoder
from ltx2.runtime.networks.load import load_network, read_weights
from ltx2.runtime.networks.text.connectors import EmbeddingsConnectors
from ltx2.runtime.networks.text.gemma import TextEncoder
from ltx2.runtime.networks.text.tokenizer import Encoded
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.networks.upsampler import LatentUpsampler
from ltx2.runtime.networks.video_vae.frames import decode_frames
from ltx2.runtime.networks.video_vae.model import VideoAutoencoder
from ltx2.runtime.sampling.denoise import check_latents, denoise, mix_noise
from ltx2.runtime.sampling.latents import Latents, audio_positions, video_positions
from ltx2.runtime.streams import Streams

SILENT = 1e-4  # of full scale, -80 dB
SLOW = 0.1  # of a stage's time, in which it waits for the disk
Params = ParamSpec("Params")
Result = TypeVar("Result")
Network = TypeVar("Network", bound=nn.Module)
Work = Generator[Event, None, Result]
Observe = Callable[[str, nn.Module], None]


class Pipeline:
    """A model folder, ready to generate. Headers are read here; weights are read phase by phase.

    `observe` is called with every phase's component and network, before the network is used: to watch its layers.
    Raises ModelFolderError for another folder, UnsupportedError for a release that is only converted so far.
    """

    def __init__(self, model: str | Path | ModelFolder, observe: Observe | None = None) -> None:
        self.folder = model if isinstance(model, ModelFolder) else ModelFolder.open(Path(model))
        self.observe = observe
        check_release(self.folder.manifest.release)

    @takes(Request)
    def generate(self, request: Request) -> Clip:
        """Run `stream` to its end and return the clip, with all its frames in memory."""
        if request.output is not None:
            fix = "leave it out and use clip.save, or use stream, which writes frames as they are decoded"
            raise InputError("generate has no output", "it returns the clip with all its frames", fix)
        for event in self.events(request):
            if isinstance(event, Generated):
                return event.clip
        raise RuntimeError("the generation ended without a clip")

    @takes(Request)
    def stream(self, request: Request) -> Generator[Event, None, None]:
        """Typed progress events; closing the stream ends the work. Options are the command's, underscored. The last
        event is Generated with the clip or, with `output`, Saved: then frames went into that file as they were decoded,
        and were never in memory together.

        The request is checked before this returns; raises InputError, UnsupportedError, ModelFolderError or
        DoesNotFitError.
        """
        return self.events(request)

    def events(self, request: Request) -> Generator[Event, None, None]:
        """As `stream`."""
        return Run(Job(self.folder, request), self.observe).events()

    @takes(Request)
    def plan(self, request: Request) -> MemoryPlan:
        """How much memory every phase of a generation would take; reads headers only. Raises as `stream`, but not for
        what does not fit: `MemoryPlan.check` does."""
        return self.planned(request)

    def planned(self, request: Request) -> MemoryPlan:
        """As `plan`."""
        job = Job(self.folder, request)
        job.check()
        return plan_memory(job)


class Run:
    """One generation: the checked job, how its memory is used, and what its phases took."""

    def __init__(self, job: Job, observe: Observe | None = None) -> None:
        job.check()
        self.job = job
        self.observe = observe
        self.request = job.request
        self.plan = plan_memory(job)
        self.plan.check()
        self.phases: list[PhaseDone] = []
        self.products: dict[str, Choice] = {}
        self.seconds = 0.0  # of an earlier run that this one continues
        self.state: StateFile | None = None
        if job.request.state is not None and job.request.latents is None:
            self.state = StateFile(Path(job.request.state), Owner.of(job))
        self.earlier = self.state.read() if self.state is not None and job.request.resume else None

    def events(self) -> Generator[Event, None, None]:
        """All phases, then Generated or, with an output, Saved."""
        self._started = time.perf_counter()
        yield from self._warnings()
        latents = yield from self._latents()
        if self.request.save_latents:
            write_latents(self.request.save_latents, latents)
        audio = None if self.request.no_audio else (yield from self._audio(latents.audio))
        if self.request.output is None:
            yield from self._generated(latents, audio)
        else:
            yield from self._saved(Path(self.request.output), latents, audio)

    def _generated(self, latents: Latents, audio: AudioTrack | None) -> Iterator[Event]:
        """The clip in memory."""
        frames, sizes = FrameBuffer(self.job.sizes), self.job.sizes
        yield from self._phase("video_vae", self._decode_video, latents.video, frames.write)
        samples, rate = (audio.samples, audio.sample_rate) if audio is not None else (None, 0)
        state = self.state.path if self.state is not None else None
        yield Generated(Clip(frames.frames, samples, rate, sizes.fps, latents.as_numpy(), self._record(), state))

    def _saved(self, path: Path, latents: Latents, audio: AudioTrack | None) -> Iterator[Event]:
        """The clip in its file; frames are there as they are decoded, so that no more than a tile's are in memory."""
        with video_writer(path, fps=self.job.sizes.fps, audio=audio) as writer:
            yield from self._phase("video_vae", self._decode_video, latents.video, writer.write)
            yield PhaseStarted("mp4")
        record = self._record()
        conclude(path, record, self.state.path if self.state is not None else None)
        yield Saved(path, record)

    def _record(self) -> dict[str, Any]:
        record = make_record(self.job.folder, self.request, self.phases, self._seconds())
        record["memory_plan"] = self.plan.to_dict()
        record["products"] = {form: dict(choice.by_rows) for form, choice in self.products.items()}
        return record

    def _seconds(self) -> float:
        return self.seconds + time.perf_counter() - self._started

    def _warnings(self) -> Iterator[Event]:
        for message in [*self.request.without_effect(), *self.plan.warnings()]:
            yield Warned(message)
        if self.request.memory_limit is not None and self.plan.limit > (has := available_memory()):
            yield Warned(f"--memory-limit {self.request.memory_limit:g} is more than the {has / 1e9:.1f} GB there are")
        if self.state is None:
            return
        there = self.state.path.exists()
        if self.request.resume and not there:
            yield Warned(f"there is no {self.state.path.name} to continue: this run starts from the beginning")
        elif there and not self.request.resume:
            yield Warned(f"{self.state.path.name} is of a run that was cut off: --resume would continue it")

    def _phase(
        self,
        name: str,
        work: Callable[Concatenate[Phase, Params], Work[Result]],
        *args: Params.args,
        **kwargs: Params.kwargs,
    ) -> Work[Result]:
        """Run one phase; its network is a local of `work`, so it is free when `work` returns."""
        phase = Phase(name)
        yield PhaseStarted(name)
        with self.plan.phase(name).applied(), explained(name):
            result = yield from work(phase, *args, **kwargs)
        done = phase.finish()
        self.phases.append(done)
        yield done
        return result

    def _load(self, component: str, expected: type[Network]) -> Network:
        """A phase's network, after the observer has seen it."""
        network = load_network(self.job.folder, component, expected)
        self.products |= choose_products(network, self.request.matmul)
        if self.observe is not None:
            self.observe(component, network)
        return network

    def _latents(self) -> Work[Latents]:
        if self.request.latents is not None:
            return self.job.read_latents(self.request.latents)
        earlier = self.earlier
        if earlier is None:
            contexts = yield from self._contexts()
            if self.request.save_embeddings:
                write_embeddings(self.request.save_embeddings, contexts)
            latents = yield from self._sample(contexts, self._noises(), None)
        else:
            self.phases += earlier.phases
            self.seconds = earlier.seconds
            if earlier.contexts is None:
                return earlier.latents
            noises = [earlier.latents] * earlier.stage + list(earlier.noises)
            latents = yield from self._sample(earlier.contexts, noises, earlier)
        last = self.job.preset.stages[-1]
        self._keep(State(len(self.job.preset.stages), last.steps, latents))
        return latents

    def _keep(self, state: State) -> None:
        if self.state is not None:
            self.state.write(replace(state, phases=self.phases, seconds=self._seconds()))

    # Text

    def _contexts(self) -> Work[Contexts]:
        if self.request.embeddings is not None:
            return self.job.read_contexts(self.request.embeddings)
        tokens = self.job.tokens
        if tokens.truncated:
            yield Warned(f"the prompt is {tokens.truncated} tokens too long; its end is ignored")
        if warning := check_text_encoder(self.job.folder):
            yield Warned(warning)
        hidden = yield from self._phase("text_encoder", self._encode_text, tokens)
        return (yield from self._phase("connectors", self._connect, hidden, tokens))

    def _encode_text(self, phase: Phase, tokens: Encoded) -> Work[list[mx.array]]:
        network = self._load("text_encoder", TextEncoder)
        phase.loaded(network.config.num_hidden_layers + 1)
        states = []
        for state in network.hidden_states(mx.array(tokens.ids), mx.array(tokens.mask), release=True):
            states.append(state)
            yield phase.step()
        return states

    def _connect(self, phase: Phase, hidden: list[mx.array], tokens: Encoded) -> Work[Contexts]:
        network = self._load("connectors", EmbeddingsConnectors)
        read_weights(network)
        phase.loaded()
        contexts = Contexts(*network(hidden, mx.array(tokens.mask)).values())
        check_finite(contexts.video, "the prompt's video embeddings")
        check_finite(contexts.audio, "the prompt's audio embeddings")
        yield phase.step()
        return contexts

    # Sampling

    def _sample(self, contexts: Contexts, noises: Sequence[Latents], earlier: State | None) -> Work[Latents]:
        """All stages, or what is left of them after an earlier run's state."""
        latents: Latents | None = None
        for index, (stage, noise) in enumerate(zip(self.job.preset.stages, noises, strict=True)):
            number, done = index + 1, 0
            if earlier is not None and number < earlier.stage:
                continue
            if earlier is not None and number == earlier.stage:
                start, done = earlier.latents, earlier.step
            else:
                if latents is not None:
                    latents = yield from self._phase("spatial_upscaler", self._upscale, latents)
                start = mix_noise(latents, noise, stage.sigmas[0])
            state = State(number, done, start, contexts, noises[number:])
            latents = start
            if done < stage.steps:
                latents = yield from self._phase(f"stage{number}", self._denoise, stage, state)
            check_latents(latents, f"stage {number}")
        assert latents is not None, "a preset has at least one stage"
        return latents

    def _noises(self) -> list[Latents]:
        """Unit Gaussian noise of every stage; one key per tensor, so that no draw depends on another's size."""
        if self.request.noise is not None:
            return self.job.read_noise(self.request.noise)
        grids = self.job.grids
        keys = mx.random.split(mx.random.key(self.request.seed or 0), 2 * len(grids))
        return [
            Latents(
                mx.random.normal(grid.video_shape, key=keys[2 * i]),
                mx.random.normal(grid.audio_shape, key=keys[2 * i + 1]),
            )
            for i, grid in enumerate(grids)
        ]

    def _denoise(self, phase: Phase, stage: Stage, state: State) -> Work[Latents]:
        """The steps of a stage that are left after `state`."""
        transformer = self._load("transformer", Transformer)
        with streamed(self.job.folder, transformer, self.plan.phase(phase.name).streamed) as stream:
            latents = yield from self._steps(phase, stage, state, transformer)
        if stream is not None and stream.share > SLOW:
            slow = f"{phase.name} has waited {100 * stream.share:.0f} % of its time for blocks to be read"
            yield Warned(f"{slow}: fewer bits, or more memory, leave less to read")
        return latents

    def _steps(self, phase: Phase, stage: Stage, state: State, transformer: Transformer) -> Work[Latents]:
        assert state.contexts is not None, "they are kept until the last step"
        grid, fps, scales = self.job.grid(stage), self.job.sizes.fps, self.job.scales
        positions = Streams(video_positions(grid, fps, scales), audio_positions(grid, scales))
        text = transformer.project(Streams(state.contexts.video, state.contexts.audio))
        prepared = text.zip(transformer.ropes(positions))
        phase.loaded(stage.steps - state.step)
        tokens = state.latents.to_tokens()
        steps = denoise(transformer, tokens, stage.sigmas[state.step :], prepared)
        for step, denoised in enumerate(steps, start=state.step + 1):
            tokens = denoised
            done = phase.step()
            if self._checkpoint_due(state.stage, step):
                self._keep(replace(state, step=step, latents=tokens.from_tokens(grid)))
                phase.pause()
            yield done
        return tokens.from_tokens(grid)

    def _checkpoint_due(self, stage: int, step: int) -> bool:
        """Every N steps, counted over all stages; the last step of all has a state of its own."""
        every, steps = self.request.checkpoint_every, [s.steps for s in self.job.preset.stages]
        count = sum(steps[: stage - 1]) + step
        return every is not None and count % every == 0 and count < sum(steps)

    def _upscale(self, phase: Phase, latents: Latents) -> Work[Latents]:
        """x2 in both picture directions, on latents without the VAE's normalisation; the audio passes through."""
        statistics = self._load("video_vae", VideoAutoencoder).per_channel_statistics
        network = self._load("spatial_upscaler", LatentUpsampler)
        read_weights(network)
        phase.loaded()
        video = statistics.normalise(network(statistics.unnormalise(latents.video)))
        check_finite(video, "the upscaled latents")
        yield phase.step()
        return Latents(video, latents.audio)

    # Decoding

    def _audio(self, latents: mx.array) -> Work[AudioTrack]:
        """Before the picture: it is small, and a video file is written with its sound at hand."""
        mel = yield from self._phase("audio_vae", self._decode_audio, latents)
        audio = yield from self._phase("vocoder", self._vocode, mel)
        if np.abs(audio.samples).max() < SILENT:
            yield Warned("the sound is silent throughout; --no-audio leaves it out")
        return audio

    def _decode_audio(self, phase: Phase, latents: mx.array) -> Work[mx.array]:
        network = self._load("audio_vae", AudioAutoencoder)
        read_weights(network.decoder)
        phase.loaded()
        mel = network.decode(latents)
        check_finite(mel, "the decoded spectrograms")
        yield phase.step()
        return mel

    def _vocode(self, phase: Phase, mel: mx.array) -> Work[AudioTrack]:
        network = self._load("vocoder", Vocoder)
        read_weights(network)
        phase.loaded()
        waveform = network(mel)
        check_finite(waveform, "the sound's samples")
        yield phase.step()
        return AudioTrack(np.array(waveform[0], order="C"), network.sample_rate(1 / self.job.scales.audio_hop))

    def _decode_video(self, phase: Phase, latents: mx.array, write: Callable[[np.ndarray], None]) -> Work[None]:
        """Give the frames away group by group, uint8 (F, H, W, 3)."""
        network = self._load("video_vae", VideoAutoencoder)
        read_weights(network.decoder)
        phase.loaded()
        for frames in decode_frames(network, latents, self.plan.tiling):
            done = phase.step()
            write(frames)
            phase.pause()
            yield done
