"""Gemma 3's language model: norms multiply by 1 + weight, and layers that see the whole text scale its positions."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ltx2.runtime.networks.text import gemma
from ltx2.runtime.networks.text.config import Gemma3Config


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight) in float32; keeps x's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = mx.zeros((dim,))

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., dim) -> the same shape."""
        return mx.fast.rms_norm(x, 1 + self.weight.astype(mx.float32), self.eps).astype(x.dtype)


class Attention(gemma.Attention):
    def __init__(self, config: Gemma3Config, layer: int) -> None:
        super().__init__(config, layer, RMSNorm)
        self.scale = config.query_pre_attn_scalar**-0.5
        is_global = config.is_global(layer)
        self.rope_base = config.rope_theta if is_global else config.rope_local_base_freq
        self.rope_scale = config.rope_scale if is_global else 1.0

    def rotated(self, x: mx.array) -> mx.array:
        return mx.fast.rope(x, self.head_dim, traditional=False, base=self.rope_base, scale=self.rope_scale, offset=0)


def build(config: Mapping[str, Any]) -> gemma.TextEncoder:
    """An uninitialised encoder from the folder's config.json."""
    made = Gemma3Config.from_dict(config)
    layers = [gemma.Layer(made, i, Attention(made, i), RMSNorm) for i in range(made.num_hidden_layers)]
    return gemma.TextEncoder(made, layers, RMSNorm)
