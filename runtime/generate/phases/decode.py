"""Latents to sound and frames."""

from collections.abc import Iterator

import numpy as np

from ltx2.runtime.distributed.split import spread
from ltx2.runtime.events import Event, Warned
from ltx2.runtime.generate.job import Job
from ltx2.runtime.generate.phases.base import Made, Phase, Tools
from ltx2.runtime.layers.checks import check_finite
from ltx2.runtime.media.source import read_frames
from ltx2.runtime.media.video import AudioTrack, encoding_memory
from ltx2.runtime.memory import activations as network
from ltx2.runtime.memory import cpu
from ltx2.runtime.memory.activations import Activations
from ltx2.runtime.memory.plan import Headers, Need, on_cpu, uses_cpu
from ltx2.runtime.networks.audio.bandwidth import vocoder_config
from ltx2.runtime.networks.audio.vae import AudioAutoencoder
from ltx2.runtime.networks.audio.vocoder import Vocoder
from ltx2.runtime.networks.load import read_weights
from ltx2.runtime.networks.video_vae.frames import decode_frames
from ltx2.runtime.networks.video_vae.model import VideoAutoencoder
from ltx2.runtime.networks.video_vae.tiles import Tiles, Tiling
from ltx2.runtime.sampling.latents import Sizes

SILENT = 1e-4  # of full scale, -80 dB
BEHIND = 1  # layers that a device may be behind the host: a tenth faster for little memory


class DecodeSound(Phase):
    """Audio latents to spectrograms. Before the picture: it is small, and a video file is written with its sound at
    hand."""

    name = "audio_vae"
    components = ("audio_vae",)

    def need(self, headers: Headers, sizes: Sizes, tiling: Tiling | None) -> Need:
        config, frames = self.job.audio_config, self.job.grid(sizes=sizes).audio_frames
        used = network.decode_audio(config, frames)
        used = used.beside(*map(on_cpu, cpu.decode_audio(config, frames)))
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
        used = network.decode_video(config, tiles, width, uses_cpu(), BEHIND)
        used = used.beside(on_cpu(cpu.decode_video(config, width)))
        frames = sizes.frames * sizes.height * sizes.width * 3
        if self.job.request.output is not None:  # then they leave as they are decoded
            frames = encoding_memory(sizes.width, sizes.height)
        return Need(self.name, headers.weights(self.name, "decoder."), used, frames)

    def run(self, tools: Tools, made: Made) -> Iterator[Event]:
        vae = tools.load(self.name, VideoAutoencoder)
        read_weights(vae.decoder)
        tools.meter.loaded()
        splice = Splice(self.job)
        assert made.latents.video is not None, "a clip without a picture has no such phase"
        ahead, tiles = 0 if tools.plan.held_back else BEHIND, spread(tools.machines, tools.split)
        for frames in decode_frames(vae, made.latents.video, tools.tiling, ahead, tiles):
            done = tools.meter.step()
            tools.write(splice(frames))
            tools.meter.pause()
            yield done


class CopyVideo(Phase):
    """A given picture goes into the clip as it is."""

    name = "copy_video"
    components = ()

    def need(self, headers: Headers, sizes: Sizes, tiling: Tiling | None) -> Need:
        frames = sizes.frames * sizes.height * sizes.width * 3
        if self.job.request.output is not None:
            frames = encoding_memory(sizes.width, sizes.height)
        return Need(self.name, 0, Activations(0, 0, 0), frames)

    def run(self, tools: Tools, made: Made) -> Iterator[Event]:
        tools.meter.loaded()
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
        """The group, with the source's frames where it has some."""
        if self._frames is None:
            return frames
        spliced = frames.copy()
        for index in range(len(frames)):
            if self._next >= self._start and (own := next(self._frames, None)) is not None:
                spliced[index] = own
            self._next += 1
        return spliced
