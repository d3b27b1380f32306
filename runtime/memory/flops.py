"""The arithmetic of every network, counted from shapes: floating-point operations of linear layers, attentions and
convolutions (two per multiplication and addition), and the bytes that these must move at least: every stored weight
once per evaluation, and their inputs and outputs. Elementwise work is not counted, nor the overlaps that tiles of the
video decoder compute twice: tiles lower efficiency."""

from dataclasses import dataclass
from math import prod

from ltx2.runtime.networks.audio.bandwidth import ExtendedVocoderConfig
from ltx2.runtime.networks.audio.config import AudioVAEConfig
from ltx2.runtime.networks.audio.vocoder import CHANNELS, MEL_BINS, VocoderConfig
from ltx2.runtime.networks.text.config import ConnectorsConfig, GemmaConfig
from ltx2.runtime.networks.text.duration_head import DurationHeadConfig
from ltx2.runtime.networks.transformer.config import TransformerConfig
from ltx2.runtime.networks.transformer.modulation import FREQUENCIES
from ltx2.runtime.networks.upsampler import UpsamplerConfig
from ltx2.runtime.networks.video_vae.config import Size, VideoVAEConfig
from ltx2.runtime.networks.video_vae.diffusion_config import DiffusionVAEConfig
from ltx2.runtime.networks.video_vae.diffusion_config import Stage as NeighbourhoodStage
from ltx2.runtime.networks.video_vae.diffusion_decoder import ROWS, TIMESTEP_WIDTH
from ltx2.runtime.networks.video_vae.encode import VideoConfig
from ltx2.runtime.sampling.latents import Grid


@dataclass(frozen=True)
class Work:
    """Operations, and the values of their inputs and outputs without weights."""

    flops: int = 0
    values: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.values + other.values)

    def __mul__(self, times: int) -> "Work":
        return Work(times * self.flops, times * self.values)

    def moving(self, itemsize: int, weights: int) -> "PhaseWork":
        """In bytes, of values of `itemsize` and of `weights`."""
        return PhaseWork(self.flops, self.values * itemsize + weights)


@dataclass(frozen=True)
class PhaseWork:
    """The operations of a whole phase, and the bytes that it must move at least."""

    flops: int
    bytes: int


# Operations


def linear(tokens: int, inputs: int, outputs: int) -> Work:
    return Work(2 * tokens * inputs * outputs, tokens * (inputs + outputs))


def attention(queries: int, keys: int, width: int, key_width: int | None = None) -> Work:
    """Softmax(Q K^T) V over all heads, of `width` together; `key_width` where keys and values are narrower."""
    return Work(4 * queries * keys * width, 2 * queries * width + 2 * keys * (key_width or width))


def convolution(positions: int, taps: int, inputs: int, outputs: int) -> Work:
    """A convolution with as many output positions as input positions."""
    return linear(positions, taps * inputs, outputs) + Work(0, positions * inputs * (1 - taps))


# Networks


def denoise_step(config: TransformerConfig, grid: Grid, text: int, appended: int = 0) -> Work:
    """One call of the transformer. `appended`: tokens beside the picture's own."""
    video, audio = config.video.dim, config.audio.dim
    x, y = grid.tokens + appended, grid.audio_frames
    block = _stream(video, x, text) + _stream(audio, y, text)
    block += _cross(x, video, y, audio, audio) + _cross(y, audio, x, video, audio)
    ends = linear(x, config.in_channels, video) + linear(x, video, config.out_channels)
    ends += linear(y, config.audio_in_channels, audio) + linear(y, audio, config.audio_out_channels)
    if config.apply_gated_attention:  # self-attention, attention to the text and to the other stream
        heads = (config.num_attention_heads, config.num_attention_heads, config.audio_num_attention_heads)
        block += linear(x, video, sum(heads)) + linear(y, audio, 3 * config.audio_num_attention_heads)
    rows = [9 if config.cross_attention_adaln else 6, 4, 1]
    rows += [2] if config.cross_attention_adaln and config.use_prompt_adaln_single else []
    noise_levels = (_modulation(width, count) for width in (video, audio) for count in rows)
    return block * config.num_layers + sum(noise_levels, ends)


def text_keys(config: TransformerConfig, grid: Grid, text: int) -> Work:
    """Keys and values of the text in all blocks: a part of `denoise_step`, but done once where they are kept."""
    widths = (config.video.dim, config.audio.dim) if grid.tokens else (config.audio.dim,)
    return sum((linear(text, width, width) * 2 for width in widths), Work()) * config.num_layers


