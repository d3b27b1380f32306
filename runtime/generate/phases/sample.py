"""Noise to latents, and latents to larger ones."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from ltx2.runtime.distributed.split import shared_denoiser
from ltx2.runtime.events import Event, Previewed, Warned
from ltx2.runtime.generate.phases.base import Made, Phase, Tools
from ltx2.runtime.generate.phases.preview import Preview, preview_memory, preview_weights
from ltx2.runtime.layers.checks import check_finite
from ltx2.runtime.layers.lora import attach
from ltx2.runtime.memory import activations as network
from ltx2.runtime.memory import cpu, flops, metal
from ltx2.runtime.memory.flops import PhaseWork
from ltx2.runtime.memory.plan import CODES, Headers, Need, on_cpu, on_metal
from ltx2.runtime.memory.streaming import block_of, streamed
from ltx2.runtime.model.layout import TRANSFORMER
from ltx2.runtime.networks.load import load_statistics, read_weights
from ltx2.runtime.networks.transformer.config import TransformerConfig
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.networks.upsampler import LatentUpsampler, UpsamplerConfig
from ltx2.runtime.networks.video_vae.config import VideoVAEConfig
from ltx2.runtime.networks.video_vae.tiles import Tiling
from ltx2.runtime.sampling.conditioning import Conditioning, Reference
from ltx2.runtime.sampling.denoise import begin, check_latents, denoise
from ltx2.runtime.sampling.guidance import passes
from ltx2.runtime.sampling.latents import Sizes
from ltx2.runtime.streams import Streams

TEXT_KEYS = re.compile(r"attn2\.to_[kv]\.")  # layers of the transformer that see the text alone
SLOW = 0.1  # warn if a stage spends more than this share of its time waiting for the disk


@dataclass(frozen=True)
class Upscale(Phase):
    """Twice the picture's sides, or the frame rate, on latents without the VAE's normalisation; the sound passes. The
    sides of the latents that come in are the job's divided by `downscale`."""

    upscaler: str
    downscale: int = 1

    @property
    def name(self) -> str:
        return self.upscaler

    @property
    def title(self) -> str:
        return "doubling the frame rate" if self.upscaler == "temporal_upscaler" else "doubling the picture's size"

    @property
    def components(self) -> tuple[str, ...]:
        return (self.upscaler, self.job.coder)

    def need(self, headers: Headers, sizes: Sizes, tiling: Tiling | None) -> Need:
        config = UpsamplerConfig.from_dict(headers.config(self.upscaler))
        itemsize = headers.itemsize(self.upscaler)
        used = network.upscale(config, self.job.grid(self.downscale, sizes), itemsize)
        used = used.beside(on_cpu(cpu.upscale(config, used.largest, itemsize)))
        return Need(self.name, headers.weights(self.upscaler), used)

    def work(self, headers: Headers) -> PhaseWork:
        config = UpsamplerConfig.from_dict(headers.config(self.upscaler))
        work = flops.upscale(config, self.job.grid(self.downscale))
        return work.moving(headers.itemsize(self.upscaler), headers.weights(self.upscaler))

    def run(self, tools: Tools, made: Made) -> Iterator[Event]:
        statistics = load_statistics(self.job.folder, self.job.coder, self.job.video_config.latent_channels)
        upscaler = tools.networks.load(self.upscaler, LatentUpsampler)
        read_weights(upscaler)
        yield tools.meter.loaded()
        assert made.latents.video is not None, "only pictures are upscaled"
        video = statistics.normalise(upscaler(statistics.unnormalise(made.latents.video)))
        check_finite(video, "the upscaled latents")
        made.latents = replace(made.latents, video=video)
        yield tools.meter.step()


