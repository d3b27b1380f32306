"""Gemma 3 against transformers and mlx-lm, its weights' release, and its configuration's spellings."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from ltx2.convert.sources.gemma import text_config
from ltx2.runtime.errors import CheckpointError, ConfigError, UnsupportedError
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_network, parameter_shapes
from ltx2.runtime.networks.text import gemma3
from ltx2.runtime.networks.text.config import Gemma3Config
from ltx2.runtime.networks.text.gemma import TextEncoder, attention_masks
from ltx2.runtime.networks.text.tokenizer import Tokenizer
from tests.support import published
from tests.support.calls import states_of
from tests.support.golden import golden
from tests.support.memory import peak_of
from tests.support.official import Official, random_values
from tests.support.parity import relative_l2, require

Array = np.ndarray[Any, np.dtype[Any]]
Figure = Callable[..., None]

TINY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "query_pre_attn_scalar": 24, "rms_norm_eps": 1e-6,
}  # fmt: skip
ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}


def left_padded(tokens: int, length: int, vocabulary: int, seed: int = 0) -> tuple[Array, Array]:
    """Ids and mask (1, length) whose last `tokens` are text."""
    ids = np.random.default_rng(seed).integers(3, vocabulary, (1, length)).astype(np.int32)
    mask = (np.arange(length)[None] >= length - tokens).astype(np.int32)
    return np.where(mask, ids, 0).astype(np.int32), mask


def run(encoder: TextEncoder, ids: Array, mask: Array, release: bool = False) -> list[Array]:
    states = states_of(encoder, mx.array(ids), mx.array(mask), release=release)
    return [np.array(state.astype(mx.float32)) for state in states]


def weights_of(encoder: TextEncoder) -> dict[str, mx.array]:
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(encoder.parameters())))


def tiny(layer_types: list[str], window: int, seed: int = 0) -> tuple[TextEncoder, Any]:
    """A tiny random encoder and transformers' model with the same weights and configuration."""
    require("torch"), require("transformers")
    import torch
    from transformers import Gemma3TextConfig, Gemma3TextModel

    config = Gemma3TextConfig(
        **TINY, num_hidden_layers=len(layer_types), layer_types=layer_types, sliding_window=window, rope_parameters=ROPE
    )
    reference = Gemma3TextModel(config).eval()
    rng = np.random.default_rng(seed)
    weights = {n: random_values(f"model.{n}", tuple(p.shape), rng) for n, p in reference.named_parameters()}
    reference.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    ours = gemma3.build(text_config(config.to_dict()))
    ours.load_weights([(f"model.{name}", mx.array(value)) for name, value in weights.items()])
    return ours, reference


@pytest.fixture
def encoder(model: Path) -> TextEncoder:
    return load_network(ModelFolder.open(model), "text_encoder", TextEncoder)


@pytest.fixture(scope="module")
def reference(official: Official) -> Any:
    require("torch"), require("transformers")
    from tests.support.reference_text import gemma

    config = json.loads((official.gemma / "config.json").read_text())["text_config"]
    return gemma(config, official.tensors(official.gemma / "model.safetensors"))


@pytest.mark.parametrize(("tokens", "length"), [(40, 64), (48, 48), (1, 16)])
def test_hidden_states_equal_transformers(
    encoder: TextEncoder, reference: Any, figure: Figure, tokens: int, length: int
) -> None:
    from tests.support.reference_text import gemma_states

    ids, mask = left_padded(tokens, length, vocabulary=480)
    ours, theirs = run(encoder, ids, mask), gemma_states(reference, ids, mask)
    assert len(ours) == len(theirs) == 7
    assert ours[0].shape == (1, tokens, 64)
    worst = max(relative_l2(a, b[:, -tokens:]) for a, b in zip(ours, theirs, strict=True))
    figure(f"gemma3 hidden states, {tokens} of {length} tokens, rel L2 vs transformers", worst, limit=1e-4)


@pytest.mark.parametrize(
    ("layer_types", "window"),
    [
        (["full_attention"], 4),
        (["sliding_attention"], 4),
        (["sliding_attention"], 64),
        ((["sliding_attention"] * 2 + ["full_attention"]) * 2, 4),
    ],
)
def test_layer_kinds_equal_transformers(figure: Figure, layer_types: list[str], window: int) -> None:
    """Each kind of layer has its own rotation and mask; the window is shorter than the text."""
    from tests.support.reference_text import gemma_states

    ours, reference = tiny(layer_types, window)
    ids, mask = left_padded(24, 32, TINY["vocab_size"])
    worst = max(
        relative_l2(a, b[:, -24:])
        for a, b in zip(run(ours, ids, mask), gemma_states(reference, ids, mask), strict=True)
    )
    kinds = "+".join(kind.split("_")[0] for kind in layer_types)
    figure(f"gemma3 layers {kinds}, window {window}, rel L2 vs transformers", worst, limit=1e-4)


