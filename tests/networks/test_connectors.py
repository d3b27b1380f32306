"""Feature extractor and connectors against diffusers on random weights, and against the demo model's golden tensors."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ltx2.convert.names import rules
from ltx2.runtime.errors import ConfigError, ModelFolderError, UnsupportedError
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_network, parameter_shapes
from ltx2.runtime.networks.text.config import PER_TOKEN, ConnectorsConfig, Heads
from ltx2.runtime.networks.text.connectors import (
    EmbeddingsConnectors,
    build,
    fill_with_registers,
    normalized,
    normalized_per_token,
)
from ltx2.runtime.networks.text.gemma import TextEncoder
from ltx2.runtime.networks.text.tokenizer import Encoded, Tokenizer
from ltx2.runtime.streams import Streams
from tests.support import published
from tests.support.calls import states_of
from tests.support.golden import PROMPTS, PROMPTS_25, golden, golden_25
from tests.support.memory import settled, waiting
from tests.support.official import MONOLITH, Official, Split
from tests.support.parity import relative_l2, require

Array = np.ndarray[Any, np.dtype[Any]]
Figure = Callable[..., None]

STATES, WIDTH = 7, 64


@pytest.fixture
def connectors(model: Path) -> EmbeddingsConnectors:
    return load_network(ModelFolder.open(model), "connectors", EmbeddingsConnectors)


@pytest.fixture
def connectors_25(model_25: Path) -> EmbeddingsConnectors:
    return load_network(ModelFolder.open(model_25), "connectors", EmbeddingsConnectors)


@pytest.fixture(scope="module")
def transformer_section() -> dict[str, Any]:
    return Official(MONOLITH, MONOLITH, MONOLITH).config(MONOLITH)["transformer"]


@pytest.fixture(scope="module")
def reference(official: Official, transformer_section: dict[str, Any]) -> Any:
    require("torch"), require("diffusers")
    from tests.support.reference_text import connectors

    return connectors(transformer_section, official.tensors(official.monolith))


@pytest.fixture(scope="module")
def reference_25(official_25: Split) -> Any:
    require("torch"), require("diffusers")
    from tests.support.reference_text import connectors

    tensors = official_25.tensors("transformer") | official_25.tensors("gemma4")
    return connectors(official_25.config("transformer")["transformer"], tensors)


def hidden_states(tokens: int, length: int, seed: int = 0) -> tuple[list[Array], Array]:
    """Hidden states (1, length, WIDTH) of very different sizes, and the mask of `tokens` left-padded tokens.

    Padding holds large values: they must not reach the result.
    """
    rng = np.random.default_rng(seed)
    mask = (np.arange(length)[None] >= length - tokens).astype(np.int32)
    states = [(3.0**i * rng.standard_normal((1, length, WIDTH)) + i).astype(np.float32) for i in range(STATES)]
    return [np.where(mask[..., None], state, 1e6).astype(np.float32) for state in states], mask


def run(connectors: EmbeddingsConnectors, states: list[Array], mask: Array) -> list[Array]:
    """Video and audio context."""
    return [np.array(c.astype(mx.float32)) for c in connectors(map(mx.array, states), mx.array(mask)).values()]


@pytest.mark.parametrize(("tokens", "length"), [(1, 128), (37, 256), (128, 128), (200, 256)])
def test_contexts_equal_diffusers(
    connectors: EmbeddingsConnectors, reference: Any, figure: Figure, tokens: int, length: int
) -> None:
    """One token is the empty prompt."""
    from tests.support.reference_text import contexts

    states, mask = hidden_states(tokens, length)
    ours, theirs = run(connectors, states, mask), contexts(reference, states, mask)
    for name, a, b in zip(("video", "audio"), ours, theirs, strict=True):
        assert a.shape == (1, length, WIDTH)
        error = relative_l2(a, b)
        figure(f"connectors, {name} context, {tokens} of {length} tokens, rel L2 vs diffusers", error, limit=1e-4)


@pytest.mark.parametrize(("tokens", "length"), [(1, 128), (37, 256), (128, 128)])
def test_contexts_of_own_widths_equal_diffusers(
    connectors_25: EmbeddingsConnectors, reference_25: Any, figure: Figure, tokens: int, length: int
) -> None:
    """Gated attention, features normalised per token and projected for each stream."""
    from tests.support.reference_text import contexts

    states, mask = hidden_states(tokens, length)
    ours, theirs = run(connectors_25, states, mask), contexts(reference_25, states, mask)
    for name, width, a, b in zip(("video", "audio"), (128, 64), ours, theirs, strict=True):
        assert a.shape == (1, length, width)
        error = relative_l2(a, b)
        figure(f"2.5 connectors, {name} context, {tokens} of {length}, rel L2 vs diffusers", error, limit=1e-4)


def test_the_connectors_of_23_are_those_of_25(
    official_23: Official, model_23: Path, connectors_25: EmbeddingsConnectors
) -> None:
    """The same network, from one file."""
    states, mask = hidden_states(10, 128)
    ours = load_network(ModelFolder.open(model_23), "connectors", EmbeddingsConnectors)
    for a, b in zip(run(ours, states, mask), run(connectors_25, states, mask), strict=True):
        np.testing.assert_array_equal(a, b)


def test_features_equal_diffusers(connectors: EmbeddingsConnectors, reference: Any, figure: Figure) -> None:
    require("torch")
    import torch
    from diffusers.pipelines.ltx2.connectors import per_layer_masked_mean_norm

    states, mask = hidden_states(37, 64)
    stacked_states, valid = connectors._stacked(map(mx.array, states), mx.array(mask))
    features, _ = connectors.text_projection(stacked_states)
    stacked = torch.stack([torch.from_numpy(state) for state in states], dim=-1)
    theirs = per_layer_masked_mean_norm(stacked, torch.tensor([37]), device="cpu")
    with torch.no_grad():
        theirs = reference.text_proj_in(theirs)[:, -37:]
    assert np.array(valid).sum() == 37
    figure("text features, rel L2 vs diffusers", relative_l2(np.array(features)[:, -37:], theirs), limit=1e-4)


def golden_contexts(model: Path, prompt: str) -> tuple[Encoded, Streams[mx.array]]:
    """From prompt text to what the transformer attends to, in float32."""
    folder = ModelFolder.open(model)
    connectors = load_network(folder, "connectors", EmbeddingsConnectors)
    encoder = load_network(folder, "text_encoder", TextEncoder)
    connectors.set_dtype(mx.float32), encoder.set_dtype(mx.float32)
    encoded = Tokenizer.load(folder.component_path("text_encoder")).encode(prompt, 1024)
    ids, mask = mx.array(encoded.ids), mx.array(encoded.mask)
    return encoded, connectors(states_of(encoder, ids, mask, release=True), mask)


@pytest.mark.parametrize("name", PROMPTS)
def test_golden_contexts(demo_model: Path, name: str, figure: Figure) -> None:
    _, contexts = golden_contexts(demo_model, PROMPTS[name])
    for stream, ours in contexts.items():
        error = relative_l2(np.array(ours), golden(f"{name}.{stream}_context"))
        figure(f"{stream} context, golden prompt {name}, rel L2", error, limit=1e-4)


@pytest.mark.parametrize(("name", "rows", "key"), [("a", 1024, "context"), ("b", 64, "context_first64")])
def test_golden_contexts_25(demo_25: Path, name: str, rows: int, key: str, figure: Figure) -> None:
    """With the tokenizer of a file, which adds no first token."""
    encoded, contexts = golden_contexts(demo_25, PROMPTS_25[name])
    np.testing.assert_array_equal(encoded.ids, golden_25(f"{name}.input_ids"))
    np.testing.assert_array_equal(encoded.mask, golden_25(f"{name}.attention_mask"))
    for stream, ours in contexts.items():
        error = relative_l2(np.array(ours)[:, :rows], golden_25(f"{name}.{stream}_{key}"))
        figure(f"{stream} context, golden prompt {name} of 2.5, rel L2", error, limit=1e-4)


def test_left_out_padding_changes_nothing(connectors: EmbeddingsConnectors) -> None:
    """The text encoder does not compute padding that comes before every prompt of a batch."""
    states, mask = hidden_states(20, 128)
    for a, b in zip(run(connectors, states, mask), run(connectors, [s[:, -20:] for s in states], mask), strict=True):
        assert relative_l2(a, b) < 1e-6


def test_prompts_of_a_batch_do_not_touch_each_other(connectors: EmbeddingsConnectors) -> None:
    long, long_mask = hidden_states(50, 128, seed=1)
    short, short_mask = hidden_states(3, 128, seed=2)
    states = [np.concatenate(pair)[:, -50:] for pair in zip(long, short, strict=True)]
    both = run(connectors, states, np.concatenate([long_mask, short_mask]))
    alone = zip(run(connectors, long, long_mask), run(connectors, short, short_mask), strict=True)
    for batch, (a, b) in zip(both, alone, strict=True):
        assert relative_l2(batch, np.concatenate([a, b])) < 1e-6


def test_normalisation_is_per_layer_over_text_only() -> None:
    states, mask = hidden_states(5, 8)
    text = states[3][:, 3:]
    expected = 8 * (text - text.mean()) / (text.max() - text.min())
    ours = np.array(normalized(mx.array(states[3]), mx.array(mask).astype(mx.bool_)))
    np.testing.assert_allclose(ours[:, 3:], expected, atol=1e-5)
    assert not ours[:, :3].any()


def test_normalisation_per_token() -> None:
    states, mask = hidden_states(5, 8)
    text = states[3][:, 3:]
    expected = text / np.sqrt((text**2).mean(-1, keepdims=True))
    ours = np.array(normalized_per_token(mx.array(states[3]), mx.array(mask).astype(mx.bool_)))
    np.testing.assert_allclose(ours[:, 3:], expected, atol=1e-5)
    assert not ours[:, :3].any()


def test_registers_follow_the_text_by_position() -> None:
    features = mx.arange(8.0).reshape(1, 4, 2)
    registers = mx.array([[10.0, 10.0], [11.0, 11.0], [12.0, 12.0]])
    valid = mx.array([[False, True, False, True]])
    filled = np.array(fill_with_registers(features, valid, registers, 6))
    np.testing.assert_array_equal(filled[0, :, 0], [2, 6, 12, 10, 11, 12])


def test_bf16_is_not_promoted(connectors: EmbeddingsConnectors) -> None:
    """float32 statistics and rotation tables stay inside."""
    connectors.set_dtype(mx.bfloat16)
    states, mask = hidden_states(10, 128)
    contexts = connectors([mx.array(s).astype(mx.bfloat16) for s in states], mx.array(mask))
    assert [c.dtype for c in contexts.values()] == [mx.bfloat16] * 2
    assert all(bool(mx.isfinite(c).all()) for c in contexts.values())


def test_states_are_consumed_one_by_one(connectors: EmbeddingsConnectors) -> None:
    """What stays of a state is its normalised copy in the weights' dtype, not the state."""
    connectors.set_dtype(mx.bfloat16)
    states, mask = hidden_states(10, 128)
    produced = []

    def produce() -> Iterator[mx.array]:
        for state in states:
            array = mx.array(state)
            mx.eval(array)
            produced.append(mx.get_active_memory())
            yield array

    settled()
    with waiting():
        connectors(produce(), mx.array(mask))
    assert np.diff(produced)[1:].max() < 0.75 * states[0].nbytes


