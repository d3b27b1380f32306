"""The transformer against diffusers on random weights, and the properties users rely on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from ltx2.runtime.layers.rope import apply_rope, rope_tables
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_network
from ltx2.runtime.networks.transformer.inputs import Levels, StreamInput
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.sampling.latents import Grid, Scales, audio_positions, video_positions
from ltx2.runtime.streams import Streams
from tests.support.calls import inputs
from tests.support.official import Official
from tests.support.parity import relative_l2, require

SCALES = Scales(spatial=32, temporal=8, audio_hop=0.01, audio_temporal=4)
GRID = Grid(channels=32, frames=3, height=2, width=3, audio_channels=2, audio_frames=13)
FPS = 24.0
POSITIONS = Streams(video_positions(GRID, FPS, SCALES), audio_positions(GRID, SCALES))


def random_data(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "video": draw(1, GRID.tokens, 32),
        "audio": draw(1, GRID.audio_frames, 32),
        "video_text": draw(1, 20, 64),
        "audio_text": draw(1, 20, 64),
    }


def given(model: Transformer, data: dict[str, np.ndarray], levels: float | Streams[Levels]) -> Streams[StreamInput]:
    tokens, contexts = (Streams(mx.array(data["video" + s]), mx.array(data["audio" + s])) for s in ("", "_text"))
    return inputs(model, tokens, contexts, POSITIONS, levels)


def run_ours(model: Transformer, data: dict[str, np.ndarray], levels: float | Streams[Levels]) -> list[np.ndarray]:
    return [np.array(v.astype(mx.float32)) for v in model(given(model, data, levels)).values()]


def spread(sigma: float) -> Streams[Levels]:
    """One noise level as if every token had its own."""
    values = mx.array([0.0, sigma])
    video, audio = (mx.ones(tokens, mx.int32) for tokens in (GRID.tokens, GRID.audio_frames))
    return Streams(Levels(values, video, sigma), Levels(values, audio, sigma))


@pytest.fixture(scope="module")
def transformer(model: Path) -> Transformer:
    return load_network(ModelFolder.open(model), "transformer", Transformer)


@pytest.fixture(scope="module")
def reference(official: Official) -> Any:
    require("torch"), require("diffusers")
    from tests.support.reference_transformer import reference_transformer

    return reference_transformer(official.tensors(official.monolith), official.config(official.monolith)["transformer"])


@pytest.mark.parametrize("sigma", [1.0, 0.725, 0.1])
def test_velocity_equals_diffusers(
    transformer: Transformer, reference: Any, figure: Callable[..., None], sigma: float
) -> None:
    import torch

    data = random_data(seed=1)
    ours = run_ours(transformer, data, sigma)
    to_torch = {k: torch.from_numpy(v) for k, v in data.items()}
    with torch.no_grad():
        theirs = reference(
            hidden_states=to_torch["video"],
            audio_hidden_states=to_torch["audio"],
            encoder_hidden_states=to_torch["video_text"],
            audio_encoder_hidden_states=to_torch["audio_text"],
            timestep=torch.full((1, GRID.tokens), sigma * 1000),
            audio_timestep=torch.full((1, GRID.audio_frames), sigma * 1000),
            sigma=torch.tensor([sigma * 1000]),
            audio_sigma=torch.tensor([sigma * 1000]),
            num_frames=GRID.frames,
            height=GRID.height,
            width=GRID.width,
            fps=FPS,
            audio_num_frames=GRID.audio_frames,
            return_dict=False,
        )
    for name, a, b in zip(("video", "audio"), ours, theirs, strict=True):
        figure(f"transformer {name} velocity, sigma {sigma}, rel L2 vs diffusers", relative_l2(a, b), limit=1e-4)


def test_rope_tables_and_positions_equal_diffusers(reference: Any, figure: Callable[..., None]) -> None:
    import torch

    video = torch.from_numpy(video_positions(GRID, FPS, SCALES))
    coords = reference.rope.prepare_video_coords(1, GRID.frames, GRID.height, GRID.width, "cpu", fps=FPS)
    figure("video positions, max abs difference", float((coords.mean(-1)[0] - video).abs().max()), limit=1e-6)
    audio_coords = reference.audio_rope.prepare_audio_coords(1, GRID.audio_frames, "cpu")
    audio = audio_positions(GRID, SCALES)
    difference = np.abs(audio_coords.mean(-1)[0].numpy() - audio).max()
    figure("audio positions, max abs difference", float(difference), limit=1e-6)
    for name, module, positions, limits, dim in (
        ("video", reference.rope, video.numpy(), (20, 2048, 2048), 128),
        ("audio", reference.audio_rope, audio, (20,), 64),
        ("cross", reference.cross_attn_rope, video.numpy()[:1], (20,), 64),
    ):
        cos, sin = module(torch.from_numpy(positions)[None])
        ours = rope_tables(positions, limits, dim, heads=4)
        for kind, theirs, table in (("cos", cos, ours.cos), ("sin", sin, ours.sin)):
            difference = np.abs(np.array(table.transpose(0, 2, 1, 3)) - theirs.numpy()).max()
            figure(f"{name} rope {kind}, max abs difference", float(difference), limit=1e-5)


def test_rotation_keeps_lengths_and_pads_do_not_rotate() -> None:
    positions = np.array([[0.5], [100.0], [300.0]], dtype=np.float32)
    tables = rope_tables(positions, (20, 2048, 2048), dim=40, heads=2)  # 6 frequencies per axis, 2 pads
    assert tables.cos.shape == (1, 1, 2, 10)
    np.testing.assert_array_equal(np.array(tables.cos[0, 0, 0, :2]), 1)
    np.testing.assert_array_equal(np.array(tables.sin[0, 0, 0, :2]), 0)
    x = mx.random.normal((1, 1, 2, 20), key=mx.random.key(0))
    turned = apply_rope(x, tables)
    np.testing.assert_allclose(np.array((turned**2).sum()), np.array((x**2).sum()), rtol=1e-5)
    assert np.abs(np.array(turned - x)).max() > 0.1


def test_per_token_timesteps_equal_uniform_ones(transformer: Transformer, figure: Callable[..., None]) -> None:
    """The fused path for one noise level and the general path are the same function."""
    data = random_data(seed=2)
    uniform, per_token = (run_ours(transformer, data, levels) for levels in (0.6, spread(0.6)))
    for name, a, b in zip(("video", "audio"), uniform, per_token, strict=True):
        figure(f"per-token against uniform timesteps, {name}, rel L2", relative_l2(a, b), limit=1e-5)


def test_gates_follow_the_other_streams_noise_level(transformer: Transformer) -> None:
    """A stream kept as it is (sigma 0) must steer the gate of the other one."""
    data = random_data(seed=3)
    level = Levels(mx.array([0.6]), sigma=0.6)
    base = run_ours(transformer, data, Streams(level, level))
    moved = run_ours(transformer, data, Streams(level, replace(level, sigma=0.0)))
    assert relative_l2(moved[0], base[0]) > 1e-3


def test_bf16_reaches_every_attention_and_matmul(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 table or timestep embedding must not promote the streams: that costs 3x in time."""
    network = load_network(ModelFolder.open(model), "transformer", Transformer)
    network.set_dtype(mx.bfloat16)
    for block in network.transformer_blocks:  # tables stay float32 in published files
        for name in [n for n in block if "table" in n]:
            block[name] = block[name].astype(mx.float32)
    network.scale_shift_table = network.scale_shift_table.astype(mx.float32)
    seen: dict[str, set[mx.Dtype]] = {"attention": set(), "linear": set()}
    attend, linear = mx.fast.scaled_dot_product_attention, nn.Linear.__call__

    def spy_attend(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        seen["attention"] |= {q.dtype, k.dtype, v.dtype}
        return attend(q, k, v, **options)

    def spy_linear(self: nn.Linear, x: mx.array) -> mx.array:
        seen["linear"] |= {x.dtype, self.weight.dtype}
        return linear(self, x)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", spy_attend)
    monkeypatch.setattr(nn.Linear, "__call__", spy_linear)
    out = [run_ours(network, random_data(seed=4), levels) for levels in (0.6, spread(0.6))]
    assert seen == {"attention": {mx.bfloat16}, "linear": {mx.bfloat16}}
    assert all(np.isfinite(v).all() for velocities in out for v in velocities)
