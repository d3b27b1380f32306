"""The video VAE against diffusers and the golden frames; tiled decoding against untiled; what is refused."""

import json
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from ltx2.runtime.errors import ConfigError, InputError, UnsupportedError
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_network, parameter_shapes
from ltx2.runtime.networks.video_vae import frames as streamed
from ltx2.runtime.networks.video_vae import layers
from ltx2.runtime.networks.video_vae.config import VideoVAEConfig
from ltx2.runtime.networks.video_vae.decoder import StillDecoder
from ltx2.runtime.networks.video_vae.frames import FRAMES_PER_GROUP, VideoDecoder, decode_frames, decode_tiles
from ltx2.runtime.networks.video_vae.model import VideoAutoencoder, build
from ltx2.runtime.networks.video_vae.tiles import Intervals, Tiling, temporal_spans, tilings
from tests.support.golden import golden, golden_25
from tests.support.memory import peak_of
from tests.support.official import Official
from tests.support.parity import relative_l2, require
from tests.support.published import MONOLITH, read_header

Figure = Callable[..., None]
Both = tuple[str, VideoAutoencoder, Any]  # name, ours, diffusers'


def blocks(*stages: tuple[str, int], residual: bool = False) -> list[Any]:
    """Block list of a checkpoint from (name, layers or multiplier) pairs."""
    extra = {"residual": True} if residual else {}
    return [[name, {"num_layers": n} if name == "res_x" else {"multiplier": n, **extra}] for name, n in stages]


