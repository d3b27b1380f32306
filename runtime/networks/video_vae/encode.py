"""From pixels to latents: the half that all video VAEs share. Images and short clips are encoded in one piece, clips of
any length in tiles, from frames that come in groups, so that memory stays bounded."""

from collections.abc import Iterable, Mapping

import mlx.core as mx
import mlx.nn as nn

from ltx2.runtime.errors import InputError
from ltx2.runtime.layers.statistics import LatentStatistics
from ltx2.runtime.machine.bounded import evaluate
from ltx2.runtime.model.layout import DIFFUSION_VAE, VIDEO_VAE
from ltx2.runtime.networks.video_vae.config import Tower, VideoVAEConfig
from ltx2.runtime.networks.video_vae.diffusion_config import DiffusionVAEConfig
from ltx2.runtime.networks.video_vae.encoder import Encoder
from ltx2.runtime.networks.video_vae.tiles import Intervals, Tiling, spatial_spans, time_weights

VideoConfig = VideoVAEConfig | DiffusionVAEConfig
# By component. Of a model that has both, the first encodes, and its statistics are used.
VIDEO_VAES: Mapping[str, type[VideoConfig]] = {VIDEO_VAE: VideoVAEConfig, DIFFUSION_VAE: DiffusionVAEConfig}


class VideoCoder(nn.Module):
    """Encoder and latent statistics. Latents are (1, C, f, h, w) with f = (F - 1) / 8 + 1 for F frames.

    `spatial_scale`: pixels per latent along height and width. `temporal_scale`: frames per latent; the first latent
    stands for one frame."""

    def __init__(self, tower: Tower, patch_size: int) -> None:
        super().__init__()
        self.encoder = Encoder(tower, patch_size)
        self.per_channel_statistics = LatentStatistics(tower.outputs - 1, 1, 1, 1)
        self.temporal_scale, space, _ = tower.scale
        self.spatial_scale = space * patch_size

    def encode(self, pixels: mx.array) -> mx.array:
        """(1, 3, F, H, W) in [-1, 1] -> normalised latents (1, C, f, h, w), float32, in one piece.

        Frames after the last 8k+1 are left out. Raises InputError when H or W is no multiple of 32.
        """
        *_, frames, height, width = pixels.shape
        self._check(height, width)
        kept = frames - (frames - 1) % self.temporal_scale
        x = pixels[:, :, :kept].transpose(0, 2, 3, 4, 1)
        latents = self.encoder(x.astype(self._dtype))
        latents = self.per_channel_statistics.normalise(latents.transpose(0, 4, 1, 2, 3).astype(mx.float32))
        evaluate(latents)
        return latents

    def encode_video(self, groups: Iterable[mx.array], tiling: Tiling) -> mx.array:
        """A clip that comes in groups of frames (1, 3, n, H, W) in [-1, 1] -> normalised latents (1, C, f, h, w),
        float32. Holds no more than a tile's frames and a group.

        Tiles are cut in latents; along time every tile after the first starts one latent early, with weight 0: its
        first latent stands for one frame only. Frames after the last 8k+1 are left out. Raises InputError when H or W
        is no multiple of 32, and for a clip without frames.
        """
        clip, scale = _Clip(groups, self._dtype), self.temporal_scale
        size, overlap = tiling.frames // scale, tiling.frame_overlap // scale
        latents: mx.array | None = None
        start = 0
        while True:
            stop, first = start + size, max(0, start - 1)
            last = not clip.reaches(stop * scale + 1)
            if last:
                stop = (clip.stop - 1) // scale + 1
            weights = time_weights(stop - first, overlap + 1 if start else 0, 0 if last else overlap)
            tile = self._encode_tiles(clip.take(first * scale, (stop - 1) * scale + 1), tiling)
            tile = tile * mx.array(weights)[:, None, None]
            latents = tile if latents is None else _added(latents, tile, first)
            evaluate(latents)
            if last:
                return latents
            start = stop - overlap

    def _encode_tiles(self, groups: list[mx.array], tiling: Tiling) -> mx.array:
        """As `encode`, in tiles over space: frames in groups (1, 3, n, H, W) -> (1, C, f, h, w)."""
        scale = self.spatial_scale
        height, width = groups[0].shape[3:]
        self._check(height, width)
        rows, columns = (
            spatial_spans(Intervals(length // scale, side // scale, tiling.overlap // scale), 1)
            for length, side in ((height, tiling.height), (width, tiling.width))
        )
        total: mx.array | None = None
        for row in rows:
            for column in columns:
                tops, lefts = (slice(s.source.start * scale, s.source.stop * scale) for s in (row, column))
                tile = self.encode(mx.concatenate([group[..., tops, lefts] for group in groups], axis=2))
                if len(rows) == len(columns) == 1:
                    return tile
                if total is None:
                    total = mx.zeros((*tile.shape[:3], height // scale, width // scale))
                weighted = tile * mx.array(row.weights)[:, None] * mx.array(column.weights)
                total[:, :, :, row.target, column.target] += weighted
                evaluate(total)
        assert total is not None
        return total

    @property
    def _dtype(self) -> mx.Dtype:
        return self.encoder.conv_in.conv.weight.dtype

    def _check(self, height: int, width: int) -> None:
        if height % self.spatial_scale or width % self.spatial_scale:
            raise InputError(
                f"a picture of {width}x{height} cannot be encoded",
                f"width and height must be multiples of {self.spatial_scale}",
                "resize or crop it first",
            )


class _Clip:
    """A clip's frames, from when they come until they are no longer needed."""

    def __init__(self, groups: Iterable[mx.array], dtype: mx.Dtype) -> None:
        self._coming = iter(groups)
        self._dtype = dtype
        self._groups: list[mx.array] = []  # (1, 3, n, H, W)
        self._start = 0
        self.stop = 0

    def reaches(self, stop: int) -> bool:
        """Whether the clip has `stop` frames; reads on until that is known."""
        while self.stop < stop and (group := next(self._coming, None)) is not None:
            self._groups.append(group.astype(self._dtype))
            evaluate(self._groups[-1])
            self.stop += group.shape[2]
        return self.stop >= stop

    def take(self, start: int, stop: int) -> list[mx.array]:
        """Frames [start, stop), in groups (1, 3, n, H, W); drops those before. Raises InputError for a clip without
        frames."""
        if not self.stop:
            raise InputError("the clip cannot be encoded", "it has no frames", "choose another file")
        while self._start + self._groups[0].shape[2] <= start:
            self._start += self._groups.pop(0).shape[2]
        taken, at = [], self._start
        for group in self._groups:
            part = group[:, :, max(0, start - at) : max(0, stop - at)]
            taken += [part] if part.shape[2] else []
            at += group.shape[2]
        return taken


def _added(latents: mx.array, tile: mx.array, first: int) -> mx.array:
    """The latents (1, C, f, h, w) so far, and a tile (1, C, n, h, w) added to them from latent `first` on."""
    shared = latents.shape[2] - first
    both = latents[:, :, first:] + tile[:, :, :shared]
    return mx.concatenate([latents[:, :, :first], both, tile[:, :, shared:]], axis=2)
