"""The video decoder of the newest release: stages of neighbourhood attention bring latents to four pixels per position,
then a small diffusion model turns noise into pixels beside them, in one step or a few.

A clip is a list of slabs (frames, height, width, channels) of up to four frames. Layers replace its slabs one after the
other, so that memory beside the clip itself is that of a few slabs."""

from collections import deque
from collections.abc import Callable
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ltx2.runtime.layers.linear import Linear
from ltx2.runtime.layers.neighbourhood import BLOCK, Keys, Neighbourhood
from ltx2.runtime.layers.rope import rotate_pairs
from ltx2.runtime.machine.bounded import evaluate
from ltx2.runtime.networks.transformer.modulation import FREQUENCIES, sinusoidal_embedding
from ltx2.runtime.networks.video_vae.config import Size
from ltx2.runtime.networks.video_vae.decoder import unpatchify
from ltx2.runtime.networks.video_vae.diffusion_config import DiffusionVAEConfig
from ltx2.runtime.networks.video_vae.encoder import patchify
from ltx2.runtime.networks.video_vae.layers import depth_to_space

NORM_EPS = 1e-6
THETA = 10000.0
TIMESTEP_WIDTH = 384
ROWS = 7  # of the modulation: scale, shift, gate of attention and of the feed-forward network, gate of the context
Volume = list[mx.array]
Norm = Callable[[mx.array], mx.array]


