"""Latents to sound and frames."""

from collections.abc import Callable, Iterator
from functools import cached_property

import mlx.core as mx
import numpy as np

from ltx2.runtime.distributed.split import spread
from ltx2.runtime.events import Event, Warned
from ltx2.runtime.generate.job import CANVAS, Job
from ltx2.runtime.generate.phases.base import Made, Phase, Tools
from ltx2.runtime.layers.checks import check_finite
from ltx2.runtime.media.source import read_frames
from ltx2.runtime.media.video import AudioTrack, encoding_memory
from ltx2.runtime.memory import activations as network
from ltx2.runtime.memory import cpu, flops, metal
from ltx2.runtime.memory.activations import Activations
from ltx2.runtime.memory.flops import PhaseWork, Work
from ltx2.runtime.memory.plan import Headers, Need, on_cpu, on_metal, uses_cpu
from ltx2.runtime.model.layout import DIFFUSION_VAE, VIDEO_VAE
from ltx2.runtime.networks.audio.bandwidth import vocoder_config
from ltx2.runtime.networks.audio.vae import AudioAutoencoder
from ltx2.runtime.networks.audio.vocoder import Vocoder
from ltx2.runtime.networks.load import read_weights
from ltx2.runtime.networks.video_vae.config import MAX_ELEMENTS, Size, VideoVAEConfig
from ltx2.runtime.networks.video_vae.diffusion import DiffusionAutoencoder
from ltx2.runtime.networks.video_vae.diffusion_config import DiffusionVAEConfig, diffusion_tilings
from ltx2.runtime.networks.video_vae.frames import Pictures, decode_frames
from ltx2.runtime.networks.video_vae.model import VideoAutoencoder
from ltx2.runtime.networks.video_vae.tiles import Tiles, Tiling, tilings
from ltx2.runtime.sampling.latents import Sizes

SILENT = 1e-4  # of full scale, -80 dB
BEHIND = 1  # layers that a device may be behind the host: a tenth faster for little memory


class DecodeSound(Phase):
    """Audio latents to spectrograms. Before the picture: it is small, and a video file is written with its sound at
    hand."""

    name = "audio_vae"
    title = "decoding the sound"
    components = ("audio_vae",)

    def need(self, headers: Headers, sizes: Sizes, tiling: Tiling | None) -> Need:
        config, frames = self.job.audio_config, self.job.grid(sizes=sizes).audio_frames
        used = network.decode_audio(config, frames)
        used = used.beside(on_cpu(cpu.decode_audio(config, frames)) + on_metal(metal.audio(used.largest)))
        return Need(self.name, headers.weights(self.name, "decoder."), used)

    def work(self, headers: Headers) -> PhaseWork:
        work = flops.decode_audio(self.job.audio_config, self.job.grid().audio_frames)
        return work.moving(network.FLOAT32, headers.weights(self.name, "decoder."))

    def run(self, tools: Tools, made: Made) -> Iterator[Event]:
        vae = tools.networks.load(self.name, AudioAutoencoder)
        read_weights(vae.decoder)
        yield tools.meter.loaded()
        assert made.latents.audio is not None, "a clip without sound has no such phase"
        made.mel = vae.decode(made.latents.audio)
        check_finite(made.mel, "the decoded spectrograms")
        yield tools.meter.step()


class Vocode(Phase):
    """Spectrograms to samples."""

    name = "vocoder"
    title = "making the sound's waves"
    components = ("vocoder",)

    def need(self, headers: Headers, sizes: Sizes, tiling: Tiling | None) -> Need:
        config = vocoder_config(headers.config(self.name))
        frames = self.job.grid(sizes=sizes).audio_frames * self.job.audio_config.temporal_scale
        used = network.vocode(config, frames)
        used = used.beside(on_cpu(cpu.vocode(config, used.largest)))
        return Need(self.name, headers.weights(self.name), used)

    def work(self, headers: Headers) -> PhaseWork:
        mel_frames = (self.job.grid().audio_frames - 1) * self.job.audio_config.temporal_scale + 1
        work = flops.vocode(vocoder_config(headers.config(self.name)), mel_frames)
        return work.moving(network.FLOAT32, headers.weights(self.name))

    def run(self, tools: Tools, made: Made) -> Iterator[Event]:
        vocoder = tools.networks.load(self.name, Vocoder)
        read_weights(vocoder)
        yield tools.meter.loaded()
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

    name = VIDEO_VAE
    title = "decoding the picture"
    components = (VIDEO_VAE,)
    spreads = True  # its tiles over several machines

    def tilings(self, latents: Size) -> list[Tiling | None]:
        """Ways to decode latents of this size (frames, height, width), each with less memory than the last."""
        return tilings(self._config, latents)

    def in_one_piece(self, latents: Size) -> bool:
        """Whether the GPU can decode latents of this size at once: a quarter faster, and without seams."""
        return self._config.decoder.largest_array(latents) <= MAX_ELEMENTS

    def need(self, headers: Headers, sizes: Sizes, tiling: Tiling | None) -> Need:
        sizes = self.job.output(sizes)
        latents = self.job.grid(sizes=sizes).size
        used = self._activations(latents, tiling, headers.itemsize(self.name))
        return Need(self.name, headers.weights(self.name, "decoder."), used, frames_memory(self.job, sizes))

    def work(self, headers: Headers) -> PhaseWork:
        work = self._counted(self.job.grid(sizes=self.job.output()).size)
        return work.moving(headers.itemsize(self.name), headers.weights(self.name, "decoder."))

    def run(self, tools: Tools, made: Made) -> Iterator[Event]:
        assert made.latents.video is not None, "a clip without a picture has no such phase"
        splice, frames_of = Splice(self.job), self._loaded(tools)
        yield tools.meter.loaded()
        for frames in frames_of(made.latents.video):
            done = tools.meter.step()
            tools.write(splice(frames))
            tools.meter.pause()
            yield done

    @cached_property
    def _config(self) -> VideoVAEConfig:
        return VideoVAEConfig.from_dict(self.job.folder.config(self.name))

    def _activations(self, latents: Size, tiling: Tiling | None, width: int) -> Activations:
        tiles = Tiles(latents, tiling, self._config)
        used = network.decode_video(self._config, tiles, width, uses_cpu(), BEHIND)
        used = used.beside(*map(on_metal, metal.decode_video(self._config, tiles, width, BEHIND)))
        return used.beside(on_cpu(cpu.decode_video(self._config, width)))

    def _counted(self, latents: Size) -> Work:
        return flops.decode_video(self._config, latents)

    def _loaded(self, tools: Tools) -> Callable[[mx.array], Iterator[Pictures]]:
        """A function from latents (1, C, F, H, W) to groups of frames (n, H, W, 3)."""
        vae = tools.networks.load(self.name, VideoAutoencoder)
        read_weights(vae.decoder)
        ahead, tiles = 0 if tools.plan.held_back else BEHIND, spread(tools.machines, tools.split)
        return lambda latents: decode_frames(vae, latents, tools.tiling, ahead, tiles)


