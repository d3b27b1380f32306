"""`ltx2 generate`: clips that repeat, the files that stand for a part of the work, and what is recorded."""

import json
import shutil
import subprocess
import tracemalloc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio_ffmpeg  # type: ignore[import-untyped]
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ltx2
from ltx2.cli import run
from ltx2.runtime.generate import job
from ltx2.runtime.generate.options.preset import preset_of
from ltx2.runtime.generate.records.clip import Saved
from tests.support.command import SIZE, Here
from tests.support.media import read_video
from tests.support.official import MONOLITH

pytestmark = pytest.mark.usefixtures("few_steps")
PROMPT = "a red square"
LATENTS = "latents.safetensors"


def streams(clip: Path) -> list[str]:
    """Kinds of the streams in a video file."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(clip)]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    return [kind for line in said.splitlines() for kind in ("Video", "Audio") if f": {kind}: " in line]


def same(first: Path, second: Path) -> bool:
    a, b = load_file(first), load_file(second)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def phases(sidecar: Path) -> list[str]:
    return [phase["name"] for phase in json.loads(sidecar.read_text())["phases"]]


@dataclass(frozen=True)
class Made:
    """A clip, and all that one command can write beside it."""

    clip: Path
    latents: Path
    embeddings: Path

    @property
    def sidecar(self) -> Path:
        return self.clip.with_suffix(".json")


@pytest.fixture(scope="module")
def made(demo_f32: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Seed 3, 30 frames a second."""
    folder = tmp_path_factory.mktemp("made")
    made = Made(folder / "clip.mp4", folder / LATENTS, folder / "embeddings.safetensors")
    args = ["generate", PROMPT, "-m", demo_f32, "-o", made.clip, "--seed", "3", "--fps", "30", *SIZE]
    args += ["--no-metadata", "--save-latents", made.latents, "--save-embeddings", made.embeddings]
    assert run([str(arg) for arg in args]) == 0
    return made


