"""The video VAE's configuration: the checkpoint's block lists, read into stages. The networks are built from these; the
memory plan and the count of operations ask them for convolutions."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, ClassVar, NamedTuple, TypeVar

from ltx2.runtime.errors import ConfigError, UnsupportedError
from ltx2.runtime.model.config import AS_PUBLISHED, SUPPORTED_ONLY, Config, Repeats

Size = tuple[int, int, int]  # frames, height, width
# Block name in the checkpoint -> stride over (frames, height, width).
STRIDES: Mapping[str, Size] = {
    "compress_space": (1, 2, 2),
    "compress_time": (2, 1, 1),
    "compress_all": (2, 2, 2),
}
PADDING_MODES = ("zeros", "reflect")
MAX_ELEMENTS = 2**31 - 1  # GPU kernels index with 32 bits: beyond it the tail of an array is garbage
Blocks = tuple[tuple[str, Any], ...]
Kind = TypeVar("Kind", bound=Config)


@dataclass(frozen=True)
class ResBlocksConfig(Config):
    """Parameters of `res_x`."""

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"inject_noise": (False,)}
    num_layers: Repeats


@dataclass(frozen=True)
class DownsampleConfig(Config):
    """Parameters of the encoder's `compress_*_res`."""

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"residual": (True,)}
    multiplier: int


@dataclass(frozen=True)
class UpsampleConfig(Config):
    """Parameters of the decoder's `compress_*`."""

    multiplier: int
    residual: bool = False


@dataclass(frozen=True)
class Stage:
    """A part of a network: `layers` residual blocks or, with a `stride`, one convolution that changes the size."""

    inputs: int  # channels
    outputs: int
    layers: int = 0
    stride: Size | None = None
    residual: bool = False  # of an upsampling


class Convolution(NamedTuple):
    """3x3x3 convolutions, `times` of them one after the other, each over clips of `size`."""

    inputs: int  # channels
    outputs: int
    size: Size
    times: int = 1

    @property
    def padded(self) -> int:
        """Values of the input with its border."""
        return self.inputs * prod(side + 2 for side in self.size)


