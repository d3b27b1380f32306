"""The res_2s sampler as MODEL.md's formulas (3.4, 15.1) in float64, with the anchor refined in a loop."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
LAST = 0.0011


def res_2s(
    x: Array,
    levels: Sequence[float],
    predict: Callable[[Array, float], Array],
    draw: Callable[[str, int], Array],
    pin: Callable[[Array], Array] = lambda x: x,
) -> Array:
    """From noise at levels[0] to x0; `levels` are the schedule's, without its 0. `predict(x, level)`: x0, not pinned.
    `draw("substep" or "step", number)`: the step's noise, standardised."""
    for number, (sigma, following) in enumerate(pairwise((*levels, LAST))):
        anchor, h = x, np.log(sigma / following)
        phi1, phi2 = (lambda z: (np.exp(z) - 1) / z), (lambda z: (np.exp(z) - 1 - z) / z**2)
        a21, b2 = 0.5 * phi1(-h / 2), 2 * phi2(-h)
        b1, middle = phi1(-h) - b2, np.sqrt(sigma * following)
        d1 = pin(predict(x, sigma))
        between = anchor + h * a21 * (d1 - anchor)
        between = pin(_noised(between, anchor, sigma, middle, draw("substep", number)))
        if h < 0.5 and sigma > 0.03:
            for _ in range(100):
                anchor = between - h * a21 * (d1 - anchor)
        d2 = pin(predict(between, middle))
        x = anchor + h * (b1 * (d1 - anchor) + b2 * (d2 - anchor))
        x = pin(_noised(x, anchor, sigma, following, draw("step", number)))
    return pin(predict(x, LAST))


def _noised(y: Array, anchor: Array, sigma: float, level: float, noise: Array) -> Array:
    up = min(0.5 * level, 0.9999 * level)
    rest = np.sqrt(level**2 - up**2)
    alpha = (1 - level) + rest
    epsilon = (anchor - y) / (sigma - level)
    return alpha * ((anchor - sigma * epsilon) + rest / alpha * epsilon) + up * noise
