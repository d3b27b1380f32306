"""Bytes that a network holds beside its weights while it computes, from shapes alone.

The host queues operations ahead of a GPU: an array is free when the device is done with it, not when the program is. So
every figure has two parts. The arrays that are needed at once follow from the code. The queued ones are fitted to
measurements (bench/results/memory-*.json); a memory limit can do without them."""

from dataclasses import dataclass, replace
from math import prod

from ltx2.runtime.layers.neighbourhood import BLOCK, GATHERED
from ltx2.runtime.machine.bounded import AHEAD
from ltx2.runtime.networks.audio.bandwidth import ExtendedVocoderConfig
from ltx2.runtime.networks.audio.config import AudioVAEConfig
from ltx2.runtime.networks.audio.vocoder import VocoderConfig
from ltx2.runtime.networks.text.config import ConnectorsConfig, GemmaConfig
from ltx2.runtime.networks.text.duration_head import DurationHeadConfig
from ltx2.runtime.networks.transformer.config import TransformerConfig
from ltx2.runtime.networks.upsampler import UpsamplerConfig
from ltx2.runtime.networks.video_vae.config import Convolution, Size, Tower, VideoVAEConfig
from ltx2.runtime.networks.video_vae.diffusion_config import DiffusionVAEConfig, Stage
from ltx2.runtime.networks.video_vae.encode import VideoConfig
from ltx2.runtime.networks.video_vae.frames import FRAMES_PER_GROUP
from ltx2.runtime.networks.video_vae.layers import LARGE
from ltx2.runtime.networks.video_vae.tiles import Intervals, Tiles, Tiling
from ltx2.runtime.sampling.latents import Grid

MB = 10**6
FLOAT32 = 4
# Even if we wait after every operation, the device still holds one command buffer's arrays and frees them late.
UNDER_WAY = 150 * MB
UNPACKED = 2  # unpacked weights at once: one is made while another is multiplied with
UNPACKED_QUEUED = 4  # at full speed


@dataclass(frozen=True)
class Activations:
    """In bytes: `needed` at once; up to `queued` more while the device works at full speed; the `largest` array."""

    needed: int
    queued: int
    largest: int

    @property
    def full(self) -> int:
        return self.needed + self.queued

    def or_then(self, other: "Activations") -> "Activations":
        """Of one and then the other."""
        needed = max(self.needed, other.needed)
        return Activations(needed, max(self.full, other.full) - needed, max(self.largest, other.largest))

    def beside(self, more: int, queued: int = 0) -> "Activations":
        """With `more` bytes needed at once, and more queued."""
        return replace(self, needed=self.needed + more, queued=self.queued + queued)


