"""Recipes and budgets of every release: what newer networks have that is not packed, and what is kept higher."""

import re
from pathlib import Path
from typing import Any

import pytest

from ltx2.quant.apply import Settings, quantize_plan
from ltx2.quant.choose.budget import mac_budget
from ltx2.runtime.model.forms import Quantization
from tests.support.official import plan_of

NEVER = re.compile(r"to_gate_logits|adaln|norm|patchify_proj|^(audio_)?proj_out|keyframes|registers|table")


def sources(request: pytest.FixtureRequest, release: str) -> list[Path]:
    return list(request.getfixturevalue(f"official_{release}").sources)


@pytest.mark.parametrize(
    ("release", "whole"), [("23", {"video_vae", "audio_vae"}), ("25", {"video_vae", "audio_vae", "duration_head"})]
)
def test_what_a_recipe_packs(request: pytest.FixtureRequest, release: str, whole: set[str]) -> None:
    plan = quantize_plan(plan_of(*sources(request, release), variant="distilled"), Settings(bits=4, group_size=32))
    packed: dict[str, dict[str, int]] = {}
    for name, component in plan.components.items():
        quantization = Quantization.from_config(component.quantization)
        stored = {key for move in plan.moves(name) for key in move.stored()}
        layers = [key.removesuffix(".scales") for key in stored if key.endswith(".scales")]
        packed[name] = {layer: quantization.of(layer).bits for layer in layers}
    assert all(not packed[name] for name in (*whole, "vocoder", "spatial_upscaler"))
    assert not [layer for layers in packed.values() for layer in layers if NEVER.search(layer)]
    gates = [m.key for m in plan.moves("transformer") if "to_gate_logits.weight" in m.key]
    assert len(gates) == 6 * 6, "of all attentions of six blocks"
    assert set(packed["connectors"].values()) == {8} and len(packed["connectors"]) == 2 * 2 * 6 + 2
    assert set(packed["text_encoder"].values()) == {8}
    picture = {packed["transformer"][f"transformer_blocks.2.{layer}"] for layer in ("attn1.to_q", "ff.proj_in")}
    sound = {packed["transformer"][f"transformer_blocks.2.{layer}"] for layer in ("audio_attn1.to_q", "attn2.to_k")}
    assert (picture, sound) == ({4}, {6})


def test_a_macs_budget(request: pytest.FixtureRequest) -> None:
    """Whichever video VAE says the latents' scale."""
    plan: Any = plan_of(*sources(request, "25"), variant="distilled")
    assert mac_budget(plan, 24).weights > 10e9
