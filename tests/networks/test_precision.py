"""In a 16-bit model every attention, matrix product and picture convolution runs in 16 bits: a float32 table that
leaks into a stream costs three times the time. Sound is computed in float32 on purpose."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import ltx2
from ltx2.runtime.events import PhaseDone
from ltx2.runtime.generate.records.clip import Generated

SIZE: dict[str, Any] = {"width": 64, "height": 64, "frames": 9}
SIXTEEN = {"text_encoder", "connectors", "stage1", "spatial_upscaler", "stage2", "video_vae"}


def test_a_16_bit_run_computes_in_16_bits(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole pipeline, with every kernel that matters watched, phase by phase."""
    seen: dict[str, set[mx.Dtype]] = {"attention": set(), "linear": set(), "convolution": set()}

    def watch(owner: Any, name: str, kind: str, arrays: Callable[..., list[mx.array]]) -> None:
        original = getattr(owner, name)

        def spy(*args: Any, **options: Any) -> Any:
            seen[kind] |= {array.dtype for array in arrays(*args)}
            return original(*args, **options)

        monkeypatch.setattr(owner, name, spy)

    watch(mx.fast, "scaled_dot_product_attention", "attention", lambda q, k, v: [q, k, v])
    watch(nn.Linear, "__call__", "linear", lambda layer, x: [x, layer.weight])
    watch(nn.Conv3d, "__call__", "convolution", lambda layer, x: [x, layer.weight])
    watch(nn.Conv2d, "__call__", "convolution", lambda layer, x: [x, layer.weight])
    phases: dict[str, dict[str, set[mx.Dtype]]] = {}
    for event in ltx2.load(demo_model).stream("a red circle stands still on a white background", seed=1, **SIZE):
        if isinstance(event, PhaseDone):
            phases[event.name] = {kind: set(dtypes) for kind, dtypes in seen.items() if dtypes}
            for dtypes in seen.values():
                dtypes.clear()
        if isinstance(event, Generated):
            assert event.clip.audio is not None and np.isfinite(event.clip.audio).all()
    assert phases.keys() >= SIXTEEN
    for name in SIXTEEN:
        assert phases[name], f"nothing was watched in {name}"
        assert set.union(*phases[name].values()) == {mx.bfloat16}, (name, phases[name])
