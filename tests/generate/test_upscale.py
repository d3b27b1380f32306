"""Clips and latents that are there, made twice as large or twice as smooth."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ltx2
from ltx2.bench.quality.classify import classify
from ltx2.runtime.errors import InputError, UsageError
from ltx2.runtime.files.tensors import open_tensorfile
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.media.source import media_facts, read_frames, read_sound
from ltx2.runtime.media.video import AudioTrack
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_network
from ltx2.runtime.networks.video_vae.model import VideoAutoencoder
from tests.support.command import Here
from tests.support.golden import golden
from tests.support.media import write_clip, write_frames
from tests.support.official import TEMPORAL, Official, random_temporal, tensors_of
from tests.support.parity import relative_l2, require

PROMPT = "a red square moves left on a white background with a low tone"


@pytest.fixture(scope="module")
def pipe(demo_25: Path) -> Pipeline:
    return ltx2.load(demo_25)


@pytest.fixture(scope="module")
def folder(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of the size that the demo model's stage 1 makes: as a file, without sound, and as latents."""
    folder = tmp_path_factory.mktemp("small")
    latents, text = folder / "clip.safetensors", folder / "text.safetensors"
    size: dict[str, Any] = {"width": 64, "height": 64, "frames": 9, "no_upscale": True, "no_audio": True}
    clip = pipe.generate(PROMPT, seed=5, save_latents=latents, save_embeddings=text, **size)
    tone = 0.5 * np.sin(np.arange(3000) / 5, dtype=np.float32)[None]
    write_clip(folder / "clip.mkv", clip.frames, 24, AudioTrack(tone, 8000))
    return folder


def video(path: Path) -> Any:
    return np.concatenate(list(read_frames(path)))