@pytest.mark.parametrize(("count", "width"), [(6, 64), (8, 64), (7, 32)])
def test_another_text_encoder_is_refused(connectors: EmbeddingsConnectors, count: int, width: int) -> None:
    states = [mx.ones((1, 4, width))] * count
    with pytest.raises(ModelFolderError, match="does not fit"):
        connectors(states, mx.ones((1, 128), dtype=mx.int32))


# Configuration


@pytest.mark.parametrize("header", ["ltx-2-19b", "ltx-2.3-22b"])
def test_published_tensors_fit(header: str) -> None:
    _, metadata, tensors = published.read_header(header)
    moved = {rules.target("checkpoint", name): shape for name, (_, shape) in tensors.items()}
    theirs = {target.key: shape for target, shape in moved.items() if target and target.component == "connectors"}
    config = ConnectorsConfig.select(json.loads(metadata["config"])["transformer"])
    assert parameter_shapes(build(config | {"text_projection_in_features": 188160})) == theirs


def test_config_takes_what_concerns_the_connectors(transformer_section: dict[str, Any]) -> None:
    config = ConnectorsConfig.select(transformer_section)
    parsed = ConnectorsConfig.from_dict(config | {"text_projection_in_features": 448})
    assert parsed.video == parsed.audio == Heads(4, 16) and not parsed.per_token
    assert (parsed.num_hidden_states, parsed.connector_positional_embedding_max_pos) == (7, (4096,))
    assert "num_layers" not in config


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("caption_proj_before_connector", True, UnsupportedError),
        ("caption_projection_first_linear", False, UnsupportedError),
        ("caption_proj_input_norm", True, UnsupportedError),
        ("connector_norm_output", False, UnsupportedError),
        ("rope_type", "interleaved", UnsupportedError),
        ("frequencies_precision", "float32", UnsupportedError),
        ("audio_connector_attention_head_dim", 64, ConfigError),
        ("text_encoder_norm_type", "PER_TOKEN_RMS", UnsupportedError),
        ("text_encoder_norm_types", "PER_TOKEN_RMS", ConfigError),
        ("connector_num_attention_heads", 3, ConfigError),
    ],
)
def test_config_of_another_network_is_refused(
    transformer_section: dict[str, Any], key: str, value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        build(ConnectorsConfig.select({**transformer_section, key: value}) | {"text_projection_in_features": 448})


@pytest.mark.parametrize("key", PER_TOKEN)
@pytest.mark.parametrize("other", [True, False, None])
def test_a_projection_stated_in_part_is_refused(official_25: Split, key: str, other: bool | None) -> None:
    """All four keys or none of them."""
    section = ConnectorsConfig.select(official_25.config("transformer")["transformer"])
    assert ConnectorsConfig.from_dict(section | {"text_projection_in_features": 448}).per_token
    if other == PER_TOKEN[key]:
        return
    changed = {k: v for k, v in section.items() if k != key} | ({} if other is None else {key: other})
    with pytest.raises(UnsupportedError, match=key):
        build(changed | {"text_projection_in_features": 448})