class Attention(nn.Module):
    """The projections of an attention; queries and keys are normalised per head."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.q_norm = nn.RMSNorm(head_dim, eps=NORM_EPS)
        self.k_norm = nn.RMSNorm(head_dim, eps=NORM_EPS)
        self.heads = dim // head_dim

    def project(self, x: mx.array, rope: tuple[mx.array, mx.array]) -> tuple[mx.array, mx.array, mx.array]:
        """(t, H, W, C) -> scaled and rotated queries, rotated keys, values, each (t, H, W, C)."""
        q, k, v = (part.reshape(*x.shape[:3], self.heads, -1) for part in mx.split(self.qkv(x), 3, axis=-1))
        q = rotate_pairs(self.q_norm(q) * q.shape[-1] ** -0.5, *rope)
        k = rotate_pairs(self.k_norm(k), *rope)
        return q.reshape(x.shape), k.reshape(x.shape), mx.contiguous(v).reshape(x.shape)  # no view that holds all three


class FeedForward(nn.Module):
    """SwiGLU: the hidden width is four times the width, rounded up to a multiple of 16."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = (4 * dim + 15) // 16 * 16
        self.w_up = Linear(dim, hidden, bias=False)
        self.w_gate = Linear(dim, hidden, bias=False)
        self.w_down = Linear(hidden, dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.w_down(nn.silu(self.w_gate(x)) * self.w_up(x))


class Block(nn.Module):
    """Neighbourhood attention and feed-forward network, each normalised before and added to the stream."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, head_dim)
        self.norm2 = nn.RMSNorm(dim, eps=NORM_EPS)
        self.mlp = FeedForward(dim)

    def run(
        self,
        volume: Volume,
        grid: "Grid",
        enter: Callable[[int], mx.array] | None = None,
        norms: tuple[Norm, Norm] | None = None,
    ) -> None:
        """Replaces the slabs, (t, H, W, C) each. `enter` gives a slab's input where that is not the slab itself;
        `norms` replace the block's own. Keys and values are kept for the slabs that coming windows reach."""
        first, second = norms or (self.norm1, self.norm2)
        starts = [0, *accumulate(slab.shape[0] for slab in volume)]
        queries: dict[int, mx.array] = {}
        keys: deque[tuple[int, mx.array, mx.array]] = deque()
        coming = 0
        for number, (start, stop) in enumerate(pairwise(starts)):
            reach = grid.windows.frames(start, stop)
            while starts[coming] < reach.stop:
                if enter is not None:
                    volume[coming] = enter(coming)
                q, k, v = self.attn.project(first(volume[coming]), grid.rope(starts[coming], starts[coming + 1]))
                evaluate(volume[coming], q, k, v)
                queries[coming] = q
                keys.append((starts[coming], k, v))
                coming += 1
                del q, k, v
            while keys[0][0] + keys[0][1].shape[0] <= reach.start:
                keys.popleft()
            near = Keys(keys[0][0], [k for _, k, _ in keys], [v for _, _, v in keys])
            rows: list[mx.array] = []
            row = 0
            for attended in grid.windows.attend(queries.pop(number), near, start, self.attn.heads):
                x = volume[number][:, row : row + attended.shape[1]] + self.attn.proj(attended)
                x = x + self.mlp(second(x))
                evaluate(x)
                rows.append(x)
                row += x.shape[1]
            volume[number] = mx.concatenate(rows, axis=1)
            evaluate(volume[number])


class DiffusionBlock(Block):
    """A block with the decoded latents added to its stream, steered by the noise level."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__(dim, head_dim)
        self.context_proj = Linear(dim, dim)
        self.scale_shift_table = mx.zeros((ROWS, dim))

    def denoise(self, volume: Volume, grid: "Grid", context: Volume, modulation: mx.array) -> None:
        """Replaces the slabs; `context` has slabs of the same shapes, `modulation` (7, C) follows the noise level."""
        table = self.scale_shift_table.astype(mx.float32) + modulation.astype(mx.float32)

        def steered(norm: nn.RMSNorm, scale: mx.array, shift: mx.array) -> Norm:
            dtype = norm.weight.dtype
            weight, shift = (norm.weight.astype(mx.float32) * (1 + scale)).astype(dtype), shift.astype(dtype)
            return lambda x: mx.fast.rms_norm(x, weight, NORM_EPS) + shift

        norms = steered(self.norm1, table[0], table[1]), steered(self.norm2, table[3], table[4])
        self.run(volume, grid, lambda number: volume[number] + self.context_proj(context[number]), norms)


class Upsample(nn.Module):
    """Linear layer and pixel shuffle: the size grows by a stride, the channels are divided."""

    def __init__(self, dim: int, stride: Size, divisor: int) -> None:
        super().__init__()
        self.proj = Linear(dim, dim * prod(stride) // divisor)
        self.stride = stride

    def run(self, volume: Volume, *, inner: bool = False) -> Volume:
        """Slabs (t, H, W, C) -> slabs of the new size; empties the list. A stride over time leaves the clip's first
        frame single, but not the first one of an `inner` tile, which begins later."""
        found: Volume = []
        drop = 0 if inner else self.stride[0] - 1
        while volume:
            x = depth_to_space(self.proj(volume.pop(0))[None], self.stride)[0]
            for start in range(0, x.shape[0], BLOCK):
                found.append(x[max(start, drop) : start + BLOCK])
            drop = 0
            evaluate(*found[-2:])
        return found


class TimestepEmbedder(nn.Module):
    """Two linears with SiLU between, on the sinusoidal embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = [Linear(FREQUENCIES, TIMESTEP_WIDTH), nn.SiLU(), Linear(TIMESTEP_WIDTH, TIMESTEP_WIDTH)]

    def __call__(self, timestep: float) -> mx.array:
        """(384,)"""
        x = sinusoidal_embedding(mx.array([[timestep]]))[0, 0].astype(self.mlp[0].dtype)
        for layer in self.mlp:
            x = layer(x)
        return x


class Modulation(nn.Module):
    """From the embedded noise level to the rows that all diffusion blocks share."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = Linear(TIMESTEP_WIDTH, ROWS * dim)

    def __call__(self, embedded: mx.array) -> mx.array:
        """(384,) -> (7, C)"""
        return self.proj(nn.silu(embedded)).reshape(ROWS, -1)


class DiffusionDecoder(nn.Module):
    """Un-normalised latents to pixels. `features` runs all stages but the last two over the whole clip; `context` the
    stage before the diffusion model and `denoise` that model, over the clip or a tile of it."""

    def __init__(self, config: DiffusionVAEConfig) -> None:
        super().__init__()
        d = config.decoder
        pixels = 3 * d.patch_size**2
        *widths, last = d.stage_channels
        self.config = config
        self.conv_in = Linear(d.in_channels, widths[0])
        self.det_stages = [
            [Block(width, d.head_dim) for _ in range(depth)]
            for width, depth in zip(widths, d.stage_depths[:-1], strict=True)
        ]
        self.upsamples = [Upsample(width, *upsample) for width, upsample in zip(widths, d.upsamples, strict=True)]
        self.t_embedder = TimestepEmbedder()
        self.shared_adaln = Modulation(last)
        self.conv_in_x_t = Linear(pixels, last)
        self.diff_blocks = [DiffusionBlock(last, d.head_dim) for _ in range(d.stage_depths[-1])]
        self.norm_out = nn.RMSNorm(last, eps=NORM_EPS)
        self.conv_out = Linear(last, pixels)

    def features(self, latents: mx.array) -> Volume:
        """Latents (f, h, w, C) -> slabs (t, H, W, C') for the last stage but one, with those of the last latent's
        copies."""
        ghosts = mx.repeat(latents[-1:], self.config.ghosts, axis=0)
        x = self.conv_in(mx.concatenate([latents, ghosts]).astype(self.conv_in.dtype))
        volume = [x[start : start + BLOCK] for start in range(0, x.shape[0], BLOCK)]
        for stage in range(len(self.det_stages) - 1):
            volume = self._stage(stage, volume)
        return volume

    def context(self, features: Volume, *, inner: bool = False) -> Volume:
        """Slabs of a clip or a tile -> slabs with one position for 4x4 pixels. Empties the list."""
        return self._stage(len(self.det_stages) - 1, features, inner)

    def _stage(self, number: int, volume: Volume, inner: bool = False) -> Volume:
        grid = Grid(volume, self.config.decoder.stage_kernels[number], self.config.decoder.head_dim)
        for block in self.det_stages[number]:
            block.run(volume, grid)
        return self.upsamples[number].run(volume, inner=inner)

    def denoise(self, context: Volume, noise: mx.array, steps: int) -> mx.array:
        """Slabs and unit Gaussian noise (F, H, W, 3) -> pixels (F, H, W, 3), nominally in [-1, 1]."""
        x0 = self.config.model_output_type == "x0"
        if steps == 1 and x0:
            return self._predict(context, noise, 1.0)
        x = noise.astype(mx.float32)
        for step in range(steps):
            t = (steps - step) / steps
            predicted = self._predict(context, x, t).astype(mx.float32)
            velocity = (x - predicted) / t if x0 else predicted
            x = x - velocity / steps
            evaluate(x)
        return x

    def _predict(self, context: Volume, x: mx.array, t: float) -> mx.array:
        """What the model makes of pixels (F, H, W, 3) at noise level t, of the same shape."""
        patch, dtype = self.config.decoder.patch_size, self.conv_in_x_t.dtype
        starts = [0, *accumulate(slab.shape[0] for slab in context)]
        volume = []
        for start, stop in pairwise(starts):
            volume.append(self.conv_in_x_t(patchify(x[None, start:stop].astype(dtype), patch)[0]))
            evaluate(volume[-1])
        modulation = self.shared_adaln(self.t_embedder(self.config.decoder.timestep_scale_multiplier * t))
        grid = Grid(volume, self.config.decoder.stage_kernels[-1], self.config.decoder.head_dim)
        for block in self.diff_blocks:
            block.denoise(volume, grid, context, modulation)
        for number, slab in enumerate(volume):
            volume[number] = unpatchify(self.conv_out(self.norm_out(slab))[None], patch)[0]
            evaluate(volume[number])
        return mx.concatenate(volume)


class Grid:
    """What attention needs to know of a clip's size: windows, and the rotation of queries and keys by their place."""

    def __init__(self, volume: Volume, kernel: Size, head_dim: int) -> None:
        _, height, width, _ = volume[0].shape
        self._size = size = (sum(slab.shape[0] for slab in volume), height, width)
        self.windows = Neighbourhood(size, kernel)
        time = head_dim // 4 // 2 * 2
        time -= (head_dim - time) // 2 % 2 * 2  # pairs only
        space = (head_dim - time) // 2
        self._angles = [_angles(length, dim) for length, dim in zip(size, (time, space, space), strict=True)]

    def rope(self, start: int, stop: int) -> tuple[mx.array, mx.array]:
        """Cosines and sines for frames [start, stop): (t, H, W, 1, head_dim / 2), float32."""
        t, h, w = self._angles
        shape = (stop - start, *self._size[1:])
        axes = t[start:stop, None, None], h[:, None], w
        angles = np.concatenate([np.broadcast_to(axis, (*shape, axis.shape[-1])) for axis in axes], axis=-1)
        table = mx.array(angles)[:, :, :, None]
        return mx.cos(table), mx.sin(table)


def _angles(length: int, dim: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Angles (length, dim / 2) of the positions along one axis."""
    frequencies = (THETA ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)).astype(np.float32)
    return np.arange(length, dtype=np.float32)[:, None] * frequencies