@dataclass(frozen=True)
class Tower:
    """Encoder or, where it goes `up`, decoder: a convolution from `inputs` to `width` channels, the stages in the order
    of computation, a convolution to `outputs` channels. Convolutions extend pictures by reflection or by zeros."""

    inputs: int
    width: int
    stages: tuple[Stage, ...]
    outputs: int
    up: bool
    reflect: bool

    @property
    def scale(self) -> Size:
        """Factor between both ends, over (frames, height, width)."""
        return multiplied(stage.stride for stage in self.stages if stage.stride)

    def convolutions(self, size: Size, still: bool = False) -> Iterator[Convolution]:
        """All convolutions, in order, of a clip that comes in with this size. A stride over time keeps the first frame
        single: upsampling drops one frame afterwards, downsampling doubles the first one before. `still`: a single
        frame goes up, and the frames that would be dropped are not computed."""
        yield Convolution(self.inputs, self.width, size)
        width = self.width
        for stage in self.stages:
            width, (frames, rows, columns) = stage.outputs, size
            if stage.stride is None:
                yield Convolution(width, width, size, 2 * stage.layers)
                continue
            t, h, w = stage.stride
            if self.up:
                yield Convolution(stage.inputs, width * (1 if still else t) * h * w, size)
                size = frames * t - (t - 1), rows * h, columns * w
            else:
                yield Convolution(stage.inputs, width // (t * h * w), (frames + t - 1, rows, columns))
                size = (frames + t - 1) // t, rows // h, columns // w
        yield Convolution(width, self.outputs, size)

    def largest_array(self, size: Size) -> int:
        """Values of the largest array that goes into a convolution, with its border, or comes out of one."""
        return max(max(c.padded, c.outputs * prod(c.size)) for c in self.convolutions(size))


def multiplied(strides: Iterable[Size]) -> Size:
    """The product of strides, axis by axis."""
    time, height, width = (prod(axis) for axis in zip((1, 1, 1), *strides, strict=True))
    return time, height, width


@dataclass(frozen=True)
class VideoVAEConfig(Config):
    """`vae` of the checkpoint's metadata (class CausalVideoAutoencoder)."""

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "_class_name": ("CausalVideoAutoencoder",),
        "dims": (3,),
        "in_channels": (3,),
        "out_channels": (3,),
        "scaling_factor": (1.0,),
        "norm_layer": ("pixel_norm",),
        "latent_log_var": ("uniform",),
        "use_quant_conv": (False,),
        "normalize_latent_channels": (False,),
        "causal_decoder": (False,),
    }
    IGNORED: ClassVar[frozenset[str]] = frozenset({"decoder_spatial_padding_mode"})  # Lightricks reads it no longer

    latent_channels: int
    encoder_blocks: Blocks  # in the order of computation
    decoder_blocks: Blocks  # in the encoder's order: the decoder runs them backwards
    encoder_base_channels: int
    decoder_base_channels: int
    patch_size: int
    timestep_conditioning: bool = True  # of the decoder; files without the key mean a network that has it
    spatial_padding_mode: str | None = None  # of both networks
    encoder_spatial_padding_mode: str = "zeros"  # where `spatial_padding_mode` is missing

    def __post_init__(self) -> None:
        if self.timestep_conditioning:
            raise UnsupportedError(
                "VideoVAEConfig: timestep_conditioning is not supported",
                "the key is true or missing, which means the same; this version implements false only",
                SUPPORTED_ONLY,
            )
        if self.tower.scale != self.decoder.scale:
            raise ConfigError(
                "VideoVAEConfig: encoder_blocks and decoder_blocks disagree",
                f"the encoder divides (frames, height, width) by {self.tower.scale}, "
                f"the decoder multiplies by {self.decoder.scale}",
                AS_PUBLISHED,
            )

    @cached_property
    def tower(self) -> Tower:
        """The encoder's convolutions."""
        padding = self.spatial_padding_mode or self.encoder_spatial_padding_mode
        return encoder_tower(
            self.encoder_blocks, self.encoder_base_channels, self.latent_channels, self.patch_size, padding
        )

    @cached_property
    def decoder(self) -> Tower:
        """The decoder's convolutions."""
        stages: list[Stage] = []
        width = self.decoder_base_channels
        for name, params in self.decoder_blocks:  # from the pixels inwards
            if stride := STRIDES.get(name):
                upsample = _parameters(UpsampleConfig, name, params)
                inner = width * upsample.multiplier
                stages.insert(0, Stage(inner, width, stride=stride, residual=upsample.residual))
                width = inner
            else:
                stages.insert(0, _res_blocks(name, params, width))
        reflect = _reflects(self.spatial_padding_mode or "reflect")
        return Tower(self.latent_channels, width, tuple(stages), 3 * self.patch_size**2, True, reflect)

    @property
    def spatial_scale(self) -> int:
        """Pixels per latent along height and width."""
        return self.patch_size * self.tower.scale[1]

    @property
    def smallest_side(self) -> int:
        """Pixels of the shortest side that can be decoded: reflection needs a second latent."""
        return self.spatial_scale * (2 if self.decoder.reflect else 1)

    @property
    def temporal_scale(self) -> int:
        """Frames per latent; the first latent stands for one frame."""
        return self.tower.scale[0]


def encoder_tower(blocks: Blocks, width: int, latent_channels: int, patch_size: int, padding: str) -> Tower:
    """The encoder of a block list, beginning with `width` channels. Its last output channel is the log-variance that
    all latents share. Raises ConfigError or UnsupportedError for another kind of block or padding."""
    stages = []
    first = width
    for name, params in blocks:
        if name.endswith("_res") and (stride := STRIDES.get(name.removesuffix("_res"))):
            outputs = width * _parameters(DownsampleConfig, name, params).multiplier
            stages.append(Stage(width, outputs, stride=stride))
            width = outputs
        else:
            stages.append(_res_blocks(name, params, width))
    return Tower(3 * patch_size**2, first, tuple(stages), latent_channels + 1, False, _reflects(padding))


def _res_blocks(name: str, params: Any, width: int) -> Stage:
    if name != "res_x":
        raise UnsupportedError(
            f"video VAE block {name!r} is not supported",
            f"this version implements res_x and {', '.join(STRIDES)} (with _res in the encoder)",
            SUPPORTED_ONLY,
        )
    return Stage(width, width, layers=_parameters(ResBlocksConfig, name, params).num_layers)


def _parameters(kind: type[Kind], name: str, params: Any) -> Kind:
    if not isinstance(params, Mapping):
        raise ConfigError(
            f"VideoVAEConfig: parameters of block {name!r} have the wrong type",
            f"expected an object, got {params!r}",
            AS_PUBLISHED,
        )
    return kind.from_dict(params)


def _reflects(mode: str) -> bool:
    if mode not in PADDING_MODES:
        raise UnsupportedError(
            f"spatial padding mode {mode!r} is not supported",
            f"this version implements {' and '.join(PADDING_MODES)}",
            SUPPORTED_ONLY,
        )
    return mode == "reflect"
