"""Encoding clips in tiles: against Lightricks' rules written out densely, as they come in groups of frames."""

from collections.abc import Callable, Iterator
from functools import partial
from math import ceil

import mlx.core as mx
import numpy as np
import pytest

from ltx2.runtime.errors import InputError
from ltx2.runtime.generate.given import ENCODING
from ltx2.runtime.networks.video_vae.config import encoder_tower
from ltx2.runtime.networks.video_vae.encode import VideoCoder
from ltx2.runtime.networks.video_vae.tiles import Tiling
from tests.support.memory import peak_of
from tests.support.parity import relative_l2

Figure = Callable[..., None]
Encode = Callable[[np.ndarray], np.ndarray]


BLOCKS = (
    ("res_x", {"num_layers": 1}),
    ("compress_space_res", {"multiplier": 2}),
    ("compress_time_res", {"multiplier": 2}),
    ("compress_all_res", {"multiplier": 2}),
    ("compress_all_res", {"multiplier": 2}),
)
TOWER = encoder_tower(BLOCKS, 4, 8, 4, "zeros")


class Pooling(VideoCoder):
    """Latents are means of their own pixels, and of the whole tile: a tile's latents depend on all that it sees."""

    def __init__(self) -> None:
        super().__init__(TOWER, 4)
        self.calls: list[tuple[int, ...]] = []

    def encode(self, pixels: mx.array) -> mx.array:
        self.calls.append(pixels.shape)
        x = np.array(pixels)[:, :, : (pixels.shape[2] - 1) // 8 * 8 + 1]
        x = np.concatenate([x[:, :, :1].repeat(7, axis=2), x], axis=2)
        x = x.reshape(1, 3, x.shape[2] // 8, 8, x.shape[3] // 32, 32, x.shape[4] // 32, 32).mean(axis=(3, 5, 7))
        return mx.array(x + 10 * np.array(pixels).mean())


@pytest.fixture
def vae() -> Pooling:
    return Pooling()


def clip(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """(1, 3, F, H, W) in [-1, 1]"""
    return np.tanh(np.random.default_rng(seed).standard_normal((1, 3, frames, height, width))).astype(np.float32)


def groups(pixels: np.ndarray, *sizes: int) -> Iterator[mx.array]:
    """A clip in groups of so many frames, over and over."""
    start = number = 0
    while start < pixels.shape[2]:
        stop = start + sizes[number % len(sizes)]
        yield mx.array(np.ascontiguousarray(pixels[:, :, start:stop]))
        start, number = stop, number + 1


def trapezoid(length: int, left: int, right: int, zero: bool) -> np.ndarray:
    """Ramps k / (r + 1) on both sides; the left one is k / r from 0 on where it begins with a latent of weight 0."""
    mask = np.ones(length)
    for k in range(left):
        mask[k] *= k / left if zero else (k + 1) / (left + 1)
    for k in range(right):
        mask[length - 1 - k] *= (k + 1) / (right + 1)
    return mask


def cuts(length: int, size: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """Start, stop, left ramp, right ramp of every interval."""
    count = 1 if length <= size else ceil((length - overlap) / (size - overlap))
    found = []
    for i in range(count):
        start = i * (size - overlap)
        stop = length if i == count - 1 else start + size
        found.append((start, stop, overlap if i else 0, overlap if i < count - 1 else 0))
    return found


def dense(pixels: np.ndarray, tiling: Tiling, encode: Encode) -> np.ndarray:
    """Every tile encoded by itself, multiplied by its masks, added up, divided by the sum of the masks."""
    frames, height, width = (pixels.shape[2] - 1) // 8 + 1, pixels.shape[3] // 32, pixels.shape[4] // 32
    total: np.ndarray | float = 0.0
    weights = np.zeros((frames, height, width))
    for a, b, early, late in cuts(frames, tiling.frames // 8, tiling.frame_overlap // 8):
        if a:
            a, early = a - 1, early + 1
        for top, bottom, up, down in cuts(height, tiling.height // 32, tiling.overlap // 32):
            for left, right, before, after in cuts(width, tiling.width // 32, tiling.overlap // 32):
                part = pixels[:, :, 8 * a : 8 * (b - 1) + 1, 32 * top : 32 * bottom, 32 * left : 32 * right]
                mask = trapezoid(b - a, early, late, zero=a > 0)[:, None, None]
                mask = mask * trapezoid(bottom - top, up, down, zero=False)[:, None]
                mask = mask * trapezoid(right - left, before, after, zero=False)
                padding = [(a, frames - b), (top, height - bottom), (left, width - right)]
                total = total + np.pad(encode(part) * mask, [(0, 0), (0, 0), *padding])
                weights += np.pad(mask, padding)
    result: np.ndarray = total / np.maximum(weights, 1e-8)
    return result


@pytest.mark.parametrize(
    ("size", "tiling"),
    [
        ((41, 96, 160), Tiling(64, 96, 32, 24, 8)),  # all axes, three tiles over time
        ((36, 64, 64), Tiling(64, 64, 32, 24, 8)),  # time only, a short last tile, three frames too many
        ((9, 128, 96), Tiling(64, 64, 32, 16, 0)),  # space only
    ],
)
def test_tiles_follow_lightricks_rules(
    vae: Pooling, figure: Figure, size: tuple[int, int, int], tiling: Tiling
) -> None:
    pixels = clip(*size)
    kept = pixels[:, :, : (size[0] - 1) // 8 * 8 + 1]
    expected = dense(kept, tiling, lambda part: np.array(vae.encode(mx.array(part))))
    found = vae.encode_video(groups(pixels, 5, 1, 12), tiling)
    assert found.dtype == mx.float32
    figure(f"video_vae.encode_video {size} against the rules, rel L2", relative_l2(found, expected), limit=1e-6)
    whole = relative_l2(vae.encode(mx.array(kept)), expected)
    assert whole > 1e-3, "tiles differ from one piece"


@pytest.mark.parametrize("frames", [1, 17])
def test_one_tile_is_one_piece(vae: Pooling, frames: int) -> None:
    pixels = clip(frames, 64, 96)
    found = vae.encode_video(groups(pixels, 3), ENCODING)
    assert mx.array_equal(found, vae.encode(mx.array(pixels)))


def test_frames_are_read_when_they_are_needed(vae: Pooling) -> None:
    """A tile of 3 latents has 17 frames, later ones 25; the next latent's last frame says whether a tile follows."""
    read: list[int] = []

    def watched() -> Iterator[mx.array]:
        for group in groups(clip(57, 32, 32), 1):
            read.append(len(vae.calls))
            yield group

    vae.encode_video(watched(), Tiling(64, 64, 32, 24, 8))
    assert [read.count(tiles) for tiles in range(5)] == [25, 16, 16, 0, 0]
    assert [shape[2] for shape in vae.calls] == [17, 25, 25, 17]


def test_memory_does_not_grow_with_the_clips_length(vae: Pooling) -> None:
    peaks = []
    for frames in (161, 321):
        pixels = groups(clip(frames, 64, 64), 8)
        peaks.append(peak_of(partial(vae.encode_video, pixels, Tiling(64, 64, 32, 24, 8))))
    assert peaks[1] < 1.1 * peaks[0]


def test_what_cannot_be_encoded(vae: Pooling) -> None:
    with pytest.raises(InputError, match="no frames"):
        vae.encode_video(iter(()), ENCODING)
    with pytest.raises(InputError, match="multiples of 32"):
        vae.encode_video(groups(clip(9, 64, 80), 9), ENCODING)


def test_the_network_in_tiles(figure: Figure) -> None:
    network, pixels, tiling = VideoCoder(TOWER, 4), clip(17, 64, 96), Tiling(64, 64, 32, 16, 0)
    expected = dense(pixels, tiling, lambda part: np.array(network.encode(mx.array(part))))
    found = network.encode_video(groups(pixels, 4), tiling)
    figure("video_vae.encode_video, random weights, rel L2", relative_l2(found, expected), limit=1e-6)
