"""The phases of a generation, in order: the one list that says what follows what. What runs, what the memory plan adds
up, which components are needed, what a benchmark names and counts, and where a resumed run goes on is read off it.

Each phase loads its network, uses it and frees it, so that networks are never in memory together."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ltx2.runtime.events import Event, Warned
from ltx2.runtime.generate.job import CONTEXTS, LATENTS, Job
from ltx2.runtime.layers.checks import check_finite
from ltx2.runtime.layers.lora import attach
from ltx2.runtime.media.video import AudioTrack, encoding_memory
from ltx2.runtime.memory import activations as network
from ltx2.runtime.memory import cpu
from ltx2.runtime.memory.meter import Phase as Meter
from ltx2.runtime.memory.plan import Headers, Need, PhasePlan, on_cpu, uses_cpu
from ltx2.runtime.memory.streaming import streamed
from ltx2.runtime.model.layout import TRANSFORMER
from ltx2.runtime.networks.audio.bandwidth import vocoder_config
from ltx2.runtime.networks.audio.vae import AudioAutoencoder
from ltx2.runtime.networks.audio.vocoder import Vocoder
from ltx2.runtime.networks.load import read_weights
from ltx2.runtime.networks.text.config import ConnectorsConfig, gemma_config
from ltx2.runtime.networks.text.connectors import EmbeddingsConnectors
from ltx2.runtime.networks.text.gemma import TextEncoder
from ltx2.runtime.networks.transformer.config import TransformerConfig
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.networks.upsampler import LatentUpsampler, UpsamplerConfig
from ltx2.runtime.networks.video_vae.frames import decode_frames
from ltx2.runtime.networks.video_vae.model import VideoAutoencoder
from ltx2.runtime.networks.video_vae.tiles import Tiles, Tiling
from ltx2.runtime.sampling.denoise import Denoiser, Step, begin, check_latents, denoise
from ltx2.runtime.sampling.latents import Sizes
from ltx2.runtime.sampling.noise import Noise
from ltx2.runtime.streams import Streams

SILENT = 1e-4  # of full scale, -80 dB
SLOW = 0.1  # warn if a stage spends more than this share of its time waiting for the disk
Network = TypeVar("Network", bound=nn.Module)


@dataclass
class Made:
    """What the phases of a run have made so far. `step` is the running stage's last one; `latents` are those of the
    last finished stage or upscaler, (1, C, F, H, W) and (1, A, T, 16); `sound` are the clip's audio latents where a
    later stage makes others."""

    hidden: Sequence[mx.array] = ()
    contexts: Mapping[str, Streams[mx.array]] = field(default_factory=dict)
    latents: Streams[mx.array] = field(default_factory=Streams)
    sound: mx.array | None = None
    step: Step | None = None
    mel: mx.array | None = None
    track: AudioTrack | None = None


class Tools(Protocol):
    """What a run gives its phases: a stopwatch, the phase's share of the memory plan, networks, noise, and where frames
    (F, H, W, 3) uint8 go."""

    meter: Meter
    plan: PhasePlan
    tiling: Tiling | None
    noise: Noise

    @property
    def write(self) -> Callable[[np.ndarray], None]: ...

    def load(self, component: str, expected: type[Network]) -> Network:
        """A network that was checked to be there."""


@dataclass(frozen=True)
class Phase(ABC):
    """One step of a generation. `components`: of the model folder."""

    job: Job

    @property
    @abstractmethod
    def name(self) -> str:
        """Unique among the phases of a run."""

    @property
    @abstractmethod
    def components(self) -> tuple[str, ...]: ...

    @abstractmethod
    def need(self, headers: Headers, sizes: Sizes, tiling: Tiling | None) -> Need:
        """What the phase takes of memory, for these sizes in place of the job's."""

    @abstractmethod
    def run(self, tools: Tools, made: Made) -> Iterator[Event]:
        """Do it: what it makes goes into `made`."""


