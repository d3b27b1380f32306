"""Latent upscalers against diffusers and the golden latents, in every structure that was published."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from ltx2.runtime.errors import ConfigError, UnsupportedError
from ltx2.runtime.memory import activations, cpu
from ltx2.runtime.memory.flops import upscale
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_network, parameter_shapes
from ltx2.runtime.networks.upsampler import LatentUpsampler, UpsamplerConfig, build
from ltx2.runtime.networks.video_vae.model import VideoAutoencoder
from ltx2.runtime.sampling.latents import Grid
from tests.memory.test_audio_memory import peak
from tests.memory.test_flops import Meter
from tests.support.golden import golden
from tests.support.official import Official
from tests.support.parity import relative_l2, require
from tests.support.published import SPATIAL, TEMPORAL, read_header

Figure = Callable[..., None]
TINY: dict[str, Any] = {
    "_class_name": "LatentUpsampler",
    "in_channels": 8,
    "mid_channels": 64,
    "num_blocks_per_stage": 2,
    "dims": 3,
}
SPACE: dict[str, Any] = {"spatial_upsample": True, "temporal_upsample": False}
TIME: dict[str, Any] = {"spatial_upsample": False, "temporal_upsample": True}
# Name -> configuration, and the size made of (3, 5, 7) latents.
STRUCTURES: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "x2, rational": (SPACE | {"spatial_scale": 2.0, "rational_resampler": True}, (3, 10, 14)),
    "x2": (SPACE, (3, 10, 14)),
    "x1.5": (SPACE | {"spatial_scale": 1.5, "rational_resampler": True}, (3, 8, 11)),
    "x0.75": (SPACE | {"spatial_scale": 0.75, "rational_resampler": True}, (3, 4, 6)),
    "time x2": (TIME, (5, 5, 7)),
    "time x2 with keys of the spatial ones": (TIME | {"spatial_scale": 1.0, "rational_resampler": True}, (5, 5, 7)),
    "space and time x2": ({"spatial_upsample": True, "temporal_upsample": True}, (5, 10, 14)),
}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def upsampler(model: Path) -> LatentUpsampler:
    return load_network(ModelFolder.open(model), "spatial_upscaler", LatentUpsampler)


def compare(network: LatentUpsampler, reference: Any, latents: np.ndarray) -> float:
    import torch

    with torch.no_grad():
        theirs = reference(torch.tensor(latents)).numpy()
    return relative_l2(network(mx.array(latents)), theirs)


def test_converted_upscaler_equals_diffusers(upsampler: LatentUpsampler, official: Official, figure: Figure) -> None:
    require("torch"), require("diffusers")
    from tests.support.reference_vae import reference_upsampler

    reference = reference_upsampler(official.tensors(official.upscaler), official.config(official.upscaler))
    figure("upsampler (converted) rel L2", compare(upsampler, reference, noise(1, 32, 4, 2, 3)), limit=1e-4)


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_equal_diffusers(name: str, figure: Figure) -> None:
    require("torch"), require("diffusers")
    from tests.support.reference_vae import load_official, random_tensors, reference_upsampler

    changes, size = STRUCTURES[name]
    network = build(TINY | changes)
    tensors = random_tensors(network, seed=1)
    load_official(network, tensors)
    latents = noise(1, 8, 3, 5, 7)
    assert network(mx.array(latents)).shape == (1, 8, *size)
    assert network.config.enlarged(3, 5, 7) == size
    reference = reference_upsampler(tensors, TINY | changes)
    figure(f"upsampler ({name}) rel L2", compare(network, reference, latents), limit=1e-4)


@pytest.mark.parametrize("prompt", ["a", "b"])
def test_golden_latents(demo_model: Path, figure: Figure, prompt: str) -> None:
    """Un-normalise, enlarge, normalise, as between the two stages."""
    latents = mx.array(golden(f"{prompt}.stage1.video_latent"))
    folder = ModelFolder.open(demo_model)
    upsampler = load_network(folder, "spatial_upscaler", LatentUpsampler)
    upsampler.update(tree_map(lambda value: value.astype(mx.float32), upsampler.parameters()))
    statistics = load_network(folder, "video_vae", VideoAutoencoder).per_channel_statistics
    ours = statistics.normalise(upsampler(statistics.unnormalise(latents)))
    error = relative_l2(ours, golden(f"{prompt}.upsampled.video_latent"))
    figure(f"upsampler golden {prompt} rel L2", error, limit=1e-4)


def test_normalisation_spans_the_clip(upsampler: LatentUpsampler) -> None:
    """A frame's result depends on the other frames; group statistics per frame draw a grid into the picture."""
    latents = noise(1, 32, 9, 2, 3)
    changed = latents.copy()
    changed[:, :, -1] *= 10
    first, again = (np.array(upsampler(mx.array(v)))[:, :, 0] for v in (latents, changed))
    assert np.abs(first - again).max() > 1e-2  # beyond the reach of the first frame's convolutions