def test_golden_hidden_states(demo_model: Path, figure: Figure) -> None:
    encoder = load_network(ModelFolder.open(demo_model), "text_encoder", TextEncoder)
    encoder.set_dtype(mx.float32)
    for prompt in "ab":
        last = run(encoder, golden(f"{prompt}.input_ids"), golden(f"{prompt}.attention_mask"))[-1]
        error = relative_l2(last, golden(f"{prompt}.gemma_last_hidden_valid"))
        figure(f"gemma3 last hidden state, golden prompt {prompt}, rel L2", error, limit=1e-4)


def test_prompts_of_a_batch_do_not_touch_each_other(encoder: TextEncoder) -> None:
    """Rows of different lengths keep padding inside the batch; each row must equal its own run."""
    long, long_mask = left_padded(20, 32, 480, seed=1)
    short, short_mask = left_padded(5, 32, 480, seed=2)
    both = run(encoder, np.concatenate([long, short]), np.concatenate([long_mask, short_mask]))
    for batch, a, b in zip(both, run(encoder, long, long_mask), run(encoder, short, short_mask), strict=True):
        assert batch.shape == (2, 20, 64)
        assert relative_l2(batch[:1], a) < 1e-5
        assert relative_l2(batch[1:, -5:], b) < 1e-5


def test_masks() -> None:
    """Row: query, column: key; the first token is padding, the window two tokens long."""
    masks = attention_masks(mx.array([[False, True, True, True]]), window=2)
    whole = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]
    window = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(np.array(masks.whole)[0, 0], whole)
    np.testing.assert_array_equal(np.array(masks.window)[0, 0], window)


def test_padding_stays_finite_in_bf16(encoder: TextEncoder) -> None:
    """Queries that may see no token at all are where NaN comes from."""
    encoder.set_dtype(mx.bfloat16)
    rows = [left_padded(tokens, 32, 480) for tokens in (32, 1)]
    states = run(encoder, np.concatenate([ids for ids, _ in rows]), np.concatenate([mask for _, mask in rows]))
    assert all(np.isfinite(state).all() for state in states)


def test_float16_weights_are_computed_with_in_float32(encoder: TextEncoder) -> None:
    """Gemma's residual stream does not fit float16."""
    for layer in encoder.model.layers:
        layer.post_feedforward_layernorm.weight = mx.full((64,), 3e4)
    encoder.set_dtype(mx.float16)
    ids, mask = map(mx.array, left_padded(8, 8, 480))
    states = list(states_of(encoder, ids, mask))
    assert {state.dtype for state in states} == {mx.float32}
    assert float(mx.abs(states[-2]).max()) > 65504
    assert all(bool(mx.isfinite(state).all()) for state in states)


def test_released_run_equals_a_kept_one(model: Path, encoder: TextEncoder) -> None:
    ids, mask = left_padded(12, 16, 480)
    kept = run(encoder, ids, mask)
    streamed = load_network(ModelFolder.open(model), "text_encoder", TextEncoder)
    for a, b in zip(run(streamed, ids, mask, release=True), kept, strict=True):
        np.testing.assert_array_equal(a, b)
    assert list(weights_of(streamed)) == ["model.norm.weight"]
    with pytest.raises(RuntimeError, match="released"):
        run(streamed, ids, mask)


def test_released_run_holds_one_layer_at_a_time(tmp_path: Path) -> None:
    config = {"model_type": "gemma3_text", **TINY, "num_hidden_layers": 12, "intermediate_size": 4096}
    encoder = gemma3.build(text_config(config))
    total = sum(value.nbytes for value in weights_of(encoder).values())
    mx.save_safetensors(str(tmp_path / "w.safetensors"), weights_of(encoder))
    peaks = {}
    for release in (False, True):
        encoder.load_weights(str(tmp_path / "w.safetensors"))
        peaks[release] = peak_of(partial(run, encoder, *left_padded(4, 4, 96), release=release))
    assert peaks[False] > 0.9 * total
    assert peaks[True] < 0.3 * total


def test_quantized_embedding_and_layers(encoder: TextEncoder, figure: Figure) -> None:
    """A quantized encoder computes what its dequantized weights would."""
    ids, mask = left_padded(12, 12, 480)
    nn.quantize(encoder, group_size=32, bits=4)
    assert isinstance(encoder.model.embed_tokens, nn.QuantizedEmbedding)
    assert isinstance(encoder.model.layers[0].mlp.up_proj, nn.QuantizedLinear)
    quantized = run(encoder, ids, mask)
    plain = gemma3.build(vars(encoder.config))
    weights = {
        f"{name}.weight": mx.dequantize(m.weight, m.scales, m.biases, group_size=32, bits=4)
        for name, m in encoder.named_modules()
        if hasattr(m, "scales")
    }
    norms = {name: value for name, value in weights_of(encoder).items() if "norm" in name}
    plain.load_weights(list((weights | norms).items()))
    error = max(relative_l2(a, b) for a, b in zip(quantized, run(plain, ids, mask), strict=True))
    figure("gemma3 quantized, rel L2 vs dequantized weights", error, limit=1e-5)