class EncodeText(Phase):
    """Prompts to the text encoder's hidden states, all in one load of it."""

    name = "text_encoder"
    components = ("text_encoder",)

    def need(self, headers: Headers, sizes: Sizes, tiling: Tiling | None) -> Need:
        embedding, layer = headers.text_parts
        config = gemma_config(headers.config(self.name))
        used = network.text_encoder(config, layer, embedding, _tokens(self.job), headers.itemsize(self.name))
        return Need(self.name, max(embedding, layer), used)

    def run(self, tools: Tools, made: Made) -> Iterator[Event]:
        for tokens in self.job.tokens.values():
            if tokens.truncated:
                yield Warned(f"the prompt is {tokens.truncated} tokens too long; its end is ignored")
        ids, mask = _batch(self.job)
        encoder = tools.load(self.name, TextEncoder)
        tools.meter.loaded(encoder.config.num_hidden_layers + 1)
        states = []
        for state in encoder.hidden_states(ids, mask, release=True):
            states.append(state)
            yield tools.meter.step()
        made.hidden = states


class Connect(Phase):
    """Hidden states to the contexts that the transformer attends to."""

    name = "connectors"
    components = ("connectors",)

    def need(self, headers: Headers, sizes: Sizes, tiling: Tiling | None) -> Need:
        config, width = ConnectorsConfig.from_dict(headers.config(self.name)), headers.itemsize(self.name)
        length = self.job.preset.text_tokens
        used = network.connectors(
            config, _tokens(self.job), length, width, unpacked=width * headers.unpacked(self.name)
        )
        used = used.beside(on_cpu(cpu.connectors(config, length, width)))
        return Need(self.name, headers.weights(self.name), used)

    def run(self, tools: Tools, made: Made) -> Iterator[Event]:
        connectors = tools.load(self.name, EmbeddingsConnectors)
        read_weights(connectors)
        tools.meter.loaded()
        both = connectors(made.hidden, _batch(self.job)[1])
        made.hidden = ()
        for stream, context in both.items():
            check_finite(context, f"the prompt's {stream} embeddings")
        names = list(self.job.prompts)
        made.contexts = {
            name: Streams(*(context[row : row + 1] for context in both.values())) for row, name in enumerate(names)
        }
        yield tools.meter.step()


@dataclass(frozen=True)
class Upscale(Phase):
    """Twice the picture's sides before stage `number`, on latents without the VAE's normalisation; the sound passes."""

    number: int

    @property
    def upscaler(self) -> str:
        return str(self.job.stages[self.number - 1].enter)

    @property
    def name(self) -> str:
        return self.upscaler if self.number == 2 else f"{self.upscaler}{self.number}"

    @property
    def components(self) -> tuple[str, ...]:
        return (self.upscaler, "video_vae")

    def need(self, headers: Headers, sizes: Sizes, tiling: Tiling | None) -> Need:
        config = UpsamplerConfig.from_dict(headers.config(self.upscaler))
        itemsize = headers.itemsize(self.upscaler)
        used = network.upscale(config, self.job.stage_grid(self.number - 1, sizes), itemsize)
        used = used.beside(on_cpu(cpu.upscale(config, used.largest, itemsize)))
        return Need(self.name, headers.weights(self.upscaler), used)

    def run(self, tools: Tools, made: Made) -> Iterator[Event]:
        made.latents = _upscaled(tools, self.upscaler, made.latents)
        yield tools.meter.step()


