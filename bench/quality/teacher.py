"""A model held against its reference while each makes the same clip.

The reference's run is recorded: some inputs of every layer that the other model has packed, and every step's tokens
and velocities. The other model is then given these same inputs, layer by layer and step by step (teacher forcing),
before it makes the clip on its own. Only one network is in memory at a time."""

from collections import Counter
from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ltx2.bench.quality.metrics import Difference
from ltx2.convert.plan.entries import Layer
from ltx2.quant.measure.recording import Call, Stream, velocities
from ltx2.runtime.events import Event
from ltx2.runtime.generate.networks import Observe
from ltx2.runtime.generate.observe import watch
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.generate.records.clip import Clip, Generated
from ltx2.runtime.generate.records.exchange import read_embeddings
from ltx2.runtime.layers.linear import LinearLayer
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.transformer.config import TransformerConfig
from ltx2.runtime.networks.transformer.inputs import Skips, StreamInput
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.sampling.guidance import TEXT
from ltx2.runtime.streams import Streams

# Components with packed layers: every n-th call of a layer is kept, and so many inputs of it. A transformer is called
# once a step, the others once a clip. A published model's inputs take 0.6 GB.
KEPT = {"text_encoder": (1, 16), "connectors": (1, 16), "transformer": (3, 5)}
STREAMS = ("video", "audio")

StepKey = tuple[int, int, float]  # stage, step (both from 1), noise level
Differences = dict[str, Difference]  # of both streams


@dataclass(frozen=True)
class Case:
    """Options of `generate` without the prompt, and the dtype that both models compute in (None: each in that of its
    weights)."""

    options: Mapping[str, Any]
    dtype: mx.Dtype | None = None


@dataclass(frozen=True)
class Rows:
    """Some inputs (rows, width) of a layer, its outputs without the bias (rows, outputs), and the bias (outputs,)."""

    inputs: mx.array
    products: mx.array
    bias: mx.array | None


@dataclass(frozen=True)
class Step:
    """A call of the transformer without skips, and the velocities (1, tokens, channels) that it has returned."""

    call: Call
    velocities: Streams[mx.array]


@dataclass(frozen=True)
class Recording:
    """The reference's run for one prompt."""

    prompt: str
    rows: Mapping[Layer, list[Rows]]
    stages: list[list[Step]]
    contexts: Streams[mx.array]
    clip: Clip


@dataclass(frozen=True)
class Comparison:
    """The other model's run for one prompt against the reference's: every layer on the reference's inputs, every step
    on its tokens; text, latents and clip as the model made them on its own."""

    layers: Mapping[Layer, Difference]
    velocity: Mapping[StepKey, Differences]
    contexts: Differences
    latents: Differences
    clip: Clip


def packed_layers(folder: ModelFolder) -> dict[str, set[str]]:
    """Paths of the packed layers, by component."""
    found: dict[str, set[str]] = {}
    for component in KEPT:
        names = {name for file in folder.tensor_files(component) for name in file.tensors}
        parts = ("scales", "weight_scale")
        found[component] = {n.rpartition(".")[0] for n in names if n.rpartition(".")[2] in parts}
    return found


def record(
    model: Path, prompt: str, case: Case, layers: Mapping[str, Collection[str]]
) -> Generator[Event, None, Recording]:
    """Make the clip with the reference; returns its run. `layers`: the layers whose inputs to keep, by component."""
    recorder = _Recorder(layers, case.dtype)
    contexts, clip = yield from _generated(model, prompt, case, recorder)
    return Recording(prompt, recorder.rows, recorder.stages, contexts, clip)


def compare(model: Path, recording: Recording, case: Case) -> Generator[Event, None, Comparison]:
    """Give the other model the reference's inputs, then let it make the clip; returns the comparison."""
    pupil = _Pupil(recording, case.dtype)
    contexts, clip = yield from _generated(model, recording.prompt, case, pupil)
    text = {name: _difference(getattr(recording.contexts, name), getattr(contexts, name)) for name in STREAMS}
    latents = {name: Difference.between(recording.clip.latents[name], clip.latents[name]) for name in STREAMS}
    return Comparison(pupil.layers, pupil.velocity, text, latents, clip)


def make(model: Path, prompt: str, case: Case) -> Generator[Event, None, Clip]:
    """Make a clip without comparing it; returns it."""
    _, clip = yield from _generated(model, prompt, case, lambda _, network: _cast(network, case.dtype))
    return clip