def project_text(config: TransformerConfig, text: int) -> Work:
    """Projecting the text's features to both streams' widths, once per stage; nothing where the connectors do it."""
    if config.caption_proj_before_connector:
        return Work()
    widths = (config.video.dim, config.audio.dim)
    return sum((linear(text, config.caption_channels, w) + linear(text, w, w) for w in widths), Work())


def _stream(width: int, tokens: int, text: int) -> Work:
    """Self-attention, attention to the text, feed-forward network."""
    own, other = _cross(tokens, width, tokens, width, width), _cross(tokens, width, text, width, width)
    return own + other + _feed_forward(tokens, width)


def _cross(queries: int, width: int, keys: int, key_width: int, inner: int) -> Work:
    """Attention with its four projections."""
    projections = linear(queries, width, inner) + linear(queries, inner, width)
    return projections + linear(keys, key_width, inner) * 2 + attention(queries, keys, inner)


def _feed_forward(tokens: int, width: int) -> Work:
    return linear(tokens, width, 4 * width) + linear(tokens, 4 * width, width)


def _modulation(width: int, rows: int) -> Work:
    return linear(1, FREQUENCIES, width) + linear(1, width, width) + linear(1, width, rows * width)


def encode_text(config: GemmaConfig, tokens: int) -> Work:
    return sum((_text_layer(config, layer, tokens) for layer in range(config.num_hidden_layers)), Work())


def _text_layer(config: GemmaConfig, layer: int, tokens: int) -> Work:
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.query_heads(layer).width, config.key_heads(layer).width
    work = linear(tokens, width, queries) + linear(tokens, queries, width)
    work += linear(tokens, width, keys) * (1 if config.shares_values(layer) else 2)
    work += attention(tokens, tokens, queries, keys)
    return work + linear(tokens, width, inner) * 2 + linear(tokens, inner, width)


def connect(config: ConnectorsConfig, tokens: int, length: int) -> Work:
    streams = (config.video, config.audio)
    widths = [heads.width for heads in streams] if config.per_token else [config.caption_channels]
    work = sum((linear(tokens, config.text_projection_in_features, width) for width in widths), Work())
    for heads in streams:
        block = _cross(length, heads.width, length, heads.width, heads.width) + _feed_forward(length, heads.width)
        if config.connector_apply_gated_attention:
            block += linear(length, heads.width, heads.count)
        work += block * config.connector_num_layers
    return work


def predict_length(config: DurationHeadConfig, length: int) -> Work:
    """The duration head on contexts of `length` tokens per stream."""
    dim, hidden = config.pooler_hidden_dim, config.mlp_hidden
    work = linear(length, config.cross_attention_dim, dim) + linear(length, config.audio_cross_attention_dim, dim)
    work += linear(2 * length, dim, dim) * 2 + linear(1, dim, dim) * 2 + attention(1, 2 * length, dim)
    return work + linear(1, dim, hidden) + linear(1, hidden, 1)


def upscale(config: UpsamplerConfig, grid: Grid) -> Work:
    """`grid`: of the input."""
    mid, blocks, (up, down) = config.mid_channels, 2 * config.num_blocks_per_stage, config.factors
    large = prod(config.enlarged(grid.frames, grid.height, grid.width))
    ends = convolution(grid.tokens, 27, config.in_channels, mid) + convolution(large, 27, mid, config.in_channels)
    inner = (convolution(size, 27, mid, mid) * blocks for size in (grid.tokens, large))
    if config.temporal_upsample:
        return sum(inner, ends + convolution(grid.tokens, 27, mid, 2 * mid * up * up))
    blur = Work(2 * 25 * large * mid, (grid.tokens * up * up + large) * mid) if down > 1 else Work()
    return sum(inner, ends + convolution(grid.tokens, 9, mid, mid * up * up) + blur)


def decode_video(config: VideoVAEConfig, latents: Size) -> Work:
    """`latents`: frames, height, width."""
    layers = config.decoder.convolutions(latents)
    return sum((convolution(prod(c.size), 27, c.inputs, c.outputs) * c.times for c in layers), Work())


def decode_still(config: VideoVAEConfig, size: tuple[int, int]) -> Work:
    """A preview of latents with these rows and columns."""
    layers = config.decoder.convolutions((1, *size), still=True)
    return sum((convolution(prod(c.size), 9, c.inputs, c.outputs) * c.times for c in layers), Work())


