"""Bytes that a CPU's kernels hold beside those of a GPU's, from shapes alone: a convolution copies its input once per
tap of its kernel, attention writes out its scores, and weights of 16 bits are widened before use."""

from math import prod

from ltx2.runtime.layers.neighbourhood import BLOCK
from ltx2.runtime.memory.activations import FLOAT32, gathered_blocks, tiled_stages
from ltx2.runtime.networks.audio.bandwidth import ExtendedVocoderConfig
from ltx2.runtime.networks.audio.config import AudioVAEConfig
from ltx2.runtime.networks.audio.vocoder import VocoderConfig
from ltx2.runtime.networks.text.config import ConnectorsConfig
from ltx2.runtime.networks.transformer.config import TransformerConfig
from ltx2.runtime.networks.upsampler import UpsamplerConfig
from ltx2.runtime.networks.video_vae.config import Size, VideoVAEConfig
from ltx2.runtime.networks.video_vae.diffusion_config import DiffusionVAEConfig
from ltx2.runtime.networks.video_vae.encode import VideoConfig
from ltx2.runtime.networks.video_vae.tiles import Tiling
from ltx2.runtime.sampling.latents import Grid

TAPS_2D, TAPS_3D = 9, 27
WIDENED = 4  # of the queued kernels


def connectors(config: ConnectorsConfig, length: int, itemsize: int) -> int:
    """The scores of one attention."""
    return config.video.count * length * length * itemsize


def denoise_step(config: TransformerConfig, grid: Grid, text_tokens: int, itemsize: int, appended: int = 0) -> int:
    """Keys and values of the text by heads; and the scores of the largest attention, as far as they exceed what the
    feed-forward network takes. `appended`: tokens beside the picture's own."""
    tokens = grid.tokens + appended
    copies = 2 * text_tokens * (config.video.dim + config.audio.dim) * itemsize
    scores = config.num_attention_heads * tokens * max(tokens, text_tokens) * itemsize
    return copies + max(0, scores - 40 * config.video.dim * tokens * itemsize)


def held_late(config: TransformerConfig, grid: Grid, itemsize: int, appended: int = 0) -> int:
    """Of the arrays that a GPU only queues, those that a denoise step on a CPU holds even where every operation is
    waited for; fitted to the demo model with 48 to 768 tokens."""
    return 26 * config.video.dim * (grid.tokens + appended) * itemsize


def upscale(config: UpsamplerConfig, unit: int, itemsize: int) -> int:
    """The convolutions of a block and the one after it. `unit`: bytes of the enlarged latents."""
    return 3 * TAPS_3D * unit + _widened(TAPS_3D * config.mid_channels**2, itemsize)


def decode_video(config: VideoVAEConfig, itemsize: int, taps: int = TAPS_3D) -> int:
    """Widened kernels; unfolded convolutions depend on the tile and are counted with it."""
    return _widened(taps * config.decoder.width**2, itemsize)


def encode_video(config: VideoConfig, itemsize: int) -> int:
    """As `decode_video`."""
    return _widened(TAPS_3D * max(stage.outputs for stage in config.tower.stages) ** 2, itemsize)


def decode_diffusion(config: DiffusionVAEConfig, latents: Size, tiling: Tiling | None, itemsize: int) -> int:
    """The scores of the blocks that attend together, before and after the softmax."""
    stages = tiled_stages(config, latents, tiling)
    scores = max(prod(gathered_blocks(stage, itemsize)) * stage.channels for stage in stages)
    return 2 * FLOAT32 * BLOCK**3 * scores // config.decoder.head_dim


def decode_audio(config: AudioVAEConfig, audio_frames: int) -> int:
    """The widest convolution of the finest level."""
    widest = max(config.widths[:2])
    return audio_frames * config.temporal_scale * config.mel_bins * FLOAT32 * TAPS_2D * widest


def encode_audio(unit: int) -> int:
    """One convolution. `unit`: bytes of an array of the finest level."""
    return unit * TAPS_2D


def vocode(config: VocoderConfig | ExtendedVocoderConfig, unit: int) -> int:
    """One convolution. `unit`: bytes of the largest signal."""
    return unit * max(max(generator.resblock_kernel_sizes) for generator, _ in config.generators(0))


def _widened(values: int, itemsize: int) -> int:
    return WIDENED * values * FLOAT32 if itemsize < FLOAT32 else 0