@dataclass(frozen=True)
class Denoise(Phase):
    """Stage `number`: noise to latents."""

    number: int
    components = (TRANSFORMER,)

    @property
    def name(self) -> str:
        return f"stage{self.number}"

    def need(self, headers: Headers, sizes: Sizes, tiling: Tiling | None) -> Need:
        config, width = TransformerConfig.from_dict(headers.config(TRANSFORMER)), headers.itemsize(TRANSFORMER)
        grid, text = self.job.stage_grid(self.number, sizes), self.job.preset.text_tokens
        used = network.denoise_step(config, grid, text, width, unpacked=width * headers.unpacked(TRANSFORMER))
        used = used.beside(on_cpu(cpu.denoise_step(config, grid, text, width)))
        weights = headers.weights(TRANSFORMER) + self.job.loras.nbytes(self.number, width)
        return Need(self.name, weights, used, blocks=headers.blocks)

    def run(self, tools: Tools, made: Made) -> Iterator[Event]:
        course, states = self.job.course(self.number), self.job.states(self.number, made.latents)
        start = made.step or begin(course, states, tools.noise)
        transformer = tools.load(TRANSFORMER, Transformer)
        if self.job.loras.uses:
            attach(transformer, self.job.loras.at(self.number))
        with streamed(self.job.folder, transformer, tools.plan.streamed) as stream:
            denoiser = Denoiser(transformer, made.contexts, states)
            tools.meter.loaded(course.steps - start.number)
            for made.step in denoise(denoiser, course, tools.noise, start):
                yield tools.meter.step()
        if stream is not None and stream.share > SLOW:
            slow = f"{self.name} has waited {100 * stream.share:.0f} % of its time for blocks to be read"
            yield Warned(f"{slow}: fewer bits, or more memory, leave less to read")
        assert made.step is not None, "a stage has steps"
        made.latents = states.zip(made.step.x).map(lambda pair: pair[0].latents(pair[1]))
        made.step = None
        check_latents(made.latents, f"stage {self.number}")
        row = self.job.row
        if row is not None and row.sound == self.number:
            made.sound = made.latents.audio
        if self.number == len(self.job.stages) and made.sound is not None:
            made.latents = Streams(made.latents.video, made.sound)


class Interpolate(Phase):
    """Twice the frame rate, on the final latents without the VAE's normalisation: F latent frames become 2F - 1."""

    name = "temporal_upscaler"
    components = ("temporal_upscaler", "video_vae")

    def need(self, headers: Headers, sizes: Sizes, tiling: Tiling | None) -> Need:
        config, itemsize = UpsamplerConfig.from_dict(headers.config(self.name)), headers.itemsize(self.name)
        used = network.upscale(config, self.job.grid(sizes=sizes), itemsize)
        used = used.beside(on_cpu(cpu.upscale(config, used.largest, itemsize)))
        return Need(self.name, headers.weights(self.name), used)

    def run(self, tools: Tools, made: Made) -> Iterator[Event]:
        made.latents = _upscaled(tools, self.name, made.latents)
        yield tools.meter.step()


class DecodeSound(Phase):
    """Audio latents to spectrograms. Before the picture: it is small, and a video file is written with its sound at
    hand."""

    name = "audio_vae"
    components = ("audio_vae",)

    def need(self, headers: Headers, sizes: Sizes, tiling: Tiling | None) -> Need:
        config, frames = self.job.audio_config, self.job.grid(sizes=sizes).audio_frames
        used = network.decode_audio(config, frames)
        used = used.beside(on_cpu(cpu.decode_audio(config, frames)))
        return Need(self.name, headers.weights(self.name, "decoder."), used)

    def run(self, tools: Tools, made: Made) -> Iterator[Event]:
        vae = tools.load(self.name, AudioAutoencoder)
        read_weights(vae.decoder)
        tools.meter.loaded()
        assert made.latents.audio is not None, "a clip without sound has no such phase"
        made.mel = vae.decode(made.latents.audio)
        check_finite(made.mel, "the decoded spectrograms")
        yield tools.meter.step()


