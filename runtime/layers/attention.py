"""Multi-head attention with RMS-normalised queries and keys, and the feed-forward network: the two halves of every
transformer and connector block."""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ltx2.runtime.layers.linear import Linear
from ltx2.runtime.layers.rope import Rope, apply_rope
from ltx2.runtime.machine.bounded import divided, in_parts


class Keys(NamedTuple):
    """Keys and values to attend to, both (batch, heads, tokens, head_dim)."""

    keys: mx.array
    values: mx.array


class Attention(nn.Module):
    """Self- or cross-attention of inner width `heads * head_dim`; queries and keys are normalised over the whole
    inner width before they are rotated. `gated`: every head's result is scaled by 2 * sigmoid of a projection of the
    query's token. A hook `gathered` turns this machine's keys and values into those of all tokens
    (runtime/distributed/sequence.py)."""

    gathered: Callable[[Keys], Keys] | None = None

    def __init__(
        self, query_dim: int, context_dim: int, heads: int, head_dim: int, eps: float, *, gated: bool = False
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.scale = head_dim**-0.5
        self.to_q = Linear(query_dim, inner)
        self.to_k = Linear(context_dim, inner)
        self.to_v = Linear(context_dim, inner)
        self.to_out = Linear(inner, query_dim)
        self.q_norm = nn.RMSNorm(inner, eps=eps)
        self.k_norm = nn.RMSNorm(inner, eps=eps)
        if gated:
            self.to_gate_logits = Linear(query_dim, heads)

    def __call__(
        self,
        x: mx.array,
        context: mx.array | Keys | None = None,
        rope: Rope | None = None,
        context_rope: Rope | None = None,
        mask: mx.array | None = None,
    ) -> mx.array:
        """x (batch, tokens, query_dim) -> the same shape. `context`: (batch, keys, context_dim), or the `keys_of` it;
        None: x itself.

        `rope` rotates the queries, and the keys of self-attention; `context_rope` those of a context. `mask` (batch or
        1, heads or 1, tokens or 1, keys), in x's dtype, is added to the scores.
        """
        q = self._heads(self.q_norm(self.to_q(x)), rope)
        if context is None:
            context, context_rope = x, rope
        found = context if isinstance(context, Keys) else self.keys_of(context, context_rope)
        k, v = found if self.gathered is None else self.gathered(found)

        def attend(part: slice) -> mx.array:
            rows = mask if mask is None or mask.shape[2] == 1 else mask[:, :, part]
            return mx.fast.scaled_dot_product_attention(q[:, :, part], k, v, scale=self.scale, mask=rows)

        return self._out(x, in_parts(attend, q.shape[2], axis=2, flops=4 * q.size * k.shape[2]))

    def keys_of(self, context: mx.array, rope: Rope | None = None) -> Keys:
        """Keys and values of a context (batch, keys, context_dim), which several calls may share."""
        return Keys(self._heads(self.k_norm(self.to_k(context)), rope), self._heads(self.to_v(context), None))

    def passed(self, x: mx.array) -> mx.array:
        """x (batch, tokens, query_dim) -> the same shape, with the values of self-attention in place of its result, as
        STG skips it."""
        return self._out(x, self._heads(self.to_v(x), None))

    def _out(self, x: mx.array, heads: mx.array) -> mx.array:
        """heads (batch, heads, tokens, head_dim), gated by x and joined: (batch, tokens, query_dim)"""
        joined = heads.transpose(0, 2, 1, 3)
        if "to_gate_logits" in self:
            joined = _gated(joined, self.to_gate_logits(x)[..., None])
        return self.to_out(joined.flatten(2))

    def _heads(self, x: mx.array, rope: Rope | None) -> mx.array:
        """(batch, tokens, inner) -> (batch, heads, tokens, head_dim)"""
        x = x.reshape(*x.shape[:2], self.heads, -1)
        return (x if rope is None else apply_rope(x, rope)).transpose(0, 2, 1, 3)


@mx.compile
def _gated(heads: mx.array, logits: mx.array) -> mx.array:
    return heads * (2 * mx.sigmoid(logits))


class FeedForward(nn.Module):
    """Linear, GELU (tanh approximation), Linear; four times as wide inside."""

    def __init__(self, dim: int, bias: bool = True) -> None:
        super().__init__()
        self.proj_in = Linear(dim, 4 * dim, bias)
        self.proj_out = Linear(4 * dim, dim, bias)

    def __call__(self, x: mx.array) -> mx.array:
        """x (batch, tokens, dim) -> the same shape."""
        return divided(
            lambda part: self.proj_out(gelu_tanh(self.proj_in(part))), x, axis=1, flops=8 * x.size * x.shape[-1]
        )


@mx.compile  # not shapeless: that takes a strided kernel, 3x slower
def gelu_tanh(x: mx.array) -> mx.array:
    """GELU of x (any shape) by its tanh approximation, in float32 inside one fused kernel (x*x*x: a power is 8x
    slower)."""
    y = x.astype(mx.float32)
    return (0.5 * y * (1 + mx.tanh(0.7978845608028654 * (y + 0.044715 * y * y * y)))).astype(x.dtype)