@dataclass(frozen=True)
class Denoise(Phase):
    """Stage `number`: noise to latents."""

    number: int

    @property
    def name(self) -> str:
        return f"stage{self.number}"

    @property
    def title(self) -> str:
        stages = len(self.job.stages)
        return "denoising" if stages == 1 else f"denoising, stage {self.number} of {stages}"

    @property
    def components(self) -> tuple[str, ...]:
        return (TRANSFORMER,) if self.job.request.preview is None else (TRANSFORMER, "video_vae")

    @property
    def kept(self) -> tuple[str, ...]:
        """The contexts whose keys and values serve several calls: those of all steps or, where the noise level
        modulates the text, those that several calls of a step see."""
        least = 2 if self.job.transformer_config.modulates_text else 1
        return tuple(name for name, calls in self._texts().items() if calls >= least)

    @property
    def repeated(self) -> int:
        """How often calls attend to keys and values that an earlier call has made."""
        course, modulates = self.job.course(self.number), self.job.transformer_config.modulates_text
        calls = [self._texts(step)[name] for name in self.kept for step in range(course.steps)]
        made = sum(map(bool, calls)) * course.sampler.predictions if modulates else len(self.kept)
        return course.sampler.predictions * sum(calls) - made

    def _texts(self, step: int = 0) -> Counter[str]:
        """How many calls of a step see each context."""
        guided = self.job.stages[self.number - 1].guided
        frozen = self.job.frozen if guided else Streams(False, False)  # shapes are not looked at for nothing
        calls = passes(self.job.course(self.number).guidance, frozen, step).values()
        return Counter(name for call in calls for name in set(call.contexts.values()))

    @property
    def _changes(self) -> list[Conditioning]:
        return [given.conditioning for given in self.job.given if given.in_stage(self.number)]

    def appended(self, sizes: Sizes | None = None) -> int:
        """Tokens beside the picture's own. A clip of other sizes than the job's has as many for each of its own."""
        place = self.job.place(self.number)
        count, own = sum(change.appends(place) for change in self._changes), place.grid.tokens
        return ceil(count * self.job.stage_grid(self.number, sizes).tokens / own) if count else 0

    def need(self, headers: Headers, sizes: Sizes, tiling: Tiling | None) -> Need:
        config, width = TransformerConfig.from_dict(headers.config(TRANSFORMER)), headers.itemsize(TRANSFORMER)
        grid, text = self.job.stage_grid(self.number, sizes), self.job.preset.text_tokens
        loras, tensors = self.job.loras, headers.tensors(TRANSFORMER)
        unpacked = width * (headers.unpacked(TRANSFORMER) + loras.largest(self.number))
        appended = self.appended(sizes)
        used = network.denoise_step(config, grid, text, width, unpacked=unpacked, appended=appended)
        used = used.beside(on_metal(metal.denoise_step(config, grid.tokens + appended)))
        if headers.rotates(TRANSFORMER):
            used = used.beside(network.rotated(config, grid.tokens + appended, width))
        if any(isinstance(change, Reference) and change.attention < 1 for change in self._changes):
            used = used.beside(network.seen(grid.tokens + appended, width))
        late = on_cpu(min(used.queued, cpu.held_late(config, grid, width, appended)))
        used = used.beside(on_cpu(cpu.denoise_step(config, grid, text, width, appended)) + late, -late)
        factors = {path: width * size for path, size in loras.sizes(self.number).items()}
        beside = sum(size for path, size in factors.items() if tensors[f"{path}.weight"].dtype == CODES)
        weights, plain = headers.weights(TRANSFORMER) + beside, sum(factors.values()) - beside
        if self.job.request.preview is not None:
            decoder, itemsize = VideoVAEConfig.from_dict(headers.config("video_vae")), headers.itemsize("video_vae")
            weights += preview_weights(decoder, itemsize)
            used = used.or_then(preview_memory(decoder, grid, itemsize))
        keys = len(self.kept) * network.text_keys(config, grid, text, width)
        return Need(self.name, weights, used, blocks=headers.blocks, text=keys, factors=plain)

    def work(self, headers: Headers) -> PhaseWork:
        job, config = self.job, TransformerConfig.from_dict(headers.config(TRANSFORMER))
        grid, text, calls = job.stage_grid(self.number), job.preset.text_tokens, job.calls(self.number)
        work = flops.denoise_step(config, grid, text, self.appended()) * calls + flops.project_text(config, text)
        moved = calls * headers.weights(TRANSFORMER)
        if repeated := self.repeated:
            keys = sum(t.nbytes for name, t in headers.tensors(TRANSFORMER).items() if TEXT_KEYS.search(name))
            work, moved = work + flops.text_keys(config, grid, text) * -repeated, moved - repeated * keys
        if job.request.preview is not None:
            decoder, steps = VideoVAEConfig.from_dict(headers.config("video_vae")), job.course(self.number).steps
            work += flops.decode_still(decoder, (grid.height, grid.width)) * steps
            moved += preview_weights(decoder, headers.itemsize("video_vae")) * steps
        return work.moving(headers.itemsize(TRANSFORMER), moved)

    def run(self, tools: Tools, made: Made) -> Iterator[Event]:
        course = self.job.course(self.number)
        states = self.job.states(self.number, made.latents, made.encoded)
        start = made.step or begin(course, states, tools.noise)
        transformer = tools.networks.load(TRANSFORMER, Transformer)
        read, loras = tools.plan.streamed, self.job.loras.strengths(self.number)
        if transformer.loras and transformer.loras != loras:  # those of another clip may be in its weights for good
            tools.networks.keep(())
            transformer = tools.networks.load(TRANSFORMER, Transformer)
        if transformer.loras != loras:
            attach(transformer, self.job.loras.at(self.number), settles=lambda path: block_of(path) not in read)
            transformer.loras = loras
        preview = None
        if self.job.request.preview is not None and tools.machines.leads:
            preview = tools.networks.load("video_vae", Preview, Preview.load)
        given = transformer, made.contexts, states, self.kept if tools.plan.text else ()
        with (
            streamed(self.job.folder, transformer, read) as stream,
            shared_denoiser(tools.machines, tools.split, *given) as denoiser,
        ):
            yield tools.meter.loaded(course.steps - start.number)
            for made.step in denoise(denoiser, course, tools.noise, start):
                for name, tokens in made.step.x.items():  # at once: nobody waits for garbage, and no state holds it
                    check_finite(tokens, f"the {name} latents after step {made.step.number} of stage {self.number}")
                yield tools.meter.step()
                if preview is not None:
                    picture = preview(states.get("video").latents(made.step.x0.get("video")))
                    yield Previewed(self.name, made.step.number, self._preview_path(made.step.number), picture)
                    tools.meter.pause()
        if stream is not None and stream.share > SLOW:
            slow = f"{self.name} has waited {100 * stream.share:.0f} % of its time for blocks to be read"
            yield Warned(f"{slow}: fewer bits, or more memory, leave less to read")
        assert made.step is not None, "a stage has steps"
        made.latents = states.zip(made.step.x).map(lambda pair: pair[0].latents(pair[1]))
        made.step = None
        check_latents(made.latents, f"stage {self.number}")
        if self.job.sound_stage == self.number:
            made.sound = made.latents.audio

    def _preview_path(self, step: int) -> str:
        request = self.job.request
        clip = "" if request.output is None else f"{Path(request.output).stem}."
        return str(Path(str(request.preview)) / f"{clip}{self.name}.step{step:02}.png")
