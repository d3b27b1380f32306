"""Runs a transformer's blocks again, one after the other, on recorded calls, and measures the correlations of their
layers' inputs.

The matrices of all layers would be larger than the model, so they are made when they are needed, block by block, from
the weights before packing: nothing depends on earlier packing, or on where a run was interrupted.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ltx2.convert.output.pieces import values_of
from ltx2.convert.plan.entries import Move, Plan, decoded, kept_layers
from ltx2.quant.codes.correlations import PANEL, Correlations, Feedback, make_feedback
from ltx2.quant.codes.on_cpu import OnCpu
from ltx2.quant.codes.on_gpu import OnGpu, is_gpu
from ltx2.quant.measure.recording import Call, Stream, given
from ltx2.runtime.errors import InputError
from ltx2.runtime.generate.observe import watch
from ltx2.runtime.layers.linear import LinearLayer
from ltx2.runtime.model.forms import Form
from ltx2.runtime.model.layout import TRANSFORMER
from ltx2.runtime.networks.transformer.block import StreamContext, TransformerBlock
from ltx2.runtime.networks.transformer.config import TransformerConfig
from ltx2.runtime.networks.transformer.inputs import Ropes, StreamInput, Text
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.streams import Streams

BLOCKS = "transformer_blocks"
LAYER = re.compile(rf"{BLOCKS}\.(\d{{1,3}})\.(.+)")
ROWS = 2048  # of an input, multiplied at a time
KEPT = 2  # feedbacks to keep: layers with the same input are packed near each other


class _State(NamedTuple):
    """A call between two blocks: the inputs of the next one, x (1, tokens, width) of each stream."""

    x: Streams[mx.array]
    contexts: Streams[StreamContext]


class Replay:
    """Feedback for the layers of a plan's transformer blocks. Quick for layers in the order of their blocks; an earlier
    block makes it start from the beginning."""

    def __init__(self, plan: Plan, calls: Sequence[Call]) -> None:
        kept = [layer for layer in kept_layers(plan) if layer[0] == TRANSFORMER]
        moves = decoded(plan, dict.fromkeys(kept, "bf16")).moves(TRANSFORMER)
        self._weights = {move.key: move for move in moves}
        self._config = plan.components[TRANSFORMER].config
        self._calls = calls
        self._states: list[_State] = []
        self._next = 0  # the block that the states are for
        self._sums: _Sums | None = None  # of the block before
        self._feedbacks: dict[tuple[str, int, int, bool], Feedback] = {}

    @staticmethod
    def covers(component: str, layer: str) -> bool:
        """Whether a layer belongs to a transformer block."""
        return component == TRANSFORMER and LAYER.fullmatch(layer) is not None

    def feedback(self, layer: str, form: Form, biased: bool) -> Feedback:
        """For a layer of a block, stored in this form.

        Raises InputError for calls of another transformer, ValueError for correlations that no inputs can have.
        """
        match = LAYER.fullmatch(layer)
        assert match is not None, "as `covers` says"
        block, path = int(match[1]), match[2]
        if self._sums is None or self._next != block + 1:
            self._feedbacks.clear()
            self._sums = None  # free the last block's before the next ones are made
            self._sums = self._measured(block)
        key = (self._sums.twin[path], form.group_size, form.rotation, biased)
        if key not in self._feedbacks:
            if len(self._feedbacks) == KEPT:
                del self._feedbacks[next(iter(self._feedbacks))]
            found, on = self._sums.correlations(path), OnGpu() if is_gpu() else OnCpu()
            self._feedbacks[key] = make_feedback(found, form, biased, on)
        return self._feedbacks[key]

    def _measured(self, block: int) -> "_Sums":
        if not self._states or self._next > block:
            self._states, self._next = self._begun(), 0
        while self._next < block:
            self._run(self._block())
        network, sums = self._block(), _Sums(len({id(next(call.values()).text) for call in self._calls}))
        watch(network, sums.see)
        self._run(network)
        return sums

    def _begun(self) -> list[_State]:
        """All calls at the first block."""
        network = Transformer(TransformerConfig.from_dict({**self._config, "num_layers": 0}))
        self._load(network, {key: key for key in self._weights if not key.startswith(f"{BLOCKS}.")})
        first, texts, ropes = _FirstBlock(), dict[int, Text](), dict[tuple[Any, ...], Ropes]()
        network.transformer_blocks = cast(list[TransformerBlock], [first])

        def shared(stream: Stream, made: StreamInput) -> StreamInput:
            """Holds once what several calls have in common."""
            positions = stream.positions.shape, stream.positions.tobytes()
            text = texts.setdefault(id(stream.text), made.text)
            return replace(made, text=text, ropes=ropes.setdefault(positions, made.ropes))

        try:
            for call in self._calls:
                network(call.map(shared, given(network, call)))
                x, contexts = first.given[-1]
                mx.eval(*x.values(), *((vars(context), context.text.tokens) for context in contexts.values()))
        except (ValueError, IndexError) as error:
            fix = "calibrate this model"
            raise InputError("the calls in the statistics do not fit the model", str(error), fix) from error
        return first.given

    def _block(self) -> TransformerBlock:
        """The next block, with its weights."""
        network, prefix = TransformerBlock(TransformerConfig.from_dict(self._config)), f"{BLOCKS}.{self._next}."
        self._load(network, {key.removeprefix(prefix): key for key in self._weights if key.startswith(prefix)})
        return network

    def _load(self, network: nn.Module, names: dict[str, str]) -> None:
        """`names`: parameter of the network -> tensor of the model."""
        network.load_weights([(name, _array(self._weights[key])) for name, key in names.items()], strict=True)
        network.eval()

    def _run(self, block: TransformerBlock) -> None:
        for index, state in enumerate(self._states):
            x = block(*state)
            mx.eval(*x.values())
            self._states[index] = state._replace(x=x)
        self._next += 1


def _array(move: Move) -> mx.array:
    """A tensor of any shape before packing."""
    values = mx.array(np.concatenate(list(values_of(move))))
    return values.view(mx.bfloat16) if move.spec.dtype == "BF16" else values


class _FirstBlock:
    """In place of a block: keeps its inputs."""

    def __init__(self) -> None:
        self.given: list[_State] = []

    def __call__(self, x: Streams[mx.array], contexts: Streams[StreamContext], _: int) -> Streams[mx.array]:
        self.given.append(_State(x, contexts))
        return x


class _Sums:
    """Sums over the inputs of a block's layers, and over products of their columns. `twin`: layer -> the first layer
    with the same inputs."""

    def __init__(self, prompts: int) -> None:
        self._prompts = prompts
        self.twin: dict[str, str] = {}
        self._products: dict[str, list[mx.array]] = {}  # in panels, so that adding takes little extra memory
        self._totals: dict[str, mx.array] = {}
        self._tokens: dict[str, int] = {}
        self._latest: tuple[str, mx.array] | None = None
        self._correlations: dict[str, Correlations] = {}

    def see(self, path: str, _: LinearLayer, x: mx.array) -> None:
        """Add the inputs x (..., width) of a layer."""
        if path not in self.twin:
            same = self._latest is not None and self._latest[1] is x
            self.twin[path] = self.twin[self._latest[0]] if self._latest and same else path
        self._latest = path, x
        if self.twin[path] == path:
            self._add(path, x.reshape(-1, x.shape[-1]))

    def _add(self, path: str, rows: mx.array) -> None:
        """Add rows (rows, width)."""
        spans = [slice(start, start + PANEL) for start in range(0, rows.shape[1], PANEL)]
        products = self._products.setdefault(path, [mx.zeros(()) for _ in spans])
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS].astype(mx.float32)
            self._totals[path] = self._totals.get(path, 0) + part.sum(axis=0)
            for place, span in enumerate(spans):
                products[place] = mx.addmm(products[place], part[:, span].T, part)
                mx.async_eval(products[place])  # the device may free the one before
            mx.eval(self._totals[path], products)
        self._tokens[path] = self._tokens.get(path, 0) + len(rows)

    def correlations(self, path: str) -> Correlations:
        """Of a layer's inputs."""
        path = self.twin[path]
        if path not in self._correlations:
            products, tokens = self._products.pop(path), self._tokens[path]
            for place, panel in enumerate(products):
                products[place] = panel / tokens
                mx.eval(products[place])
            mean = np.array(self._totals[path]) / np.float32(tokens)
            self._correlations[path] = Correlations(products, mean, tokens, self._prompts)
        return self._correlations[path]