class Vocode(Phase):
    """Spectrograms to samples."""

    name = "vocoder"
    components = ("vocoder",)

    def need(self, headers: Headers, sizes: Sizes, tiling: Tiling | None) -> Need:
        config = vocoder_config(headers.config(self.name))
        frames = self.job.grid(sizes=sizes).audio_frames * self.job.audio_config.temporal_scale
        used = network.vocode(config, frames)
        used = used.beside(on_cpu(cpu.vocode(config, used.largest)))
        return Need(self.name, headers.weights(self.name), used)

    def run(self, tools: Tools, made: Made) -> Iterator[Event]:
        vocoder = tools.load(self.name, Vocoder)
        read_weights(vocoder)
        tools.meter.loaded()
        assert made.mel is not None, "spectrograms are decoded before"
        waveform = vocoder(made.mel)
        made.mel = None
        check_finite(waveform, "the sound's samples")
        yield tools.meter.step()
        samples = np.array(waveform[0], order="C")
        made.track = AudioTrack(samples, vocoder.sample_rate(1 / self.job.scales.audio_hop))
        if np.abs(samples).max() < SILENT:
            yield Warned("the sound is silent throughout; --no-audio leaves it out")


class DecodeVideo(Phase):
    """Video latents to frames, group by group."""

    name = "video_vae"
    components = ("video_vae",)

    def need(self, headers: Headers, sizes: Sizes, tiling: Tiling | None) -> Need:
        sizes = self.job.output(sizes)
        config, grid, width = self.job.video_config, self.job.grid(sizes=sizes), headers.itemsize(self.name)
        tiles = Tiles((grid.frames, grid.height, grid.width), tiling, config)
        used = network.decode_video(config, tiles, width, uses_cpu()).beside(on_cpu(cpu.decode_video(config, width)))
        frames = sizes.frames * sizes.height * sizes.width * 3
        if self.job.request.output is not None:  # then they leave as they are decoded
            frames = encoding_memory(sizes.width, sizes.height)
        return Need(self.name, headers.weights(self.name, "decoder."), used, frames)

    def run(self, tools: Tools, made: Made) -> Iterator[Event]:
        vae = tools.load(self.name, VideoAutoencoder)
        read_weights(vae.decoder)
        tools.meter.loaded()
        assert made.latents.video is not None, "a clip without a picture has no such phase"
        for frames in decode_frames(vae, made.latents.video, tools.tiling):
            done = tools.meter.step()
            tools.write(frames)
            tools.meter.pause()
            yield done


def _upscaled(tools: Tools, component: str, latents: Streams[mx.array]) -> Streams[mx.array]:
    """The picture's latents (1, C, F, H, W) through an upscaler; the sound passes."""
    statistics = tools.load("video_vae", VideoAutoencoder).per_channel_statistics
    upscaler = tools.load(component, LatentUpsampler)
    read_weights(upscaler)
    tools.meter.loaded()
    assert latents.video is not None, "only pictures are upscaled"
    video = statistics.normalise(upscaler(statistics.unnormalise(latents.video)))
    check_finite(video, "the upscaled latents")
    return Streams(video, latents.audio)


def phases(job: Job) -> list[Phase]:
    """What a job's generation consists of, in order."""
    request, found = job.request, list[Phase]()
    if request.latents is None:
        if request.embeddings is None:
            found += [EncodeText(job), Connect(job)]
        for number in job.numbers if job.until != CONTEXTS else ():
            found += [Upscale(job, number)] if job.stages[number - 1].enter and number > 1 else []
            found.append(Denoise(job, number))
    if request.temporal_upscale and job.until != CONTEXTS:
        found.append(Interpolate(job))
    if job.until not in (CONTEXTS, LATENTS):
        found += [] if request.no_audio else [DecodeSound(job), Vocode(job)]
        found.append(DecodeVideo(job))
    return found


def components(steps: Sequence[Phase]) -> list[str]:
    """What phases need of the model folder, each once."""
    return list(dict.fromkeys(name for phase in steps for name in phase.components))


def _tokens(job: Job) -> int:
    """Tokens of all prompts together, each as long as the longest."""
    return len(job.tokens) * max(int(tokens.mask.sum()) for tokens in job.tokens.values())


def _batch(job: Job) -> tuple[mx.array, mx.array]:
    """ids and mask of all prompts, (prompts, tokens) int32 both."""
    tokens = job.tokens.values()
    return mx.array(np.concatenate([t.ids for t in tokens])), mx.array(np.concatenate([t.mask for t in tokens]))
