"""The video VAE's configuration: the checkpoint's `vae` section, its block lists read into stages."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, ClassVar

from ltx2.runtime.errors import ConfigError, UnsupportedError
from ltx2.runtime.model.config import AS_PUBLISHED, SUPPORTED_ONLY, Config, Repeats

# Block name in the checkpoint -> stride over (frames, height, width).
STRIDES: Mapping[str, tuple[int, int, int]] = {
    "compress_space": (1, 2, 2),
    "compress_time": (2, 1, 1),
    "compress_all": (2, 2, 2),
}
PADDING_MODES = ("zeros", "reflect")


@dataclass(frozen=True)
class ResStage(Config):
    """`res_x`: residual blocks that keep size and width."""

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"inject_noise": (False,)}
    num_layers: Repeats


@dataclass(frozen=True)
class ResampleStage:
    """`compress_*`: the size changes by `stride` over (frames, height, width), the channels by `multiplier`."""

    stride: tuple[int, int, int]
    multiplier: int
    residual: bool


@dataclass(frozen=True)
class EncoderResample(Config):
    """Parameters of the encoder's `compress_*_res`."""

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"residual": (True,)}
    multiplier: int


@dataclass(frozen=True)
class DecoderResample(Config):
    """Parameters of the decoder's `compress_*`."""

    multiplier: int
    residual: bool = False


Stage = ResStage | ResampleStage


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
        "timestep_conditioning": (False,),
    }

    latent_channels: int
    encoder_blocks: tuple[tuple[str, Any], ...]  # in the order of computation
    decoder_blocks: tuple[tuple[str, Any], ...]  # in the encoder's order: the decoder runs them backwards
    encoder_base_channels: int
    decoder_base_channels: int
    patch_size: int
    spatial_padding_mode: str | None = None  # both networks; the next two are the older spelling
    encoder_spatial_padding_mode: str = "zeros"
    decoder_spatial_padding_mode: str = "reflect"

    def __post_init__(self) -> None:
        for mode in (self.encoder_padding, self.decoder_padding):
            if mode not in PADDING_MODES:
                raise UnsupportedError(
                    f"spatial padding mode {mode!r} is not supported",
                    f"this version implements {' and '.join(PADDING_MODES)}",
                    SUPPORTED_ONLY,
                )
        encoder, decoder = _scales(self.encoder_stages), _scales(self.decoder_stages)
        if encoder != decoder:
            raise ConfigError(
                "VideoVAEConfig: encoder_blocks and decoder_blocks disagree",
                f"the encoder divides (frames, height, width) by {encoder}, the decoder multiplies by {decoder}",
                AS_PUBLISHED,
            )

    @property
    def encoder_padding(self) -> str:
        return self.spatial_padding_mode or self.encoder_spatial_padding_mode

    @property
    def decoder_padding(self) -> str:
        return self.spatial_padding_mode or self.decoder_spatial_padding_mode

    @cached_property
    def encoder_stages(self) -> tuple[Stage, ...]:
        """In the order of computation."""
        return tuple(_encoder_stage(name, params) for name, params in self.encoder_blocks)

    @cached_property
    def decoder_stages(self) -> tuple[Stage, ...]:
        """In the order of computation."""
        return tuple(_decoder_stage(name, params) for name, params in reversed(self.decoder_blocks))

    @property
    def decoder_channels(self) -> int:
        """Channels of the decoder's first stage."""
        widths = (stage.multiplier for stage in self.decoder_stages if isinstance(stage, ResampleStage))
        return self.decoder_base_channels * prod(widths)

    @property
    def spatial_scale(self) -> int:
        """Pixels per latent along height and width."""
        return self.patch_size * _scales(self.encoder_stages)[1]

    @property
    def smallest_side(self) -> int:
        """Pixels of the shortest side that can be decoded: reflection needs a second latent."""
        return self.spatial_scale * (2 if self.decoder_padding == "reflect" else 1)

    @property
    def temporal_scale(self) -> int:
        """Frames per latent; the first latent stands for one frame."""
        return _scales(self.encoder_stages)[0]


def _scales(stages: tuple[Stage, ...]) -> tuple[int, ...]:
    strides = [stage.stride for stage in stages if isinstance(stage, ResampleStage)]
    return tuple(prod(axis) for axis in zip((1, 1, 1), *strides, strict=True))


def _encoder_stage(name: str, params: Any) -> Stage:
    _check_params(name, params)
    stride = STRIDES.get(name.removesuffix("_res"))
    if name.endswith("_res") and stride:
        return ResampleStage(stride, EncoderResample.from_dict(params).multiplier, residual=True)
    return _res_stage(name, params)


def _decoder_stage(name: str, params: Any) -> Stage:
    _check_params(name, params)
    if stride := STRIDES.get(name):
        resample = DecoderResample.from_dict(params)
        return ResampleStage(stride, resample.multiplier, resample.residual)
    return _res_stage(name, params)


def _res_stage(name: str, params: Mapping[str, Any]) -> ResStage:
    if name != "res_x":
        raise UnsupportedError(
            f"video VAE block {name!r} is not supported",
            f"this version implements res_x and {', '.join(STRIDES)} (with _res in the encoder)",
            SUPPORTED_ONLY,
        )
    return ResStage.from_dict(params)


def _check_params(name: str, params: Any) -> None:
    if not isinstance(params, Mapping):
        raise ConfigError(
            f"VideoVAEConfig: parameters of block {name!r} have the wrong type",
            f"expected an object, got {params!r}",
            AS_PUBLISHED,
        )
