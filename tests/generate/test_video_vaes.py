"""Which video VAE decodes: a model folder with both, with one, and the diffusion decoder's noise, seeded or given."""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ltx2
from ltx2.runtime.errors import InputError
from ltx2.runtime.events import StepDone
from ltx2.runtime.generate.phases.order import count
from ltx2.runtime.generate.records.clip import Generated
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_network, parameter_shapes
from ltx2.runtime.networks.video_vae.diffusion import DiffusionAutoencoder, build
from ltx2.runtime.sampling.noise import Seeded
from tests.support.command import Here
from tests.support.official import Split, random_values
from tests.support.published import read_header

CONFIG = json.loads(read_header("ltx-2.5-video-vae-bf16")[1]["config"])["vae"]
SMALL: dict[str, Any] = {"width": 64, "height": 64, "frames": 9, "no_audio": True}
CANVAS = (1, 3, 17, 96, 96)  # of SMALL's latents, each side raised to the decoder's least


def tiny_config() -> dict[str, Any]:
    """The published structure at toy width, with windows of three."""
    encoder = {"base_channels": 8, "out_channels": 32}
    decoder = {
        "in_channels": 32, "head_dim": 16, "stage_channels": [32, 16, 16, 16], "stage_depths": [1, 1, 1, 1],
        "stage_kernels": [[3, 3, 3]] * 4, "stage5_kernel": None,
        "upsamples": [[[2, 2, 2], 2], [[2, 2, 2], 1], [[2, 2, 2], 1]],
    }  # fmt: skip
    return CONFIG | {"encoder": CONFIG["encoder"] | encoder, "decoder": CONFIG["decoder"] | decoder}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random diffusion VAE as it is published: bare names, float32."""
    rng, tensors = np.random.default_rng(5), {}
    for name, shape in parameter_shapes(build(tiny_config())).items():
        official = (shape[0], shape[4], *shape[1:4]) if len(shape) == 5 else shape
        name = re.sub(r"(?<=statistics\.)(mean|std)", r"\1-of-means", name)
        tensors[name] = random_values(name, official, rng)
    path = tmp_path_factory.mktemp("vae") / "ltx-2.5-video-vae.safetensors"
    save_file(tensors, path, {"config": json.dumps({"vae": tiny_config()}), "model_version": "2.5.0"})
    return path


@pytest.fixture(scope="module")
def both(official_25: Split, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with both."""
    out = tmp_path_factory.mktemp("vaes") / "both"
    return Path(ltx2.convert([*official_25.sources, source], out, variant="distilled"))


