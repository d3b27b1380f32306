"""What a stranger meets first: where results are printed, which models there are, what a failure leaves."""

from inspect import signature
from pathlib import Path

import pytest

from ltx2.runtime.files.tensors import open_tensorfile, write_tensorfile
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.units import gb
from tests.support.command import SIZE, Here
from tests.support.media import noise_frames, write_clip
from tests.support.official import LORA_25

MAKES = "ltx2 download ltx-2-distilled --convert --bits 4"


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0.0 GB"),
        (1, "0.0000000010 GB"),
        (8_192, "0.0000082 GB"),
        (50_000_000, "0.050 GB"),
        (999_999_999, "1.00 GB"),
        (10**9, "1.0 GB"),
        (43_284_455_114, "43.3 GB"),
    ],
)
def test_one_unit_says_something_of_every_size(count: int, said: str) -> None:
    assert gb(count) == said


def test_a_plan_is_the_command_s_result(here: Here, demo_model: Path) -> None:
    done = here("plan", demo_model, "--memory", "24")
    assert done.err == "" and "runs" in done.out and "* recommended: " in done.out
    assert here("plan", demo_model, "--memory", "24", "-q").out == ""


@pytest.mark.parametrize("memory", ["24", "24GB", "24 gb", "24.0"])
def test_the_unit_of_memory_may_be_written(here: Here, demo_model: Path, memory: str) -> None:
    assert here("plan", demo_model, "--memory", memory, "--json").json["memory_gb"] == 24


@pytest.mark.parametrize("option", ["--memory-limit", "--fit", "--memory", "--shard-size"])
@pytest.mark.parametrize("given", ["24MB", "much", "inf GB days"])
def test_another_unit_is_not_taken(here: Here, option: str, given: str) -> None:
    command = {"--memory-limit": ["generate", "x"], "--memory": ["plan"]}.get(option, ["quantize", "m", "-o", "q"])
    whole = "whole " if option == "--fit" else ""
    here(*command, option, given).failed(2, option, f"'{given}' is not a {whole}number of GB, such as 24")


def test_macs_have_whole_gigabytes(here: Here) -> None:
    here("quantize", "m", "-o", "q", "--fit", "24.5GB").failed(2, "'24.5GB' is not a whole number of GB")


def test_a_pipeline_is_short(demo_model: Path) -> None:
    """It and its signature say no address."""
    assert repr(Pipeline(demo_model)) == f"<Pipeline: {demo_model}, LTX 2.0 distilled>"
    assert " at 0x" not in str(signature(Pipeline))


def test_an_advised_quality_is_one_in_range(here: Here) -> None:
    here("generate", "x", "--crf", "99").failed(2, "between 0 and 51", "use 19, the default")
    here("generate", "x", "--image-crf", "99").failed(2, "between 0 and 51", "use 18 or 33")


@pytest.fixture
def weights(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder's `weights/`, with two models."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    for name in ("fox", "kite"):
        (tmp_path / "weights" / name).symlink_to(demo_model)
    return tmp_path / "weights"


class TestModelThatIsNotThere:
    @pytest.mark.parametrize("name", ["fax", "models/fax", "./fax"])
    def test_names_those_that_are(self, here: Here, weights: Path, name: str) -> None:
        here("generate", "x", "-m", name).failed(1, "there is no model folder", "weights/ has fox, kite", "use -m fox")

    @pytest.mark.parametrize("name", ["fax", "models/fax"])
    def test_or_says_what_makes_one(
        self, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        here("generate", "x", "-m", name).failed(1, f"there is no model folder {name}", "none in weights/", MAKES)

    def test_none_named(self, here: Here, weights: Path) -> None:
        here("generate", "x").failed(2, "no model is named", "weights/ has 2", "use -m fox or -m kite")

    def test_a_folder_of_them_names_them(self, here: Here, weights: Path, tmp_path: Path) -> None:
        for command in (["verify"], ["quantize", "-o", "q"], ["plan"], ["generate", "x", "-o", "c.mp4", "-m"]):
            here(*command, "weights").failed(1, "weights is not a model folder", "weights/kite", "use weights/fox")
            here(*command, tmp_path).failed(1, f"{tmp_path} is not a model folder", "it has no ltx2.json")

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("lora", ["it is a LoRA", "--lora "]),
            ("clip.mkv", ["it is a clip", "--from ", "--retake"]),
            ("picture.png", ["it is a picture", "--image "]),
            ("sound.wav", ["it is a sound", "--audio "]),
            ("README.md", ["it is a file", "convert a checkpoint"]),
        ],
    )
    def test_a_file_that_another_option_takes(self, here: Here, tmp_path: Path, name: str, said: list[str]) -> None:
        path = LORA_25 if name == "lora" else tmp_path / name
        if name == "clip.mkv":
            write_clip(path, noise_frames(9, 64, 64), 24)
        elif name != "lora":
            path.write_bytes({"p": b"\x89PNG\r\n", "s": b"RIFF\0\0\0\0WAVE", "R": b"# ltx2\n"}[name[0]])
        here("generate", "x", "-m", path).failed(1, f"{path} is not a model folder", *said)