def text_encoder(config: GemmaConfig, layer: int, embedding: int, tokens: int, itemsize: int) -> Activations:
    """Weights are read and released layer by layer: beside the largest part (a `layer` or the `embedding`, in bytes)
    are all states so far, and a layer's attention and feed-forward network. The device may free a part only when the
    first weight of the next is read."""
    state = tokens * config.hidden_size * itemsize
    states = (config.num_hidden_layers + 1) * state
    # Queries before and after rotation, and the attention's output; or the gate, its input and their product.
    widest = max(config.query_heads(layer).width for layer in range(config.num_hidden_layers))
    inside = 4 * state + 3 * tokens * max(config.intermediate_size, widest) * itemsize
    needed = max(embedding + 2 * state, layer + states + inside) - max(embedding, layer)
    return Activations(needed, layer // 4, tokens * config.intermediate_size * itemsize)


def connectors(config: ConnectorsConfig, tokens: int, length: int, itemsize: int, *, unpacked: int = 0) -> Activations:
    """The text encoder's states, normalised and stacked, and scaled where each stream projects its own features; later
    the states beside the connectors' `length` tokens. `unpacked` as in `denoise_step`."""
    states = config.num_hidden_states * tokens * config.caption_channels * itemsize
    position = length * config.video.width * itemsize
    waiting = tokens * config.audio.width * itemsize if config.per_token else 0  # the sound's features
    needed, full = (max(3 * states + 2 * position, states + waiting + units * position) for units in (16, 22))
    needed, full = needed + UNPACKED * unpacked, full + UNPACKED_QUEUED * unpacked
    return Activations(needed, full - needed, max(states, unpacked))


def predict_length(config: DurationHeadConfig, length: int) -> Activations:
    """In float32: the contexts of both streams, `length` tokens each, one after the other beside the weight that
    projects them; then the projections, twice while they are concatenated, with their keys and values."""
    widest = max(config.cross_attention_dim, config.audio_cross_attention_dim)
    context = FLOAT32 * length * widest
    projected = 2 * FLOAT32 * length * config.pooler_hidden_dim
    needed = max(context + FLOAT32 * widest * config.pooler_hidden_dim + projected, 4 * projected)
    return Activations(needed, context + 3 * projected, context)


def denoise_step(
    config: TransformerConfig, grid: Grid, text_tokens: int, itemsize: int, *, unpacked: int = 0, appended: int = 0
) -> Activations:
    """Kept over the steps: rotary tables in float32, projected text, latents. In a block: keys and values of the text,
    and per token the residual stream, its normalised copy and the feed-forward network's four-fold width. `unpacked`:
    bytes of the largest packed weight once unpacked, where layers unpack theirs to multiply. `appended`: tokens beside
    the picture's own."""
    video, audio, tokens = config.video.dim, config.audio.dim, grid.tokens + appended
    tables = FLOAT32 * ((video + audio) * tokens + 2 * audio * grid.audio_frames)
    channels = config.in_channels * tokens + config.audio_in_channels * grid.audio_frames
    text = text_tokens * (video + audio + sum(config.context_dims.values())) * itemsize
    kept = tables + text + 4 * FLOAT32 * channels
    unit = (video * tokens + audio * grid.audio_frames) * itemsize
    # Where every block modulates the text, there is one more copy of it.
    keys = (5 if config.cross_attention_adaln else 4) * text_tokens * (video + audio) * itemsize
    needed = kept + keys + 13 * unit // 2 + UNPACKED * unpacked
    # Up to ten command buffers wait for the device. Each ends after some operations, or some megabytes.
    full = kept + keys + min(47 * unit, 700 * MB + 11 * unit) + UNPACKED_QUEUED * unpacked
    return Activations(needed, full - needed, max(4 * unit, unpacked))


def rotated(config: TransformerConfig, tokens: int, itemsize: int) -> int:
    """More bytes where layers rotate their inputs: a second copy of a feed-forward network's inner values, of four
    times the width."""
    return (4 - 1) * config.video.dim * tokens * itemsize


def seen(tokens: int, itemsize: int) -> int:
    """Bytes of the attention mask of `tokens` tokens, in float32 and as it is added to scores."""
    return tokens**2 * (FLOAT32 + itemsize)


def text_keys(config: TransformerConfig, grid: Grid, text_tokens: int, itemsize: int) -> int:
    """Bytes of the keys and values of one text in all blocks."""
    widths = config.audio.dim + (config.video.dim if grid.tokens else 0)
    return 2 * config.num_layers * text_tokens * widths * itemsize


def upscale(config: UpsamplerConfig, grid: Grid, itemsize: int) -> Activations:
    """Per value of the larger latents: the residual stream and the arrays of two normalised convolutions. Where latents
    are enlarged and reduced again: a frame at its largest, shuffled. `grid`: of the input."""
    up, down = config.factors
    small = grid.tokens * config.mid_channels * itemsize
    made = prod(config.enlarged(grid.frames, grid.height, grid.width)) * config.mid_channels * itemsize
    unit, picture = max(small, made), small + made + 2 * up * up * small // grid.frames if down > 1 else 0
    needed = max(3 * unit + min(4 * unit, 110 * MB), picture)
    full = max(7 * unit + min(6 * unit, 200 * MB), picture)
    return Activations(needed, full - needed, max(unit, up * up * small // grid.frames))


def decode_video(config: VideoVAEConfig, tiles: Tiles, itemsize: int, unfold: bool, ahead: int = 0) -> Activations:
    """The largest layer of a tile, beside the tiles that are summed so far and the frames that wait for more. `ahead`:
    small layers that the host does not wait for. `unfold`: convolutions copy their input 27 times."""
    space = config.spatial_scale
    _, height, width = tiles.latents
    pixels = height * width * space * space * 3
    longest, *_ = largest_tile(tiles)
    frames = (longest - 1) * config.temporal_scale + 1
    waiting = 0
    if tiles.tiling is not None and longest < tiles.latents[0]:
        waiting = (tiles.tiling.frame_overlap + 1) * pixels * FLOAT32
    latents = prod(tiles.latents) * config.latent_channels * FLOAT32
    pieces = [
        (bottom - top, right - left, above * width + (bottom - above) * before)
        for top, bottom, above in _ends(tiles.rows)
        for left, right, before in _ends(tiles.columns)
    ]
    several = len(pieces) > 1
    per_latent = frames * space * space * 3  # values of a tile's frames
    # Once all tiles are decoded: overlaps with the next ones are blended, groups of frames leave.
    whole = frames * pixels * (FLOAT32 if several else itemsize)
    needed = full = whole + max(2 * waiting, 3 * FRAMES_PER_GROUP * pixels * FLOAT32)
    largest = 0
    for tile_height, tile_width, before in pieces:
        tile = _tower(config.decoder, (longest, tile_height, tile_width), itemsize, unfold)
        adding = tile_height * tile_width * per_latent * (2 * FLOAT32 + itemsize) if several else 0
        # Arrays of the tile or layer before that are not yet free.
        late = 100 * MB + 3 * tile.largest // 4 if several else 50 * MB if tile.largest >= LARGE else 0
        needed = max(needed, before * per_latent * FLOAT32 + max(tile.needed, adding))
        full = max(full, before * per_latent * FLOAT32 + max(tile.full + late, adding))
        largest = tile.largest
    behind = ahead * largest if largest <= AHEAD else 0
    return Activations(waiting + latents + needed, full - needed + behind, largest)


def largest_tile(tiles: Tiles) -> Size:
    """Latents over time, rows and columns of the largest tile as it is decoded: over time all but the first start one
    early."""
    longest = max(stop - max(0, start - 1) for start, stop, _ in _ends(tiles.times))
    height, width = (max(stop - start for start, stop, _ in _ends(side)) for side in (tiles.rows, tiles.columns))
    return longest, height, width


def decode_still(config: VideoVAEConfig, size: tuple[int, int], itemsize: int, unfold: bool) -> Activations:
    """One latent frame of `size` (rows, columns): as a tile, but small layers are not waited for, so every layer's four
    arrays may be held. `unfold`: convolutions copy their input nine times."""
    layers = list(config.decoder.convolutions((1, *size), still=True))
    taps = 10 if unfold else 1

    def unit(layer: Convolution) -> int:
        _, height, width = layer.size
        bordered = layer.inputs * (height + 2) * (width + 2)
        return itemsize * (3 * max(layer.inputs, layer.outputs) * prod(layer.size) + taps * bordered)

    all_of_them = sum(unit(layer) * layer.times for layer in layers)
    largest = max(itemsize * max(layer.inputs, layer.outputs) * prod(layer.size) for layer in layers)
    return Activations(max(map(unit, layers)), min(all_of_them, 700 * MB), largest)


def still_weights(config: VideoVAEConfig, itemsize: int) -> Activations:
    """Making the weights for single frames: a kernel of the decoder, and two taps of it in float32."""
    layers = zip(*(config.decoder.convolutions((1, 1, 1), still) for still in (False, True)), strict=True)
    sizes = [(27 * itemsize * c.inputs * c.outputs, 2 * 9 * FLOAT32 * s.inputs * s.outputs) for c, s in layers]
    return Activations(max(map(sum, sizes)), 0, max(kernel for kernel, _ in sizes))


def _ends(tiles: Intervals) -> list[tuple[int, int, int]]:
    """Start, stop and the stop of the tile before, of the first tile and the last two: no other is larger."""
    return [(*tiles[i], tiles[i - 1][1] if i else 0) for i in tiles.ends]


def encode_video(config: VideoConfig, clip: Size, tiling: Tiling, itemsize: int, unfold: bool) -> Activations:
    """The frames that a tile over time needs and those that tell whether another follows; and the largest layer of a
    tile beside its pixels, cut out and rearranged. `clip`: frames, height and width in pixels."""
    early = config.temporal_scale  # frames of the latent that later tiles start with
    held = min(clip[0], tiling.frames + 2 * early) + FRAMES_PER_GROUP * FLOAT32 // itemsize
    buffer = held * clip[1] * clip[2] * 3 * itemsize
    frames, height, width = encoded_tile(config, clip, tiling)
    pixels = 2 * frames * height * width * 3 * itemsize
    patch = config.patch_size
    return _tower(config.tower, (frames, height // patch, width // patch), itemsize, unfold).beside(buffer + pixels)


def encoded_tile(config: VideoConfig, clip: Size, tiling: Tiling) -> Size:
    """Frames, height and width in pixels of the largest tile of a clip as it is encoded."""
    frames, height, width = map(min, clip, (tiling.frames + config.temporal_scale, tiling.height, tiling.width))
    return frames, height, width


def decode_diffusion(
    config: DiffusionVAEConfig, latents: Size, tiling: Tiling | None, itemsize: int, steps: int
) -> Activations:
    """The largest stage; the last one works beside the output of the one before. Tiles work beside the clip that they
    are cut from and the tiles that are summed so far. The noise is held all the time; several steps keep pixels in
    float32."""
    *early, part, last = tiled_stages(config, latents, tiling)
    tiles, outer = Tiles(config.cells(latents), tiling, config.cell), config.stages(latents)[-2]
    context = last.positions * last.channels * itemsize
    _, _, frames, height, width = config.canvas(latents)
    picture, pixels = height * width * 3, last.positions * 3 * config.decoder.patch_size**2
    several, cut = len(tiles.rows) * len(tiles.columns) > 1, len(tiles.times) > 1
    kept = outer.positions * outer.channels * itemsize if several or cut else 0
    waiting = (tiles.tiling.frame_overlap if tiles.tiling and cut else 0) * picture * FLOAT32
    added = last.size[0] * picture * FLOAT32 if several else 0
    between = 3 * pixels * FLOAT32 if steps > 1 else 0
    decoding = max(_slabs(part, itemsize), context + _slabs(last, itemsize) + between)
    finishing = pixels * itemsize + max(2 * waiting, 3 * FRAMES_PER_GROUP * picture * FLOAT32)
    needed = max(*(_slabs(stage, itemsize) for stage in early), kept + waiting + added + max(decoding, finishing))
    largest = max(stage.positions * stage.channels * itemsize for stage in (*early, part, last))
    return Activations(frames * picture * FLOAT32 + needed, UNDER_WAY, largest)


def tiled_stages(config: DiffusionVAEConfig, latents: Size, tiling: Tiling | None) -> list[Stage]:
    """The decoder's stages; the last two are those of the largest tile."""
    *early, outer, inner = config.stages(latents)
    tiles = Tiles(config.cells(latents), tiling, config.cell)
    axes = (tiles.times, tiles.rows, tiles.columns)
    t, h, w = (max(stop - start for start, stop, _ in _ends(axis)) for axis in axes)
    (time, tall, wide), _ = config.decoder.upsamples[-1]
    part = outer._replace(size=(t + outer.size[0] - tiles.latents[0], h, w))
    return [*early, part, inner._replace(size=(t * time, h * tall, w * wide))]


def _slabs(stage: Stage, itemsize: int) -> int:
    """A clip in slabs; queries, keys and values of the frames in reach of a window; and either the keys that rows of
    blocks gather, with masks and the feed-forward network of their positions, or a slab's projections."""
    (frames, height, width), (reach, _, _) = stage.size, stage.kernel
    position = stage.channels * itemsize
    frame = height * width * position
    held = 2 * min(frames, reach + 3 * BLOCK) + min(frames, reach + 2 * BLOCK)
    blocks, box = gathered_blocks(stage, itemsize)
    gathering = blocks * (box * (5 * position // 2 + 2 * BLOCK**3) + 12 * BLOCK**3 * position)
    return (frames + held) * frame + max(gathering, 12 * min(frames, BLOCK) * frame)


def gathered_blocks(stage: Stage, itemsize: int) -> tuple[int, int]:
    """The number of blocks of queries that attend together, and of keys of each."""
    box = prod(min(side, BLOCK + reach - 1) for side, reach in zip(stage.size, stage.kernel, strict=True))
    rows, row = -(-stage.size[1] // BLOCK), -(-stage.size[2] // BLOCK)
    return row * min(rows, max(1, GATHERED // (2 * row * box * stage.channels * itemsize))), box


def _tower(tower: Tower, size: Size, itemsize: int, unfold: bool) -> Activations:
    """A residual block's input, its normalised and padded copy, and the convolution's output; and the normalised array
    until the device has read it."""
    layers = tower.convolutions(size)
    unit, padded = max((itemsize * c.inputs * prod(c.size), itemsize * c.padded) for c in layers)
    copies = 27 * padded if unfold else 0
    if unit >= LARGE:
        return Activations(2 * unit + padded + copies, unit, unit)
    # Small arrays are not waited for.
    return Activations(3 * unit + padded + copies, min(4 * unit, 90 * MB) + copies, unit)


def decode_audio(config: AudioVAEConfig, audio_frames: int) -> Activations:
    """The largest arrays are those that an upsampling repeats, at the finest resolution: one, padded for a convolution,
    and the output."""
    widths = config.widths
    return _audio(config, audio_frames * config.temporal_scale, widths[min(1, len(widths) - 1)])


def encode_audio(config: AudioVAEConfig, samples: int) -> Activations:
    """The largest arrays are at the finest resolution: a residual block's input, its normalised and padded copy, and
    the convolution's output."""
    return _audio(config, samples // config.hop_length + 1, config.widths[0])


def _audio(config: AudioVAEConfig, frames: int, channels: int) -> Activations:
    """Arrays of so many spectrogram frames and channels. In float32 whatever the weights, which are widened for use."""
    unit = frames * config.mel_bins * channels * FLOAT32
    wide = 5 * 9 * config.widths[-1] ** 2 * FLOAT32
    needed, full = wide + min(5 * unit, 13 * unit // 5 + UNDER_WAY), wide + min(8 * unit, 21 * unit // 5 + 110 * MB)
    return Activations(needed, max(0, full - needed), unit)


def vocode(config: VocoderConfig | ExtendedVocoderConfig, mel_frames: int) -> Activations:
    """In float32. The largest stage: its upsampling kernel, rearranged and widened, and a pair of convolutions at a
    time beside the stage's input and the sum of its blocks."""
    needed, full, largest = 0, 0, 0
    for generator, frames in config.generators(mel_frames):
        width = generator.upsample_initial_channel
        for factor, kernel in zip(generator.upsample_rates, generator.upsample_kernel_sizes, strict=True):
            wide = 2 * width * (width // 2) * -(-kernel // factor) * factor * FLOAT32
            width, frames = width // 2, frames * factor
            unit = width * frames * FLOAT32
            needed = max(needed, wide + min(29 * unit // 2, 10 * unit + UNDER_WAY))
            full = max(full, wide + 147 * unit // 10)
            largest = max(largest, unit)
    return Activations(needed, full - needed, largest)
