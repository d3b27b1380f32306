"""The diffusion video decoder: against diffusers in one piece, in tiles against Lightricks' rules written out with
diffusers' stages, clips that are smaller than its windows, and what is refused."""

import json
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from safetensors.numpy import save_file

from ltx2.runtime.errors import ConfigError, InputError, NumericsError, UnsupportedError
from ltx2.runtime.layers import neighbourhood
from ltx2.runtime.memory import activations, cpu
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_network, parameter_shapes
from ltx2.runtime.networks.video_vae.diffusion import DiffusionAutoencoder, build
from ltx2.runtime.networks.video_vae.diffusion_config import DiffusionVAEConfig, diffusion_tilings
from ltx2.runtime.networks.video_vae.tiles import Tiling
from tests.support.parity import relative_l2, require
from tests.support.published import read_header

Figure = Callable[..., None]
PUBLISHED = json.loads(read_header("ltx-2.5-video-vae-bf16")[1]["config"])["vae"]


def config(upsamples: list[Any], channels: list[int], kernels: list[list[int]], **keys: Any) -> dict[str, Any]:
    """The published configuration with other stages, at toy width; encoder and patches to fit."""
    kinds = {(1, 2, 2): "space", (2, 1, 1): "time", (2, 2, 2): "all"}
    blocks = [[f"compress_{kinds[tuple(stride)]}_res", {"multiplier": 1}] for stride, _ in upsamples]
    encoder = {
        "blocks": [["res_x", {"num_layers": 1}], *blocks],
        "base_channels": 8,
        "out_channels": 8,
        "patch_size": 2,
    }
    decoder = {
        "in_channels": 8, "patch_size": 2, "head_dim": 16,
        "stage_channels": channels, "stage_depths": [1, 2, 2, 2][: len(channels)],
        "stage_kernels": kernels, "stage5_kernel": kernels[-1], "upsamples": upsamples,
    }  # fmt: skip
    return PUBLISHED | {"encoder": PUBLISHED["encoder"] | encoder, "decoder": PUBLISHED["decoder"] | decoder} | keys


SHORT = config([[[1, 2, 2], 2], [[2, 2, 2], 1]], [64, 32, 32], [[3, 3, 3], [3, 5, 3], [5, 5, 7]])
LONG = config(
    [[[1, 2, 2], 2], [[2, 1, 1], 1], [[2, 2, 2], 2]], [64, 32, 32, 16], [[3, 3, 3], [1, 3, 3], [3, 3, 5], [5, 3, 3]]
)
BY_VELOCITY = SHORT | {"model_output_type": "v"}


def network(config: dict[str, Any]) -> tuple[DiffusionAutoencoder, dict[str, np.ndarray]]:
    """With random weights, and these by their official names."""
    require("torch")
    from tests.support.reference_vae import load_official, random_tensors

    made = build(config)
    tensors = random_tensors(made, seed=3)
    load_official(made, tensors)
    return made, tensors


