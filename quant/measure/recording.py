"""Calls of the transformer, recorded while a model works, so that they can be made again."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ltx2.runtime.files.tensors import Array, TensorFile
from ltx2.runtime.layers.rope import Positions
from ltx2.runtime.networks.transformer.inputs import Levels, Ropes, StreamInput, Text
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.streams import Streams

EVERY = 3  # of so many calls of a stage one is kept; which one changes from prompt to prompt
PARTS = ("tokens", "timesteps", "sigma", "positions")
OPTIONAL = ("index", "marked")
NAME = re.compile(rf"replay\.\d{{1,6}}\.(text|\d{{1,6}})\.(?:video|audio)(?:\.({'|'.join(PARTS + OPTIONAL)}))?")
DTYPES = {mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32", mx.int32: "I32"}
Tensors = dict[str, tuple[str, Array]]  # name -> safetensors dtype and values


@dataclass(frozen=True)
class Stream:
    """One stream of a call: tokens (1, tokens, channels) with their noise levels and marks (1, tokens, 1); text
    (1, text tokens, width) and positions (axes, tokens), from which projected text and rotary tables are made."""

    tokens: mx.array
    levels: Levels
    text: mx.array
    positions: Positions
    marked: mx.array | None = None

    @classmethod
    def of(cls, given: StreamInput) -> "Stream":
        return cls(given.tokens, given.levels, given.text.context, given.ropes.positions, given.marked)


Call = Streams[Stream]  # calls with the same text share its array


def given(transformer: Transformer, call: Call) -> Streams[StreamInput]:
    """The inputs that make the same call of a transformer again."""
    texts = transformer.project(call.map(lambda stream: stream.text))
    ropes = transformer.ropes(call.map(lambda stream: stream.positions))

    def again(stream: Stream, made: tuple[Text, Ropes]) -> StreamInput:
        return StreamInput(stream.tokens, stream.levels, *made, marked=stream.marked)

    return call.map(again, texts.zip(ropes))


def velocities(transformer: Transformer, call: Call) -> Streams[mx.array]:
    """What a transformer answers to a call, (1, tokens, channels) of each stream."""
    found = transformer(given(transformer, call))
    mx.eval(*found.values())
    return found


class CallRecorder:
    """Keeps a part of a pipeline's calls."""

    def __init__(self) -> None:
        self._kept: list[tuple[Streams[mx.array], list[Call]]] = []  # texts, and calls with them
        self._prompts = self._seen = 0

    def next_prompt(self) -> None:
        """Calls from now on belong to another prompt."""
        self._prompts += 1

    def next_stage(self) -> None:
        self._seen = self._prompts  # another step's turn for every prompt

    def see(self, call: Call) -> None:
        if self._seen % EVERY == 0:
            text = call.map(lambda stream: stream.text)
            known = (calls for other, calls in self._kept if all(a is b for a, b in text.zip(other).values()))
            calls = next(known, None)
            if calls is None:
                self._kept.append((text, calls := []))
            calls.append(call)
        self._seen += 1

    def tensors(self) -> Tensors:
        """The calls as tensors of a file."""
        tensors: Tensors = {}
        for place, (text, calls) in enumerate(self._kept):
            tensors |= {f"replay.{place}.text.{name}": _tensor(values) for name, values in text.items()}
            for number, call in enumerate(calls):
                for name, stream in call.items():
                    prefix = f"replay.{place}.{number}.{name}"
                    tensors |= {f"{prefix}.{part}": _tensor(values) for part, values in _parts(stream).items()}
        return tensors


def _parts(stream: Stream) -> dict[str, mx.array]:
    """The arrays of a stream by the name of their part, in the shapes of Stream."""
    levels = stream.levels
    parts = {
        "tokens": stream.tokens,
        "timesteps": levels.values[None],
        "sigma": mx.array([[levels.sigma]]),
        "positions": mx.array(stream.positions),
        "index": levels.index,
        "marked": stream.marked,
    }
    return {name: values for name, values in parts.items() if values is not None}


def read_calls(file: TensorFile) -> Iterator[Call]:
    """The calls in a file of statistics. Raises LookupError if a part of one is missing."""
    for place in _numbers(file.tensors, r"replay\.(\d+)\.text\.\w+"):
        names = [name for name in ("video", "audio") if f"replay.{place}.text.{name}" in file.tensors]
        texts = {name: _array(file, f"replay.{place}.text.{name}") for name in names}
        for number in _numbers(file.tensors, rf"replay\.{place}\.(\d+)\.\w+\.tokens"):
            prefix = f"replay.{place}.{number}"
            yield Streams(**{name: _stream(file, f"{prefix}.{name}", text) for name, text in texts.items()})


def _numbers(names: Mapping[str, object], pattern: str) -> list[int]:
    return sorted({int(match[1]) for name in names if (match := re.fullmatch(pattern, name))})


def _stream(file: TensorFile, name: str, text: mx.array) -> Stream:
    """Inverse of `_parts`, with the stream's text (1, text tokens, width)."""
    tokens, timesteps, sigma, positions = (_array(file, f"{name}.{part}") for part in PARTS)
    found = (f"{name}.{part}" for part in OPTIONAL)
    index, marked = (_array(file, part) if part in file.tensors else None for part in found)
    return Stream(tokens, Levels(timesteps[0], index, float(sigma)), text, np.array(positions), marked)


def _tensor(values: mx.array) -> tuple[str, Array]:
    """The safetensors dtype and stored values of an array of any shape."""
    raw = values.view(mx.uint16) if values.dtype == mx.bfloat16 else values
    return DTYPES[values.dtype], np.array(raw)


def _array(file: TensorFile, name: str) -> mx.array:
    """Inverse of `_tensor`, of any shape."""
    values = mx.array(np.array(file.array(name)))
    return values.view(mx.bfloat16) if file.tensors[name].dtype == "BF16" else values