def _generated(
    model: Path, prompt: str, case: Case, observe: Observe
) -> Generator[Event, None, tuple[Streams[mx.array], Clip]]:
    """Run the pipeline; returns the text's contexts (1, tokens, width), and the clip."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "contexts.safetensors"
        pipeline = Pipeline(model, observe)
        for event in pipeline.stream(prompt, **case.options, save_embeddings=file):
            if isinstance(event, Generated):
                config = TransformerConfig.from_dict(pipeline.folder.config("transformer"))
                return read_embeddings(file, config.context_dims)[TEXT], event.clip
            yield event
    raise RuntimeError("the generation ended without a clip")


class _Recorder:
    """Observes the reference's networks."""

    def __init__(self, layers: Mapping[str, Collection[str]], dtype: mx.Dtype | None) -> None:
        self.rows: dict[Layer, list[Rows]] = {}
        self.stages: list[list[Step]] = []
        self._calls: Counter[Layer] = Counter()
        self._layers = layers
        self._dtype = dtype

    def __call__(self, component: str, network: nn.Module) -> None:
        _cast(network, self._dtype)
        if component in KEPT:
            watch(network, partial(self._see, component))
        if isinstance(network, Transformer):
            self.stages.append([])
            network.around = self._call

    def _see(self, component: str, path: str, layer: LinearLayer, x: mx.array) -> None:
        """A layer is called with x (..., width)."""
        every, _ = KEPT[component]
        if path in self._layers[component]:
            if self._calls[component, path] % every == 0:
                self._keep_rows((component, path), layer, x)
            self._calls[component, path] += 1

    def _keep_rows(self, key: Layer, layer: LinearLayer, x: mx.array) -> None:
        kept = self.rows.setdefault(key, [])
        inputs, bias = _some_rows(x, KEPT[key[0]][1], len(kept)), layer.get("bias")
        kept.append(Rows(inputs, _product(layer, inputs, bias), bias))
        mx.eval(inputs, kept[-1].products)  # else the whole input would stay in memory

    def _call(self, transformer: Transformer, inputs: Streams[StreamInput], skips: Skips) -> Streams[mx.array]:
        """The velocities (1, tokens, channels), which are kept if they are the prompt's without skips."""
        returned = transformer.velocities(inputs, skips)
        text = next(inputs.values()).text
        if not self.stages[-1]:
            self._text = text  # of a guided step's calls, the first is the prompt's
        if skips.nothing and text is self._text:
            mx.eval(*returned.values())
            self.stages[-1].append(Step(inputs.map(Stream.of), returned))
        return returned


class _Pupil:
    """Observes the other model's networks, and gives them the reference's inputs first."""

    def __init__(self, recording: Recording, dtype: mx.Dtype | None) -> None:
        self.layers: dict[Layer, Difference] = {}
        self.velocity: dict[StepKey, Differences] = {}
        self._recording = recording
        self._dtype = dtype
        self._stage = 0

    def __call__(self, component: str, network: nn.Module) -> None:
        _cast(network, self._dtype)
        if component in KEPT:
            watch(network, partial(self._see, component))
        if isinstance(network, Transformer):
            network.around = self._taught

    def _see(self, component: str, path: str, layer: LinearLayer, _: mx.array) -> None:
        rows = self._recording.rows.get(key := (component, path))
        if rows and key not in self.layers:  # at its first call, when its weights are loaded
            pairs = ((row.products, _product(layer, row.inputs, row.bias)) for row in rows)
            self.layers[key] = sum((_difference(*pair) for pair in pairs), Difference())

    def _taught(self, transformer: Transformer, inputs: Streams[StreamInput], skips: Skips) -> Streams[mx.array]:
        """The stage's first call; before it the network, now ready, answers the reference's calls."""
        transformer.around = None
        steps = self._recording.stages[self._stage]
        self._stage += 1
        for number, step in enumerate(steps, start=1):
            pairs = step.velocities.zip(velocities(transformer, step.call))
            sigma = float(next(step.call.values()).levels.sigma)
            self.velocity[self._stage, number, sigma] = {name: _difference(*pair) for name, pair in pairs.items()}
        return transformer(inputs, skips)


def _cast(network: nn.Module, dtype: mx.Dtype | None) -> None:
    if dtype is not None:
        network.set_dtype(dtype)


def _some_rows(x: mx.array, count: int, call: int) -> mx.array:
    """Up to `count` rows (rows, width) of a layer's input (..., width), evenly spaced, different ones in each call."""
    rows = x.reshape(-1, x.shape[-1])
    total = rows.shape[0]
    step = max(1, total // count)
    return rows[call % step :: step][:count]


def _product(layer: LinearLayer, inputs: mx.array, bias: mx.array | None) -> mx.array:
    """The layer's output (rows, outputs) without the bias, in float32: 16 bits would round as coarsely as 8-bit
    codes."""
    y = layer.multiply(inputs.astype(mx.float32))
    return y if bias is None else y - bias.astype(mx.float32)


def _difference(reference: mx.array, other: mx.array) -> Difference:
    """Of two arrays of any common shape."""
    return Difference.between(*(np.array(values.astype(mx.float32)) for values in (reference, other)))
