"""Given pictures, clips and sounds to latents."""

from collections.abc import Iterator
from functools import reduce

import mlx.core as mx

from ltx2.runtime.events import Event
from ltx2.runtime.generate.given import ENCODING, Given
from ltx2.runtime.generate.job import Job
from ltx2.runtime.generate.phases.base import Made, Phase, Tools
from ltx2.runtime.layers.checks import check_finite
from ltx2.runtime.memory import activations as network
from ltx2.runtime.memory import cpu, flops, metal
from ltx2.runtime.memory.activations import Activations
from ltx2.runtime.memory.flops import PhaseWork, Work
from ltx2.runtime.memory.plan import Headers, Need, on_cpu, on_metal, uses_cpu
from ltx2.runtime.networks.audio.vae import AudioAutoencoder
from ltx2.runtime.networks.load import read_weights
from ltx2.runtime.networks.video_vae.config import Size
from ltx2.runtime.networks.video_vae.encode import VideoCoder
from ltx2.runtime.networks.video_vae.tiles import Tiling
from ltx2.runtime.sampling.latents import Sizes
from ltx2.runtime.streams import Streams


class EncodeVideo(Phase):
    """Given pictures and clips to latents, at the size of every stage that has them."""

    name = "encode_video"
    title = "encoding what is given of the picture"

    @property
    def components(self) -> tuple[str, ...]:
        return (self.job.coder,)

    def need(self, headers: Headers, sizes: Sizes, tiling: Tiling | None) -> Need:
        config, itemsize = self.job.video_config, headers.itemsize(self.job.coder)
        each = (
            network.encode_video(config, clip, ENCODING, itemsize, uses_cpu()).beside(
                *map(on_metal, metal.encode_video(config, clip, ENCODING, itemsize))
            )
            for clip in self.clips(sizes)
        )
        used = reduce(Activations.or_then, each).beside(on_cpu(cpu.encode_video(config, itemsize)))
        return Need(self.name, headers.weights(self.job.coder, "encoder."), used)

    def work(self, headers: Headers) -> PhaseWork:
        work = sum((flops.encode_video(self.job.video_config, clip) for clip in self.clips(self.job.sizes)), Work())
        return work.moving(headers.itemsize(self.job.coder), headers.weights(self.job.coder, "encoder."))

    def run(self, tools: Tools, made: Made) -> Iterator[Event]:
        vae = tools.networks.load(self.job.coder, VideoCoder)
        read_weights(vae.encoder)
        yield tools.meter.loaded()
        for latents in self.encoded(vae, made):
            check_finite(latents, "the latents of a given picture")
            yield tools.meter.step()

    def clips(self, sizes: Sizes) -> list[Size]:
        """Frames, height and width of all that is encoded."""
        found = ((given, number) for _, number, given in places(self.job) if given.encodes_video)
        return [given.encoded(self.job.place(number, sizes)) for given, number in found]

    def encoded(self, vae: VideoCoder, made: Made) -> Iterator[mx.array]:
        """Latents (1, C, f, h, w), one after the other as they are made."""
        for index, number, given in places(self.job):
            if given.encodes_video:
                latents = given.video(vae, self.job.place(number))
                assert latents is not None, "as it says"
                made.encoded[f"{index}.{number}.video"] = latents
                yield latents


class EncodeSource(EncodeVideo):
    """A clip that is enlarged, to latents."""

    title = "encoding the clip"

    def clips(self, sizes: Sizes) -> list[Size]:
        assert self.job.clip is not None, "a clip is enlarged"
        factor = self.job.sizes.height // self.job.clip.sizes.height
        return [(sizes.frames, sizes.height // factor, sizes.width // factor)]

    def encoded(self, vae: VideoCoder, made: Made) -> Iterator[mx.array]:
        assert self.job.clip is not None, "a clip is enlarged"
        latents = self.job.clip.video(vae)
        made.latents = Streams(latents)
        yield latents


class EncodeSound(Phase):
    """Given sounds to latents."""

    name = "encode_audio"
    title = "encoding what is given of the sound"
    components = ("audio_vae",)

    def need(self, headers: Headers, sizes: Sizes, tiling: Tiling | None) -> Need:
        config = self.job.audio_config
        used = network.encode_audio(config, round(sizes.frames / sizes.fps * config.sampling_rate))
        used = used.beside(on_cpu(cpu.encode_audio(used.largest)) + on_metal(metal.audio(used.largest)))
        return Need(self.name, headers.weights(self.components[0], "encoder."), used)

    def work(self, headers: Headers) -> PhaseWork:
        config, sizes = self.job.audio_config, self.job.sizes
        work = flops.encode_audio(config, round(sizes.frames / sizes.fps * config.sampling_rate))
        return work.moving(network.FLOAT32, headers.weights(self.components[0], "encoder."))

    def run(self, tools: Tools, made: Made) -> Iterator[Event]:
        vae = tools.networks.load("audio_vae", AudioAutoencoder)
        read_weights(vae.encoder)
        yield tools.meter.loaded()
        for index, number, given in places(self.job):
            if given.encodes_audio:
                latents = given.audio(vae, self.job.place(number))
                assert latents is not None, "as it says"
                check_finite(latents, "the latents of a given sound")
                made.encoded[f"{index}.{number}.audio"] = latents
                yield tools.meter.step()


def places(job: Job) -> Iterator[tuple[int, int, Given]]:
    """Number of a given thing, stage, and the thing."""
    for index, given in enumerate(job.given):
        for number in job.numbers:
            if given.in_stage(number):
                yield index, number, given
