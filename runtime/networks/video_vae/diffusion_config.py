"""Configuration of the video VAE whose decoder is a diffusion model (class CausalDiffusionVAE), and the sizes of a clip
on its way through that decoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, ClassVar, NamedTuple

from ltx2.runtime.errors import ConfigError, UnsupportedError
from ltx2.runtime.model.config import AS_PUBLISHED, SUPPORTED_ONLY, Config, Repeats
from ltx2.runtime.networks.video_vae.config import Blocks, Size, Tower, encoder_tower, multiplied
from ltx2.runtime.networks.video_vae.tiles import Tiling

# Pixels along both sides, and frames: the first ones take most memory.
TILES = ((1024, 128), (768, 128), (512, 128), (512, 96), (384, 96))
OUTPUT_TYPES = ("x0", "v")


@dataclass(frozen=True)
class EncoderConfig(Config):
    """Section `encoder`: the convolutional encoder."""

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "_class_name": ("Encoder",),
        "dims": (3,),
        "in_channels": (3,),
        "norm_layer": ("pixel_norm",),
        "latent_log_var": ("constant", "uniform"),
    }
    IGNORED: ClassVar[frozenset[str]] = frozenset({"latent_log_var_value"})  # latents are means

    out_channels: int  # of the latents
    blocks: Blocks
    base_channels: int
    patch_size: int
    spatial_padding_mode: str | None = None


@dataclass(frozen=True)
class DecoderConfig(Config):
    """Section `decoder`: stages of neighbourhood attention, the last of which is the diffusion model."""

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "_class_name": ("NADiffusionDecoder",),
        "out_channels": (3,),
        "resampler_kind": ("linear",),
    }
    IGNORED: ClassVar[frozenset[str]] = frozenset({"spatial_padding_mode"})  # it has no convolutions

    in_channels: int
    patch_size: int
    head_dim: int
    stage_channels: tuple[int, ...]
    stage_depths: tuple[Repeats, ...]
    stage_kernels: tuple[tuple[int, int, int], ...]
    upsamples: tuple[tuple[tuple[int, int, int], int], ...]  # between stages: stride, divisor of channels
    stage5_kernel: tuple[int, int, int] | None = None
    timestep_scale_multiplier: float = 1.0
    default_num_inference_steps: int = 2


class Cell(NamedTuple):
    """Pixels and frames of one position."""

    spatial_scale: int
    temporal_scale: int


class Stage(NamedTuple):
    """A stage of the decoder, and the size of the clip that it works on."""

    channels: int
    depth: int
    kernel: Size
    size: Size

    @property
    def positions(self) -> int:
        return prod(self.size)


@dataclass(frozen=True)
class DiffusionVAEConfig(Config):
    """`vae` of the checkpoint's metadata (class CausalDiffusionVAE)."""

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"_class_name": ("CausalDiffusionVAE",), "dims": (3,)}

    encoder: EncoderConfig
    decoder: DecoderConfig
    model_output_type: str = "v"
    spatial_padding_mode: str | None = None  # of the encoder, where that says nothing itself

    def __post_init__(self) -> None:
        d = self.decoder
        if self.model_output_type not in OUTPUT_TYPES:
            raise UnsupportedError(
                f"DiffusionVAEConfig: model_output_type = {self.model_output_type!r} is not supported",
                f"this version implements {' and '.join(OUTPUT_TYPES)}",
                SUPPORTED_ONLY,
            )
        widths = tuple(width // divisor for width, (_, divisor) in zip(d.stage_channels, d.upsamples, strict=False))
        fits = {
            "as many widths, depths and kernels as stages": len(d.stage_channels)
            == len(d.stage_depths)
            == len(d.stage_kernels)
            == len(d.upsamples) + 1
            >= 2,
            "upsamples that lead from width to width": widths == d.stage_channels[1:],
            "widths that are multiples of head_dim": not any(width % d.head_dim for width in d.stage_channels),
            "a head_dim that splits over three axes": d.head_dim % 8 == 0,
            "one kernel for the last stage": d.stage5_kernel in (None, d.stage_kernels[-1]),
            "strides over time of 1 or 2": all(stride[0] in (1, 2) for stride, _ in d.upsamples),
            "the encoder's latents": d.in_channels == self.encoder.out_channels,
            "the encoder's scale": (self.tower.scale[0], *(self.encoder.patch_size * s for s in self.tower.scale[1:]))
            == (self._scale[0], *(d.patch_size * s for s in self._scale[1:])),
        }
        for wanted, given in fits.items():
            if not given:
                raise ConfigError("DiffusionVAEConfig: the decoder's keys disagree", f"it needs {wanted}", AS_PUBLISHED)

    @cached_property
    def tower(self) -> Tower:
        """The encoder's convolutions."""
        e = self.encoder
        padding = e.spatial_padding_mode or self.spatial_padding_mode or "zeros"
        return encoder_tower(e.blocks, e.base_channels, e.out_channels, e.patch_size, padding)

    @property
    def patch_size(self) -> int:
        """Pixels along both sides that the encoder begins with as one."""
        return self.encoder.patch_size

    @property
    def latent_channels(self) -> int:
        return self.encoder.out_channels

    @property
    def smallest_side(self) -> int:
        """Pixels of the shortest side that can be decoded: smaller clips are extended."""
        return self.spatial_scale

    @property
    def _scale(self) -> Size:
        return multiplied(stride for stride, _ in self.decoder.upsamples)

    @property
    def _strides(self) -> list[Size]:
        """What every stage's output is enlarged by; nothing enlarges the last one's."""
        return [*(stride for stride, _ in self.decoder.upsamples), (1, 1, 1)]

    @property
    def temporal_scale(self) -> int:
        """Frames per latent; the first latent stands for one frame."""
        return self._scale[0]

    @property
    def spatial_scale(self) -> int:
        """Pixels per latent along height and width."""
        return self._scale[1] * self.decoder.patch_size

    @property
    def ghosts(self) -> int:
        """Copies of the last latent that are decoded after it and dropped. They keep the first stages from shifting the
        windows of kept frames inwards at the clip's end."""
        return self.decoder.stage_kernels[0][0] // 2 * 2

    def stages(self, latents: Size) -> list[Stage]:
        """All stages for a clip of so many latents (frames, height, width), at least `smallest`. In all but the last
        one the copies of the last latent are part of the clip."""
        d, found = self.decoder, []
        frames, height, width = map(max, latents, self.smallest)
        size = (frames + self.ghosts, height, width)
        for channels, depth, kernel, (t, h, w) in zip(
            d.stage_channels, d.stage_depths, d.stage_kernels, self._strides, strict=True
        ):
            found.append(Stage(channels, depth, kernel, size))
            size = size[0] * t - (t - 1), size[1] * h, size[2] * w
        last = found.pop()
        return [*found, last._replace(size=(last.size[0] - self.ghosts * self.temporal_scale, *last.size[1:]))]

    @cached_property
    def smallest(self) -> Size:
        """The fewest latents at which no stage's kernel is larger than its clip; smaller clips are extended."""
        frames = height = width = time = rows = columns = 1  # of latents, and positions per latent so far
        for (t, h, w), stride in zip(self.decoder.stage_kernels, self._strides, strict=True):
            frames = max(frames, -(-(t - 1) // time) + 1)
            height, width = max(height, -(-h // rows)), max(width, -(-w // columns))
            time, rows, columns = time * stride[0], rows * stride[1], columns * stride[2]
        return frames, height, width

    @property
    def smallest_tile(self) -> Size:
        """The fewest cells of a tile along each axis that hold the windows of the last two stages."""
        (outer, inner), (stride, _) = self.decoder.stage_kernels[-2:], self.decoder.upsamples[-1]
        frames = max(outer[0], -(-(inner[0] + stride[0] - 1) // stride[0]))
        height, width = (max(outer[axis], -(-inner[axis] // stride[axis])) for axis in (1, 2))
        return frames, height, width

    def canvas(self, latents: Size) -> tuple[int, ...]:
        """Shape of the noise (1, 3, F, H, W) that decoding so many latents starts from, each side at least the
        smallest that can be decoded."""
        frames, height, width = map(max, latents, self.smallest)
        space = self.spatial_scale
        return 1, 3, (frames - 1) * self.temporal_scale + 1, height * space, width * space

    def cells(self, latents: Size) -> Size:
        """The grid that tiles are cut in: the positions that go into the last stage but one, without those of the
        copies."""
        frames, height, width = self.stages(latents)[-2].size
        return frames - self.ghosts * (self.temporal_scale // self.cell.temporal_scale), height, width

    @property
    def halo(self) -> tuple[int, int]:
        """How many frames and pixels a position of the last stage sees to each side, in whole cells: neighbouring tiles
        must share that much."""
        kernel, depth, cell = self.decoder.stage_kernels[-1], self.decoder.stage_depths[-1], self.cell
        frames, pixels = depth * (kernel[0] // 2), depth * (max(kernel[1:]) // 2) * self.decoder.patch_size
        time, space = cell.temporal_scale, cell.spatial_scale
        return -(-frames // time) * time, -(-pixels // space) * space

    @property
    def cell(self) -> Cell:
        """Pixels and frames of one of the `cells`, the first of which stands for one frame."""
        (time, space, _), _ = self.decoder.upsamples[-1]
        return Cell(space * self.decoder.patch_size, time)


def diffusion_tilings(config: DiffusionVAEConfig, latents: Size) -> list[Tiling | None]:
    """Ways to decode a clip of so many latents (frames, height, width): in one piece (None), then in tiles that take
    less and less memory. Neighbours share as much as a position of the last stage sees."""
    frames, pixels = config.halo
    shape = config.canvas(latents)
    found: list[Tiling | None] = [None]
    for side, length in TILES:
        tiling = Tiling(side, side, pixels, length, frames)
        if side < max(shape[3:]) or length < shape[2]:  # else it is the whole clip
            found.append(tiling)
    return found
