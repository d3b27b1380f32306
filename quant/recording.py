"""Calls of the denoiser, kept while a model works: what quantizing needs to run its blocks again, one by one."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ltx2.runtime.tensorfile import Array, TensorFile
from ltx2.runtime.transformer.model import Prepared, StreamInput, Transformer
from ltx2.runtime.transformer.rope import Positions

EVERY = 3  # calls of a stage, of which one is kept; which one changes from prompt to prompt
PARTS = ("tokens", "timesteps", "sigma", "positions")
NAME = re.compile(rf"replay\.\d{{1,6}}\.(text|\d{{1,6}})\.(?:video|audio)(?:\.({'|'.join(PARTS)}))?")
DTYPES = {mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32"}
Tensors = dict[str, tuple[str, Array]]  # name -> safetensors dtype and values


@dataclass(frozen=True)
class Stream:
    """What one stream was given: tokens and noise levels, text (1, text tokens, width), positions (axes, tokens)."""

    given: StreamInput
    text: mx.array
    positions: Positions


@dataclass(frozen=True)
class Call:
    """One denoise step; calls of one prompt share their texts' arrays."""

    video: Stream
    audio: Stream


class CallRecorder:
    """Keeps calls of the first `prompts` prompts' transformers."""

    def __init__(self, prompts: int) -> None:
        self.prompts = prompts
        self._kept: list[list[Call]] = []

    def next_prompt(self) -> None:
        """What is seen from now on belongs to another prompt."""
        self._kept.append([])

    def observe(self, network: nn.Module) -> None:
        """Watch a network, which is one stage's, if it is a transformer."""
        if isinstance(network, Transformer) and len(self._kept) <= self.prompts:
            network.__class__ = _Recorded
            network.recording = _Recording(self._kept[-1], len(self._kept) - 1)

    def tensors(self) -> Tensors:
        """The calls as they are written to a file."""
        tensors: Tensors = {}
        for prompt, calls in enumerate(self._kept):
            for number, call in enumerate(calls):
                for name, stream in vars(call).items():
                    tensors[f"replay.{prompt}.text.{name}"] = _tensor(stream.text)
                    values = vars(stream.given) | {"positions": mx.array(stream.positions)}
                    tensors |= {f"replay.{prompt}.{number}.{name}.{p}": _tensor(values[p]) for p in PARTS}
        return tensors


class _Recording:
    """One stage's calls."""

    def __init__(self, kept: list[Call], prompt: int) -> None:
        self._kept, self._wait = kept, prompt % EVERY
        self.video: tuple[mx.array, Positions] | None = None
        self.audio: tuple[mx.array, Positions] | None = None

    def called(self, video: StreamInput, audio: StreamInput) -> None:
        assert self.video is not None and self.audio is not None, "streams are prepared before they are denoised"
        if self._wait % EVERY == 0:
            self._kept.append(Call(Stream(video, *self.video), Stream(audio, *self.audio)))
        self._wait += 1


class _Recorded(Transformer):
    recording: _Recording

    def prepare_video(self, text: mx.array, positions: Positions) -> Prepared:
        self.recording.video = text, positions
        return super().prepare_video(text, positions)

    def prepare_audio(self, text: mx.array, positions: Positions) -> Prepared:
        self.recording.audio = text, positions
        return super().prepare_audio(text, positions)

    def __call__(
        self, video: StreamInput, audio: StreamInput, video_prepared: Prepared, audio_prepared: Prepared
    ) -> tuple[mx.array, mx.array]:
        self.recording.called(video, audio)
        return super().__call__(video, audio, video_prepared, audio_prepared)


def read_calls(file: TensorFile) -> Iterator[Call]:
    """The calls that a file of statistics holds. Raises LookupError where a part of one is missing."""
    for prompt in _numbers(file.tensors, r"replay\.(\d+)\.text\.video"):
        texts = {name: _array(file, f"replay.{prompt}.text.{name}") for name in ("video", "audio")}
        for number in _numbers(file.tensors, rf"replay\.{prompt}\.(\d+)\.video\.tokens"):
            yield Call(*(_stream(file, f"replay.{prompt}.{number}.{name}", text) for name, text in texts.items()))


def _numbers(names: Mapping[str, object], pattern: str) -> list[int]:
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(pattern, name)))


def _stream(file: TensorFile, name: str, text: mx.array) -> Stream:
    *given, positions = (_array(file, f"{name}.{part}") for part in PARTS)
    return Stream(StreamInput(*given), text, np.array(positions))


def _tensor(values: mx.array) -> tuple[str, Array]:
    raw = values.view(mx.uint16) if values.dtype == mx.bfloat16 else values
    return DTYPES[values.dtype], np.array(raw)


def _array(file: TensorFile, name: str) -> mx.array:
    values = mx.array(np.array(file.array(name)))
    return values.view(mx.bfloat16) if file.tensors[name].dtype == "BF16" else values
