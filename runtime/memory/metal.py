"""Bytes that Metal's kernels hold beside those of other GPUs, from shapes alone, as MLX 0.32.2 and later compute (its
backend/metal/conv.cpp): a 3x3x3 convolution, whose clip is extended over time before it, as three of 3x3, one for each
tap over time. Their results are all there until the last is done. One of 3x3 with many channels multiplies transformed
tiles of 8x8 positions for 6x6 results (Winograd), of a frame or a few at a time (runtime/machine/winograd.py). And a
matrix product whose inner axis is long is computed in parts along it, all of which are there until they are added up
(backend/metal/matmul.cpp); by GPUs with matrix units (M5), but counted for all.

None of this was measured on a Mac here."""

from math import prod

from ltx2.runtime.machine.bounded import AHEAD
from ltx2.runtime.machine.winograd import RESULT, TILE, frames_at_once, tiles_of
from ltx2.runtime.memory.activations import FLOAT32, encoded_tile, largest_tile
from ltx2.runtime.networks.text.config import ConnectorsConfig
from ltx2.runtime.networks.transformer.config import TransformerConfig
from ltx2.runtime.networks.video_vae.config import Convolution, Size, Tower, VideoVAEConfig
from ltx2.runtime.networks.video_vae.encode import VideoConfig
from ltx2.runtime.networks.video_vae.layers import LARGE
from ltx2.runtime.networks.video_vae.tiles import Tiles, Tiling

TAPS = 3  # over time
# What is transformed: multiples of so many channels on both sides, so many of both together, so many positions or more.
FACTOR, CHANNELS, POSITIONS = 32, 256, 4096
LONG, PART = 3, 4096  # an inner axis so many times as long as the others is cut into parts of so many values


def connectors(config: ConnectorsConfig, tokens: int) -> int:
    """The projection of all hidden states of the text, in parts: as much as the states, twice."""
    outputs = config.video.width if config.per_token else config.caption_channels
    return _parts(tokens, config.num_hidden_states * config.caption_channels, outputs)


def denoise_step(config: TransformerConfig, tokens: int) -> int:
    """The second product of the video's feed-forward network, in parts. `tokens`: of the video."""
    return _parts(tokens, 4 * config.video.dim, config.video.dim)


def _parts(tokens: int, inputs: int, outputs: int) -> int:
    """Bytes of a product's parts, in float32."""
    cut = inputs > PART and inputs >= LONG * max(tokens, outputs)
    return FLOAT32 * -(-inputs // PART) * tokens * outputs if cut else 0


def decode_video(config: VideoVAEConfig, tiles: Tiles, itemsize: int, ahead: int = 0) -> tuple[int, int]:
    """Beside the arrays of the largest layer, what the one that takes most needs: a copy of its kernels, the results of
    the other taps, one that is allocated and not used, and what each tap transforms. And what several layers hold where
    the host does not wait for each: both of a residual block of small arrays and, with `ahead`, those before."""
    return tower(config.decoder, largest_tile(tiles), itemsize, ahead)


def encode_video(config: VideoConfig, clip: Size, tiling: Tiling, itemsize: int) -> tuple[int, int]:
    """As `decode_video`. `clip`: frames, height and width in pixels."""
    frames, height, width = encoded_tile(config, clip, tiling)
    return tower(config.tower, (frames, height // config.patch_size, width // config.patch_size), itemsize)


def decode_still(config: VideoVAEConfig, size: tuple[int, int], itemsize: int) -> int:
    """What the largest convolution of a single frame of latents (rows, columns) transforms."""
    return itemsize * max(map(transformed, config.decoder.convolutions((1, *size), still=True)))


def audio(unit: int) -> int:
    """What a convolution of spectrograms transforms. `unit`: bytes of the largest array."""
    return 2 * TILE**2 * unit // RESULT**2 + unit


def tower(network: Tower, size: Size, itemsize: int, ahead: int = 0) -> tuple[int, int]:
    """As `decode_video`, of a half of a video VAE whose input has this size: frames, rows, columns."""
    largest = needed = full = before = 0
    for layer in network.convolutions(size):
        positions = prod(layer.size)
        arrays = itemsize * (2 * layer.inputs * positions + layer.padded)
        results = layer.outputs * positions
        one = TAPS * itemsize * (results + TAPS**2 * layer.inputs * layer.outputs + transformed(layer))
        evaluated = 2 * one if layer.times > 1 and itemsize * results < LARGE else one
        queued = evaluated if ahead and itemsize * results <= AHEAD else 0
        behind = max(before, queued) if layer.times > 2 else before  # another block of the same
        largest, needed = max(largest, arrays), max(needed, arrays + one)
        full, before = max(full, arrays + behind + evaluated), queued
    return needed - largest, full - needed


def transformed(layer: Convolution) -> int:
    """Values that one 3x3 convolution transforms: a few frames of its input and of its results, and its kernels; and a
    copy of the frames with their border. 0 where nothing is transformed."""
    inputs, outputs, (frames, height, width) = layer.inputs, layer.outputs, layer.size
    many = not inputs % FACTOR and not outputs % FACTOR and inputs + outputs >= CHANNELS
    if not many or prod(layer.size) < POSITIONS:
        return 0
    rows, columns = (-(-side // RESULT) * RESULT + TILE - RESULT for side in (height, width))
    frame = inputs * rows * columns + TILE**2 * tiles_of(height, width) * (inputs + outputs)
    return min(frames, frames_at_once(height, width)) * frame + TILE**2 * inputs * outputs