class TestRepeating:
    def test_from_a_sidecar(self, here: Here, made: Made, tmp_path: Path) -> None:
        """The same clip, and nothing but the clip."""
        assert here("generate", "--from", made.sidecar, "-o", tmp_path / "2.mp4").code == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["2.json", "2.mp4"]
        assert (tmp_path / "2.mp4").read_bytes() == made.clip.read_bytes()
        first, second = (json.loads(path.read_text())["request"] for path in (made.sidecar, tmp_path / "2.json"))
        assert second == first | {"save_latents": None, "save_embeddings": None}

    def test_options_take_precedence(self, here: Here, made: Made, tmp_path: Path) -> None:
        args = ["generate", "a green star", "--from", made.sidecar, "-o", tmp_path / "2.mp4", "--seed", "4"]
        assert here(*args, "--save-latents", tmp_path / LATENTS).code == 0
        assert not same(made.latents, tmp_path / LATENTS)
        request = json.loads((tmp_path / "2.json").read_text())["request"]
        assert (request["prompt"], request["seed"], request["fps"]) == ("a green star", 4, 30.0)

    def test_a_new_prompt_replaces_the_embeddings(self, here: Here, generate: Here, made: Made, tmp_path: Path) -> None:
        generate("--embeddings", made.embeddings)
        done = here("generate", "a green star", "--from", tmp_path / "clip.json", "-o", tmp_path / "2.mp4")
        assert done.code == 0 and "text_encoder" in phases(tmp_path / "2.json")

    def test_from_another_folder(
        self, here: Here, demo_f32: Path, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The model, the noise and the embeddings were given by relative paths."""
        save_noise(tmp_path / "noise")
        (tmp_path / "model").symlink_to(demo_f32)
        (tmp_path / "embeddings").symlink_to(made.embeddings)
        monkeypatch.chdir(tmp_path)
        files = ["--noise", "noise", "--embeddings", "embeddings"]
        assert here("generate", "-m", "model", "-o", "clip.mp4", *files, *SIZE).code == 0
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert here("generate", "--from", "../clip.json", "-o", "clip.mp4").code == 0
        assert Path("clip.mp4").read_bytes() == Path("../clip.mp4").read_bytes()

    def test_a_model_that_moved(self, here: Here, demo_f32: Path, made: Made, tmp_path: Path) -> None:
        """Its new place is asked for; with it the clip is the same, and there is nothing to warn of."""
        record = json.loads(made.sidecar.read_text())
        record["model"]["path"] = str(tmp_path / "gone")
        (tmp_path / "old.json").write_text(json.dumps(record))
        args = ["generate", "--from", tmp_path / "old.json", "-o", tmp_path / "2.mp4"]
        here(*args).failed(1, "the model of", "gone", "-m MODEL")
        done = here(*args, "-m", demo_f32)
        assert done.code == 0 and "warning" not in done.err
        assert (tmp_path / "2.mp4").read_bytes() == made.clip.read_bytes()

    def test_with_another_model(self, here: Here, made: Made, tmp_path: Path) -> None:
        record = json.loads(made.sidecar.read_text())
        record["model"]["files"]["vocoder"][0] = "0" * 64
        (tmp_path / "old.json").write_text(json.dumps(record))
        done = here("generate", "--from", tmp_path / "old.json", "-o", tmp_path / "2.mp4")
        assert done.code == 0 and "warning: this is not the model" in done.err

    def test_seeds(self, generate: Here, made: Made, tmp_path: Path) -> None:
        for seed in ("3", "4"):
            place = ("--save-latents", tmp_path / f"{seed}.safetensors")
            generate("--embeddings", made.embeddings, "--fps", "30", "--seed", seed, *place, to=f"{seed}.mp4")
        third, fourth = (tmp_path / f"{seed}.safetensors" for seed in (3, 4))
        assert same(made.latents, third) and not same(made.latents, fourth)


class TestSidecar:
    def test_what_it_records(self, generate: Here, demo_f32: Path, tmp_path: Path) -> None:
        done = generate(PROMPT, "--seed", "3", "--json").json
        record = json.loads((tmp_path / "clip.json").read_text())
        assert done == {"clip": str(tmp_path / "clip.mp4"), "sidecar": str(tmp_path / "clip.json"), **record}
        request = {"prompt": PROMPT, "width": 64, "height": 64, "frames": 9, "fps": 24.0, "seed": 3}
        assert record["request"].items() >= request.items()
        manifest = json.loads((demo_f32 / "ltx2.json").read_text())
        assert record["model"]["sources"] == [{k: s[k] for k in ("name", "sha256")} for s in manifest["sources"]]
        assert (record["model"]["release"], record["model"]["variant"]) == ("2.0", "distilled")
        for name, component in manifest["components"].items():
            assert record["model"]["files"][name] == [file["sha256"] for file in component["files"]]
        assert record["machine"].keys() >= {"chip", "memory_bytes", "system", "mlx", "ltx2"}

    def test_what_the_chosen_pipeline_has_no_use_for_is_said(self, generate: Here) -> None:
        done = generate(PROMPT, "--steps", "3", "--cfg", "3")
        assert done.code == 0 and "not guided: --steps, --cfg without effect" in " ".join(done.err.split())

    @pytest.mark.parametrize("block", ["-1", "6", "0,99"])
    def test_a_block_that_is_not_there_is_named_with_the_range(self, generate: Here, block: str) -> None:
        said = f"there is no block {block.split(',')[-1]} for --stg-blocks"
        done = generate("x", "--pipeline", "one-stage", f"--stg-blocks={block}", "--dry-run")
        done.failed(1, said, "the transformer has blocks 0 to 5", "use 5")

    def test_its_place_is_checked_before_any_work(self, generate: Here, tmp_path: Path) -> None:
        (tmp_path / "clip.json").mkdir()
        done = generate(PROMPT)
        done.failed(1, "cannot write", "clip.json", "it is a folder")
        assert "done in" not in done.err

    def test_every_phase_has_its_time_and_memory(self, made: Made) -> None:
        record = json.loads(made.sidecar.read_text())
        by_name = {phase["name"]: phase for phase in record["phases"]}
        stages = ["text_encoder", "connectors", "stage1", "spatial_upscaler", "stage2"]
        assert list(by_name) == [*stages, "audio_vae", "vocoder", "video_vae"]
        assert (len(by_name["stage1"]["step_seconds"]), len(by_name["stage2"]["step_seconds"])) == (3, 3)
        for phase in record["phases"]:
            assert phase["seconds"] >= 0 and phase["mlx_peak_bytes"] > 0 and phase["process_peak_bytes"] > 0
            assert 0 < phase["longest_eval_seconds"] < phase["seconds"]
        assert sum(phase["seconds"] for phase in record["phases"]) <= record["seconds"] + 0.1


class TestLatents:
    def test_are_decoded_to_the_same_clip(self, generate: Here, made: Made, tmp_path: Path) -> None:
        assert generate("--latents", made.latents, "--fps", "30", "--no-metadata", size=[]).code == 0
        assert phases(tmp_path / "clip.json") == ["audio_vae", "vocoder", "video_vae"]
        assert (tmp_path / "clip.mp4").read_bytes() == made.clip.read_bytes()
        request = json.loads((tmp_path / "clip.json").read_text())["request"]
        assert (request["width"], request["height"], request["frames"]) == (64, 64, 9), "the latents' own"

    def test_need_nothing_but_the_decoders(self, here: Here, made: Made, tmp_path: Path) -> None:
        """Not even to know whether they were sampled by a dev or a distilled model."""
        decoders = ["video_vae", "audio_vae", "vocoder"]
        model = ltx2.convert([MONOLITH], tmp_path / "decoders", only=decoders, dtype="f32")
        args = ["generate", "-m", model, "--latents", made.latents, "--fps", "30", "-o", tmp_path / "2.mp4"]
        assert here(*args, "--no-metadata").code == 0
        assert (tmp_path / "2.mp4").read_bytes() == made.clip.read_bytes()

    def test_are_the_ones_the_sampler_ended_with(self, demo_f32: Path, made: Made, tmp_path: Path) -> None:
        """No two sides alike, so that a wrong order of axes shows."""
        options: dict[str, Any] = {"width": 192, "height": 128, "frames": 17, "save_latents": tmp_path / LATENTS}
        clip = ltx2.load(demo_f32).generate(embeddings=made.embeddings, no_audio=True, **options)
        saved = load_file(tmp_path / LATENTS)
        assert {name: value.shape for name, value in saved.items()} == {
            "video": (1, 32, 3, 4, 6),
            "audio": (1, 2, 18, 16),
        }
        for name, value in saved.items():
            assert value.dtype == np.float32 and clip.latents[name].flags.c_contiguous
            np.testing.assert_array_equal(value, clip.latents[name])

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"video": np.zeros((1, 31, 2, 2, 2), np.float32)}, "video in latents has the wrong shape"),
            ({"video": np.zeros((32, 2, 2, 2), np.float32)}, "video in latents has the wrong shape"),
            ({"audio": np.zeros((1, 2, 9, 15), np.float32)}, "audio in latents has the wrong shape"),
            ({"video": np.full((1, 32, 2, 2, 2), np.nan, np.float32)}, "video holds NaN or infinite values"),
            ({"audio": np.zeros((1, 2, 9, 16), np.float16)}, "audio in latents is not float32"),
            ({"audio": None}, "has no tensor 'audio'"),
            ({"audio": None} | {f"x{i}": np.zeros(1, np.float32) for i in range(9)}, "x0, x1, x2 and 6 more"),
        ],
    )
    def test_that_cannot_be_used(self, generate: Here, tmp_path: Path, change: dict[str, Any], said: str) -> None:
        good = {"video": np.ones((1, 32, 2, 2, 2), np.float32), "audio": np.ones((1, 2, 9, 16), np.float32)}
        save_file({k: v for k, v in (good | change).items() if v is not None}, tmp_path / "latents")
        generate("--latents", tmp_path / "latents", size=[]).failed(1, said)


class TestMemory:
    def test_does_not_depend_on_the_number_of_frames(self, demo_f32: Path, made: Made, tmp_path: Path) -> None:
        """Neither numpy's (which tracemalloc sees) nor MLX's, when frames go into a file."""

        def peaks(latents: int) -> tuple[int, int]:
            shapes = {"video": (1, 32, latents, 2, 2), "audio": (1, 2, 8 * latents, 16)}
            save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, tmp_path / LATENTS)
            tracemalloc.start()
            options: dict[str, Any] = {"no_audio": True, "low_memory": True, "output": tmp_path / "clip.mp4"}
            *_, last = ltx2.load(demo_f32).stream(latents=tmp_path / LATENTS, force=True, **options)
            _, most = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert isinstance(last, Saved)
            return most, last.record["phases"][0]["mlx_peak_bytes"]

        (short, short_mlx), (long, long_mlx) = peaks(6), peaks(16)
        frames = (121 - 41) * 64 * 64 * 3
        assert long < short + frames / 4
        assert long_mlx < 1.1 * short_mlx


class TestEmbeddings:
    def test_stand_for_the_text_encoder(self, here: Here, demo_f32: Path, made: Made, tmp_path: Path) -> None:
        """The same latents, without the text encoder's weights."""
        model = tmp_path / "model"
        shutil.copytree(demo_f32, model)
        (model / "text_encoder" / "model.safetensors").unlink()
        args = ["generate", "-m", model, "-o", tmp_path / "2.mp4", "--seed", "3", "--fps", "30", *SIZE]
        here(*args, PROMPT).failed(1, "text_encoder", "is missing")
        done = here(*args, "--embeddings", made.embeddings, "--save-latents", tmp_path / LATENTS)
        assert done.code == 0 and same(made.latents, tmp_path / LATENTS)
        assert phases(tmp_path / "2.json")[0] == "stage1"

    def test_format(self, made: Made) -> None:
        found = load_file(made.embeddings)
        assert found.keys() == {"video_context", "audio_context"}
        assert all(value.shape == (1, 128, 64) and value.dtype == np.float32 for value in found.values())

    def test_a_prompt_beside_them_has_no_effect_and_that_is_said(self, generate: Here, made: Made) -> None:
        assert "warning: the prompt has no effect" in generate("other", "--embeddings", made.embeddings).err

    def test_of_another_model(self, generate: Here, tmp_path: Path) -> None:
        wrong = np.zeros((1, 1024, 3840), np.float32)
        save_file({"video_context": wrong, "audio_context": wrong}, tmp_path / "e")
        generate("--embeddings", tmp_path / "e").failed(1, "video_context", "[1, 1024, 3840]", "[1, tokens, 64]")


NOISE_SHAPES = {
    "stage1.video": (1, 32, 2, 1, 1),
    "stage1.audio": (1, 2, 9, 16),
    "stage2.video": (1, 32, 2, 2, 2),
    "stage2.audio": (1, 2, 9, 16),
}


def save_noise(path: Path, changes: Mapping[str, Any] | None = None) -> None:
    """Noise for SIZE at 24 frames a second; `changes` replace a tensor, or leave it out where they are None."""
    rng = np.random.default_rng(0)
    noise = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in NOISE_SHAPES.items()}
    save_file({name: value for name, value in (noise | dict(changes or {})).items() if value is not None}, path)