class DiffuseVideo(DecodeVideo):
    """The same by the diffusion decoder, from noise beside the latents."""

    name = DIFFUSION_VAE
    components = (DIFFUSION_VAE,)
    spreads = False

    def tilings(self, latents: Size) -> list[Tiling | None]:
        return diffusion_tilings(self._config, latents)

    def in_one_piece(self, latents: Size) -> bool:
        return False  # the first of its tilings is

    @cached_property
    def _config(self) -> DiffusionVAEConfig:  # type: ignore[override]
        return DiffusionVAEConfig.from_dict(self.job.folder.config(self.name))

    def _activations(self, latents: Size, tiling: Tiling | None, width: int) -> Activations:
        steps = self._config.decoder.default_num_inference_steps
        used = network.decode_diffusion(self._config, latents, tiling, width, steps)
        return used.beside(on_cpu(cpu.decode_diffusion(self._config, latents, tiling, width)))

    def _counted(self, latents: Size) -> Work:
        return flops.decode_diffusion(self._config, latents, self._config.decoder.default_num_inference_steps)

    def _loaded(self, tools: Tools) -> Callable[[mx.array], Iterator[Pictures]]:
        vae = tools.networks.load(self.name, DiffusionAutoencoder)
        read_weights(vae.decoder)

        def decoded(latents: mx.array) -> Iterator[Pictures]:
            _, _, frames, height, width = latents.shape
            noise = tools.noise(CANVAS, self._config.canvas((frames, height, width)))
            return vae.decode_frames(latents, noise, tools.tiling)

        return decoded


def frames_memory(job: Job, sizes: Sizes) -> int:
    """Bytes of the clip's frames: all of them, or those on their way into the file."""
    if job.request.output is None:
        return sizes.frames * sizes.height * sizes.width * 3
    return encoding_memory(sizes.width, sizes.height)


class CopyVideo(Phase):
    """A given picture goes into the clip as it is."""

    name = "copy_video"
    title = "copying the picture"
    components = ()

    def need(self, headers: Headers, sizes: Sizes, tiling: Tiling | None) -> Need:
        return Need(self.name, 0, Activations(0, 0, 0), frames_memory(self.job, sizes))

    def work(self, headers: Headers) -> PhaseWork:
        return PhaseWork(0, 0)

    def run(self, tools: Tools, made: Made) -> Iterator[Event]:
        yield tools.meter.loaded()
        assert self.job.clip is not None, "a picture is given"
        for frames in read_frames(self.job.clip.path):
            tools.write(frames)
            yield tools.meter.step()


class Splice:
    """A longer clip keeps the frames of its source: called with groups of frames (F, H, W, 3), one after the other."""

    def __init__(self, job: Job) -> None:
        clip, extend = job.clip, job.request.extend
        self._next, self._start = 0, 0
        self._frames: Iterator[np.ndarray] | None = None
        if clip is None or extend is None or clip.latents or job.request.temporal_upscale:
            return
        self._start = job.sizes.frames - clip.sizes.frames if extend.seconds < 0 else 0
        self._frames = (frame for group in read_frames(clip.path) for frame in group)

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """The group (F, H, W, 3), with the source's frames in their places."""
        if self._frames is None:
            return frames
        spliced = frames.copy()
        for index in range(len(frames)):
            if self._next >= self._start and (own := next(self._frames, None)) is not None:
                spliced[index] = own
            self._next += 1
        return spliced
