"""A request meets a model folder: preset, configurations and sizes, and everything that can be known to be wrong
before the work starts."""

from functools import cached_property
from pathlib import Path

from ltx2.runtime.errors import InputError
from ltx2.runtime.files.paths import check_output
from ltx2.runtime.generate.exchange import Contexts, read_embeddings, read_latents, read_noise
from ltx2.runtime.generate.presets import Preset, Stage, decoding_preset, load_preset
from ltx2.runtime.generate.request import Request
from ltx2.runtime.generate.sidecar import sidecar_path
from ltx2.runtime.media.video import check_target
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.model.origin import check_text_encoder
from ltx2.runtime.networks.audio.vae import AudioVAEConfig
from ltx2.runtime.networks.load import check_network, encode_prompt
from ltx2.runtime.networks.text.tokenizer import Encoded
from ltx2.runtime.networks.transformer.config import TransformerConfig
from ltx2.runtime.networks.video_vae.config import VideoVAEConfig
from ltx2.runtime.sampling.latents import Grid, Latents, Scales, Sizes

DECODERS = ("video_vae", "audio_vae", "vocoder")


class Job:
    """One generation, complete: the request with its defaults, the model's folder, preset and geometry.

    Raises InputError, UnsupportedError, ConfigError or ModelFolderError for what does not go together; `check` looks
    at files and tensors too.
    """

    def __init__(self, folder: ModelFolder, request: Request) -> None:
        self.folder = folder
        self.preset = _preset(folder, request)
        self.video_config = VideoVAEConfig.from_dict(folder.config("video_vae"))
        self.audio_config = AudioVAEConfig.from_dict(folder.config("audio_vae"))
        self.scales = Scales(
            self.video_config.spatial_scale,
            self.video_config.temporal_scale,
            self.audio_config.hop / self.audio_config.sample_rate,
            self.audio_config.temporal_scale,
        )
        if request.latents is not None:
            request = request.for_latents(self.read_latents(request.latents).video.shape, self.scales)
        self.request = request.with_defaults(self.preset)
        self.sizes = self.request.sizes
        self.sizes.check(self.scales, self.preset.stages, self.video_config.smallest_side)

    @property
    def components(self) -> list[str]:
        """What the work needs of the model folder."""
        needed = ["video_vae"] if self.request.no_audio else list(DECODERS)
        if self.request.latents is None:
            needed.append("transformer")
            needed += ["spatial_upscaler"] if len(self.preset.stages) > 1 else []
            needed += ["text_encoder", "connectors"] if self.request.embeddings is None else []
        return needed

    def grid(self, stage: Stage, sizes: Sizes | None = None) -> Grid:
        """The latent grid of one stage, also for other `sizes` than the job's."""
        channels = self.video_config.latent_channels, self.audio_config.latent_channels
        return (sizes or self.sizes).grid(stage, self.scales, *channels)

    @property
    def grids(self) -> list[Grid]:
        """The latent grids of all stages."""
        return [self.grid(stage) for stage in self.preset.stages]

    @cached_property
    def tokens(self) -> Encoded:
        """The prompt's tokens."""
        assert self.request.prompt is not None, "checked in with_defaults"
        return encode_prompt(self.folder, self.request.prompt, self.preset.text_tokens)

    def read_latents(self, path: str) -> Latents:
        return read_latents(path, self.video_config.latent_channels, self.audio_config.latent_channels)

    def read_contexts(self, path: str) -> Contexts:
        config = TransformerConfig.from_dict(self.folder.config("transformer"))
        return read_embeddings(path, config.caption_channels)

    def read_noise(self, path: str) -> list[Latents]:
        return read_noise(path, self.grids)

    def check(self) -> None:
        """Components are whole, files to read fit, files to write have a place. Reads headers, and small files."""
        self._check_upscaler()
        for component in self.components:
            check_network(self.folder, component)
        if "text_encoder" in self.components:
            check_text_encoder(self.folder)
        request = self.request
        if request.output is not None:
            check_target(Path(request.output))
            check_output(sidecar_path(Path(request.output)))
        for path in (request.save_embeddings, request.save_latents, request.state):
            if path is not None:
                check_output(Path(path))
        if request.latents is None and request.noise is not None:
            self.read_noise(request.noise)
        if request.latents is None and request.embeddings is not None:
            self.read_contexts(request.embeddings)

    def _check_upscaler(self) -> None:
        if "spatial_upscaler" in self.components and not self.folder.has("spatial_upscaler"):
            raise InputError(
                f"{self.folder.path} has no spatial_upscaler",
                "the second stage needs it",
                "convert again with the spatial upscaler file among the sources, or use --no-upscale",
            )


def _preset(folder: ModelFolder, request: Request) -> Preset:
    manifest = folder.manifest
    if request.latents is not None:
        return decoding_preset(manifest.release)
    preset = load_preset(manifest.release, manifest.variant)
    return preset.single_stage() if request.no_upscale else preset