class TestNoise:
    def test_stands_for_the_seed(self, generate: Here, made: Made, tmp_path: Path) -> None:
        """And every tensor of it counts."""

        def latents(name: str, seed: int, changes: dict[str, Any]) -> Path:
            save_noise(tmp_path / "noise", changes)
            saved = tmp_path / f"{name}.safetensors"
            args = ["--noise", tmp_path / "noise", "--seed", str(seed), "--save-latents", saved]
            assert generate("--embeddings", made.embeddings, "--no-audio", "--force", *args).code == 0
            return saved

        first = latents("first", 1, {})
        assert same(first, latents("second", 2, {}))
        for name, shape in NOISE_SHAPES.items():
            assert not same(first, latents(name, 1, {name: np.ones(shape, np.float32)})), name

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"stage2.audio": None}, ["no tensor 'stage2.audio'", "it holds stage1.audio, stage1.video, stage2.video"]),
            ({"stage1.video": np.zeros((1, 32, 2, 2, 2), np.float32)}, ["stage1.video", "[1, 32, 2, 1, 1]"]),
            ({"stage1.audio": np.zeros((1, 2, 10, 16), np.float32)}, ["stage1.audio", "[1, 2, 9, 16]"]),
            ({"stage2.video": np.zeros((1, 32, 2, 2, 2), np.float64)}, ["stage2.video", "float32"]),
        ],
    )
    def test_that_does_not_fit_is_found_before_any_work(
        self, generate: Here, tmp_path: Path, change: dict[str, Any], said: list[str]
    ) -> None:
        save_noise(tmp_path / "n", change)
        done = generate(PROMPT, "--noise", tmp_path / "n")
        done.failed(1, *said)
        assert "text_encoder" not in done.err