def encode_video(config: VideoConfig, clip: Size) -> Work:
    """`clip`: frames, height, width in pixels."""
    (frames, height, width), patch = clip, config.patch_size
    layers = config.tower.convolutions((frames, height // patch, width // patch))
    return sum((convolution(prod(c.size), 27, c.inputs, c.outputs) * c.times for c in layers), Work())


def decode_diffusion(config: DiffusionVAEConfig, latents: Size, steps: int) -> Work:
    """`latents`: frames, height, width."""
    *stages, last = config.stages(latents)
    work = linear(stages[0].positions, config.decoder.in_channels, stages[0].channels)
    for stage, (stride, divisor) in zip(stages, config.decoder.upsamples, strict=True):
        work += _neighbourhood(stage) * stage.depth
        work += linear(stage.positions, stage.channels, stage.channels * prod(stride) // divisor)
    pixels, width = 3 * config.decoder.patch_size**2, last.channels
    step = linear(last.positions, pixels, width) + linear(last.positions, width, pixels)
    step += (_neighbourhood(last) + linear(last.positions, width, width)) * last.depth
    step += linear(1, FREQUENCIES, TIMESTEP_WIDTH) + linear(1, TIMESTEP_WIDTH, TIMESTEP_WIDTH)
    step += linear(1, TIMESTEP_WIDTH, ROWS * width)
    return work + step * steps


def _neighbourhood(stage: NeighbourhoodStage) -> Work:
    """One block: attention to windows, and a gated feed-forward network, without gathered keys outside of a window."""
    count, width = stage.positions, stage.channels
    scores = Work(4 * count * prod(stage.kernel) * width, 4 * count * width)
    feed = linear(count, width, 4 * width) * 2 + linear(count, 4 * width, width)
    return linear(count, width, 3 * width) + linear(count, width, width) + scores + feed


def decode_audio(config: AudioVAEConfig, frames: int) -> Work:
    width, bins = config.widths[-1], config.latent_frequencies
    size = frames * bins
    work = convolution(size, 9, config.z_channels, width) + _residual_blocks(size, width, width, 2)
    for level, outputs in reversed(list(enumerate(config.widths))):
        work += _residual_blocks(size, width, outputs, config.num_res_blocks + 1)
        width = outputs
        if level:
            work += convolution(4 * size, 9, width, width)  # the first of its frames is dropped afterwards
            frames, bins = 2 * frames - 1, 2 * bins
            size = frames * bins
    return work + convolution(size, 9, width, config.out_ch)


def encode_audio(config: AudioVAEConfig, samples: int) -> Work:
    frames, bins, width = samples // config.hop_length + 1, config.mel_bins, config.ch
    work = convolution(frames * bins, 9, config.in_channels, width)
    for level, outputs in enumerate(config.widths):
        size = frames * bins
        work += _residual_blocks(size, width, outputs, config.num_res_blocks)
        width = outputs
        if level < len(config.widths) - 1:
            frames, bins = -(-frames // 2), bins // 2
            work += linear(frames * bins, 9 * width, width) + Work(0, (size - 9 * frames * bins) * width)
    size = frames * bins
    return work + _residual_blocks(size, width, width, 2) + convolution(size, 9, width, 2 * config.z_channels)


def _residual_blocks(size: int, inputs: int, outputs: int, count: int) -> Work:
    """Two convolutions each; and a projection of the first block's input where its width differs."""
    work = convolution(size, 9, inputs, outputs) + convolution(size, 9, outputs, outputs) * (2 * count - 1)
    return work + (convolution(size, 1, inputs, outputs) if inputs != outputs else Work())


def vocode(config: VocoderConfig | ExtendedVocoderConfig, mel_frames: int) -> Work:
    """The generators, and the spectrogram in between. Filters count as elementwise."""
    work = sum((_generate(generator, frames) for generator, frames in config.generators(mel_frames)), Work())
    if isinstance(config, ExtendedVocoderConfig):
        (_, frames), bwe = config.generators(mel_frames)[1], config.bwe
        work += convolution(CHANNELS * frames, bwe.n_fft, 1, bwe.n_fft + 2)
        work += linear(CHANNELS * frames, bwe.n_fft // 2 + 1, MEL_BINS)
    return work


def _generate(config: VocoderConfig, frames: int) -> Work:
    width = config.upsample_initial_channel
    work = convolution(frames, 7, CHANNELS * MEL_BINS, width)
    pairs = sum(
        2 * size * len(dilations)
        for size, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True)
    )
    calls = sum(2 * len(dilations) for dilations in config.resblock_dilation_sizes)
    for factor, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
        work += linear(frames, width, kernel * width // 2)  # transposed: each frame makes `kernel` samples
        width, frames = width // 2, frames * factor
        work += Work(2 * frames * pairs * width * width, 2 * calls * frames * width)
    return work + convolution(frames, 7, width, CHANNELS)
