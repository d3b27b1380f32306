"""Gemma 4's unified language model: values are normalised and attention is not scaled, layers that see the whole text
have their own heads and may use their keys as values, and every layer's output is multiplied by a number."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ltx2.runtime.networks.text import gemma
from ltx2.runtime.networks.text.config import Gemma4Config


class Attention(gemma.Attention):
    scale = 1.0

    def __init__(self, config: Gemma4Config, layer: int) -> None:
        super().__init__(config, layer, nn.RMSNorm)
        self.eps = config.rms_norm_eps
        self.rotation = config.rotation(layer)

    def rotated(self, x: mx.array) -> mx.array:
        """As the base class says. Pair i, of dimensions i and i + head_dim / 2, turns once per 2 pi theta^(2i /
        head_dim) tokens; pairs after the rotation's share do not turn (`rope_type` "proportional" of transformers)."""
        pairs = self.head_dim // 2
        lengths = np.full(pairs, np.inf)
        turning = np.arange(int(self.rotation.share * pairs))
        lengths[: turning.size] = self.rotation.theta ** (turning / pairs)
        freqs = mx.array(lengths.astype(np.float32))
        return mx.fast.rope(x, self.head_dim, traditional=False, base=None, scale=1.0, offset=0, freqs=freqs)

    def attended(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, None, self.eps)


class Layer(gemma.Layer):
    def __init__(self, config: Gemma4Config, layer: int) -> None:
        super().__init__(config, layer, Attention(config, layer), nn.RMSNorm)
        self.layer_scalar = mx.ones((1,))

    def __call__(self, x: mx.array, masks: gemma.Masks) -> mx.array:
        """x (batch, tokens, dim) -> the same shape."""
        x = super().__call__(x, masks)
        return x * self.layer_scalar.astype(x.dtype)


def build(config: Mapping[str, Any]) -> gemma.TextEncoder:
    """An uninitialised encoder from the folder's config.json."""
    made = Gemma4Config.from_dict(config)
    layers: list[gemma.Layer] = [Layer(made, i) for i in range(made.num_hidden_layers)]
    return gemma.TextEncoder(made, layers, nn.RMSNorm)