def test_a_prompt_that_is_too_long_is_said_to_be(generate: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the published 1024 tokens."""
    monkeypatch.setattr(job, "preset_of", preset_of)
    size = ["--width", "64", "--height", "64", "--frames", "1"]
    done = generate("red " * 1100, size=size)
    assert done.code == 0 and "warning: the prompt is 77 tokens too long" in done.err


class TestWithout:
    def test_sound(self, here: Here, made: Made, tmp_path: Path) -> None:
        """The picture stays the same: the sound is still sampled with it."""
        args = ["generate", "--from", made.sidecar, "-o", tmp_path / "2.mp4", "--save-latents", tmp_path / LATENTS]
        assert here(*args, "--no-audio").code == 0
        assert same(made.latents, tmp_path / LATENTS)
        assert (streams(made.clip), streams(tmp_path / "2.mp4")) == (["Video", "Audio"], ["Video"])
        assert not {"audio_vae", "vocoder"} & set(phases(tmp_path / "2.json"))
        np.testing.assert_array_equal(read_video(made.clip)[0], read_video(tmp_path / "2.mp4")[0])

    def test_upscaler(self, generate: Here, made: Made, tmp_path: Path) -> None:
        size = ["--width", "96", "--height", "64", "--frames", "9"]  # 96 is no multiple of 64
        assert generate("--embeddings", made.embeddings, "--no-upscale", size=size).code == 0
        assert phases(tmp_path / "clip.json")[:2] == ["stage1", "audio_vae"]
        assert read_video(tmp_path / "clip.mp4")[0].shape == (9, 64, 96, 3)

    @pytest.mark.parametrize("fps", ["24", "60"])
    def test_motion(self, generate: Here, made: Made, tmp_path: Path, fps: str) -> None:
        """One frame, shorter than one audio latent at 60 frames a second."""
        size = ["--width", "64", "--height", "64", "--frames", "1"]
        assert generate("--embeddings", made.embeddings, "--fps", fps, size=size).code == 0
        assert read_video(tmp_path / "clip.mp4")[0].shape == (1, 64, 64, 3)
        assert streams(tmp_path / "clip.mp4") == ["Video", "Audio"]


# A weight of every component, and what is said when it is NaN.
GARBAGE = {
    "text_encoder": ("model.layers.1.self_attn.q_proj.weight", "the prompt's video embeddings contain NaN"),
    "transformer": ("transformer_blocks.1.attn1.to_q.weight", "the video latents after step 1 of stage 1 contain NaN"),
    "spatial_upscaler": ("final_conv.weight", "the upscaled latents contain NaN"),
    "video_vae": ("decoder.conv_in.conv.weight", "the decoded frames contain NaN"),
    "audio_vae": ("decoder.conv_in.conv.weight", "the decoded spectrograms contain NaN"),
    "vocoder": ("conv_post.weight", "the sound's samples contain NaN"),
}


class TestDamage:
    @pytest.fixture
    def model(self, demo_f32: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(demo_f32, tmp_path / "model"))

    @pytest.mark.parametrize("component", GARBAGE)
    def test_garbage_never_becomes_a_clip(self, here: Here, model: Path, tmp_path: Path, component: str) -> None:
        key, said = GARBAGE[component]
        weights = model / component / "model.safetensors"
        tensors = load_file(weights)
        tensors[key] = np.full_like(tensors[key], np.nan)
        save_file(tensors, weights)
        done = here("generate", PROMPT, "-m", model, "-o", tmp_path / "clip.mp4", *SIZE)
        done.failed(1, said, "ltx2 verify")
        denoised = component not in ("text_encoder", "transformer")
        kept = ["clip.unfinished.safetensors"] if denoised else []
        assert sorted(path.name for path in tmp_path.iterdir()) == [*kept, "model"]
        assert ("this continues: ltx2 generate" in done.err) == bool(kept)

    def test_silence_is_said_to_be_silent(self, here: Here, model: Path, made: Made, tmp_path: Path) -> None:
        weights = model / "vocoder" / "model.safetensors"
        tensors = load_file(weights)
        save_file(tensors | {name: 0 * tensors[name] for name in ("conv_post.weight", "conv_post.bias")}, weights)
        args = ["generate", "--latents", made.latents, "-o", tmp_path / "clip.mp4", "-m"]
        done = here(*args, model)
        assert done.code == 0 and "warning: the sound is silent" in done.err
        assert "warning" not in here(*args, json.loads(made.sidecar.read_text())["model"]["path"]).err

    @pytest.mark.parametrize("size", [1000, 100_000])
    @pytest.mark.parametrize("component", ["spatial_upscaler", "vocoder"])
    def test_a_truncated_file_is_found_before_any_work(
        self, here: Here, model: Path, tmp_path: Path, component: str, size: int
    ) -> None:
        with (model / component / "model.safetensors").open("r+b") as file:
            file.truncate(size)
        done = here("generate", PROMPT, "-m", model, "-o", tmp_path / "clip.mp4", *SIZE)
        done.failed(1, f"{component} of {model} is damaged", "copy the file back")
        assert "reading the prompt" not in done.err

    def test_a_network_that_does_not_fit_is_found_before_any_work(
        self, here: Here, model: Path, tmp_path: Path
    ) -> None:
        path = model / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 1}))
        done = here("generate", PROMPT, "-m", model, "-o", tmp_path / "clip.mp4", *SIZE)
        done.failed(1, "tensor transformer_blocks.1.", "is not part of the network")
        assert "reading the prompt" not in done.err