def test_mlx_lm_loads_the_folder(model: Path, encoder: TextEncoder, figure: Figure) -> None:
    require("mlx_lm")
    from mlx_lm.utils import load

    theirs, tokenizer = load(str(model / "text_encoder"))[:2]
    prompt = "a red square moves left"
    ids = Tokenizer.load(model / "text_encoder").encode(prompt, 24)
    text = ids.ids[ids.mask.astype(bool)]
    assert tokenizer.encode(prompt) == text.tolist()
    embedded = theirs.model.embed_tokens(mx.array(text[None])) * 64**0.5
    states = run(encoder, ids.ids, ids.mask)
    figure("gemma3 embeddings, rel L2 vs mlx-lm", relative_l2(states[0], np.array(embedded)), limit=1e-6)
    last = np.array(theirs.model(mx.array(text[None])))
    figure("gemma3 last hidden state, rel L2 vs mlx-lm", relative_l2(states[-1], last), limit=1e-4)


def test_transformers_loads_the_folder(model: Path, encoder: TextEncoder, figure: Figure) -> None:
    require("torch"), require("transformers")
    from transformers import AutoModelForCausalLM

    from tests.support.reference_text import gemma_states

    theirs = AutoModelForCausalLM.from_pretrained(model / "text_encoder").eval()
    ids, mask = left_padded(20, 20, 480)
    error = relative_l2(run(encoder, ids, mask)[-1], gemma_states(theirs.model, ids, mask)[-1])
    figure("gemma3 folder in transformers, last hidden state, rel L2", error, limit=1e-4)


# Configuration


PUBLISHED: dict[str, Any] = {  # google/gemma-3-12b-it writes no more than this
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 3840, "intermediate_size": 15360, "num_attention_heads": 16,
        "num_hidden_layers": 48, "num_key_value_heads": 8, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}  # fmt: skip


def test_published_tensors_fit() -> None:
    """Names and shapes of the network and of the five published shards."""
    config = json.loads((published.HEADERS / "gemma-3-12b-it-config.json").read_text())
    ours = parameter_shapes(gemma3.build(text_config(config)))
    prefix = "language_model."
    theirs = {name: shape for file in published.GEMMA for name, (_, shape) in published.read_header(file)[2].items()}
    assert ours == {n.removeprefix(prefix): shape for n, shape in theirs.items() if n.startswith(prefix)}


def test_config_of_the_published_model() -> None:
    config = Gemma3Config.from_dict(text_config(PUBLISHED))
    assert (config.vocab_size, config.head_dim, config.query_pre_attn_scalar) == (262208, 256, 256)
    assert [i for i in range(48) if config.is_global(i)] == [5, 11, 17, 23, 29, 35, 41, 47]
    assert (config.rope_theta, config.rope_local_base_freq, config.rope_scale) == (1e6, 1e4, 1 / 8)
    assert text_config(PUBLISHED)["eos_token_id"] == [1, 106]


@pytest.mark.parametrize("full", [False, True])
def test_config_as_newer_transformers_write_it(full: bool) -> None:
    """rope_parameters and layer_types instead of rope_scaling and sliding_window_pattern."""
    require("transformers")
    from transformers import Gemma3Config as Theirs

    written = Theirs(**PUBLISHED)
    data = json.loads(json.dumps(written.to_dict() if full else written.to_diff_dict()))
    assert "rope_parameters" in data["text_config"]
    assert Gemma3Config.from_dict(text_config(data)) == Gemma3Config.from_dict(text_config(PUBLISHED))


def test_config_of_a_converted_folder_is_a_fixed_point() -> None:
    once = text_config(PUBLISHED)
    assert text_config(once) == once


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gemma4"},
        {"text_config": None},
        {"text_config": {**PUBLISHED["text_config"], "layer_types": ["full_attention", "sliding_attention"] * 24}},
        {"text_config": {**PUBLISHED["text_config"], "rope_parameters": {"full_attention": {"rope_theta": 1e6}}}},
    ],
)
def test_config_of_another_model_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        text_config({**PUBLISHED, **change})


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("attn_logit_softcapping", 50.0, UnsupportedError),
        ("use_bidirectional_attention", True, UnsupportedError),
        ("hidden_activation", "silu", UnsupportedError),
        ("rope_scaling", {"rope_type": "yarn", "factor": 8.0}, UnsupportedError),
        ("num_kv_shared_layers", 20, ConfigError),
    ],
)
def test_config_that_would_compute_something_else_is_refused(key: str, value: Any, error: type[Exception]) -> None:
    config = text_config({**PUBLISHED, "text_config": {**PUBLISHED["text_config"], key: value}})
    with pytest.raises(error, match=key):
        assert Gemma3Config.from_dict(config).rope_scale
