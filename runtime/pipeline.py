"""The only loop: a request becomes a clip, phase by phase, as a stream of events.

Text encoder, connectors, transformer, upscaler and decoders are never in memory together: each phase loads its network,
uses it and frees it. Whoever consumes the events decides what to show."""

import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import mlx.core as mx
import numpy as np

from ltx2.runtime.audio_vae import AudioAutoencoder, AudioVAEConfig
from ltx2.runtime.clip import Clip
from ltx2.runtime.connectors import EmbeddingsConnectors
from ltx2.runtime.errors import DoesNotFitError, InputError
from ltx2.runtime.events import Event, Generated, PhaseDone, PhaseStarted, Warned
from ltx2.runtime.exchange import (
    Contexts,
    read_embeddings,
    read_latents,
    read_noise,
    write_embeddings,
    write_latents,
)
from ltx2.runtime.latents import Grid, Latents, Scales, audio_positions, video_positions
from ltx2.runtime.layout import ModelFolder
from ltx2.runtime.load import check_network, load_network, read_weights
from ltx2.runtime.machine import device_memory, total_memory
from ltx2.runtime.memory import Phase, limit_cache
from ltx2.runtime.numerics import check_finite
from ltx2.runtime.paths import check_output
from ltx2.runtime.presets import Preset, Stage, decoding_preset, load_preset
from ltx2.runtime.request import Request, Sizes
from ltx2.runtime.sampling import check_latents, denoise, mix_noise
from ltx2.runtime.sidecar import make_record
from ltx2.runtime.text_encoder.gemma3 import Gemma3TextEncoder
from ltx2.runtime.text_encoder.tokenizer import Encoded, Tokenizer
from ltx2.runtime.transformer.config import TransformerConfig
from ltx2.runtime.transformer.model import Transformer
from ltx2.runtime.upsampler import LatentUpsampler
from ltx2.runtime.video_vae.config import VideoVAEConfig
from ltx2.runtime.video_vae.model import VideoAutoencoder
from ltx2.runtime.video_vae.tiling import auto_tiling, decode_frames
from ltx2.runtime.vocoder import Vocoder

SILENT = 1e-4  # of full scale, -80 dB
Params = ParamSpec("Params")
Result = TypeVar("Result")
Work = Generator[Event, None, Result]


class Pipeline:
    """A model folder, ready to generate. Headers are read here; weights are read phase by phase."""

    def __init__(self, path: str | Path) -> None:
        self.folder = ModelFolder.open(Path(path))

    def generate(self, prompt: str | None = None, **options: Any) -> Clip:
        """Run `stream` to its end and return the clip."""
        for event in self.stream(prompt, **options):
            if isinstance(event, Generated):
                return event.clip
        raise RuntimeError("the generation ended without a clip")

    def stream(self, prompt: str | None = None, **options: Any) -> Iterator[Event]:
        """Typed progress events; the last one is Generated with the clip. Options are the command's, underscored.

        The request is checked before this returns; raises InputError, UnsupportedError or ModelFolderError.
        """
        run = Run(self.folder, Request.from_options({"prompt": prompt, **options}))
        return run.events()