def halved(frames: Any) -> Any:
    count, height, width, _ = frames.shape
    return frames.reshape(count, height // 2, 2, width // 2, 2, 3).mean((2, 4))


def psnr(ours: Any, theirs: Any) -> float:
    return float(10 * np.log10(255**2 / np.mean((ours.astype(np.float64) - theirs) ** 2)))


class TestLatents:
    def test_twice_the_size_as_diffusers(
        self, here: Here, demo_f32: Path, tmp_path: Path, figure: Callable[..., None]
    ) -> None:
        """The golden latents; the sound is copied bit for bit."""
        given = {"video": golden("a.stage1.video_latent"), "audio": golden("a.stage1.audio_latent")}
        save_file({n: np.ascontiguousarray(v) for n, v in given.items()}, tmp_path / "a.safetensors", {"fps": "25"})
        done = here("upscale", tmp_path / "a.safetensors", "-m", demo_f32, "-o", tmp_path / "b.safetensors", "--json")
        assert done.code == 0 and done.json["latents"] == str(tmp_path / "b.safetensors")
        made = load_file(tmp_path / "b.safetensors")
        np.testing.assert_array_equal(made["audio"], given["audio"])
        error = relative_l2(made["video"], golden("a.upsampled.video_latent"))
        figure("upscaled latents rel L2", error, limit=1e-4)
        assert open_tensorfile(tmp_path / "b.safetensors").metadata["fps"] == "25"

    def test_twice_the_rate_as_diffusers(self, official: Official, tmp_path: Path, figure: Callable[..., None]) -> None:
        torch = require("torch")
        require("diffusers")
        from tests.support.reference_vae import reference_upsampler

        upscaler = random_temporal(tmp_path / "temporal.safetensors")
        ltx2.convert([*official.sources, upscaler], tmp_path / "model", variant="distilled")
        rng = np.random.default_rng(0)
        given = {"video": rng.standard_normal((1, 32, 3, 4, 6), np.float32)}  # without sound
        save_file(given, tmp_path / "a.safetensors")
        made = ltx2.load(tmp_path / "model").upscale(tmp_path / "a.safetensors", temporal=True)
        assert isinstance(made, dict) and made.keys() == {"video"} and made["video"].shape == (1, 32, 5, 4, 6)
        vae = load_network(ModelFolder.open(tmp_path / "model"), "video_vae", VideoAutoencoder)
        plain = np.array(vae.per_channel_statistics.unnormalise(mx.array(given["video"])))
        with torch.no_grad():
            larger = reference_upsampler(tensors_of(upscaler), TEMPORAL)(torch.tensor(plain)).numpy()
        theirs = vae.per_channel_statistics.normalise(mx.array(larger))
        figure("latents of twice the rate rel L2", relative_l2(made["video"], theirs), limit=1e-4)

        frames = rng.integers(0, 256, (9, 64, 64, 3), np.uint8)
        clip = write_clip(tmp_path / "a.mkv", frames, 24, AudioTrack(np.zeros((1, 3000), np.float32), 8000))
        *_, _ = ltx2.load(tmp_path / "model").stream(upscale=clip, temporal_upscale=True, output=tmp_path / "b.mp4")
        facts = media_facts(tmp_path / "b.mp4")
        assert (facts.width, facts.height, facts.fps, facts.rate) == (64, 64, 48, 8000)
        assert len(video(tmp_path / "b.mp4")) == 17

    def test_refined(self, pipe: Pipeline, folder: Path) -> None:
        given = load_file(folder / "clip.safetensors")
        plain = pipe.upscale(folder / "clip.safetensors")
        made = pipe.upscale(folder / "clip.safetensors", embeddings=folder / "text.safetensors", seed=1)
        assert isinstance(plain, dict) and isinstance(made, dict)
        assert made["video"].shape == plain["video"].shape == (1, 32, 2, 4, 4)
        np.testing.assert_array_equal(made["audio"], given["audio"])
        assert 0.1 < relative_l2(made["video"], plain["video"]) < 1.5
        save_file({"video": given["video"]}, folder / "silent.safetensors")
        silent = pipe.upscale(folder / "silent.safetensors", embeddings=folder / "text.safetensors", seed=1)
        assert isinstance(silent, dict) and silent.keys() == {"video"}
        assert 0 < relative_l2(silent["video"], made["video"]) < 1


class TestClips:
    def test_twice_the_size(self, here: Here, demo_25: Path, folder: Path, tmp_path: Path) -> None:
        """The sound is the source's; the run is recorded and can be repeated."""
        out = tmp_path / "large.mp4"
        done = here("upscale", folder / "clip.mkv", "-m", demo_25, "-o", out, "-q")
        assert (done.code, done.out, done.err) == (0, "", "")
        source, made = video(folder / "clip.mkv"), video(out)
        assert made.shape == (9, 128, 128, 3) and psnr(halved(made), source) > 17
        assert classify(made, None, 0)["colour"] == "red"
        ours, theirs = (read_sound(path).samples for path in (out, folder / "clip.mkv"))
        length = min(ours.shape[1], theirs.shape[1])
        assert np.corrcoef(ours[0, :length], theirs[0, :length])[0, 1] > 0.9
        assert json.loads((tmp_path / "large.json").read_text())["sound"] == "given"
        again = here("generate", "--from", out, "-o", tmp_path / "again.mp4", "--no-metadata")
        assert again.code == 0, again
        np.testing.assert_array_equal(video(tmp_path / "again.mp4"), made)

    def test_refined(self, pipe: Pipeline, folder: Path) -> None:
        clip = pipe.upscale(folder / "clip.mkv", embeddings=folder / "text.safetensors", seed=3)
        assert not isinstance(clip, dict)
        (stage,) = clip.record["stages"]
        assert (stage["width"], stage["height"], stage["sigmas"][0]) == (128, 128, 0.909375)
        found = classify(clip.frames, None, 0)
        assert (found["colour"], found["background"]) == ("red", "white")
        assert psnr(halved(clip.frames), video(folder / "clip.mkv")) > 14


class TestRefused:
    def test_usage(self, here: Here, demo_25: Path, folder: Path, tmp_path: Path) -> None:
        args = ["upscale", folder / "clip.mkv", "-m", demo_25]
        here(*args, "-o", tmp_path / "a.mp4", "--temporal", "--prompt", "a").failed(2, "--temporal")
        here(*args, "-o", tmp_path / "a.mp4", "--temporal").failed(1, "has no temporal_upscaler")
        here(*args, "-o", tmp_path / "a.safetensors").failed(1, "clips are written as mp4")
        assert not list(tmp_path.iterdir())

    def test_nothing_is_ignored_in_silence(self, here: Here, demo_25: Path, folder: Path, tmp_path: Path) -> None:
        args = ["upscale", folder / "clip.mkv", "-m", demo_25, "-o", tmp_path / "a.mp4", "--preview", tmp_path / "p"]
        done = here(*args)
        assert done.code == 0 and "warning: --preview has no effect without a prompt" in done.err, done.err
        assert not (tmp_path / "p").exists()

    def test_nothing_is_replaced_unasked(self, here: Here, demo_25: Path, folder: Path, tmp_path: Path) -> None:
        for source, name in (("clip.mkv", "a.mp4"), ("clip.safetensors", "a.safetensors")):
            (tmp_path / name).write_bytes(b"precious")
            here("upscale", folder / source, "-m", demo_25, "-o", tmp_path / name).failed(1, "is already there")
            assert (tmp_path / name).read_bytes() == b"precious"
        args = ["upscale", folder / "clip.safetensors", "-m", demo_25, "-o", tmp_path / "a.safetensors", "--force"]
        assert here(*args).code == 0 and (tmp_path / "a.safetensors").read_bytes() != b"precious"
        here(*args[:-2], tmp_path / "a.mp4").failed(1, "latents become latents")

    def test_inputs(self, pipe: Pipeline, tmp_path: Path) -> None:
        odd = write_frames(tmp_path / "odd.mkv", np.zeros((9, 64, 100, 3), np.uint8))
        short = write_frames(tmp_path / "short.mkv", np.zeros((4, 64, 96, 3), np.uint8))
        save_file({"video": np.zeros((1, 7, 2, 2, 3), np.float32)}, tmp_path / "other.safetensors")
        save_file({"noise": np.zeros((1, 7), np.float32)}, tmp_path / "none.safetensors")
        for path, said in (
            (odd, "width 100"), (short, "frames 4"), (tmp_path / "other.safetensors", "wrong shape"),
            (tmp_path / "none.safetensors", "has no clip"), (tmp_path / "missing.mp4", "cannot read"),
        ):  # fmt: skip
            with pytest.raises(InputError, match=said):
                pipe.upscale(path)
        with pytest.raises(UsageError, match="do not go together"):
            pipe.upscale(odd, cfg=3)

    def test_plan(self, here: Here, demo_25: Path, folder: Path, tmp_path: Path) -> None:
        args = ["upscale", folder / "clip.mkv", "-m", demo_25, "-o", tmp_path / "a.mp4", "--dry-run", "--json"]
        plan = here(*args).json["plan"]
        assert [phase["name"] for phase in plan["phases"]] == ["encode_video", "spatial_upscaler", "video_vae"]
        assert (plan["width"], plan["height"]) == (128, 128) and not list(tmp_path.iterdir())
        small = here(*args, "--memory-limit", "0.01")
        assert small.code == 3 and "a shorter or smaller clip" in small.err
