"""Gemma 4's unified language model against transformers, its golden tensors, and its configuration."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ltx2.convert.plan.check import check_plan
from ltx2.convert.sources.gemma import text_config
from ltx2.runtime.errors import ConfigError, UnsupportedError
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_network
from ltx2.runtime.networks.text import gemma4
from ltx2.runtime.networks.text.config import Gemma4Config, Heads, Rotation, gemma_config
from ltx2.runtime.networks.text.gemma import TextEncoder
from tests.networks.test_text_encoder import left_padded, run
from tests.support import published
from tests.support.calls import states_of
from tests.support.golden import golden_25
from tests.support.official import Split, plan_of, random_values
from tests.support.parity import relative_l2, require

Array = np.ndarray[Any, np.dtype[Any]]
Figure = Callable[..., None]

ROPE = {
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
TINY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
    "rms_norm_eps": 1e-6, "rope_parameters": ROPE, "sliding_window": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "change"),
    [
        ("sssf", {}),
        ("sfsf", {"sliding_window": 64}),
        ("sf", {"attention_k_eq_v": False}),
        ("f", {"num_global_key_value_heads": None}),
        ("f", {"rope_parameters": ROPE | {"full_attention": {"rope_type": "default", "rope_theta": 1e5}}}),
    ],
)
def test_layers_equal_transformers(figure: Figure, pattern: str, change: dict[str, Any]) -> None:
    """Each kind of layer has its own heads, rotation and mask; the window is shorter than the text."""
    require("torch"), require("transformers")
    import torch
    from transformers import Gemma4UnifiedTextConfig, Gemma4UnifiedTextModel

    from tests.support.reference_text import gemma_states

    kinds = [{"s": "sliding_attention", "f": "full_attention"}[letter] for letter in pattern]
    given = TINY | {"layer_types": kinds, "num_hidden_layers": len(kinds)} | change
    reference = Gemma4UnifiedTextModel(Gemma4UnifiedTextConfig(**given)).eval()
    rng = np.random.default_rng(0)
    shapes = {name: tuple(value.shape) for name, value in reference.state_dict().items()}
    weights = {name: random_values(name, shape, rng, gemma3=False) for name, shape in shapes.items()}
    reference.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    ours = gemma4.build(text_config({"model_type": "gemma4_unified", "gemma_version": "x", "text_config": given}))
    ours.load_weights(
        [(f"model.{name}", mx.array(value)) for name, value in weights.items() if "embed_scale" not in name]
    )
    ids, mask = left_padded(24, 32, TINY["vocab_size"])
    states = zip(run(ours, ids, mask), gemma_states(reference, ids, mask), strict=True)
    worst = max(relative_l2(a, b[:, -24:]) for a, b in states)
    figure(f"gemma4 layers {pattern}, {len(change)} changed, rel L2 vs transformers", worst, limit=1e-4)


@pytest.mark.parametrize(("tokens", "length"), [(600, 640), (1, 16)])
def test_a_converted_file_equals_transformers(
    official_25: Split, model_25: Path, figure: Figure, tokens: int, length: int
) -> None:
    """All hidden states, of so many tokens that a wrong wave length would show."""
    require("torch"), require("transformers")
    import torch
    from transformers import Gemma4UnifiedTextConfig, Gemma4UnifiedTextModel

    from tests.support.reference_text import gemma_states

    reference = Gemma4UnifiedTextModel(Gemma4UnifiedTextConfig(**official_25.config("gemma4")["text_config"])).eval()
    tensors = {name.removeprefix("model."): value for name, value in official_25.tensors("gemma4").items()}
    state = {name: torch.from_numpy(value) for name, value in tensors.items() if name in reference.state_dict()}
    assert len(state) == len([name for name in official_25.tensors("gemma4") if name.startswith("model.")])
    reference.load_state_dict(state, strict=False)
    encoder = load_network(ModelFolder.open(model_25), "text_encoder", TextEncoder)
    ids, mask = left_padded(tokens, length, vocabulary=480)
    ours, theirs = run(encoder, ids, mask), gemma_states(reference, ids, mask)
    assert len(ours) == len(theirs) == 7
    worst = max(relative_l2(a, b[:, -tokens:]) for a, b in zip(ours, theirs, strict=True))
    figure(f"gemma4 hidden states, {tokens} of {length} tokens, rel L2 vs transformers", worst, limit=1e-4)


def test_golden_hidden_states(demo_25: Path, figure: Figure) -> None:
    encoder = load_network(ModelFolder.open(demo_25), "text_encoder", TextEncoder)
    for prompt in "ab":
        last = run(encoder, golden_25(f"{prompt}.input_ids"), golden_25(f"{prompt}.attention_mask"))[-1]
        error = relative_l2(last, golden_25(f"{prompt}.gemma_last_hidden_valid"))
        figure(f"gemma4 last hidden state, golden prompt {prompt}, rel L2", error, limit=1e-4)


def test_bf16_is_not_promoted(model_25: Path) -> None:
    encoder = load_network(ModelFolder.open(model_25), "text_encoder", TextEncoder)
    encoder.set_dtype(mx.bfloat16)
    ids, mask = map(mx.array, left_padded(8, 8, 480))
    states = states_of(encoder, ids, mask)
    assert {state.dtype for state in states} == {mx.bfloat16}


# Configuration


def test_published_file_fits(tmp_path: Path) -> None:
    (path,) = published.write_published(tmp_path, "gemma4-12b-with-proj-ltx-2.5-bf16")
    plan = plan_of(path)
    check_plan(plan)
    config = gemma_config(plan.components["text_encoder"].config)
    assert isinstance(config, Gemma4Config)
    assert [layer for layer in range(48) if config.is_global(layer)] == [5, 11, 17, 23, 29, 35, 41, 47]
    assert (config.query_heads(0), config.key_heads(0), config.rotation(0)) == (
        Heads(16, 256), Heads(8, 256), Rotation(1e4, 1.0),
    )  # fmt: skip
    assert (config.query_heads(5), config.key_heads(5), config.rotation(5)) == (
        Heads(16, 512), Heads(1, 512), Rotation(1e6, 0.25),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("enable_moe_block", True, UnsupportedError),
        ("num_kv_shared_layers", 2, UnsupportedError),
        ("hidden_size_per_layer_input", 256, UnsupportedError),
        ("use_bidirectional_attention", "all", UnsupportedError),
        ("layer_types", ["full_attention"] * 5, ConfigError),
        ("layer_types", ["chunked_attention"] * 6, ConfigError),
        ("layer_types", "full_attention", ConfigError),
        ("rope_parameters", {"full_attention": ROPE["full_attention"]}, UnsupportedError),
        ("rope_parameters", ROPE | {"full_attention": {"rope_type": "yarn", "rope_theta": 1e6}}, UnsupportedError),
        ("rope_parameters", ROPE | {"full_attention": ROPE["full_attention"] | {"factor": 8.0}}, UnsupportedError),
        ("per_layer_config", {}, ConfigError),
    ],
)
def test_config_that_would_compute_something_else_is_refused(
    official_25: Split, key: str, value: Any, error: type[Exception]
) -> None:
    source = official_25.config("gemma4")
    config = text_config(source | {"text_config": source["text_config"] | {key: value}})
    with pytest.raises(error, match=key):
        Gemma4Config.from_dict(config)
