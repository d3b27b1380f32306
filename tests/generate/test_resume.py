"""Runs that are cut off, with real signals: what is on disk then, and that going on ends with the same bits."""

import json
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ltx2
from ltx2.cli import run
from ltx2.runtime.errors import InputError
from ltx2.runtime.files.tensors import open_tensorfile
from ltx2.runtime.generate.records.resume import Owner
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import build_component, parameter_shapes
from ltx2.runtime.networks.video_vae.frames import decode_frames
from tests.support.command import SEED, SIZE, Here
from tests.support.loras import random_factors, write_lora
from tests.support.programs import ffmpeg_that
from tests.support.stopped import stop

PROMPT = "a red square"
LATENTS, EMBEDDINGS = "latents.safetensors", "embeddings.safetensors"
STATE = "clip.unfinished.safetensors"
Stopped = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def whole(demo_f32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the clip of a run that nothing stopped, its latents and its prompt's embeddings."""
    folder = tmp_path_factory.mktemp("whole")
    args = ["generate", PROMPT, "-m", demo_f32, "-o", folder / "clip.mp4", *SIZE, *SEED, "--no-metadata"]
    args += ["--save-embeddings", folder / EMBEDDINGS, "--save-latents", folder / LATENTS]
    assert run([str(arg) for arg in args]) == 0
    assert not (folder / STATE).exists()
    return folder


def arguments_for(folder: Path, whole: Path, model: Path) -> list[str]:
    """Of a run in another folder that ends with the whole one's clip."""
    files = ["-o", folder / "clip.mp4", "--embeddings", whole / EMBEDDINGS, "--save-latents", folder / LATENTS]
    return [str(arg) for arg in ["generate", "-m", model, *files, *SIZE, *SEED, "--no-metadata"]]


def without(arguments: list[str], option: str | Path) -> list[str]:
    """The arguments but this option and its value."""
    at = arguments.index(str(option)) if option in arguments else len(arguments)
    return [*arguments[:at], *arguments[at + 2 :]]


@pytest.fixture
def arguments(demo_f32: Path, whole: Path, tmp_path: Path) -> list[str]:
    return arguments_for(tmp_path, whole, demo_f32)


@pytest.fixture
def stopped(arguments: list[str]) -> Stopped:
    """`stopped(signal, phase, step, more arguments)`: how the command ended."""
    return lambda number, phase, step, *more: stop([*arguments, *more], number, phase, step)


def same(first: Path, second: Path) -> bool:
    a, b = load_file(first), load_file(second)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def phases(sidecar: Path) -> list[str]:
    return [phase["name"] for phase in json.loads(sidecar.read_text())["phases"]]


KILLED = {
    "while decoding": ("video_vae", 1, [], (None, 0)),
    "before the picture": ("video_vae", 0, ["--checkpoint-every", "5"], (None, 0)),
    "some steps after the state": ("stage1", 6, ["--checkpoint-every", "4"], ("stage1", 4)),
    "between stages": ("stage2", 1, ["--checkpoint-every", "8"], ("stage2", 0)),
    "in the second stage": ("stage2", 2, ["--checkpoint-every", "2"], ("stage2", 2)),
    "at every step, unasked": ("stage1", 3, [], ("stage1", 3)),
}


class TestKilled:
    @pytest.mark.parametrize("name", KILLED)
    def test_goes_on_with_the_same_bits(
        self, here: Here, arguments: list[str], stopped: Stopped, whole: Path, tmp_path: Path, name: str
    ) -> None:
        phase, step, options, left = KILLED[name]
        assert stopped(signal.SIGKILL, phase, step, *options).returncode == -signal.SIGKILL
        assert not (tmp_path / "clip.mp4").exists()
        record = json.loads(open_tensorfile(tmp_path / STATE).metadata["run"])
        assert (record["phase"], record["step"]) == left
        ended = here(*arguments, "--resume")
        assert ended.code == 0 and "warning" not in ended.err, ended
        assert same(tmp_path / LATENTS, whole / LATENTS)
        assert (tmp_path / "clip.mp4").read_bytes() == (whole / "clip.mp4").read_bytes()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.json", "clip.mp4", LATENTS]

    def test_text_is_encoded_once(self, here: Here, demo_f32: Path, whole: Path, tmp_path: Path) -> None:
        """From a prompt; the record of the run has the phases of both processes."""
        args = ["generate", PROMPT, "-m", str(demo_f32), "-o", str(tmp_path / "clip.mp4"), *SIZE, *SEED]
        args.append("--no-metadata")
        assert stop(args, signal.SIGKILL, "stage1", 2).returncode == -signal.SIGKILL
        ended = here(*args, "--resume")
        assert ended.code == 0 and "reading the prompt" not in ended.err
        assert phases(tmp_path / "clip.json") == phases(whole / "clip.json")
        assert (tmp_path / "clip.mp4").read_bytes() == (whole / "clip.mp4").read_bytes()

    def test_without_a_state_it_starts_again(
        self, here: Here, arguments: list[str], stopped: Stopped, whole: Path, tmp_path: Path
    ) -> None:
        stopped(signal.SIGKILL, "stage1", 2, "--checkpoint-every", "0")
        assert not (tmp_path / STATE).exists()
        ended = here(*arguments, "--resume")
        assert ended.code == 0 and f"warning: there is no {STATE} to continue" in ended.err
        assert same(tmp_path / LATENTS, whole / LATENTS)


# Guided runs, and the phase and step that they are killed at.
GUIDED = {
    "between guided steps": (
        ["--pipeline", "one-stage", "--steps", "4", "--skip-steps", "1", "--audio-skip-steps", "2"],
        ("stage1", 3),
    ),
    "hq, in its second stage": (["--pipeline", "hq", "--steps", "2", "--distilled-lora", "LORA:0.5,1"], ("stage2", 2)),
}


@pytest.mark.parametrize("name", GUIDED)
def test_a_guided_run_goes_on_with_the_same_bits(here: Here, demo_dev: Path, tmp_path: Path, name: str) -> None:
    """The state has the contexts of both prompts, and the x0 that unguided steps keep."""
    (options, (phase, step)), lora, texts = GUIDED[name], tmp_path / "lora.safetensors", tmp_path / "texts"
    shapes = parameter_shapes(build_component(ModelFolder.open(demo_dev), "transformer", {}))
    write_lora(lora, random_factors({n.removesuffix(".weight"): s for n, s in shapes.items() if ".attn2.to_q.w" in n}))
    draw = np.random.default_rng(1).standard_normal
    names = [f"{kind}{stream}_context" for kind in ("", "negative_") for stream in ("video", "audio")]
    save_file({name: draw((1, 16, 64)).astype(np.float32) for name in names}, texts)
    args = ["generate", "-m", demo_dev, "--embeddings", texts, *SIZE, *SEED, "--no-metadata", "--no-audio"]
    args += [option.replace("LORA", str(lora)) for option in options]

    def files(run: str) -> list[str]:
        folder = tmp_path / run
        folder.mkdir(exist_ok=True)
        return [str(arg) for arg in [*args, "-o", folder / "clip.mp4", "--save-latents", folder / LATENTS]]

    assert here(*files("whole")).code == 0
    assert stop(files("killed"), signal.SIGKILL, phase, step).returncode == -signal.SIGKILL
    record = json.loads(open_tensorfile(tmp_path / "killed" / STATE).metadata["run"])
    assert (record["phase"], record["step"]) == (phase, step)
    ended = here(*files("killed"), "--resume")
    assert ended.code == 0 and "to continue" not in ended.err, ended
    assert same(tmp_path / "killed" / LATENTS, tmp_path / "whole" / LATENTS)


class TestInterrupted:
    @pytest.mark.parametrize("where", [("video_vae", 1), ("stage1", 5, "--checkpoint-every", "2")])
    def test_says_the_command_that_continues(
        self, stopped: Stopped, here: Here, whole: Path, tmp_path: Path, where: tuple[Any, ...]
    ) -> None:
        ended = stopped(signal.SIGINT, *where)
        assert ended.returncode == 130 and "Traceback" not in ended.stderr
        assert {path.name for path in tmp_path.iterdir()} <= {STATE, LATENTS}
        (command,) = (line for line in ended.stderr.splitlines() if "this continues: " in line)
        _, *args = shlex.split(command.partition("this continues: ")[2])
        assert here(*args).code == 0
        assert same(tmp_path / LATENTS, whole / LATENTS)
        assert (tmp_path / "clip.mp4").read_bytes() == (whole / "clip.mp4").read_bytes()

    def test_long_spellings_are_not_said_again(self, arguments: list[str], tmp_path: Path) -> None:
        """What continues a run adds only what the command lacks, however that is spelt."""
        spelt = " ".join(arguments).replace(" -o ", " --output=").replace("--seed ", "--seed=").split()
        ended = stop(spelt, signal.SIGINT, "stage1", 0)
        assert ended.returncode == 130 and f"this continues: {shlex.join(['ltx2', *spelt])}\n" in ended.stderr

    @pytest.mark.parametrize("options", [(), ("--checkpoint-every", "0")])
    def test_at_any_moment(self, stopped: Stopped, tmp_path: Path, options: tuple[str, ...]) -> None:
        """Also before there is a state: then the command is the same one, its seed said."""
        ended = stopped(signal.SIGINT, "stage1", 0, "--json", *options)
        assert ended.returncode == 130
        fix = json.loads(ended.stdout)["error"]["fix"]
        same_command = " ".join([*SEED, "--no-metadata", "--json", *options])
        assert fix.startswith("this continues: ltx2 generate ") and fix.endswith(same_command)

    def test_a_drawn_seed_goes_on(
        self, here: Here, arguments: list[str], whole: Path, tmp_path: Path, demo_f32: Path
    ) -> None:
        """The same command with --resume, or the one that is said, means the same seed."""
        seedless = without(arguments, "--seed")
        said = stop(seedless, signal.SIGINT, "stage2", 1).stderr
        options = json.loads(open_tensorfile(tmp_path / STATE).metadata["run"])["options"]
        assert f"--seed {options['seed']} --resume" in said
        assert here(*seedless, "--resume").code == 0
        assert json.loads((tmp_path / "clip.json").read_text())["request"]["seed"] == options["seed"]


class TestFailed:
    def test_while_writing_the_clip(
        self, here: Here, demo_f32: Path, arguments: list[str], whole: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """The disk is full, some room is made, the run goes on. What is there could also be decoded by hand."""
        with monkeypatch.context() as patch:
            ffmpeg_that(patch, tmp_path, "has no space left")
            ended = here(*arguments)
            ended.failed(1, "cannot write", "clip.mp4", "why: the disk is full\n", "this continues: ltx2 generate")
        assert sorted(path.name for path in tmp_path.iterdir()) == [STATE, "ffmpeg", LATENTS]
        by_hand = ["-m", demo_f32, "--latents", tmp_path / STATE, "-o", tmp_path / "by-hand.mp4", "--no-metadata"]
        assert here("generate", *by_hand).code == 0
        assert (tmp_path / "by-hand.mp4").read_bytes() == (whole / "clip.mp4").read_bytes()
        ended = here(*arguments, "--resume")
        assert ended.code == 0 and "stage" not in ended.err
        assert (tmp_path / "clip.mp4").read_bytes() == (whole / "clip.mp4").read_bytes()

    def test_on_the_gpu(
        self, here: Here, arguments: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """macOS ends its work after the first frames."""

        def ended(*arguments: Any) -> Iterator[Any]:
            yield next(decode_frames(*arguments))
            raise RuntimeError("[METAL] Command buffer execution failed: Impacting Interactivity (0000000e).")

        with monkeypatch.context() as patch:
            patch.setattr("ltx2.runtime.generate.phases.decode.decode_frames", ended)
            failed = here(*arguments, "--json")
        error = failed.json["error"]
        assert failed.code == 1 and error["kind"] == "device" and "this continues: ltx2 generate" in error["fix"]
        assert sorted(path.name for path in tmp_path.iterdir()) == [STATE, LATENTS]
        assert here(*arguments, "--resume").code == 0
        assert (tmp_path / "clip.mp4").read_bytes() == (whole / "clip.mp4").read_bytes()


def test_a_finished_clip_is_left_alone(here: Here, demo_f32: Path, whole: Path) -> None:
    """Said so in a dry run too, its seed given or not. And one of other settings is not taken for it."""
    clip, before = whole / "clip.mp4", (whole / "clip.mp4").stat()
    args = ["generate", PROMPT, "-m", demo_f32, "-o", clip, *SIZE, "--no-metadata"]
    for seed, dry in product(([], SEED), ([], ["--dry-run"])):
        done = here(*args, *seed, *dry, "--resume", "--json")
        assert done.code == 0 and done.json["clip"] == str(clip) and "clip.mp4 is finished" in done.err
        assert clip.stat().st_mtime_ns == before.st_mtime_ns
        changed = (["--frames", "17"], ["--crf", "30"], ["--seed", "11"])
        for other in (seed, *([*seed, *option, "--resume"] for option in changed if option[0] not in seed)):
            here(*args, *dry, *other).failed(1, "clip.mp4 is already there")


@pytest.fixture(scope="module")
def killed(whole: Path, demo_f32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a run that was killed between two steps."""
    folder = tmp_path_factory.mktemp("killed")
    stop([*arguments_for(folder, whole, demo_f32), "--checkpoint-every", "3"], signal.SIGKILL, "stage1", 3)
    return folder / STATE


@pytest.fixture
def state(killed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(killed, tmp_path / STATE))


def test_the_next_run_says_what_could_be_continued(here: Here, arguments: list[str], state: Path) -> None:
    """And nothing of the killed one is left."""
    for name in ("clip.mp4.partial", "clip.json.partial", f"{LATENTS}.partial"):
        state.with_name(name).touch()
    ended = here(*arguments)
    assert ended.code == 0 and f"warning: {STATE} is of a run that was cut off: --resume" in ended.err
    assert sorted(path.name for path in state.parent.iterdir()) == ["clip.json", "clip.mp4", LATENTS]


class TestRefused:
    def test_another_request(self, here: Here, arguments: list[str], state: Path, whole: Path, tmp_path: Path) -> None:
        """And the state stays."""
        rng = np.random.default_rng(0)
        shapes: dict[str, tuple[int, ...]] = {"stage1.video": (1, 32, 2, 1, 1), "stage2.video": (1, 32, 2, 2, 2)}
        shapes |= {"stage1.audio": (1, 2, 9, 16), "stage2.audio": (1, 2, 9, 16)}
        save_file({k: rng.standard_normal(v).astype(np.float32) for k, v in shapes.items()}, tmp_path / "noise")
        embeddings = load_file(whole / EMBEDDINGS)
        save_file({name: value + 1 for name, value in embeddings.items()}, tmp_path / "others")
        changes: dict[str, list[str | Path]] = {
            "frames 9, this is frames 17": ["--frames", "17"],
            "seed 10, this is seed 11": ["--seed", "11"],
            "no upscale False, this is no upscale True": ["--no-upscale"],
            "it was started without --noise, this is with it": ["--noise", tmp_path / "noise"],
            "what --embeddings names is not what it was started with": ["--embeddings", tmp_path / "others"],
        }
        before = state.read_bytes()
        for said, options in changes.items():
            ended = here(*without(arguments, options[0]), *options, "--resume")
            ended.failed(1, f"{STATE} cannot be continued", said, "leave out --resume")
            assert "this continues" not in ended.err
        assert state.read_bytes() == before

    def test_another_model(self, here: Here, demo_f32: Path, arguments: list[str], state: Path, tmp_path: Path) -> None:
        model = Path(shutil.copytree(demo_f32, tmp_path / "model"))
        manifest = json.loads((model / "ltx2.json").read_text())
        for file in manifest["components"]["transformer"]["files"]:
            file["sha256"] = "0" * 64
        (model / "ltx2.json").write_text(json.dumps(manifest))
        ended = here(*without(arguments, "-m"), "-m", model, "--resume")
        ended.failed(1, "another model: the files of its transformer")

    @pytest.mark.parametrize("damage", ["empty", "cut", "latents", "text"])
    def test_a_damaged_state(self, here: Here, arguments: list[str], state: Path, whole: Path, damage: str) -> None:
        content = state.read_bytes()
        damaged = {"empty": b"", "cut": content[:-1], "latents": (whole / LATENTS).read_bytes(), "text": b"{}" * 99}
        state.write_bytes(damaged[damage])
        here(*arguments, "--resume").failed(1, f"{STATE} cannot be continued", "leave out --resume")

    def test_what_may_change(self, here: Here, arguments: list[str], state: Path, whole: Path, tmp_path: Path) -> None:
        assert here(*arguments, "--no-audio", "--low-memory", "--resume").code == 0
        assert same(tmp_path / LATENTS, whole / LATENTS)


class TestPython:
    def options(self, folder: Path, whole: Path) -> dict[str, Any]:
        options = {"embeddings": whole / EMBEDDINGS, "width": 64, "height": 64, "frames": 9, "seed": 10}
        return options | {"state": folder / "state.safetensors"}

    def test_a_stream_that_is_closed(self, demo_f32: Path, whole: Path, tmp_path: Path) -> None:
        pipe, options = ltx2.load(demo_f32), self.options(tmp_path, whole)
        for event in pipe.stream(**options, checkpoint_every=2):
            if getattr(event, "phase", "") == "stage2":
                break
        assert options["state"].exists()
        clip = pipe.generate(**options, resume=True)
        saved = load_file(whole / LATENTS)
        assert all(np.array_equal(saved[name], clip.latents[name]) for name in saved)
        assert options["state"].exists(), "until the clip is saved"
        clip.save(tmp_path / "clip.mp4")
        assert not options["state"].exists()

    @pytest.mark.parametrize("option", [{"resume": True}, {"checkpoint_every": 2}])
    def test_a_state_needs_a_place(self, demo_f32: Path, option: dict[str, Any]) -> None:
        with pytest.raises(InputError, match=r"no effect without state.*add state=FILE"):
            ltx2.load(demo_f32).stream(PROMPT, **option)

    def test_nothing_is_written_without_being_asked(
        self, demo_f32: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        options = self.options(tmp_path, whole)
        del options["state"]
        ltx2.load(demo_f32).generate(**options)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "had", "has", "said"),
    [
        ("image", [], [["ab", 0, 1]], "started without --image, this is with it"),
        ("image", [["ab", 0, 1]], [], "started with --image, this is without it"),
        ("image", [["ab", 0, 1]], [["cd", 0, 1]], "what --image names is not what"),
        ("lora", [["ab", 1, None]], [["ab", 1, None], ["cd", 1, None]], "what --lora names is not what"),
        ("image", [["ab", 0, 1]], [["ab", 8, 1]], r"--image names the same.*PATH\[@FRAME"),
        ("audio", ["ab", 0], ["ab", 2], r"--audio names the same.*PATH\[@SECONDS"),
        ("audio", ["ab", 0], ["cd", 0], "what --audio names is not what"),
        ("video", "ab", "cd", "what --video names is not what"),
        ("video", None, "cd", "started without --video"),
    ],
)
def test_other_files_are_told_in_words(name: str, had: Any, has: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        Owner({name: had}, {}).check(Owner({name: has}, {}), Path("state"))
    assert not any(digest in str(raised.value) for digest in ("ab'", "cd'"))