@pytest.fixture(scope="module")
def one(official_25: Split, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose only video VAE has the diffusion decoder."""
    sources = [path for path in official_25.sources if "video-vae" not in path.name]
    return Path(ltx2.convert([*sources, source], tmp_path_factory.mktemp("vaes") / "one", variant="distilled"))


@pytest.fixture(scope="module")
def latents(both: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a clip, as they are saved."""
    path = tmp_path_factory.mktemp("vaes") / "latents.safetensors"
    rng = np.random.default_rng(1)
    shapes = {"video": (1, 32, 2, 2, 2), "audio": (1, 2, 9, 16)}
    save_file({n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}, path, {"fps": "24"})
    return path


def decoded(folder: Path, latents: Path, canvas: mx.array) -> np.ndarray:
    """By the network alone."""
    vae = load_network(ModelFolder.open(folder), "diffusion_vae", DiffusionAutoencoder)
    return np.concatenate(list(vae.decode_frames(mx.array(load_file(latents)["video"]), canvas)))


def test_latents_are_decoded_by_either(both: Path, latents: Path) -> None:
    """Noise from the seed, by its own key."""
    pipe = ltx2.load(both)
    clip = pipe.generate(latents=latents, vae="diffusion", seed=3, no_audio=True)
    expected = decoded(both, latents, Seeded(3)("decoder.video", CANVAS))
    assert np.array_equal(clip.frames, expected) and clip.frames.shape == (9, 64, 64, 3)
    assert [phase["name"] for phase in clip.record["phases"]] == ["diffusion_vae"]
    other = pipe.generate(latents=latents, vae="diffusion", seed=4, no_audio=True)
    assert not np.array_equal(other.frames, clip.frames)
    conv = pipe.generate(latents=latents, seed=3, no_audio=True)
    assert conv.record["request"]["vae"] == "conv" and not np.array_equal(conv.frames, clip.frames)


def test_its_noise_may_be_given_alone(both: Path, latents: Path, tmp_path: Path) -> None:
    canvas = np.random.default_rng(2).standard_normal(CANVAS).astype(np.float32)
    save_file({"decoder.video": canvas}, tmp_path / "noise")
    clip = ltx2.load(both).generate(latents=latents, vae="diffusion", noise=tmp_path / "noise", no_audio=True)
    assert np.array_equal(clip.frames, decoded(both, latents, mx.array(canvas))) and clip.seed is None
    for vae, match in (("conv", "this run draws no noise"), ("diffusion", "wrong shape")):
        save_file({"decoder.video": canvas[:, :, 1:]}, tmp_path / "noise")
        with pytest.raises(InputError, match=match):
            ltx2.load(both).generate(latents=latents, noise=tmp_path / "noise", vae=vae, no_audio=True)


def test_all_of_a_clips_noise_is_in_one_file(both: Path, tmp_path: Path) -> None:
    pipe = ltx2.load(both)
    job = pipe.plan("x", vae="diffusion", **SMALL).job
    assert job.draws()["decoder.video"] == CANVAS and "decoder.video" not in pipe.plan("x", **SMALL).job.draws()
    seeded = {name: np.array(Seeded(3)(name, shape)) for name, shape in job.draws().items() if name != "decoder.video"}
    save_file({name: np.ascontiguousarray(value) for name, value in seeded.items()}, tmp_path / "noise")
    with pytest.raises(InputError, match=r"no tensor 'decoder\.video'"):
        pipe.generate("x", vae="diffusion", noise=tmp_path / "noise", **SMALL)


def test_a_run_that_was_cut_off_while_it_decoded(here: Here, both: Path, tmp_path: Path) -> None:
    """The same clip, from the seed that was drawn; its decoder may be another one."""
    options: dict[str, Any] = {"vae": "diffusion", "no_upscale": True, **SMALL}
    state, clip = tmp_path / "clip.unfinished.safetensors", None
    for event in ltx2.load(both).stream("x", state=state, seed=6, **options):
        if isinstance(event, StepDone) and event.phase == "diffusion_vae":
            break
    for event in ltx2.load(both).stream("x", state=state, resume=True, **options):
        clip = event.clip if isinstance(event, Generated) else clip
        assert not (isinstance(event, StepDone) and event.phase == "stage1"), "sampled already"
    assert clip is not None and clip.seed == 6
    size = ["--width", "64", "--height", "64", "--frames", "9", "--no-upscale", "--no-audio", "--seed", "6"]
    size += ["--vae", "diffusion", "--save-latents", str(tmp_path / "l.safetensors")]
    done = here("generate", "x", "-m", both, "-o", tmp_path / "b.mp4", *size)
    assert done.code == 0 and json.loads((tmp_path / "b.json").read_text())["request"]["vae"] == "diffusion"
    assert np.array_equal(load_file(tmp_path / "l.safetensors")["video"], clip.latents["video"])
    assert np.array_equal(clip.frames, decoded(both, tmp_path / "l.safetensors", Seeded(6)("decoder.video", CANVAS)))


def test_a_folder_with_the_diffusion_vae_alone(one: Path, latents: Path, tmp_path: Path) -> None:
    """It encodes, gives the statistics, and decodes."""
    picture = tmp_path / "picture.ppm"
    picture.write_bytes(b"P6 64 64 255\n" + bytes(range(256)) * 48)
    pipe = ltx2.load(one)
    clip = pipe.generate("x", image=[picture], seed=1, **SMALL)
    assert clip.record["request"]["vae"] == "diffusion" and clip.frames.shape == (9, 64, 64, 3)
    names = [phase["name"] for phase in clip.record["phases"]]
    assert {"encode_video", "spatial_upscaler", "diffusion_vae"} <= set(names) and "video_vae" not in names
    with pytest.raises(InputError, match=r"has no video_vae.*--vae conv decodes with it"):
        pipe.generate(latents=latents, vae="conv", no_audio=True)


def test_a_folder_without_it(model_25: Path, latents: Path) -> None:
    with pytest.raises(InputError, match=r"has no diffusion_vae.*--vae diffusion"):
        ltx2.load(model_25).generate(latents=latents, vae="diffusion", no_audio=True)


def test_memory_and_work_are_planned(both: Path, tmp_path: Path) -> None:
    """In tiles where the whole clip takes too much; as little as possible on request."""
    pipe, shapes = ltx2.load(both), {"video": (1, 32, 16, 32, 48), "audio": (1, 2, 126, 16)}
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, tmp_path / "large")
    large: dict[str, Any] = {"vae": "diffusion", "latents": tmp_path / "large", "no_audio": True}
    whole = pipe.plan(**large, memory_limit=1000)
    assert whole.tiling is None and [phase.name for phase in whole.phases] == ["diffusion_vae"]
    low = pipe.plan(**large, low_memory=True)
    assert low.tiling is not None and low.peak < whole.peak
    (least,) = (need.least for need in low.needs)
    assert pipe.plan(**large, memory_limit=1.01 * least / 1e9).fits
    assert not pipe.plan(**large, memory_limit=0.9 * least / 1e9).fits
    work, conv = count(whole.job), count(pipe.plan(**large | {"vae": "conv"}).job)
    assert work["diffusion_vae"].flops > 0 and conv.keys() == {"video_vae"}
