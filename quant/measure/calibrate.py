"""Measures statistics of the inputs of a model's linear layers while it generates: from the prompt through text
encoder, connectors and every denoise step to the latents.

Layers are watched, not changed. Inputs are summed up one by one, so calibrating takes the memory of generating."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ltx2 import __version__
from ltx2.convert.plan.entries import Layer
from ltx2.convert.plan.folder import folder_plan
from ltx2.quant.codes.inputs import Inputs
from ltx2.quant.measure.recording import CallRecorder, Stream
from ltx2.quant.measure.sensitivity import Steps, measure
from ltx2.quant.measure.statistics import KIND, About, identity, write_statistics
from ltx2.runtime.errors import NumericsError
from ltx2.runtime.events import Event, PromptStarted
from ltx2.runtime.files.jsonfile import read_object
from ltx2.runtime.files.paths import check_output
from ltx2.runtime.files.tensors import Array
from ltx2.runtime.generate.job import LATENTS
from ltx2.runtime.generate.observe import watch
from ltx2.runtime.generate.options.choices import with_fixed_length
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.generate.records.places import check_saved
from ltx2.runtime.layers.linear import LinearLayer
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.transformer.inputs import Skips, StreamInput
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.streams import Streams

BUILT_IN = Path(__file__).with_name("prompts.json")
WATCHED = ("text_encoder", "connectors", "transformer")  # components with layers that are quantized
ROWS = 1024  # of an input, added up in float32


@dataclass(frozen=True)
class Calibrated(Event):
    """Last event of a calibration: the file, its number of layers, and the number of inputs (tokens of all steps) of
    the layer with most."""

    path: str
    layers: int
    prompts: int
    inputs: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The command's JSON result."""
        return {"stats": self.path, **{k: v for k, v in asdict(self).items() if k != "path"}}


@dataclass(frozen=True)
class _Moments:
    """The number of some inputs; their sum and the sum of their squares, float64 (width,)."""

    count: int
    total: Array
    squares: Array

    def __add__(self, other: "_Moments") -> "_Moments":
        return _Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @classmethod
    def of(cls, x: mx.array) -> "_Moments":
        """Of all tokens of x (..., width)."""
        rows = x.reshape(-1, x.shape[-1])
        sums = [_sums(rows[start : start + ROWS]) for start in range(0, len(rows), ROWS)]
        mx.eval(sums)
        total, squares = np.sum([[np.array(values, np.float64) for values in pair] for pair in sums], axis=0)
        return cls(len(rows), total, squares)

    def inputs(self) -> Inputs:
        return Inputs((self.squares / self.count).astype(np.float32), (self.total / self.count).astype(np.float32))


def _sums(rows: mx.array) -> tuple[mx.array, mx.array]:
    """The sums of rows (rows, width) and of their squares, float32 (width,)."""
    values = rows.astype(mx.float32)
    return values.sum(axis=0), mx.square(values).sum(axis=0)


class Recorder:
    """Sums up the inputs of networks' linear layers, and shows the transformer's calls to `keepers`; `observe` is for a
    Pipeline."""

    def __init__(self, keepers: Sequence[CallRecorder | Steps] = ()) -> None:
        self.keepers = keepers
        self._moments: dict[Layer, _Moments] = {}
        self._latest: tuple[mx.array, _Moments] | None = None

    def observe(self, component: str, network: nn.Module) -> None:
        """Watch a network from now on, if its layers may be quantized."""
        self._latest = None
        if component in WATCHED:
            watch(network, partial(self._see, component))
        if isinstance(network, Transformer):
            network.around = self._call
            for keeper in self.keepers:
                keeper.next_stage()

    def _call(self, transformer: Transformer, inputs: Streams[StreamInput], skips: Skips) -> Streams[mx.array]:
        if skips.nothing and all(stream.attention is None for stream in inputs.values()):
            call = inputs.map(Stream.of)
            for keeper in self.keepers:
                keeper.see(call)
        return transformer.velocities(inputs, skips)

    def _see(self, component: str, path: str, _: LinearLayer, x: mx.array) -> None:
        if self._latest is None or self._latest[0] is not x:  # queries, keys and values are made of the same input
            self._latest = x, _Moments.of(x)
        key, moments = (component, path), self._latest[1]
        self._moments[key] = self._moments[key] + moments if key in self._moments else moments

    @property
    def most(self) -> int:
        """The number of inputs of the layer with most."""
        return max((moments.count for moments in self._moments.values()), default=0)

    def layers(self) -> dict[Layer, Inputs]:
        """The statistics of all layers. Raises NumericsError if one is not finite."""
        layers = {layer: moments.inputs() for layer, moments in self._moments.items()}
        for (component, path), inputs in layers.items():
            if inputs.mean is None or not np.isfinite([inputs.mean, inputs.mean_square]).all():
                what = f"the inputs of {component}.{path} are not finite"
                raise NumericsError(what, "the model computes no numbers there", "verify the model: ltx2 verify MODEL")
        return layers


def calibrate(
    model: Path,
    out: Path,
    prompts: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    gptq: bool = False,
    sensitivity: bool = False,
) -> Iterator[Event]:
    """Generate the prompts (none: those that come with ltx2) up to their latents, and write the statistics of all
    linear layers' inputs; with `gptq` also some of the transformer's calls, with `sensitivity` also the change of the
    velocity by errors of its layers. The last event is Calibrated; the file appears only then. `options` are those of
    generating; the seed is that of the first prompt, the next ones have the following seeds.

    Raises what generating raises, and InputError if `out` cannot be written or is a file that is no statistics.
    """
    started = time.monotonic()
    calls, steps = CallRecorder() if gptq else None, Steps() if sensitivity else None
    recorder, options = Recorder([keeper for keeper in (calls, steps) if keeper is not None]), dict(options or {})
    pipeline, prompts = Pipeline(model, recorder.observe), tuple(prompts) or built_in_prompts()
    check_output(out)
    check_saved(out, KIND, pipeline.folder.path, fix="choose another name")
    seed = options.pop("seed", None) or 0
    for number, prompt in enumerate(prompts):
        yield PromptStarted(number + 1, len(prompts), prompt)
        for keeper in recorder.keepers:
            keeper.next_prompt()
        usual = {"prompt": prompt, "seed": seed + number, "no_audio": True}
        request = Request.from_options(usual | with_fixed_length(pipeline.folder, options))
        yield from pipeline.events(request, LATENTS)
    found = (yield from measure(pipeline.folder, steps)) if steps is not None else None
    given = {name: value for name, value in request.recorded().items() if name in options}
    about = _about(pipeline.folder, prompts, given | {"seed": seed})
    layers = recorder.layers()
    write_statistics(out, layers, about, found, calls.tensors() if calls is not None else None)
    yield Calibrated(str(out), len(layers), len(prompts), recorder.most, time.monotonic() - started)


def _about(folder: ModelFolder, prompts: Sequence[str], options: Mapping[str, Any]) -> About:
    plan, manifest = folder_plan(folder), folder.manifest
    identities = {name: identity(plan, name) for name in WATCHED}
    return About(__version__, manifest.release, manifest.variant, identities, manifest.sources, tuple(prompts), options)


def built_in_prompts() -> tuple[str, ...]:
    """The prompts that come with ltx2."""
    return tuple(read_object(BUILT_IN)["prompts"])