def test_bf16_is_computed_in_bf16_and_returned_in_the_inputs_type(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upsampler = load_network(ModelFolder.open(model), "spatial_upscaler", LatentUpsampler)
    upsampler.update(tree_map(lambda value: value.astype(mx.bfloat16), upsampler.parameters()))
    seen: set[mx.Dtype] = set()
    convolve = mx.conv3d

    def spy(x: mx.array, *args: Any, **options: Any) -> mx.array:
        seen.add(x.dtype)
        return convolve(x, *args, **options)

    monkeypatch.setattr(mx, "conv3d", spy)
    assert upsampler(mx.zeros((1, 32, 2, 2, 2))).dtype == mx.float32
    assert seen == {mx.bfloat16}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        (SPATIAL, (16, 34, 60)),
        (TEMPORAL, (31, 17, 30)),
        ("ltx-2.3-spatial-upscaler-x2", (16, 34, 60)),
        ("ltx-2.3-spatial-upscaler-x1.5-1.0", (16, 26, 45)),
        ("ltx-2.3-temporal-upscaler-x2-1.0", (31, 17, 30)),
        ("ltx-2.5-latent-spatial-upscaler-x2-bf16-1.0", (16, 34, 60)),
        ("ltx-2.5-latent-temporal-upscaler-x2-bf16-1.0", (31, 17, 30)),
    ],
)
def test_published_files(name: str, size: tuple[int, int, int]) -> None:
    """All tensors' shapes; and the size that 16 latent frames of 17x30 get."""
    _, metadata, tensors = read_header(name)
    theirs = {
        key: (shape[0], *shape[2:], shape[1]) if len(shape) > 1 else shape
        for key, (_, shape) in tensors.items()
        if key != "upsampler.blur_down.kernel"
    }
    network = build(json.loads(metadata["config"]))
    assert parameter_shapes(network) == theirs
    assert network.config.enlarged(16, 17, 30) == size


@pytest.mark.parametrize("name", STRUCTURES)
def test_work_is_counted_as_executed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    meter, network = Meter(), build(TINY | STRUCTURES[name][0])
    meter.install(monkeypatch)
    mx.eval(network(mx.zeros((1, 8, 3, 5, 7))))
    work = upscale(network.config, Grid(8, 3, 5, 7, 8, 1))
    assert (work.flops, work.values) == (meter.flops[""], meter.values[""])


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="a CPU's kernels hold more")
@pytest.mark.parametrize("name", [name for name in STRUCTURES if name != "x0.75"])  # which was never published
def test_memory_on_a_cpu(name: str) -> None:
    """Never more than 5 % below, at most 50 % above: sizes are tiny."""
    network = build(TINY | STRUCTURES[name][0])
    mx.eval(network.parameters())
    plan = activations.upscale(network.config, Grid(8, 4, 8, 8, 8, 1), 4)
    planned = plan.needed + cpu.upscale(network.config, plan.largest, 4)
    measured = peak(network, 1, 8, 4, 8, 8)
    assert -0.05 * measured <= planned - measured <= 0.5 * measured, (planned, measured)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"dims": 2}, UnsupportedError),
        ({"_class_name": "Other"}, UnsupportedError),
        ({"spatial_upsample": False}, UnsupportedError),
        ({"spatial_scale": 3.0, "rational_resampler": True}, UnsupportedError),
        ({"mid_channels": 40}, UnsupportedError),
        ({"mid_channels": 64.5}, ConfigError),
        ({"attention": True}, ConfigError),
    ],
)
def test_config_that_would_compute_something_else_is_refused(change: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        UpsamplerConfig.from_dict(TINY | SPACE | change)


def test_defaults_are_the_oldest_files() -> None:
    config = UpsamplerConfig.from_dict({})
    assert (config.mid_channels, config.num_blocks_per_stage, config.rational) == (512, 4, False)
