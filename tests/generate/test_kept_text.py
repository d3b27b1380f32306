"""Keys and values of the text that are kept over the calls of a stage: same bits, and only where memory has room."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ltx2.runtime.generate import networks
from ltx2.runtime.generate.job import Job
from ltx2.runtime.generate.networks import Observe
from ltx2.runtime.generate.observe import watch
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.generate.phases.sample import Denoise
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.generate.records.clip import Sampled
from ltx2.runtime.memory.activations import text_keys
from ltx2.runtime.networks.load import load_network
from ltx2.runtime.sampling.guidance import NEGATIVE, TEXT
from ltx2.runtime.sampling.latents import Grid
from tests.support.loras import random_factors, write_lora
from tests.support.sampling import short_texts, shorten

PROMPT = "a red square"
PLAIN: dict[str, Any] = {"width": 64, "height": 64, "frames": 9, "seed": 3}
ONE: dict[str, Any] = PLAIN | {"no_upscale": True}
GUIDED: dict[str, Any] = PLAIN | {"pipeline": "one-stage", "steps": 2, "cfg": 3.0, "stg": 1.0, "stg_blocks": (1,)}
KEYS = "transformer_blocks.0.attn2.to_k"


def latents(model: Path, options: Mapping[str, Any], observe: Observe | None = None) -> dict[str, np.ndarray]:
    *_, last = Pipeline(model, observe).events(Request.from_options({"prompt": PROMPT, **options}), "latents")
    assert isinstance(last, Sampled)
    return {name: np.array(value) for name, value in last.latents.items()}


def kept(job: Job) -> tuple[str, ...]:
    return Denoise(job, 1).kept


def ignore(component: str, network: Any) -> None:
    """Whoever observes sees every call: nothing is kept."""


def same(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> bool:
    return all(np.array_equal(first[name], second[name]) for name in ("video", "audio"))


def seen(model: Path, options: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """How often keys of the text are made in the first block, in a run that nobody observes."""
    calls: list[str] = []

    def loaded(folder: Any, component: str, expected: Any, built: Any) -> Any:
        network = load_network(folder, component, expected, built)
        if component == "transformer":
            watch(network, lambda path, layer, x: calls.append(path))
        return network

    with monkeypatch.context() as patch:
        patch.setattr(networks, "load_network", loaded)
        latents(model, options)
    return calls.count(KEYS)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, (1.0, 0.6, 0.0), (0.5, 0.2, 0.0))


@pytest.fixture
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    short_texts(monkeypatch)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(tmp_path_factory.mktemp("lora") / "text.safetensors", random_factors({KEYS: (128, 128)}))


@pytest.mark.usefixtures("short")
def test_same_bits(demo_f32: Path) -> None:
    plan = Pipeline(demo_f32).plan(PROMPT, **PLAIN)
    assert plan.phase("stage1").text == plan.phase("stage2").text > 0
    assert same(latents(demo_f32, PLAIN), latents(demo_f32, PLAIN, ignore))


@pytest.mark.usefixtures("short_text")
def test_same_bits_where_there_are_two_texts(demo_f32: Path) -> None:
    options = GUIDED | {"stg": 0.0, "audio_stg": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}
    assert kept(Pipeline(demo_f32).plan(PROMPT, **options).job) == (TEXT, NEGATIVE)
    assert same(latents(demo_f32, options), latents(demo_f32, options, ignore))


@pytest.mark.usefixtures("short_text")
def test_same_bits_where_the_noise_level_modulates_the_text(demo_25: Path) -> None:
    """Kept over the passes of a step alone."""
    plan = Pipeline(demo_25).plan(PROMPT, **GUIDED)
    assert plan.job.transformer_config.modulates_text and kept(plan.job) == (TEXT,)
    assert same(latents(demo_25, GUIDED), latents(demo_25, GUIDED, ignore))
    assert Pipeline(demo_25).plan(PROMPT, **ONE).phase("stage1").text == 0


@pytest.mark.usefixtures("short")
def test_with_a_lora(demo_f32: Path, lora: Path) -> None:
    """Of strength 1 in stage 1 and 0.5 in stage 2."""
    options = PLAIN | {"lora": (f"{lora}:1,0.5",)}
    changed = latents(demo_f32, options)
    assert same(changed, latents(demo_f32, options, ignore)) and not same(changed, latents(demo_f32, PLAIN))


@pytest.mark.usefixtures("short")
def test_made_once(demo_f32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen(demo_f32, ONE, monkeypatch) == 1


@pytest.mark.usefixtures("short")
def test_observers_see_every_call(demo_f32: Path) -> None:
    calls: list[str] = []

    def observe(component: str, network: Any) -> None:
        if component == "transformer":
            watch(network, lambda path, layer, x: calls.append(path))

    latents(demo_f32, ONE, observe)
    assert calls.count(KEYS) == calls.count("transformer_blocks.0.attn2.to_q") > 1


@pytest.mark.usefixtures("short")
def test_given_up_before_anything_else(demo_f32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte less than it takes: no text is kept, and nothing else changes."""
    free = Pipeline(demo_f32).plan(PROMPT, **ONE).phase("stage1")
    config = Pipeline(demo_f32).plan(PROMPT, **ONE).job.transformer_config
    assert free.text == 2 * config.num_layers * 128 * (config.video.dim + config.audio.dim) * mx.float32.size
    enough, short = (Pipeline(demo_f32).plan(PROMPT, memory_limit=size / 1e9, **ONE).phase("stage1")
                     for size in (free.total + 1, free.total - 2))  # fmt: skip
    assert enough.text == free.text and short.text == 0
    assert (short.weights, short.activations, short.streamed) == (free.weights, free.activations, ())
    assert seen(demo_f32, ONE | {"memory_limit": (free.total - 2) / 1e9}, monkeypatch) > 1


def test_of_several_texts(demo_f32: Path) -> None:
    """A guided clip keeps both; a sound alone has no keys for a picture."""
    job = Pipeline(demo_f32).plan(PROMPT, **GUIDED).job
    assert kept(job) == (TEXT, NEGATIVE)
    config, grid = job.transformer_config, job.stage_grid(1)
    both, sound = text_keys(config, grid, 7, 2), text_keys(config, Grid(8, 1, 0, 0, 8, 9), 7, 2)
    assert both * config.audio.dim == sound * (config.video.dim + config.audio.dim)
