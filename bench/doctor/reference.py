"""The kernels' formulas in NumPy and float32, for small inputs."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np

from ltx2.runtime.files.tensors import Array
from ltx2.runtime.model.hadamard import hadamard


def rotated(x: Array, size: int, kind: str) -> Array:
    """x (rows, width) with every block of `size` values times a Hadamard matrix."""
    return (x.reshape(len(x), -1, size) @ hadamard(size, kind)).reshape(x.shape)


def attention(given: Mapping[str, Array]) -> Array:
    """softmax(q k^T / sqrt(width) + mask) v of (1, heads, tokens, width); a boolean mask is True for visible keys."""
    q, k, v, mask = given["q"], given["k"], given["v"], given.get("mask")
    scores = q @ k.swapaxes(-1, -2) * np.float32(q.shape[-1] ** -0.5)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == np.bool_ else scores + mask
    return _softmax(scores) @ v


def neighbourhood(kernel: tuple[int, int, int], heads: int, given: Mapping[str, Array]) -> Array:
    """Attention of every position of q (T, H, W, C) to the window around it, shifted to lie inside the clip."""
    q, k, v = given["q"], given["k"], given["v"]
    out = np.empty_like(q)
    for place in np.ndindex(*q.shape[:3]):
        starts = [min(max(p - n // 2, 0), side - n) for p, n, side in zip(place, kernel, q.shape[:3], strict=True)]
        window = tuple(slice(start, start + n) for start, n in zip(starts, kernel, strict=True))
        keys, values = (x[window].reshape(-1, heads, q.shape[-1] // heads) for x in (k, v))
        weights = _softmax(np.einsum("hd,khd->hk", q[place].reshape(heads, -1), keys))
        out[place] = np.einsum("hk,khd->hd", weights, values).reshape(-1)
    return out


def _softmax(scores: Array) -> Array:
    """Of any shape, over the last axis."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True), np.float32)


def convolution(given: Mapping[str, Array], padding: int, dilation: int = 1, groups: int = 1) -> Array:
    """x (batch, sides..., inputs) with weight (outputs, taps..., inputs / groups) as a sum over the taps: (batch,
    sides..., outputs). `groups`: 1, or as many as inputs."""
    x, weight = given["x"], given["weight"]
    taps = weight.shape[1:-1]
    x = np.pad(x, [(0, 0), *[(padding, padding)] * len(taps), (0, 0)])
    sides = [side - (n - 1) * dilation for side, n in zip(x.shape[1:-1], taps, strict=True)]
    by_tap = np.moveaxis(weight, 0, -2)  # (taps..., outputs, inputs / groups)
    out: Any = np.float32(0)
    for tap in product(*map(range, taps)):
        cut = x[(slice(None), *(slice(t * dilation, t * dilation + side) for t, side in zip(tap, sides, strict=True)))]
        part = by_tap[tap]
        out = out + (cut * part[:, 0] if groups > 1 else cut @ part.T)
    return np.asarray(out)


def rms_norm(x: Array) -> Array:
    """x (..., width) divided by the root of its mean square."""
    return np.asarray(x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + np.float32(1e-6)))


def group_norm(groups: int, given: Mapping[str, Array]) -> Array:
    """x (1, ..., channels) with mean 0 and variance 1 in every group of channels."""
    x = given["x"]
    flat = x.reshape(-1, groups, x.shape[-1] // groups)
    mean, variance = flat.mean(axis=(0, 2), keepdims=True), flat.var(axis=(0, 2), keepdims=True)
    return np.asarray((flat - mean) / np.sqrt(variance + np.float32(1e-5))).reshape(x.shape)


def rope(given: Mapping[str, Array]) -> Array:
    """x (1, tokens, heads, width) with the halves of every head rotated by angles (1, tokens, heads, width / 2)."""
    first, second = np.split(given["x"], 2, axis=-1)
    cos, sin = np.cos(given["angles"]), np.sin(given["angles"])
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def language_rope(given: Mapping[str, Array]) -> Array:
    """x (1, heads, tokens, width) rotated at positions 0, 1, ... with frequencies 10000^(-2i / width)."""
    x = given["x"]
    frequencies = 10000.0 ** (-2 * np.arange(x.shape[-1] // 2) / x.shape[-1])
    angles = (np.arange(x.shape[2])[:, None] * frequencies).astype(np.float32)
    return rope({"x": x, "angles": angles[None, None]})


def fp8(given: Mapping[str, Array]) -> Array:
    """The values of E4M3 codes of any shape, float32."""
    codes = given["codes"].astype(np.int32)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    values = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return np.where(codes & 128, -values, values).astype(np.float32)


def gelu(x: Array) -> Array:
    """The tanh approximation, of any shape."""
    return np.asarray(0.5 * x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + 0.044715 * x**3))), np.float32)
