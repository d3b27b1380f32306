"""Synthetic linear layers on which quantization is judged: always the same weights, with what their inputs look like.

They imitate what makes trained layers hard to quantize: heavy tails, uneven rows and columns, a few large columns;
inputs whose channels differ in size, have a mean, and correlate, with a few massive channels."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

KINDS = (("heavy", "adaln"), ("chan", "adaln"), ("gauss", "adaln"), ("heavy", "gelu"))  # of weights, of inputs
CHANNEL_SPREAD = 0.7  # log of the channels' sizes
RANK = 256  # directions in which inputs correlate; the rest of their variance is white


@dataclass(frozen=True)
class Layer:
    """Weights (out, in), and inputs (tokens, in): some to calibrate with, some to judge by."""

    weights: Floats
    calibration: Floats
    inputs: Floats


def layer(weights: str, inputs: str, width: int = 4096, rows: int = 256, tokens: int = 512) -> Layer:
    """A layer by the kinds of its weights ("heavy", "chan" or "gauss") and of its inputs ("adaln", modulated and
    normalised, or "gelu", the activations of a feed-forward)."""
    draw = np.random.default_rng(7)
    x = _inputs(inputs, (3 * tokens, width), draw)
    return Layer(_weights(weights, (rows, width), draw), x[tokens:], x[:tokens])


def _weights(kind: str, shape: tuple[int, int], draw: np.random.Generator) -> Floats:
    rows, width = shape
    if kind == "gauss":
        return (0.02 * draw.standard_normal(shape)).astype(np.float32)
    values, spread = (draw.standard_t(5, shape), 0.4) if kind == "heavy" else (draw.standard_normal(shape), 0.35)
    values *= np.exp(spread * draw.standard_normal((rows, 1))) * np.exp(spread * draw.standard_normal((1, width)))
    if kind == "heavy":
        values[:, draw.choice(width, width // 128, replace=False)] *= 4
    return (0.02 * values).astype(np.float32)


def _inputs(kind: str, shape: tuple[int, int], draw: np.random.Generator) -> Floats:
    tokens, width = shape
    sizes = np.exp(CHANNEL_SPREAD * draw.standard_normal(width))
    shift = 0.5 * draw.standard_normal(width)
    massive = draw.choice(width, width // 512, replace=False)
    directions = draw.standard_normal((RANK, width)) / np.sqrt(np.arange(1, RANK + 1))[:, None]
    directions /= np.sqrt(np.square(directions).sum(axis=0).mean())
    values = (draw.standard_normal((tokens, RANK)) @ directions + draw.standard_normal(shape)) / np.sqrt(2)
    values = values * sizes + shift
    if kind == "gelu":
        values = 0.5 * values * (1 + np.tanh(np.sqrt(2 / np.pi) * (values + 0.044715 * values**3)))
    else:
        values[:, massive] *= 12
    return values.astype(np.float32)
