"""Calls of the denoiser, kept while a model works: what quantizing needs to run its blocks again, one by one."""

import re
from collections.abc import Iterator, Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ltx2.runtime.files.tensors import Array, TensorFile
from ltx2.runtime.generate.observe import Stream, watch_calls
from ltx2.runtime.networks.transformer.inputs import Levels
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.streams import Streams

EVERY = 3  # calls of a stage, of which one is kept; which one changes from prompt to prompt
PARTS = ("tokens", "timesteps", "sigma", "positions")
NAME = re.compile(rf"replay\.\d{{1,6}}\.(text|\d{{1,6}})\.(?:video|audio)(?:\.({'|'.join(PARTS)}))?")
DTYPES = {mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32"}
Tensors = dict[str, tuple[str, Array]]  # name -> safetensors dtype and values


Call = Streams[Stream]  # one denoise step; calls of one prompt share their texts' arrays


class CallRecorder:
    """Keeps a part of a pipeline's denoise steps."""

    def __init__(self) -> None:
        self._kept: list[list[Call]] = []
        self._seen = 0

    def next_prompt(self) -> None:
        """What is seen from now on belongs to another prompt."""
        self._kept.append([])

    def observe(self, network: nn.Module) -> None:
        """Watch a network, which is one stage's, if it is a transformer."""
        if isinstance(network, Transformer):
            self._seen = len(self._kept)  # another step's turn for every prompt
            watch_calls(network, self._see)

    def _see(self, call: Call) -> None:
        if self._seen % EVERY == 0:
            self._kept[-1].append(call)
        self._seen += 1

    def tensors(self) -> Tensors:
        """The calls as they are written to a file."""
        tensors: Tensors = {}
        for prompt, calls in enumerate(self._kept):
            for number, call in enumerate(calls):
                for name, stream in call.items():
                    tensors[f"replay.{prompt}.text.{name}"] = _tensor(stream.text)
                    values = vars(stream) | {"positions": mx.array(stream.positions)}
                    values |= {"timesteps": stream.levels.values[None], "sigma": mx.array([[stream.levels.sigma]])}
                    tensors |= {f"replay.{prompt}.{number}.{name}.{part}": _tensor(values[part]) for part in PARTS}
        return tensors


def read_calls(file: TensorFile) -> Iterator[Call]:
    """The calls that a file of statistics holds. Raises LookupError where a part of one is missing."""
    for prompt in _numbers(file.tensors, r"replay\.(\d+)\.text\.video"):
        texts = {name: _array(file, f"replay.{prompt}.text.{name}") for name in ("video", "audio")}
        for number in _numbers(file.tensors, rf"replay\.{prompt}\.(\d+)\.video\.tokens"):
            yield Call(*(_stream(file, f"replay.{prompt}.{number}.{name}", text) for name, text in texts.items()))


def _numbers(names: Mapping[str, object], pattern: str) -> list[int]:
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(pattern, name)))


def _stream(file: TensorFile, name: str, text: mx.array) -> Stream:
    tokens, timesteps, sigma, positions = (_array(file, f"{name}.{part}") for part in PARTS)
    return Stream(tokens, Levels(timesteps[0], sigma=sigma), text, np.array(positions))


def _tensor(values: mx.array) -> tuple[str, Array]:
    raw = values.view(mx.uint16) if values.dtype == mx.bfloat16 else values
    return DTYPES[values.dtype], np.array(raw)


def _array(file: TensorFile, name: str) -> mx.array:
    values = mx.array(np.array(file.array(name)))
    return values.view(mx.bfloat16) if file.tensors[name].dtype == "BF16" else values