class TestFolderOfClips:
    @pytest.mark.parametrize(
        "wrong", [["-m", "nothing"], ["-m", "fox", "--width", "65"], ["-m", "fox", "--memory-limit", "0.001"]]
    )
    @pytest.mark.parametrize("more", [[], ["--count", "2"], ["--count", "2", "-o", "made"]])
    def test_a_failed_run_leaves_none(self, here: Here, weights: Path, wrong: list[str], more: list[str]) -> None:
        done = here("generate", "a red square", *wrong, *more)
        assert done.code in (1, 3) and [path.name for path in weights.parent.iterdir()] == ["weights"]

    def test_one_that_was_there_stays(self, here: Here, weights: Path) -> None:
        Path("outputs").mkdir()
        assert here("generate", "a red square", "-m", "fox", "--width", "65").code == 1 and Path("outputs").is_dir()


def test_a_limit_that_slows_is_explained(here: Here, demo_f32: Path) -> None:
    """It is a word in the table."""
    plan = Pipeline(demo_f32).plan("a red square", width=192, height=128, frames=25, low_memory=True)
    assert any(phase.held_back for phase in plan.phases)
    said = "the limit leaves less memory than full speed takes: "
    assert any(warning.startswith(said) for warning in plan.warnings())
    tight = Pipeline(demo_f32).plan("a red square", width=64, height=64, frames=9, memory_limit=0.01)
    (warning,) = (warning for warning in tight.warnings() if warning.startswith(said))
    assert warning.count(" and ") == 1 and ", stage2" in warning
    free = Pipeline(demo_f32).plan("a red square", width=192, height=128, frames=25)
    assert not any(said in warning for warning in free.warnings())


def test_a_tiny_limit_is_shown(here: Here, demo_f32: Path, tmp_path: Path) -> None:
    args = ["generate", "x", "-m", demo_f32, "-o", tmp_path / "c.mp4", *SIZE, "--memory-limit", "0.002"]
    done = here(*args)
    done.failed(3, "the limit is 0.0020 GB")
    assert " 0.0 GB" not in done.err


def test_loras_and_references_go_together(here: Here, demo_25: Path, tmp_path: Path) -> None:
    source = write_clip(tmp_path / "source.mkv", noise_frames(9, 64, 64), 24)
    args = ["generate", "x", "-m", demo_25, "-o", tmp_path / "c.mp4", *SIZE, "--dry-run", "--lora", LORA_25]
    assert "IC-LoRA" not in here(*args).err
    assert "does not say that it is an IC-LoRA" in here(*args, "--reference", source).err
    made_for = tmp_path / "control.safetensors"
    lora = open_tensorfile(LORA_25)
    values = {name: (tensor.dtype, lora.array(name)) for name, tensor in lora.tensors.items()}
    write_tensorfile(made_for, values, {**lora.metadata, "reference_downscale_factor": "1"})
    args[args.index(LORA_25)] = made_for
    assert "control.safetensors is an IC-LoRA, made to follow a video: give --reference" in here(*args).err
    assert "IC-LoRA" not in here(*args, "--reference", source).err