class Run:
    """One generation: the checked request, its geometry, and what its phases took."""

    def __init__(self, folder: ModelFolder, request: Request) -> None:
        self.folder = folder
        self.preset = self._load_preset(request)
        self.video_config = VideoVAEConfig.from_dict(folder.config("video_vae"))
        self.audio_config = AudioVAEConfig.from_dict(folder.config("audio_vae"))
        self.scales = Scales(
            self.video_config.spatial_scale,
            self.video_config.temporal_scale,
            self.audio_config.hop / self.audio_config.sample_rate,
            self.audio_config.temporal_scale,
        )
        if request.latents is not None:
            request = request.for_latents(self._read_latents(request.latents).video.shape, self.scales)
        self.request = request.with_defaults(self.preset)
        self.sizes = Sizes.of(self.request)
        self.phases: list[PhaseDone] = []
        self._check()

    def _load_preset(self, request: Request) -> Preset:
        manifest = self.folder.manifest
        if request.latents is not None:
            return decoding_preset(manifest.release)
        preset = load_preset(manifest.release, manifest.variant)
        return preset.single_stage() if request.no_upscale else preset

    def _check(self) -> None:
        """Everything that can be known to be wrong before the work starts."""
        self.sizes.check(self.scales, self.preset.stages, self.video_config.smallest_side)
        self._check_memory()
        self._check_components()
        self._check_files()

    def _check_memory(self) -> None:
        """The finished frames fit in memory: the least that a clip of any model needs."""
        sizes, have = self.sizes, total_memory()
        needed = sizes.frames * sizes.height * sizes.width * 3
        if needed > have:
            raise DoesNotFitError(
                f"{sizes.frames} frames of {sizes.width}x{sizes.height} do not fit in memory",
                f"they are {needed / 1e9:.1f} GB, and this computer has {have / 1e9:.1f} GB",
                "use fewer frames or a smaller size",
            )

    def _check_components(self) -> None:
        needed = ["video_vae"] if self.request.no_audio else ["video_vae", "audio_vae", "vocoder"]
        if self.request.latents is None:
            needed.append("transformer")
            if len(self.preset.stages) > 1:
                self._check_upscaler()
                needed.append("spatial_upscaler")
            if self.request.embeddings is None:
                needed += ["text_encoder", "connectors"]
        for component in needed:
            self._check_weights(component)

    def _check_upscaler(self) -> None:
        if not self.folder.has("spatial_upscaler"):
            raise InputError(
                f"{self.folder.path} has no spatial_upscaler",
                "the second stage needs it",
                "convert again with the spatial upscaler file among the sources, or use --no-upscale",
            )

    def _check_files(self) -> None:
        """Files to write have a place; files to read fit (they are small, and are read again when needed)."""
        for path in (self.request.save_embeddings, self.request.save_latents):
            if path is not None:
                check_output(path)
        if self.request.latents is None and self.request.noise is not None:
            read_noise(self.request.noise, [self._grid(stage) for stage in self.preset.stages])
        if self.request.latents is None and self.request.embeddings is not None:
            self._read_contexts(self.request.embeddings)

    def _check_weights(self, component: str) -> None:
        """The component is whole, and its weights fit in memory (the text encoder's are read layer by layer)."""
        check_network(self.folder, component)
        size = sum(path.stat().st_size for path in self.folder.weight_files(component))
        usable = device_memory()
        if size > usable and component != "text_encoder":
            smaller = f"make it smaller: ltx2 quantize {self.folder.path} -o {self.folder.path}-q4 --bits 4"
            packed = any(record.quantization for record in self.folder.manifest.components.values())
            raise DoesNotFitError(
                f"the {component} does not fit in memory",
                f"its weights alone are {size / 1e9:.1f} GB, this computer's GPU can use {usable / 1e9:.1f} GB",
                "convert or quantize again with fewer --bits, or --recipe uniform" if packed else smaller,
            )

    def events(self) -> Iterator[Event]:
        """All phases, then Generated."""
        started = time.perf_counter()
        limit_cache()
        for message in self.request.without_effect():
            yield Warned(message)
        latents = yield from self._latents()
        if self.request.save_latents:
            write_latents(self.request.save_latents, latents)
        frames = yield from self._phase("video_vae", self._decode_video, latents.video)
        audio, sample_rate = None, 0
        if not self.request.no_audio:
            mel = yield from self._phase("audio_vae", self._decode_audio, latents.audio)
            audio, sample_rate = yield from self._phase("vocoder", self._vocode, mel)
            if np.abs(audio).max() < SILENT:
                yield Warned("the sound is silent throughout; --no-audio leaves it out")
        record = make_record(self.folder, self.request, self.phases, time.perf_counter() - started)
        yield Generated(Clip(frames, audio, sample_rate, self.sizes.fps, latents.as_numpy(), record))

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
        result = yield from work(phase, *args, **kwargs)
        done = phase.finish()
        self.phases.append(done)
        yield done
        return result

    def _latents(self) -> Work[Latents]:
        if self.request.latents is not None:
            return self._read_latents(self.request.latents)
        contexts = yield from self._contexts()
        if self.request.save_embeddings:
            write_embeddings(self.request.save_embeddings, contexts)
        return (yield from self._sample(contexts))

    def _read_latents(self, path: str) -> Latents:
        return read_latents(path, self.video_config.latent_channels, self.audio_config.latent_channels)

    # Text

    def _read_contexts(self, path: str) -> Contexts:
        config = TransformerConfig.from_dict(self.folder.config("transformer"))
        return read_embeddings(path, config.caption_channels)

    def _contexts(self) -> Work[Contexts]:
        if self.request.embeddings is not None:
            return self._read_contexts(self.request.embeddings)
        tokens = self._tokenize()
        if tokens.truncated:
            yield Warned(f"the prompt is {tokens.truncated} tokens too long; its end is ignored")
        hidden = yield from self._phase("text_encoder", self._encode_text, tokens)
        return (yield from self._phase("connectors", self._connect, hidden, tokens))

    def _tokenize(self) -> Encoded:
        assert self.request.prompt is not None, "checked in with_defaults"
        tokenizer = Tokenizer.load(self.folder.component_path("text_encoder"))
        return tokenizer.encode(self.request.prompt, self.preset.text_tokens)

    def _encode_text(self, phase: Phase, tokens: Encoded) -> Work[list[mx.array]]:
        network = load_network(self.folder, "text_encoder", Gemma3TextEncoder)
        phase.loaded(network.config.num_hidden_layers + 1)
        states = []
        for state in network.hidden_states(mx.array(tokens.ids), mx.array(tokens.mask), release=True):
            states.append(state)
            yield phase.step()
        return states

    def _connect(self, phase: Phase, hidden: list[mx.array], tokens: Encoded) -> Work[Contexts]:
        network = load_network(self.folder, "connectors", EmbeddingsConnectors)
        read_weights(network)
        phase.loaded()
        contexts = Contexts(*network(hidden, mx.array(tokens.mask)))
        check_finite(contexts.video, "the prompt's video embeddings")
        check_finite(contexts.audio, "the prompt's audio embeddings")
        yield phase.step()
        return contexts

    # Sampling

    def _sample(self, contexts: Contexts) -> Work[Latents]:
        grids = [self._grid(stage) for stage in self.preset.stages]
        noises = self._noises(grids)
        latents: Latents | None = None
        for number, (stage, grid, noise) in enumerate(zip(self.preset.stages, grids, noises, strict=True), start=1):
            if latents is not None:
                latents = yield from self._phase("spatial_upscaler", self._upscale, latents)
            start = mix_noise(latents, noise, stage.sigmas[0])
            name = f"stage{number}"
            latents = yield from self._phase(name, self._denoise, stage, grid, start, contexts)
            check_latents(latents, f"stage {number}")
        assert latents is not None, "a preset has at least one stage"
        return latents

    def _grid(self, stage: Stage) -> Grid:
        channels = self.video_config.latent_channels, self.audio_config.latent_channels
        return self.sizes.grid(stage, self.scales, *channels)

    def _noises(self, grids: list[Grid]) -> list[Latents]:
        """Unit Gaussian noise of every stage; one key per tensor, so that no draw depends on another's size."""
        if self.request.noise is not None:
            return read_noise(self.request.noise, grids)
        keys = mx.random.split(mx.random.key(self.request.seed or 0), 2 * len(grids))
        return [
            Latents(
                mx.random.normal(grid.video_shape, key=keys[2 * i]),
                mx.random.normal(grid.audio_shape, key=keys[2 * i + 1]),
            )
            for i, grid in enumerate(grids)
        ]

    def _denoise(self, phase: Phase, stage: Stage, grid: Grid, start: Latents, contexts: Contexts) -> Work[Latents]:
        transformer = load_network(self.folder, "transformer", Transformer)
        read_weights(transformer)
        prepared = (
            transformer.prepare_video(contexts.video, video_positions(grid, self.sizes.fps, self.scales)),
            transformer.prepare_audio(contexts.audio, audio_positions(grid, self.scales)),
        )
        phase.loaded(stage.steps)
        tokens = start.to_tokens()
        for denoised in denoise(transformer, tokens, stage.sigmas, prepared):
            tokens = denoised
            yield phase.step()
        return tokens.from_tokens(grid)

    def _upscale(self, phase: Phase, latents: Latents) -> Work[Latents]:
        """x2 in both picture directions, on latents without the VAE's normalisation; the audio passes through."""
        statistics = load_network(self.folder, "video_vae", VideoAutoencoder).per_channel_statistics
        network = load_network(self.folder, "spatial_upscaler", LatentUpsampler)
        read_weights(network)
        phase.loaded()
        video = statistics.normalise(network(statistics.unnormalise(latents.video)))
        check_finite(video, "the upscaled latents")
        yield phase.step()
        return Latents(video, latents.audio)

    # Decoding

    def _decode_video(self, phase: Phase, latents: mx.array) -> Work[np.ndarray]:
        network = load_network(self.folder, "video_vae", VideoAutoencoder)
        read_weights(network.decoder)
        phase.loaded()
        sizes, done = self.sizes, 0
        # Filled group by group: a long clip has gigabytes, and collecting groups would need them twice.
        frames = np.empty((sizes.frames, sizes.height, sizes.width, 3), np.uint8)
        for group in decode_frames(network, latents, auto_tiling(network, *latents.shape[2:])):
            frames[done : done + group.shape[0]] = np.array(mx.round(group * 255).astype(mx.uint8))
            done += group.shape[0]
            del group  # not held while the next tile is decoded
            yield phase.step()
        return frames

    def _decode_audio(self, phase: Phase, latents: mx.array) -> Work[mx.array]:
        network = load_network(self.folder, "audio_vae", AudioAutoencoder)
        read_weights(network.decoder)
        phase.loaded()
        mel = network.decode(latents)
        check_finite(mel, "the decoded spectrograms")
        yield phase.step()
        return mel

    def _vocode(self, phase: Phase, mel: mx.array) -> Work[tuple[np.ndarray, int]]:
        network = load_network(self.folder, "vocoder", Vocoder)
        read_weights(network)
        phase.loaded()
        waveform = network(mel)
        check_finite(waveform, "the sound's samples")
        yield phase.step()
        return np.array(waveform[0], order="C"), network.sample_rate(1 / self.scales.audio_hop)