def reference(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Any:
    require("diffusers")
    from tests.support.reference_diffusion import reference_diffusion_decoder

    return reference_diffusion_decoder(tensors, config)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def decoded(
    vae: DiffusionAutoencoder,
    latents: np.ndarray,
    canvas: np.ndarray,
    tiling: Tiling | None = None,
    steps: int | None = None,
) -> np.ndarray:
    """(F, H, W, 3) in [-1, 1]"""
    groups = vae.decode_tiles(mx.array(latents), mx.array(canvas), tiling, steps)
    return np.concatenate([np.array(group) for group in groups])


@pytest.mark.parametrize(
    ("name", "config", "size", "steps"),
    [
        ("short", SHORT, (4, 3, 4), 1),
        ("short", SHORT, (3, 3, 3), 2),
        ("long", LONG, (3, 3, 4), 1),
        ("by velocity", BY_VELOCITY, (3, 4, 3), 1),
        ("by velocity", BY_VELOCITY, (3, 4, 3), 3),
    ],
)
def test_decoder_equals_diffusers(
    figure: Figure, name: str, config: dict[str, Any], size: tuple[int, int, int], steps: int
) -> None:
    vae, tensors = network(config)
    from tests.support.reference_diffusion import decoded as theirs

    latents, canvas = noise(1, 8, *size), noise(*vae.config.canvas(size), seed=1)
    expected = theirs(reference(config, tensors), latents, canvas, steps)
    found = decoded(vae, latents, canvas, steps=steps)
    figure(f"diffusion decoder ({name}, {size}, {steps} steps) rel L2", relative_l2(found, expected), limit=1e-4)


def test_the_noise_counts() -> None:
    vae, _ = network(SHORT)
    latents, canvas = noise(1, 8, 3, 3, 3), noise(*vae.config.canvas((3, 3, 3)))
    assert relative_l2(decoded(vae, latents, -canvas), decoded(vae, latents, canvas)) > 1e-3


# --- tiles


def ramp(tiles: list[tuple[int, int]], number: int) -> np.ndarray:
    """Weights of a tile [start, stop): linear over what it shares with its neighbours, from above 0 to below 1."""
    start, stop = tiles[number]
    weights = np.ones(stop - start)
    if number:
        shared = tiles[number - 1][1] - start
        weights[:shared] = [(k + 1) / (shared + 1) for k in range(shared)]
    if number + 1 < len(tiles):
        shared = stop - tiles[number + 1][0]
        weights[len(weights) - shared :] = [1 - (k + 1) / (shared + 1) for k in range(shared)]
    return weights


def cuts(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    count = max(1, ceil((length - overlap) / (size - overlap)))
    return [(i * (size - overlap), min(i * (size - overlap) + size, length)) for i in range(count)]


def by_the_rules(module: Any, latents: np.ndarray, canvas: np.ndarray, tiling: Tiling, steps: int) -> np.ndarray:
    """The first stages of the whole clip, the last two of every tile by itself. Tiles are cut in what goes into the
    last stage but one, here in cells of 2 frames and 4x4 pixels; cells [a, b) make frames [2a - 1, 2b - 1), the very
    first cell one frame."""
    import torch

    decoder, mean, std = module.decoder, *(v.view(1, -1, 1, 1, 1) for v in (module.latents_mean, module.latents_std))
    features = decoder.forward_stages_1_to_3(torch.tensor(latents) * std + mean)
    ghosts = features.shape[1] - latents.shape[2]
    times = cuts(latents.shape[2], tiling.frames // 2, tiling.frame_overlap // 2)
    rows, columns = (
        cuts(length, side // 4, tiling.overlap // 4)
        for length, side in zip(features.shape[2:4], (tiling.height, tiling.width), strict=True)
    )
    frames = [(max(0, 2 * a - 1), 2 * b - 1) for a, b in times]
    tall, wide = ([(4 * a, 4 * b) for a, b in side] for side in (rows, columns))
    total = np.zeros((*canvas.shape[2:], 3))
    for i, (a, b) in enumerate(times):
        last = i == len(times) - 1
        for j, (top, bottom) in enumerate(rows):
            for k, (left, right) in enumerate(columns):
                part = features[:, a : b + ghosts * last, top:bottom, left:right]
                context = decoder.forward_stage_4(part, drop_leading_frame=i == 0, crop_trailing_ghost=last)
                place = tuple(slice(*tiles[n]) for tiles, n in ((frames, i), (tall, j), (wide, k)))
                tile = decoder.denoise(context, torch.tensor(canvas[(slice(None), slice(None), *place)]), steps)
                weights = ramp(frames, i)[:, None, None, None] * ramp(tall, j)[:, None, None] * ramp(wide, k)[:, None]
                total[place] += tile[0].permute(1, 2, 3, 0).numpy() * weights
    return total


@pytest.mark.parametrize(
    ("size", "tiling", "steps"),
    [
        ((6, 4, 5), Tiling(24, 32, 12, 10, 4), 1),
        ((3, 4, 3), Tiling(24, 64, 12, 100, 0), 2),  # rows only, one canvas for both steps
        ((6, 3, 3), Tiling(64, 64, 0, 10, 4), 1),  # time only
    ],
)
def test_tiles_follow_lightricks_rules(figure: Figure, size: tuple[int, int, int], tiling: Tiling, steps: int) -> None:
    import torch

    vae, tensors = network(SHORT)
    latents, canvas = noise(1, 8, *size), noise(*vae.config.canvas(size), seed=1)
    with torch.no_grad():
        expected = by_the_rules(reference(SHORT, tensors), latents, canvas, tiling, steps)
    found = decoded(vae, latents, canvas, tiling, steps)
    figure(f"diffusion decoder in {tiling} against the rules, rel L2", relative_l2(found, expected), limit=1e-4)
    assert relative_l2(decoded(vae, latents, canvas, steps=steps), expected) > 1e-3, "tiles differ from one piece"


@pytest.mark.parametrize(
    ("tiling", "match"),
    [
        (Tiling(24, 32, 8, 10, 2), "less than 6 frames or 20 pixels"),  # of ten cells over time two are left at the end
        (Tiling(24, 30, 12, 14, 6), "multiples of 4 pixels and 2 frames"),
    ],
)
def test_tiles_that_cannot_work_are_refused(tiling: Tiling, match: str) -> None:
    vae = build(SHORT)
    with pytest.raises(InputError, match=match):
        decoded(vae, noise(1, 8, 10, 4, 5), noise(*vae.config.canvas((10, 4, 5))), tiling)


# --- small clips


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 4, 2)])
def test_small_clips_are_extended_at_their_edges(size: tuple[int, int, int]) -> None:
    vae, _ = network(SHORT)
    assert vae.config.smallest == (3, 3, 3) and vae.config.canvas((1, 1, 4)) == (1, 3, 5, 24, 32)
    latents, canvas = noise(1, 8, *size), noise(*vae.config.canvas(size))
    missing = [max(0, 3 - side) for side in size]
    pads = [(0, missing[0]), *((n // 2, n - n // 2) for n in missing[1:])]
    whole = decoded(vae, np.pad(latents, [(0, 0), (0, 0), *pads], mode="edge"), canvas)
    (top, _), (left, _) = ((8 * before, after) for before, after in pads[1:])
    frames, height, width = (size[0] - 1) * 2 + 1, size[1] * 8, size[2] * 8
    found = decoded(vae, latents, canvas)
    assert found.shape == (frames, height, width, 3)
    np.testing.assert_array_equal(found, whole[:frames, top : top + height, left : left + width])


def test_sizes_of_the_published_file() -> None:
    config = DiffusionVAEConfig.from_dict(PUBLISHED)
    assert config.smallest == (3, 7, 7) and config.smallest_tile == (6, 6, 6) and config.cell == (8, 2)
    assert (config.spatial_scale, config.temporal_scale, config.ghosts) == (32, 8, 2)
    assert config.canvas((16, 16, 24)) == (1, 3, 121, 512, 768) and config.canvas((1, 4, 9)) == (1, 3, 17, 224, 288)


def test_shapes_of_the_published_file() -> None:
    _, _, tensors = read_header("ltx-2.5-video-vae-bf16")
    theirs = {
        name.replace("-of-means", ""): (shape[0], *shape[2:], shape[1]) if len(shape) == 5 else shape
        for name, (_, shape) in tensors.items()
        if name != "decoder.type_emb"  # a mark for keyframes that Lightricks does not use
    }
    assert parameter_shapes(build(PUBLISHED)) == theirs


def test_a_converted_file(tmp_path: Path) -> None:
    """As published: bare names, statistics, and the mark for keyframes, which is left out."""
    import ltx2

    vae, tensors = network(SHORT)
    tensors["decoder.type_emb"] = noise(8)
    metadata = {"config": json.dumps({"vae": SHORT}), "model_version": "2.5.0"}
    save_file(tensors, tmp_path / "vae.safetensors", metadata)
    folder = ModelFolder.open(ltx2.convert(tmp_path / "vae.safetensors", tmp_path / "model"))
    assert list(folder.manifest.components) == ["diffusion_vae"]
    loaded = load_network(folder, "diffusion_vae", DiffusionAutoencoder)
    latents, canvas = noise(1, 8, 3, 3, 3), noise(*vae.config.canvas((3, 3, 3)))
    np.testing.assert_array_equal(decoded(loaded, latents, canvas), decoded(vae, latents, canvas))
    pixels = mx.array(np.tanh(noise(1, 3, 5, 16, 16)))
    assert mx.array_equal(loaded.encode(pixels), vae.encode(pixels))


# --- data types, memory, errors


def test_bf16_frames(figure: Figure) -> None:
    vae, _ = network(SHORT)
    latents, canvas = noise(1, 8, 3, 3, 4), noise(*vae.config.canvas((3, 3, 4)))
    exact = np.concatenate(list(vae.decode_frames(mx.array(latents), mx.array(canvas))))
    assert exact.dtype == np.uint8 and exact.shape == (5, 24, 32, 3)
    vae.update(tree_map(lambda value: value.astype(mx.bfloat16), vae.parameters()))
    context = vae.decoder.context(vae.decoder.features(mx.array(noise(3, 3, 4, 8))))
    assert {slab.dtype for slab in context} == {mx.bfloat16}
    assert vae.decoder.denoise(context, mx.zeros((5 + 4, 24, 32, 3)), 1).dtype == mx.bfloat16
    rounded = np.concatenate(list(vae.decode_frames(mx.array(latents), mx.array(canvas))))
    figure(
        "diffusion decoder in bf16: mean difference in levels", np.abs(rounded - exact.astype(float)).mean(), limit=3
    )


@pytest.mark.parametrize("gathered", [1 << 16, 1 << 22])
@pytest.mark.parametrize(
    ("size", "tiling", "steps"),
    [((6, 4, 6), None, 1), ((5, 4, 4), None, 2), ((6, 4, 6), Tiling(24, 32, 12, 10, 4), 1)],
)
def test_memory_is_as_planned(
    monkeypatch: pytest.MonkeyPatch, figure: Figure, size: tuple[int, int, int], tiling: Tiling | None, steps: int,
    gathered: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(neighbourhood, "GATHERED", gathered)
    monkeypatch.setattr(activations, "GATHERED", gathered)
    vae = build(SHORT)
    latents, canvas = mx.array(noise(1, 8, *size)), mx.array(noise(*vae.config.canvas(size)))
    mx.eval(latents, canvas, vae.parameters())
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory() - canvas.nbytes
    for group in vae.decode_frames(latents, canvas, tiling, steps):
        del group
    measured = mx.get_peak_memory() - before
    planned = activations.decode_diffusion(vae.config, size, tiling, 4, steps).needed
    planned += cpu.decode_diffusion(vae.config, size, tiling, 4)
    figure(f"diffusion decoder's memory above the plan, {size}, {tiling}", measured / planned - 1, limit=0.05)
    assert planned <= 1.5 * measured


def test_tilings_take_less_and_less() -> None:
    config = DiffusionVAEConfig.from_dict(PUBLISHED)
    assert config.halo == (40, 160)
    assert diffusion_tilings(config, (3, 7, 7)) == [None]
    for latents in [(16, 16, 24), (16, 34, 60), (31, 22, 40)]:
        tilings = diffusion_tilings(config, latents)
        needs = [activations.decode_diffusion(config, latents, tiling, 2, 1).needed for tiling in tilings]
        assert needs == sorted(needs, reverse=True) and len(needs) >= 3


def test_noise_of_another_size_is_refused() -> None:
    with pytest.raises(InputError, match=r"\[1, 3, 5, 24, 24\]"):
        decoded(build(SHORT), noise(1, 8, 3, 3, 3), noise(1, 3, 5, 24, 32))


def test_frames_that_are_not_finite() -> None:
    vae, _ = network(SHORT)
    canvas = noise(*vae.config.canvas((3, 3, 3)))
    with pytest.raises(NumericsError, match="decoded frames"):
        list(vae.decode_frames(mx.array(noise(1, 8, 3, 3, 3) * np.inf), mx.array(canvas)))


@pytest.mark.parametrize(
    ("section", "change", "error"),
    [
        ("decoder", {"resampler_kind": "conv"}, UnsupportedError),
        ("decoder", {"attention_sinks": 1}, ConfigError),
        ("decoder", {"stage_channels": [64, 32, 16]}, ConfigError),
        ("decoder", {"stage_depths": [1, 2]}, ConfigError),
        ("decoder", {"stage5_kernel": [5, 5, 5]}, ConfigError),
        ("decoder", {"head_dim": 64}, ConfigError),
        ("decoder", {"in_channels": 16}, ConfigError),
        ("decoder", {"patch_size": 4}, ConfigError),
        ("encoder", {"norm_layer": "group_norm"}, UnsupportedError),
        ("encoder", {"blocks": [["attn", {}]]}, UnsupportedError),
        ("", {"model_output_type": "noise"}, UnsupportedError),
        ("", {"_class_name": "CausalVideoAutoencoder"}, UnsupportedError),
    ],
)
def test_config_that_would_compute_something_else_is_refused(
    section: str, change: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        DiffusionVAEConfig.from_dict(SHORT | ({section: SHORT[section] | change} if section else change))


def test_what_a_configuration_is_silent_about() -> None:
    silent = {"default_num_inference_steps", "timestep_scale_multiplier", "stage5_kernel", "model_output_type"}
    decoder = {key: value for key, value in SHORT["decoder"].items() if key not in silent}
    found = DiffusionVAEConfig.from_dict({k: v for k, v in SHORT.items() if k not in silent} | {"decoder": decoder})
    assert found.decoder.default_num_inference_steps == 2 and found.decoder.timestep_scale_multiplier == 1.0
    assert found.model_output_type == "v"
