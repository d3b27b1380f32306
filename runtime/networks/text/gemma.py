"""Gemma's language models as text encoders: token ids to the hidden states of every layer. This file has what the
generations of the family share; gemma3.py and gemma4.py add what differs.

Notable: layers are evaluated one by one, which bounds each GPU command and lets a run release every layer's weights
after use; padding that all rows share is never computed; the names are mlx-lm's, which can load the same folder."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ltx2.runtime.layers.attention import gelu_tanh
from ltx2.runtime.layers.linear import Linear
from ltx2.runtime.machine.bounded import evaluate
from ltx2.runtime.networks.text.config import GemmaConfig

Norm = Callable[[int, float], nn.Module]  # width, eps -> the generation's norm


class Masks(NamedTuple):
    """Which keys each query sees, boolean, both (batch, 1, queries, keys)."""

    whole: mx.array
    window: mx.array


def attention_masks(valid: mx.array, window: int) -> Masks:
    """`valid` (batch, tokens) marks the tokens that are not padding.

    A query sees itself and the tokens before it, `window` in all where the window applies. Padding sees itself, so that
    its rows stay finite; no other token sees it.
    """
    tokens = mx.arange(valid.shape[1])
    distance = tokens[:, None] - tokens[None, :]
    whole = ((distance >= 0) & valid[:, None, :]) | (distance == 0)
    return Masks(whole[:, None], (whole & (distance < window))[:, None])


class Attention(nn.Module, ABC):
    """Causal self-attention with grouped keys and values; queries and keys are normalised per head, then rotated."""

    scale: float

    def __init__(self, config: GemmaConfig, layer: int, norm: Norm) -> None:
        super().__init__()
        dim, queries, keys = config.hidden_size, config.query_heads(layer), config.key_heads(layer)
        self.head_dim = queries.dim
        self.q_proj = Linear(dim, queries.width, bias=False)
        self.k_proj = Linear(dim, keys.width, bias=False)
        if not config.shares_values(layer):
            self.v_proj = Linear(dim, keys.width, bias=False)
        self.o_proj = Linear(queries.width, dim, bias=False)
        self.q_norm = norm(queries.dim, config.rms_norm_eps)
        self.k_norm = norm(queries.dim, config.rms_norm_eps)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        """x (batch, tokens, dim), mask (batch, 1, tokens, tokens) -> (batch, tokens, dim)"""
        q = self.rotated(self.q_norm(self._heads(self.q_proj(x))))
        keys = self._heads(self.k_proj(x))
        values = self.attended(self._heads(self.v_proj(x)) if "v_proj" in self else keys)
        out = mx.fast.scaled_dot_product_attention(
            q, self.rotated(self.k_norm(keys)), values, scale=self.scale, mask=mask
        )
        return self.o_proj(out.transpose(0, 2, 1, 3).flatten(2))

    def _heads(self, x: mx.array) -> mx.array:
        """(batch, tokens, heads * head_dim) -> (batch, heads, tokens, head_dim)"""
        return x.reshape(*x.shape[:2], -1, self.head_dim).transpose(0, 2, 1, 3)

    @abstractmethod
    def rotated(self, x: mx.array) -> mx.array:
        """Queries or keys (batch, heads, tokens, head_dim) with their positions, the first being 0."""

    def attended(self, x: mx.array) -> mx.array:
        """The values to attend to, from projected ones, both (batch, heads, tokens, head_dim)."""
        return x


class MLP(nn.Module):
    """Gated feed-forward network."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, hidden_dim, bias=False)
        self.up_proj = Linear(dim, hidden_dim, bias=False)
        self.down_proj = Linear(hidden_dim, dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """x (batch, tokens, dim) -> the same shape."""
        return self.down_proj(gelu_tanh(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and feed-forward network, each between two norms."""

    def __init__(self, config: GemmaConfig, layer: int, attention: Attention, norm: Norm) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.is_global = config.is_global(layer)
        self.self_attn = attention
        self.mlp = MLP(dim, config.intermediate_size)
        self.input_layernorm = norm(dim, eps)
        self.post_attention_layernorm = norm(dim, eps)
        self.pre_feedforward_layernorm = norm(dim, eps)
        self.post_feedforward_layernorm = norm(dim, eps)

    def __call__(self, x: mx.array, masks: Masks) -> mx.array:
        """x (batch, tokens, dim) -> the same shape."""
        mask = masks.whole if self.is_global else masks.window
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), mask))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class LanguageModel(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: GemmaConfig, layers: list[Layer], norm: Norm) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = layers
        self.norm = norm(config.hidden_size, config.rms_norm_eps)

    def embed(self, ids: mx.array) -> mx.array:
        """Scaled embeddings (batch, tokens, dim) of `ids` (batch, tokens). The scale is rounded to the weights' dtype,
        as in training."""
        x = self.embed_tokens(ids)
        x = x * mx.array(x.shape[-1] ** 0.5, dtype=x.dtype)
        # Gemma's residual stream exceeds float16's range: such weights are computed with in float32.
        return x.astype(mx.float32) if x.dtype == mx.float16 else x


class TextEncoder(nn.Module):
    """A language model without its head. Attribute names are mlx-lm's."""

    def __init__(self, config: GemmaConfig, layers: list[Layer], norm: Norm) -> None:
        super().__init__()
        self.config = config
        self.model = LanguageModel(config, layers, norm)

    def states_of(
        self, batches: Sequence[tuple[mx.array, mx.array]], *, release: bool = False
    ) -> Iterator[list[mx.array]]:
        """The hidden states of several batches (ids, mask), each by itself: the embeddings, then every layer's output,
        the last one after the final norm. `num_hidden_layers + 1` lists of one (batch, T', dim) per batch, each
        evaluated when it is asked for.

        `ids` and `mask` (1 = token, 0 = padding) are (batch, T). T' <= T: columns before the first token of any row are
        left out, since positions are relative and no token sees padding. The padding that remains has finite,
        meaningless values.

        With `release` each layer's weights are dropped after use. Loaded weights are read from disk at first use, so
        the encoder then takes the memory of its largest layer (or embedding) only, and serves this one call: give it
        all prompts.
        """
        model = self.model
        if "weight" not in model.embed_tokens:
            raise RuntimeError("this encoder's weights were released by an earlier call; load it again")
        starts = [int(np.argmax(np.array(mask).any(axis=0))) for _, mask in batches]
        cut = [(ids[:, start:], mask[:, start:]) for (ids, mask), start in zip(batches, starts, strict=True)]
        masks = [attention_masks(mask.astype(mx.bool_), self.config.sliding_window) for _, mask in cut]
        mx.eval(model.embed_tokens.parameters(), model.norm.parameters())
        states = [_evaluated(model.embed(ids)) for ids, _ in cut]
        yield _done(states, model.embed_tokens, release)
        for i, layer in enumerate(model.layers):
            mx.eval(layer.parameters())  # read from disk first: no GPU command waits for that
            last = i + 1 == len(model.layers)
            for number, (x, seen) in enumerate(zip(states, masks, strict=True)):
                x = layer(x, seen)
                states[number] = _evaluated(model.norm(x) if last else x)
            yield _done(states, layer, release)


def _evaluated(x: mx.array) -> mx.array:
    evaluate(x)
    return x


def _done(states: Sequence[mx.array], module: nn.Module, release: bool) -> list[mx.array]:
    """A copy of the list of states; with `release`, drops the weights of `module`."""
    if release:
        module.clear()  # a Module is the dict of its parameters and children
        mx.synchronize()  # a device frees arrays a little later: the next layer would be read beside this one
    return list(states)
