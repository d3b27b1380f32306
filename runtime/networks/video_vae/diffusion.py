"""The video autoencoder with a diffusion decoder. The last two stages, which take most memory, run over the whole clip
or over tiles of it."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ltx2.runtime.errors import InputError
from ltx2.runtime.networks.video_vae.config import Size
from ltx2.runtime.networks.video_vae.diffusion_config import DiffusionVAEConfig
from ltx2.runtime.networks.video_vae.diffusion_decoder import DiffusionDecoder, Volume
from ltx2.runtime.networks.video_vae.encode import VideoCoder
from ltx2.runtime.networks.video_vae.frames import Pictures, blended, to_levels
from ltx2.runtime.networks.video_vae.tiles import Intervals, Span, Tiles, Tiling, spatial_spans


class DiffusionAutoencoder(VideoCoder):
    """Encoder, diffusion decoder and latent statistics."""

    def __init__(self, config: DiffusionVAEConfig) -> None:
        super().__init__(config.tower, config.patch_size)
        self.config = config
        self.decoder = DiffusionDecoder(config)

    def decode_frames(
        self, latents: mx.array, noise: mx.array, tiling: Tiling | None = None, steps: int | None = None
    ) -> Iterator[Pictures]:
        """Decode normalised latents (1, C, f, h, w) to groups of frames (n, H, W, 3), uint8, in order.

        `noise` is the unit Gaussian canvas (1, 3, F, H, W) that `config.canvas` gives the size of; all tiles and steps
        take it from there. `steps`: of the diffusion model; None: the configuration's. Raises InputError for noise or
        tiles of an unusable size, NumericsError for frames that are not finite.
        """
        return map(to_levels, self.decode_tiles(latents, noise, tiling, steps))

    def decode_tiles(
        self, latents: mx.array, noise: mx.array, tiling: Tiling | None = None, steps: int | None = None
    ) -> Iterator[mx.array]:
        """As `decode_frames`, but float32 in [-1, 1], not clamped and not evaluated."""
        size: Size = (latents.shape[2], latents.shape[3], latents.shape[4])
        if noise.shape != self.config.canvas(size):
            raise InputError(
                f"noise of shape {list(noise.shape)} cannot be used",
                f"decoding starts from noise of shape {list(self.config.canvas(size))}",
                "give noise of this shape",
            )
        steps = self.config.decoder.default_num_inference_steps if steps is None else steps
        frames, (top, left) = (size[0] - 1) * self.temporal_scale + 1, self._margins(size)
        height, width = size[1] * self.spatial_scale, size[2] * self.spatial_scale
        for group in self._groups(self._extended(latents), noise[0].transpose(1, 2, 3, 0), tiling, steps):
            yield group[:frames, top : top + height, left : left + width]
            frames -= group.shape[0]
            if frames <= 0:
                return

    def _margins(self, size: Size) -> tuple[int, int]:
        """Pixels that small clips are extended by, above and to the left."""
        _, top, left = (max(0, least - side) // 2 for side, least in zip(size, self.config.smallest, strict=True))
        return top * self.spatial_scale, left * self.spatial_scale

    def _extended(self, latents: mx.array) -> mx.array:
        """Latents (1, C, f, h, w), raised to the smallest clip by repeating edges: over time at the end, in the picture
        on both sides."""
        missing = [max(0, least - side) for side, least in zip(latents.shape[2:], self.config.smallest, strict=True)]
        pads = [(0, missing[0]), *((n // 2, n - n // 2) for n in missing[1:])]
        return mx.pad(latents, [(0, 0), (0, 0), *pads], mode="edge") if any(missing) else latents

    def _groups(self, latents: mx.array, noise: mx.array, tiling: Tiling | None, steps: int) -> Iterator[mx.array]:
        """Groups of frames (n, H, W, 3) of latents (1, C, f, h, w), from noise (F, H, W, 3)."""
        x = self.per_channel_statistics.unnormalise(latents)[0].transpose(1, 2, 3, 0)
        cell, cells = self.config.cell, self.config.cells((x.shape[0], x.shape[1], x.shape[2]))
        tiles = Tiles(cells, tiling, cell)
        self._check_tiles(tiles)
        features = self.decoder.features(x)
        ghosts = sum(slab.shape[0] for slab in features) - cells[0]
        times = _causal_spans(tiles.times, cell.temporal_scale)
        rows, columns = (spatial_spans(side, cell.spatial_scale) for side in (tiles.rows, tiles.columns))
        whole = len(times) == len(rows) == len(columns) == 1

        def decode(time: slice, row: slice, column: slice) -> mx.array:
            last = time.stop == cells[0]
            part = _cut(features, slice(time.start, time.stop + ghosts * last), row, column)
            if whole:
                features.clear()
            context = self.decoder.context(part, inner=time.start > 0)
            early, scale = cell.temporal_scale - 1, cell.spatial_scale
            frames = slice(max(0, time.start * (early + 1) - early), time.stop * (early + 1) - early)
            if last:
                context = _cut(context, slice(0, frames.stop - frames.start), slice(None), slice(None))
            tops, lefts = (slice(side.start * scale, side.stop * scale) for side in (row, column))
            return self.decoder.denoise(context, noise[frames, tops, lefts], steps)

        return blended(times, rows, columns, decode, iter)

    def _check_tiles(self, tiles: Tiles) -> None:
        """Raises InputError where a tile is smaller than the windows in it."""
        least = self.config.smallest_tile
        for axis, intervals in enumerate((tiles.times, tiles.rows, tiles.columns)):
            smallest = min(stop - start for start, stop in (intervals[i] for i in intervals.ends))
            if smallest < min(least[axis], tiles.latents[axis]):
                cell = self.config.cell
                raise InputError(
                    f"{tiles.tiling} cannot be used",
                    f"a tile at the edge would have less than {least[0] * cell.temporal_scale} frames or "
                    f"{least[1] * cell.spatial_scale} pixels",
                    "choose larger overlaps",
                )


def _cut(volume: Volume, frames: slice, rows: slice, columns: slice) -> Volume:
    """A part of a clip, both in slabs (t, H, W, C)."""
    found, at = [], 0
    for slab in volume:
        part = slab[max(0, frames.start - at) : max(0, frames.stop - at), rows, columns]
        found += [part] if part.shape[0] else []
        at += slab.shape[0]
    return found


def _causal_spans(tiles: Intervals, scale: int) -> list[Span]:
    """Tiles over time of cells of `scale` frames, the first of which stands for one frame."""
    spans, early = spatial_spans(tiles, scale), scale - 1
    first = replace(spans[0], target=slice(0, spans[0].target.stop - early), weights=spans[0].weights[early:])
    moved = (replace(s, target=slice(s.target.start - early, s.target.stop - early)) for s in spans[1:])
    return [first, *moved]


def build(config: Mapping[str, Any]) -> DiffusionAutoencoder:
    """From the checkpoint's `vae` section. Raises ConfigError or UnsupportedError for one we cannot compute."""
    return DiffusionAutoencoder(DiffusionVAEConfig.from_dict(config))