# The later decoder structure at toy width: no residual around its ups, one of them over time and one over space only.
NEWER = {
    "_class_name": "CausalVideoAutoencoder",
    "latent_channels": 8,
    "patch_size": 4,
    "encoder_base_channels": 8,
    "decoder_base_channels": 8,
    "timestep_conditioning": False,
    "spatial_padding_mode": "zeros",
    "encoder_blocks": blocks(
        ("res_x", 2), ("compress_space_res", 2), ("res_x", 1), ("compress_time_res", 2), ("res_x", 1),
        ("compress_all_res", 2), ("res_x", 1), ("compress_all_res", 1), ("res_x", 1),
    ),
    "decoder_blocks": blocks(
        ("res_x", 2), ("compress_space", 2), ("res_x", 2), ("compress_time", 2), ("res_x", 1),
        ("compress_all", 1), ("res_x", 1), ("compress_all", 2), ("res_x", 1),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def vae(model: Path) -> VideoAutoencoder:
    return load_network(ModelFolder.open(model), "video_vae", VideoAutoencoder)


@pytest.fixture(scope="module")
def trained(demo_model: Path) -> VideoAutoencoder:
    vae = load_network(ModelFolder.open(demo_model), "video_vae", VideoAutoencoder)
    vae.update(tree_map(lambda value: value.astype(mx.float32), vae.parameters()))
    return vae


@pytest.fixture(scope="module")
def newer(demo_25: Path) -> VideoAutoencoder:
    """The trained 2.5 demo's: zero padding, ups without a residual."""
    return load_network(ModelFolder.open(demo_25), "video_vae", VideoAutoencoder)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def decoded(vae: VideoDecoder, latents: mx.array, tiles: Tiling | None = None) -> np.ndarray:
    """Frames (F, H, W, 3) in [0, 1], neither clamped nor rounded."""
    return np.concatenate([(np.array(group) + 1) / 2 for group in decode_tiles(vae, latents, tiles, iter)])


# --- against diffusers


@pytest.fixture(scope="module", params=["residual ups, reflection", "plain ups, zeros"])
def both(request: pytest.FixtureRequest, official: Official, vae: VideoAutoencoder) -> Both:
    """Our network and diffusers' with the same weights."""
    require("torch"), require("diffusers")
    from tests.support import reference_vae as reference

    if request.param.startswith("plain"):
        network = build(NEWER)
        tensors, config = reference.random_tensors(network, seed=5), NEWER
        reference.load_official(network, tensors)
    else:
        network, config = vae, official.config(official.monolith)["vae"]
        tensors = official.section("vae.")
    return request.param, network, reference.reference_video_vae(tensors, config)


@pytest.mark.parametrize("frames", [1, 3])
def test_decoder_equals_diffusers(both: Both, figure: Figure, frames: int) -> None:
    import torch

    name, network, reference = both
    latents = noise(1, network.config.latent_channels, frames, 2, 3)
    with torch.no_grad():
        mean, std = (v.view(1, -1, 1, 1, 1) for v in (reference.latents_mean, reference.latents_std))
        theirs = reference.decode(torch.tensor(latents) * std + mean).sample[0].permute(1, 2, 3, 0).numpy()
    ours = network.decode(mx.array(latents))
    assert ours.shape == ((frames - 1) * 8 + 1, 64, 96, 3)
    figure(f"video_vae.decode ({name}, {frames} latent frames) rel L2", relative_l2(ours, theirs), limit=1e-4)


@pytest.mark.parametrize("frames", [1, 17])
def test_encoder_equals_diffusers(both: Both, figure: Figure, frames: int) -> None:
    import torch

    name, network, reference = both
    pixels = np.tanh(noise(1, 3, frames, 64, 96))
    with torch.no_grad():
        mean, std = (v.view(1, -1, 1, 1, 1) for v in (reference.latents_mean, reference.latents_std))
        theirs = ((reference.encode(torch.tensor(pixels)).latent_dist.mode() - mean) / std).numpy()
    ours = network.encode(mx.array(pixels))
    assert ours.shape == (1, network.config.latent_channels, (frames - 1) // 8 + 1, 2, 3)
    figure(f"video_vae.encode ({name}, {frames} frames) rel L2", relative_l2(ours, theirs), limit=1e-4)


@pytest.mark.parametrize("header", [MONOLITH, "ltx-2.3-22b", "ltx-2.5-video-vae-conv-bf16"])
def test_shapes_of_the_published_file(header: str) -> None:
    _, metadata, tensors = read_header(header)
    config = json.loads(metadata["config"])["vae"]
    theirs = {
        name.removeprefix("vae."): (shape[0], *shape[2:], shape[1]) if len(shape) == 5 else shape
        for name, (_, shape) in tensors.items()
        if name.removeprefix("vae.").startswith(("encoder.", "decoder."))
    }
    ours = parameter_shapes(build(config))
    assert theirs == {name: shape for name, shape in ours.items() if not name.startswith("per_channel_statistics")}


# --- encoding, statistics, data types


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("size", [(3, 4), (2, 2)])
def test_a_single_frame_takes_a_third(model: Path, newer: bool, size: tuple[int, int], figure: Figure) -> None:
    """The same picture as the decoder of clips makes of one latent frame."""
    vae = build(NEWER if newer else ModelFolder.open(model).config("video_vae"))
    latents = mx.array(noise(1, vae.config.latent_channels, 1, *size))
    want = vae.decode(latents)
    still = StillDecoder(vae.decoder)
    made = still(vae.per_channel_statistics.unnormalise(latents)[:, :, 0].transpose(0, 2, 3, 1))
    name = f"video_vae, a single frame ({'zeros' if newer else 'reflection'}, {size[0]}x{size[1]}) rel L2"
    figure(name, relative_l2(made, want), limit=1e-5)
    assert all(not layer.conv.parameters() for layer in (vae.decoder.conv_in, vae.decoder.conv_out))


def test_frames_after_8k_plus_1_are_left_out(vae: VideoAutoencoder) -> None:
    pixels = mx.array(np.tanh(noise(1, 3, 12, 64, 64)))
    assert mx.array_equal(vae.encode(pixels), vae.encode(pixels[:, :, :9]))


def test_an_image_encodes_like_the_first_frame_of_a_clip(vae: VideoAutoencoder, figure: Figure) -> None:
    pixels = mx.array(np.tanh(noise(1, 3, 9, 64, 64)))
    figure(
        "video_vae.encode causality rel L2",
        relative_l2(vae.encode(pixels[:, :, :1])[:, :, 0], vae.encode(pixels)[:, :, 0]),
        limit=1e-5,
    )


def test_a_picture_off_the_grid_is_refused(vae: VideoAutoencoder) -> None:
    with pytest.raises(InputError, match="multiples of 32"):
        vae.encode(mx.zeros((1, 3, 1, 64, 80)))


def test_statistics(vae: VideoAutoencoder) -> None:
    latents, statistics = mx.array(noise(1, 32, 2, 2, 3)), vae.per_channel_statistics
    mean, std = (np.array(v)[:, None, None, None] for v in (statistics.mean, statistics.std))
    assert std.min() > 0.5 and not np.allclose(mean, 0)  # the checkpoint's, not the initial ones
    raw = statistics.unnormalise(latents)
    np.testing.assert_allclose(raw, np.array(latents) * std + mean, rtol=1e-6)
    np.testing.assert_allclose(statistics.normalise(raw), latents, atol=1e-6)
    rounded = latents.astype(mx.bfloat16)
    in_float32 = statistics.unnormalise(rounded.astype(mx.float32)).astype(mx.bfloat16)
    assert statistics.unnormalise(rounded).dtype == mx.bfloat16
    assert mx.array_equal(statistics.unnormalise(rounded), in_float32)


def test_bf16_is_not_promoted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = load_network(ModelFolder.open(model), "video_vae", VideoAutoencoder)
    vae.update(tree_map(lambda value: value.astype(mx.bfloat16), vae.parameters()))
    seen: set[mx.Dtype] = set()
    convolve = layers.CausalConv3d.__call__

    def spy(self: layers.CausalConv3d, x: mx.array, *beside: mx.array) -> mx.array:
        seen.update(value.dtype for value in (x, *beside))
        return convolve(self, x, *beside)

    monkeypatch.setattr(layers.CausalConv3d, "__call__", spy)
    assert vae.decode(mx.zeros((1, 32, 2, 2, 2))).dtype == mx.bfloat16
    assert vae.encode(mx.zeros((1, 3, 9, 64, 64))).dtype == mx.float32  # the sampler's precision
    assert seen == {mx.bfloat16}


# --- the trained demo VAE


@pytest.mark.parametrize("prompt", ["a", "b"])
def test_golden_frames(trained: VideoAutoencoder, figure: Figure, prompt: str) -> None:
    frames = np.concatenate(list(decode_frames(trained, mx.array(golden(f"{prompt}.stage2.video_latent")))))
    assert frames.dtype == np.uint8
    off = np.abs(frames.astype(int) - golden(f"{prompt}.frames"))
    figure(f"video_vae golden {prompt}: share of values off by more than a level", np.mean(off > 1), limit=1e-3)


@pytest.mark.parametrize("prompt", ["a", "c"])
def test_golden_frames_of_the_newer_structure(newer: VideoAutoencoder, figure: Figure, prompt: str) -> None:
    frames = np.concatenate(list(decode_frames(newer, mx.array(golden_25(f"{prompt}.stage2.video_latent")))))
    off = np.abs(frames[::6].astype(int) - golden_25(f"{prompt}.frames"))
    figure(f"video_vae golden 2.5 {prompt}: share of values off by more than a level", np.mean(off > 1), limit=1e-3)


@pytest.mark.parametrize("picture", ["0", "24"])
@pytest.mark.parametrize("size", ["64x96", "128x192"])
def test_golden_latents_of_pictures(newer: VideoAutoencoder, figure: Figure, picture: str, size: str) -> None:
    pixels = golden_25(f"c.picture{picture}.{size}").astype(np.float32) / 127.5 - 1
    latents = newer.encode(mx.array(pixels.transpose(2, 0, 1)[None, :, None]))
    expected = golden_25(f"c.picture{picture}.latent_{size}")
    figure(f"video_vae golden 2.5 picture {picture}, {size}, rel L2", relative_l2(latents, expected), limit=1e-5)


@pytest.mark.parametrize("prompt", ["a", "b"])
def test_reconstruction(trained: VideoAutoencoder, figure: Figure, prompt: str) -> None:
    frames = golden(f"{prompt}.frames").astype(np.float32) / 255
    latents = trained.encode(mx.array(frames.transpose(3, 0, 1, 2)[None] * 2 - 1))
    again = np.clip((np.array(trained.decode(latents)) + 1) / 2, 0, 1)
    error = float(np.mean((again - frames) ** 2))
    figure(f"video_vae encode and decode {prompt}: mean squared error (limit is 35 dB)", error, limit=10**-3.5)


# --- tiles: the plan


class LocalVAE:
    """Decodes each latent on its own, so tiles can be exact; counts its calls. Channel 3 holds the latent's time: the
    single frame of a tile's first latent is spoiled unless it is the clip's first, as a real decoder spoils it."""

    spatial_scale = 4
    temporal_scale = 2

    def __init__(self) -> None:
        self.calls = 0

    def decode(self, latents: mx.array) -> mx.array:
        self.calls += 1
        x = np.array(latents)[0].transpose(1, 2, 3, 0)
        frames = np.concatenate([x[:1], x[1:].repeat(self.temporal_scale, axis=0)])
        if frames[0, 0, 0, 3] > 0:
            frames[0] += 1000
        return mx.array(frames[..., :3].repeat(self.spatial_scale, axis=1).repeat(self.spatial_scale, axis=2))


def local_latents(frames: int, height: int, width: int) -> mx.array:
    latents = np.tanh(noise(1, 4, frames, height, width))
    latents[:, 3] = np.arange(frames)[:, None, None]
    return mx.array(latents)


@pytest.mark.parametrize(
    "tiles",
    [
        Tiling(height=100, width=100, overlap=8, frames=10, frame_overlap=2),  # time only: 3 and more tiles
        Tiling(height=16, width=24, overlap=8, frames=100, frame_overlap=0),  # both axes of the picture
        Tiling(height=16, width=20, overlap=8, frames=10, frame_overlap=4),  # everything, a short last tile
        Tiling(height=12, width=12, overlap=8, frames=6, frame_overlap=2),  # three tiles meet
        Tiling(height=8, width=8, overlap=0, frames=4, frame_overlap=0),  # no overlap at all
    ],
)
def test_tiles_of_a_local_decoder_are_exact(tiles: Tiling) -> None:
    vae, latents = LocalVAE(), local_latents(13, 7, 11)
    whole = decoded(vae, latents)
    assert whole.shape == (25, 28, 44, 3)
    assert vae.calls == 1
    np.testing.assert_allclose(decoded(vae, latents, tiles), whole, atol=1e-6)
    assert vae.calls > 3


def test_frames_stream_while_tiles_decode() -> None:
    vae, latents = LocalVAE(), local_latents(13, 2, 2)
    groups = decode_frames(vae, latents, Tiling(height=8, width=8, overlap=0, frames=6, frame_overlap=2))
    assert next(groups).shape[0] == 2  # up to where the second tile starts
    assert vae.calls == 1
    assert sum(group.shape[0] for group in groups) == 25 - 2
    assert vae.calls == 6


def test_groups_are_small() -> None:
    groups = [group.shape[0] for group in decode_frames(LocalVAE(), local_latents(40, 2, 2))]
    assert sum(groups) == 79
    assert max(groups) == FRAMES_PER_GROUP


@pytest.mark.parametrize("under_way", [0, 1, 1 << 25])
def test_copied_groups_stay_in_order(monkeypatch: pytest.MonkeyPatch, under_way: int) -> None:
    """However many are copied at once."""
    latents = local_latents(40, 2, 2)
    alone = np.concatenate([streamed.to_levels(group) for group in decode_tiles(LocalVAE(), latents, None, iter)])
    monkeypatch.setattr(streamed, "UNDER_WAY", under_way)
    np.testing.assert_array_equal(np.concatenate(list(decode_frames(LocalVAE(), latents))), alone)


@pytest.mark.parametrize(("size", "overlap"), [(10, 3), (24, 2), (3, 2), (5, 0)])
def test_intervals_cover(size: int, overlap: int) -> None:
    for length in range(1, 60):
        spans = Intervals(length, size, overlap)
        assert spans[0][0] == 0 and spans[-1][1] == length
        assert all(before[1] - after[0] == overlap for before, after in pairwise(spans))
        assert all(0 < stop - start <= size for start, stop in spans)
        assert len(spans) == 1 or all(stop - start > overlap for start, stop in spans)


def test_temporal_tile_starts_one_latent_early_with_weight_zero() -> None:
    first, second, third = temporal_spans(Intervals(length=20, size=10, overlap=3), scale=8)
    assert (first.source, second.source, third.source) == (slice(0, 10), slice(6, 17), slice(13, 20))
    assert (second.target.start, second.target.stop) == (48, 129)
    assert second.weights[0] == 0
    np.testing.assert_allclose(second.weights[:26], [k / 25 for k in range(25)] + [1], atol=1e-6)
    np.testing.assert_allclose(first.weights[-25:], [1] + [1 - k / 25 for k in range(1, 25)], atol=1e-6)


@pytest.mark.parametrize(
    ("height", "width", "frames", "expected"),
    [
        (512, 768, 73, None),
        (512, 768, 121, Tiling(512, 768, 0, 80, 24)),
        (32, 64, 81, Tiling(32, 64, 0, 80, 24)),
        (1024, 1536, 121, Tiling(512, 768, 64, 80, 24)),
        (1088, 1920, 25, Tiling(448, 768, 64, 80, 24)),
        (1920, 1088, 25, Tiling(768, 448, 64, 80, 24)),
        (192, 3072, 9, Tiling(96, 768, 64, 80, 24)),
        (64, 800, 9, Tiling(96, 768, 64, 80, 24)),
    ],
)
def test_lightricks_tiles(height: int, width: int, frames: int, expected: Tiling | None) -> None:
    class Published(LocalVAE):
        spatial_scale, temporal_scale = 32, 8

    assert tilings(Published(), ((frames - 1) // 8 + 1, height // 32, width // 32))[0] == expected


# --- tiles: the trained decoder


def seam(difference: np.ndarray, axis: int, edge: int) -> float:
    """Mean jump of (tiled - untiled) across a tile's edge, relative to the largest of the four jumps on either side."""
    jumps = np.abs(np.diff(difference, axis=axis)).mean(axis=tuple(a for a in range(4) if a != axis))
    at = edge - 1
    return float(jumps[at] / max(*jumps[at - 4 : at], *jumps[at + 1 : at + 5]))


@pytest.mark.parametrize("prompt", ["a", "b"])
def test_tiled_equals_untiled_without_seams(trained: VideoAutoencoder, figure: Figure, prompt: str) -> None:
    """The decoder sees further than an overlap of two latents, so tiles differ a little; their edges must not show."""
    latents = mx.array(golden(f"{prompt}.stage2.video_latent"))
    whole = decoded(trained, latents)
    difference = decoded(trained, latents, Tiling(96, 128, overlap=64, frames=24, frame_overlap=8)) - whole
    rms = float(np.sqrt(np.mean(difference**2)))
    figure(f"video_vae tiled against untiled {prompt}: RMS difference", rms, limit=0.03)
    for name, axis, edges in ("frames", 0, (8, 17)), ("rows", 1, (32, 96)), ("columns", 2, (64, 128)):
        worst = max(seam(difference, axis, edge) for edge in edges)
        figure(f"video_vae seam {prompt} between {name}, of the jumps beside it", worst, limit=1.25)
    butted = decoded(trained, latents, Tiling(64, 96, overlap=0, frames=24, frame_overlap=0)) - whole
    assert min(seam(butted, 0, 17), seam(butted, 1, 64), seam(butted, 2, 96)) > 1.5  # a seam would be measured


def test_memory_does_not_grow_with_the_clips_length(trained: VideoAutoencoder) -> None:
    tiles = Tiling(height=64, width=64, overlap=0, frames=24, frame_overlap=8)
    peaks: dict[int, int] = {}
    for frames in (3, 11, 21, 11):  # the first reads the weights; what others have kept and is freed now lowers a peak
        latents = mx.array(noise(1, 32, frames, 2, 2))
        mx.eval(latents)
        peak = peak_of(partial(deque, decode_frames(trained, latents, tiles), 0))
        peaks[frames] = max(peak, peaks.get(frames, 0))
    assert peaks[21] < 1.1 * peaks[11]


@pytest.mark.parametrize("tiles", [None, Tiling(64, 64, 32, 16, 0)])
def test_running_ahead_makes_the_same_frames(tiles: Tiling | None) -> None:
    network, latents = build(NEWER), mx.array(noise(1, 8, 3, 2, 3))
    waiting, ahead = (np.concatenate(list(decode_frames(network, latents, tiles, n))) for n in (0, 1))
    np.testing.assert_array_equal(ahead, waiting)


# --- what is refused


def test_tiles_that_cannot_work_are_refused(vae: VideoAutoencoder) -> None:
    with pytest.raises(InputError):
        Tiling(height=64, width=64, overlap=64, frames=80, frame_overlap=24)
    with pytest.raises(InputError):
        Tiling(height=64, width=64, overlap=32, frames=40, frame_overlap=24)
    with pytest.raises(InputError, match="multiples of 32"):
        next(decode_frames(vae, mx.zeros((1, 32, 2, 2, 2)), Tiling(80, 64, 32, 80, 24)))


def test_pieces_beyond_the_gpus_index_range_are_refused(vae: VideoAutoencoder) -> None:
    with pytest.raises(InputError, match="in tiles"):
        vae.decode(mx.zeros((1, 32, 1000, 64, 64)))


def test_one_latent_row_cannot_be_reflected(vae: VideoAutoencoder) -> None:
    with pytest.raises(InputError, match="reflection"):
        vae.decode(mx.zeros((1, 32, 1, 1, 4)))


@pytest.mark.parametrize("newer", [False, True])
def test_largest_activation(official: Official, monkeypatch: pytest.MonkeyPatch, newer: bool) -> None:
    network = build(NEWER if newer else official.config(official.monolith)["vae"])
    sizes: list[int] = []
    convolve, extend = layers.CausalConv3d.__call__, layers._extend

    def spy_extend(x: mx.array, before: int, after: int, reflect: bool) -> mx.array:
        sizes.append(extend(x, before, after, reflect).size)
        return extend(x, before, after, reflect)

    def spy_convolve(self: layers.CausalConv3d, x: mx.array, *beside: mx.array) -> mx.array:
        sizes.append(convolve(self, x, *beside).size)
        return convolve(self, x, *beside)

    monkeypatch.setattr(layers.CausalConv3d, "__call__", spy_convolve)
    monkeypatch.setattr(layers, "_extend", spy_extend)
    network.decode(mx.zeros((1, network.config.latent_channels, 3, 2, 3)))
    bound = network.config.decoder.largest_array((3, 2, 3))
    assert max(sizes) <= bound <= 1.2 * max(sizes)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"timestep_conditioning": True}, UnsupportedError),
        ({"timestep_conditioning": None}, UnsupportedError),  # missing means true
        ({"causal_decoder": True}, UnsupportedError),
        ({"norm_layer": "group_norm"}, UnsupportedError),
        ({"latent_log_var": "constant"}, UnsupportedError),
        ({"_class_name": "CausalDiffusionVAE"}, UnsupportedError),
        ({"spatial_padding_mode": "circular"}, UnsupportedError),
        ({"attention_heads": 8}, ConfigError),
        ({"latent_channels": "8"}, ConfigError),
        ({"encoder_blocks": blocks(("res_x", 1), ("compress_all_res", 2))}, ConfigError),  # another scale
        ({"decoder_blocks": [["attn", {}]]}, UnsupportedError),
        ({"decoder_blocks": blocks(("compress_all_res", 2))}, UnsupportedError),
        ({"decoder_blocks": [["res_x", 4]]}, ConfigError),
        ({"decoder_blocks": [["res_x", {"num_layers": 1, "inject_noise": True}]]}, UnsupportedError),
        ({"decoder_blocks": [["compress_all", {"multiplier": 2, "groups": 1}]]}, ConfigError),
        ({"encoder_blocks": [["compress_all_res", {"multiplier": 2, "residual": False}]]}, UnsupportedError),
    ],
)
def test_config_that_would_compute_something_else_is_refused(change: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        VideoVAEConfig.from_dict({key: value for key, value in (NEWER | change).items() if value is not None})


@pytest.mark.parametrize(
    ("keys", "encoder", "decoder"),
    [
        ({}, "zeros", "reflect"),
        ({"spatial_padding_mode": "zeros"}, "zeros", "zeros"),
        ({"encoder_spatial_padding_mode": "reflect"}, "reflect", "reflect"),
        ({"decoder_spatial_padding_mode": "zeros"}, "zeros", "reflect"),  # no longer read
    ],
)
def test_padding_modes(keys: dict[str, str], encoder: str, decoder: str) -> None:
    config = VideoVAEConfig.from_dict({k: v for k, v in NEWER.items() if k != "spatial_padding_mode"} | keys)
    assert (config.tower.reflect, config.decoder.reflect) == (encoder == "reflect", decoder == "reflect")
    assert (config.spatial_scale, config.temporal_scale) == (32, 8)
