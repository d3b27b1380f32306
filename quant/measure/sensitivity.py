"""How much the velocity changes where outputs of the transformer's linear layers are wrong.

Layers of one kind in neighbouring blocks are tried together: their outputs get an error of known size, and the step is
computed again from the same tokens. The error is that of a random change of the weights: like that of packing, and
unlike noise, it is the same for every token, so attention does not average it away (on the demo model, noise predicted
up to 100 times too little; this was within a factor of 2)."""

import re
import time
import zlib
from collections import defaultdict
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

import mlx.core as mx

from ltx2.convert.plan.entries import Layer, natural_order
from ltx2.quant.measure.recording import Call, velocities
from ltx2.quant.recipes.recipe import EVERY, block_counts, block_of, load_recipe
from ltx2.runtime.events import Event, PhaseStarted, StepDone
from ltx2.runtime.files.jsonfile import read_object
from ltx2.runtime.generate.observe import intercept
from ltx2.runtime.layers.linear import LinearLayer
from ltx2.runtime.model.layout import TRANSFORMER, ModelFolder
from ltx2.runtime.networks.load import load_network, read_weights
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.streams import Streams

PHASE = "sensitivity"


@dataclass(frozen=True)
class Method:
    """How to measure; sensitivity.json explains the numbers."""

    error: float
    bands: int
    prompts: int
    steps: int
    weights: Mapping[str, float]


@cache
def load_method() -> Method:
    """The method, which is data."""
    data = read_object(Path(__file__).with_name("sensitivity.json"))
    return Method(**{name: value for name, value in data.items() if name != "about"})


class Steps:
    """Keeps the transformer's calls in the first stage of some prompts."""

    def __init__(self) -> None:
        self.method = load_method()
        self._prompts: list[list[Call]] = []
        self._stages = 0  # of a prompt, begun so far

    def next_prompt(self) -> None:
        """Calls from now on belong to another prompt."""
        self._prompts.append([])
        self._stages = 0

    def next_stage(self) -> None:
        self._stages += 1

    def see(self, call: Call) -> None:
        if self._stages == 1 and len(self._prompts) <= self.method.prompts:
            self._prompts[-1].append(call)

    def chosen(self) -> list[Call]:
        """As many calls of every prompt as the method asks for."""
        return [steps[n] for steps in self._prompts for n in _spread(len(steps), self.method.steps)]


def measure(folder: ModelFolder, kept: Steps) -> Generator[Event, None, dict[Layer, float]]:
    """Returns by layer the squared relative change of the velocity per squared relative error of its output, both
    streams together, averaged over the steps. The change by a group is divided evenly among its layers.

    Loads the whole transformer, and computes every step once for each group.
    """
    transformer, method, steps = load_network(folder, TRANSFORMER, Transformer), kept.method, kept.chosen()
    read_weights(transformer)
    groups, disturbed = _groups(transformer, method.bands), _Disturbance(method.error)
    intercept(transformer, disturbed.call)
    totals = [0.0] * len(groups)
    yield PhaseStarted(PHASE)
    for number, step in enumerate(steps):
        disturbed.paths = frozenset()
        clean = velocities(transformer, step)
        for index, group in enumerate(groups):
            started, disturbed.paths, disturbed.seed = time.perf_counter(), group, number * len(groups) + index
            totals[index] += _change(clean, velocities(transformer, step), method)
            count, seconds = len(steps) * len(groups), time.perf_counter() - started
            yield StepDone(PHASE, disturbed.seed + 1, count, seconds, mx.get_active_memory())
    shares = (total / len(steps) / method.error**2 / len(group) for total, group in zip(totals, groups, strict=True))
    return {(TRANSFORMER, path): share for share, group in zip(shares, groups, strict=True) for path in sorted(group)}


class _Disturbance:
    """Adds an error to the outputs of some layers."""

    def __init__(self, error: float) -> None:
        self.paths: frozenset[str] = frozenset()
        self.seed = 0
        self._error = error

    def call(self, path: str, layer: LinearLayer, x: mx.array) -> mx.array:
        """The layer's output (..., outputs) for x (..., width); for one of `paths`, with the error of a random change
        of its weights."""
        y = layer.multiply(x)
        if path not in self.paths:
            return y
        product = y - layer["bias"] if "bias" in layer else y
        # The same change in every call, for a layer that is called in parts.
        key = mx.random.key(zlib.crc32(f"{self.seed} {path}".encode()))
        change = x @ mx.random.normal((x.shape[-1], y.shape[-1]), x.dtype, key=key)
        return y + change * (self._error * _size(product) / _size(change)).astype(y.dtype)


def _size(values: mx.array) -> mx.array:
    """The root mean square of an array of any shape, a scalar."""
    return mx.sqrt(mx.mean(mx.square(values.astype(mx.float32))))


def _groups(transformer: Transformer, bands: int) -> list[frozenset[str]]:
    """Groups of layers to try together, by their paths."""
    paths = [path for path, layer in transformer.named_modules() if isinstance(layer, LinearLayer)]
    paths = sorted(load_recipe(EVERY).bits(TRANSFORMER, paths, 8), key=natural_order)
    counts, groups = block_counts(paths), defaultdict(set)
    for path in paths:
        block = block_of(path)
        band = block[1] * bands // counts[block[0]] if block else 0
        groups[band, re.sub(r"\.\d+\.", ".", path, count=1)].add(path)
    return [frozenset(group) for group in groups.values()]


def _change(clean: Streams[mx.array], changed: Streams[mx.array], method: Method) -> float:
    """The weighted sum of the squared relative changes of both streams' velocities (1, tokens, channels)."""
    total = 0.0
    for stream, (velocity, other) in clean.zip(changed).items():
        relative = _size(other - velocity) / _size(velocity)
        total += method.weights[stream] * cast(float, relative.item()) ** 2
    return total


def _spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` numbers below `count`, evenly spaced, the first and the last among them."""
    if wanted >= count or wanted < 2:
        return list(range(count))[:wanted]
    return [round(n * (count - 1) / (wanted - 1)) for n in range(wanted)]
