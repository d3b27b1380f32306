"""The duration head against torch's attention and the demo model's answer, and frames from seconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltx2.runtime.errors import ConfigError, NumericsError, UnsupportedError
from ltx2.runtime.memory.activations import predict_length
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_network
from ltx2.runtime.networks.text.duration_head import Duration, DurationHead, DurationHeadConfig, build, duration
from ltx2.runtime.streams import Streams
from tests.support.golden import golden_25
from tests.support.official import Split
from tests.support.parity import require

Array = np.ndarray[Any, np.dtype[Any]]
Figure = Callable[..., None]

PREFIX = "duration_head."


def in_torch(tensors: dict[str, Array], streams: dict[str, Array], heads: int) -> float:
    """The head's formula with torch's own attention."""
    torch = require("torch")
    weights = {name.removeprefix(PREFIX): torch.from_numpy(value) for name, value in tensors.items()}

    def linear(name: str, x: Any) -> Any:
        return torch.nn.functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    tokens = torch.cat(
        [linear(f"{s}_input_proj", torch.from_numpy(x)) + weights[f"{s}_modality_emb"] for s, x in streams.items()], 1
    )
    attention = torch.nn.MultiheadAttention(tokens.shape[-1], heads, batch_first=True)
    prefix = "attention_pooler.cross_attn."
    attention.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    pooled, _ = attention(weights["attention_pooler.query_tokens"][None], tokens, tokens)
    hidden = torch.nn.functional.gelu(linear("mlp_hidden", pooled), approximate="tanh")
    return float(linear("mlp_out", hidden).detach().exp())


@pytest.mark.parametrize("streams", [("video", "audio"), ("video",), ("audio",)])
def test_seconds_equal_torch(official_25: Split, model_25: Path, figure: Figure, streams: tuple[str, ...]) -> None:
    head = load_network(ModelFolder.open(model_25), "duration_head", DurationHead)
    rng = np.random.default_rng(0)
    widths = {"video": 128, "audio": 64}
    contexts = {name: rng.standard_normal((1, 256, widths[name])).astype(np.float32) for name in streams}
    ours = head.seconds(Streams(**{name: mx.array(x) for name, x in contexts.items()}))
    theirs = in_torch(official_25.tensors("duration-head"), contexts, heads=4)
    figure(f"seconds of {' and '.join(streams)}, rel vs torch", abs(ours - theirs) / theirs, limit=1e-5)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_demo_model_answers_25_frames(demo_25: Path, dtype: mx.Dtype) -> None:
    head = load_network(ModelFolder.open(demo_25), "duration_head", DurationHead)
    head.set_dtype(dtype)
    contexts = Streams(mx.array(golden_25("a.video_context")), mx.array(golden_25("a.audio_context")))
    seconds = head.seconds(contexts.map(lambda x: x.astype(dtype)))
    assert seconds == pytest.approx(1.0415, rel=1e-3)
    assert duration(seconds, 24.0).frames == 25


def test_an_answer_out_of_hand(demo_25: Path) -> None:
    head = load_network(ModelFolder.open(demo_25), "duration_head", DurationHead)
    with pytest.raises(NumericsError, match="predicted seconds"):
        head.seconds(Streams(mx.full((1, 4, 128), mx.nan)))
    head.mlp_out.bias = mx.array([1e4])
    assert duration(head.seconds(Streams(mx.ones((1, 4, 128)))), 24.0).frames == 473


def test_memory_as_planned() -> None:
    """Beside weights and contexts."""
    head = build({"cross_attention_dim": 1024, "audio_cross_attention_dim": 512})
    head.set_dtype(mx.bfloat16)
    contexts = Streams(mx.ones((1, 1024, 1024), mx.bfloat16), mx.ones((1, 1024, 512), mx.bfloat16))
    mx.eval(head.parameters(), list(contexts.values()))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    head.seconds(contexts)
    planned = predict_length(head.config, 1024)
    assert 0.8 * planned.needed <= mx.get_peak_memory() - before <= planned.full


# Frames


@pytest.mark.parametrize(
    ("seconds", "fps", "frames", "clamped"),
    [
        (5.0, 24.0, 113, False),  # 120 frames, down to the grid
        (5.0417, 24.0, 121, False),
        (0.1, 24.0, 25, True),  # 24 frames at least: 17 is below, so up
        (1.0, 24.0, 25, False),
        (99.0, 24.0, 473, True),
        (0.0, 50.0, 57, True),
        (99.0, 50.0, 993, True),
        (2.5, 1.0, 1, False),  # half to even
    ],
)
def test_frames(seconds: float, fps: float, frames: int, clamped: bool) -> None:
    assert duration(seconds, fps) == Duration(seconds, frames, clamped)


def test_own_bounds() -> None:
    assert duration(9.0, 24.0, 2.0, 8.0) == Duration(9.0, 185, True)
    assert duration(1.5, 24.0, 2.0, 8.0) == Duration(1.5, 49, True)
    assert duration(1.0, 24.0, 1.0, 1.0) == Duration(1.0, 17, False)  # no number of the grid lies between the bounds


@given(st.floats(0, 1e6), st.floats(1, 240), st.floats(1, 20), st.floats(1, 20))
def test_frames_are_on_the_grid_and_between_the_bounds(seconds: float, fps: float, a: float, b: float) -> None:
    least, most = min(a, b), max(a, b)
    low, high = round(least * fps), round(most * fps)
    frames = duration(seconds, fps, least, most).frames
    assert frames % 8 == 1 and frames <= max(1, high)
    between = any(n % 8 == 1 for n in range(low, high + 1))
    assert frames >= low or not between


# Configuration


def test_published_configuration() -> None:
    """The file's own section is empty."""
    config = DurationHeadConfig.from_dict({"cross_attention_dim": 4096, "audio_cross_attention_dim": 2048})
    assert (config.pooler_hidden_dim, config.num_pooler_heads, config.mlp_hidden) == (256, 4, 256)


@pytest.mark.parametrize(
    ("change", "error"),
    [({"num_queries": 2}, UnsupportedError), ({"num_pooler_heads": 3}, ConfigError), ({"queries": 1}, ConfigError)],
)
def test_another_head_is_refused(change: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        build({"cross_attention_dim": 16, "audio_cross_attention_dim": 8} | change)
