"""Mean and standard deviation of a VAE's latents over its training data; the transformer works on normalised ones."""

from math import prod

import mlx.core as mx
import mlx.nn as nn


class LatentStatistics(nn.Module):
    """One mean and deviation per feature of a token. `shape` lays the features out along the axes of latents, without
    the batch: (C, 1, 1, 1) for video, (channels, 1, frequencies) for audio. Computes in float32, returns the latents'
    dtype."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.mean = mx.zeros((prod(shape),))
        self.std = mx.ones((prod(shape),))
        self._shape = shape

    def normalise(self, latents: mx.array) -> mx.array:
        """Latents (batch, ...) as a VAE's encoder makes them -> the same shape, of zero mean and unit deviation."""
        mean, std = self._tables()
        return ((latents.astype(mx.float32) - mean) / std).astype(latents.dtype)

    def unnormalise(self, latents: mx.array) -> mx.array:
        """The inverse of `normalise`."""
        mean, std = self._tables()
        return (latents.astype(mx.float32) * std + mean).astype(latents.dtype)

    def _tables(self) -> tuple[mx.array, mx.array]:
        return self.mean.astype(mx.float32).reshape(self._shape), self.std.astype(mx.float32).reshape(self._shape)
