"""Many clips in one run: each network is loaded once, and each clip is what it would be by itself."""

import contextlib
import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import ltx2
from ltx2.cli import run
from ltx2.runtime.errors import DoesNotFitError, InputError, UsageError
from ltx2.runtime.events import Noted
from ltx2.runtime.generate.options.request import Request, check_common
from ltx2.runtime.generate.phases.order import merged
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.generate.records.clip import Generated
from ltx2.runtime.networks.transformer.config import TransformerConfig
from tests.support.command import SIZE, Here
from tests.support.loras import random_factors, write_lora
from tests.support.machine import memory_of

KEYS = "transformer_blocks.0.attn1.to_k"
PROMPTS = 'a red square\n\n{"prompt": "a green star", "seed": 3, "no-audio": true, "output": "%s"}\n'
FILES = ["a-red-square-10.mp4", "star.mp4"]


# Runs `ltx2 generate ...` and is killed when the second clip's picture is to be decoded; says what it has loaded.
KILLED = """
import os, sys
from ltx2.cli import run
from ltx2.runtime.events import PhaseStarted
from ltx2.runtime.generate import networks
from ltx2.runtime.generate.pipeline import Pipeline

events, load = Pipeline.events_all, networks.load_network

def counted(folder, component, *more):
    print("loads", component, flush=True)
    return load(folder, component, *more)

def watched(*args):
    for event in events(*args):
        if event == PhaseStarted("video_vae", 1):
            os.kill(os.getpid(), 9)
        yield event

Pipeline.events_all, networks.load_network = watched, counted
run(sys.argv[1:])
"""


class Made(NamedTuple):
    """Two clips of a run that was killed and continued: what it loaded before, which files there were then, when the
    first clip was written, and what the rest of the run said."""

    folder: Path
    loads: list[str]
    left: list[str]
    written: int
    rest: str


@pytest.fixture(scope="module")
def made(demo_f32: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("together")
    (folder / "prompts.txt").write_text(PROMPTS % (folder / "star.mp4"), encoding="utf-8-sig")
    args = ["generate", "--prompts", folder / "prompts.txt", "-m", demo_f32, "-o", folder, *SIZE, "--seed", "10"]
    command = list(map(str, [*args, "--no-metadata"]))
    done = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True, check=False, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left, written = sorted(path.name for path in folder.iterdir()), (folder / FILES[0]).stat().st_mtime_ns
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert run([*command, "--resume"]) == 0
    loads = [line.removeprefix("loads ") for line in done.stdout.splitlines()]
    return Made(folder, loads, left, written, said.getvalue())


class TestBatch:
    def test_each_network_is_loaded_once(self, made: Made) -> None:
        assert len(made.loads) == len(set(made.loads)) == 7, made.loads

    def test_what_was_made_is_kept(self, made: Made) -> None:
        """The first clip is not made again; of the second nothing but the picture's decoding is."""
        assert {*FILES[:1], "star.unfinished.safetensors"} < set(made.left) and FILES[1] not in made.left
        assert (made.folder / FILES[0]).stat().st_mtime_ns == made.written
        assert "decoding the picture" in made.rest and "denoising" not in made.rest

    def test_finished_ones_are_left_alone(self, made: Made, here: Here, demo_f32: Path, tmp_path: Path) -> None:
        """A dry run says so too, and plans what is left."""
        args = ["generate", "-m", demo_f32, "-o", made.folder, *SIZE, "--seed", "10", "--no-metadata", "--resume"]
        prompts, more = made.folder / "prompts.txt", tmp_path / "more"
        for dry in ([], ["--dry-run"]):
            done = here(*args, "--prompts", prompts, "--json", *dry)
            assert done.code == 0 and len(done.json["clips"]) == 2 and done.err.count("is finished") == 2
        more.write_text(f"{prompts.read_text(encoding='utf-8-sig').rstrip()}\nanother one", encoding="utf-8")
        done = here(*args, "--prompts", more, "--json", "--dry-run")
        assert done.code == 0 and list(done.json) == ["plan"]

    def test_nothing_else_is_left(self, made: Made) -> None:
        clips = [name for clip in FILES for name in (clip, clip.replace(".mp4", ".json"))]
        assert sorted(path.name for path in made.folder.iterdir()) == sorted([*clips, "prompts.txt"])

    @pytest.mark.parametrize(("name", "options"), [(FILES[0], {}), (FILES[1], {"seed": 3, "no_audio": True})])
    def test_a_clip_is_what_it_would_be_alone(
        self, made: Made, demo_f32: Path, tmp_path: Path, name: str, options: dict[str, Any]
    ) -> None:
        """And its record says so."""
        record = json.loads((made.folder / name).with_suffix(".json").read_text())
        prompt = "a red square" if name == FILES[0] else "a green star"
        wanted: dict[str, Any] = {"width": 64, "height": 64, "frames": 9, "seed": 10, "no_metadata": True} | options
        clip = ltx2.load(demo_f32).generate(prompt, **wanted)
        assert clip.save(tmp_path / "alone.mp4").read_bytes() == (made.folder / name).read_bytes()
        assert record["request"] == clip.record["request"]
        assert [phase["name"] for phase in record["phases"]] == [phase["name"] for phase in clip.record["phases"]]


@pytest.mark.usefixtures("small_runs")
def test_clips_with_other_loras(demo_f32: Path, tmp_path: Path) -> None:
    """What a LoRA has changed for good is no part of the next clip, in either stage. From Python: clips in memory."""
    pipe, text = ltx2.load(demo_f32), tmp_path / "text"
    widths = TransformerConfig.from_dict(pipe.folder.config("transformer")).context_dims
    draw = np.random.default_rng(0).standard_normal
    save_file({f"{name}_context": draw((1, 8, width)).astype(np.float32) for name, width in widths.items()}, text)
    lora = write_lora(tmp_path / "lora.safetensors", random_factors({KEYS: (128, 128)}))
    usual: dict[str, Any] = {"embeddings": text, "width": 64, "height": 64, "frames": 9, "seed": 1, "no_audio": True}
    clips = [usual | {"lora": [f"{lora}:0.5"]}, usual]
    alone = [pipe.generate(**clip).frames for clip in clips]
    events = list(pipe.stream_all(clips))
    made = [event.clip.frames for event in events if isinstance(event, Generated)]
    said = [event.message for event in events if isinstance(event, Noted) and "pipeline" in event.message]
    assert [message.split(" pipeline")[0] for message in said] == [f"clip {n} of 2: distilled" for n in (1, 2)]
    assert not np.array_equal(made[0], made[1])
    for ours, one in zip(made, alone, strict=True):
        np.testing.assert_array_equal(ours, one)


class TestSeedsAndNames:
    def names(self, here: Here, demo_f32: Path, tmp_path: Path, *args: str) -> list[tuple[str, int]]:
        """Of the clips that would be made."""
        asked: list[Request] = []

        def planned(self: Pipeline, requests: list[Request], *_: Any) -> Any:
            asked.extend(requests)
            raise InputError("not", "this", "time")

        for folder in ("outputs", "made"):
            (tmp_path / folder).mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr(Pipeline, "planned_all", planned)
            here("generate", "-m", demo_f32, "--dry-run", *args).failed(1)
        return [(str(request.output), request.seed or 0) for request in asked]

    @pytest.mark.parametrize(
        ("args", "expected"),
        [
            (["a b", "--count", "2", "--seed", "5"], [("outputs/a-b-5.mp4", 5), ("outputs/a-b-6.mp4", 6)]),
            (["a", "--seed", "9", "--seed", "2", "-o", "k.mp4"], [("k-1.mp4", 9), ("k-2.mp4", 2)]),
            (["a", "--count", "1", "--seed", "5", "--no-video"], [("outputs/a-5.wav", 5)]),
            (["a", "--seed", "5"], [("outputs/a-5.mp4", 5)]),
        ],
    )
    def test_of_one_prompt(
        self, here: Here, demo_f32: Path, tmp_path: Path, args: list[str], expected: list[tuple[str, int]]
    ) -> None:
        assert self.names(here, demo_f32, tmp_path, *args) == expected

    def test_of_prompts(self, here: Here, demo_f32: Path, tmp_path: Path) -> None:
        """Seeds count on; a line may have its own. Names that are alike are told apart."""
        (tmp_path / "p").write_text('a\n{"prompt": "b", "seed": 0}\nc')
        found = self.names(here, demo_f32, tmp_path, "--prompts", "p", "--count", "2", "--seed", "7", "-o", "made")
        assert found == [
            (f"made/{n}-{s}.mp4", s) for n, s in [("a", 7), ("a", 8), ("b", 0), ("b", 1), ("c", 11), ("c", 12)]
        ]
        (tmp_path / "p").write_text('{"prompt": "a", "seed": 1}\n{"prompt": "A!", "seed": 1}')
        found = self.names(here, demo_f32, tmp_path, "--prompts", "p")
        assert [name for name, _ in found] == ["outputs/a-1.mp4", "outputs/a-1-2.mp4"]

    def test_a_line_names_its_clip_in_the_folder(self, here: Here, demo_f32: Path, tmp_path: Path) -> None:
        (tmp_path / "p").write_text('{"prompt": "a", "seed": 1, "output": "x.mp4"}')
        assert self.names(here, demo_f32, tmp_path, "--prompts", "p", "-o", "made") == [("made/x.mp4", 1)]

    def test_a_dry_run_needs_no_folder(
        self, here: Here, demo_f32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nor does it look for its clips elsewhere."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "p").write_text('{"prompt": "a", "output": "x.mp4"}')
        for name in ("a-1.mp4", "a-2.mp4", "x.mp4"):
            (tmp_path / name).touch()
        before = sorted(tmp_path.iterdir())
        runs = [["a"], ["a", "--count", "2"], ["a", "--count", "2", "-o", "new"], ["--prompts", "p", "-o", "new"]]
        for args in runs:
            command = ["generate", *args, "-m", demo_f32, *SIZE, "--seed", "1", "--dry-run"]
            assert here(*command).code == 0 and sorted(tmp_path.iterdir()) == before
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "x.mp4").touch()
        here(*command).failed(1, "new/x.mp4 is already there")
        here("generate", "a", "-m", demo_f32, *SIZE, "-o", "none/x.mp4", "--dry-run").failed(1, "none does not exist")

    def test_drawn_seeds_are_each_clips_own(self, here: Here, demo_f32: Path, tmp_path: Path) -> None:
        """They count on, past a clip that has one."""
        (tmp_path / "p").write_text('{"prompt": "a", "seed": 5}\nb\nc')
        (_, own), (name, second), (_, third) = self.names(here, demo_f32, tmp_path, "--prompts", "p")
        assert own == 5 and third == second + 1 and name == f"outputs/b-{second}.mp4"


REFUSED = {
    "a line that is no JSON": ('{"prompt": "a"\n', [], 1, ["line 1 of", "no JSON object"]),
    "no JSON, its place said once": ('a\n{"prompt" "a"}', [], 1, ["line 2 of", "delimiter in column 11"]),
    "a line without a prompt": ('a\n\n{"frames": 9}', [], 1, ["line 3 of prompts: there is no prompt"]),
    "an empty prompt": ('{"prompt": " "}', [], 1, ["line 1 of prompts: the prompt is empty"]),
    "an unknown option": ('a\n{"prompt": "b", "guidance": 3}', [], 1, ["line 2 of", "'guidance'", "--help shows"]),
    "a misspelt one": ('{"prompt": "b", "frmes": 9}', [], 1, ["line 1 of", "fix: did you mean frames?"]),
    "an option of the whole run": ('{"prompt": "b", "low_memory": true}', [], 1, ["line 1 of", "the whole run's"]),
    "a wrong value": ('a\n{"prompt": "b", "width": "wide"}', [], 2, ["line 2 of", "--width 'wide'"]),
    "a wrong size": ('a\n{"prompt": "b", "width": 100}', [], 1, ["line 2 of prompts: width 100", "64 or 128"]),
    "what does not go together": ('a\n{"prompt": "b", "keep": "audio"}', [], 2, ["line 2 of prompts: --keep has no"]),
    "a place that is not there": (
        'a\n{"prompt": "b", "output": "no/b.mp4"}',
        [],
        1,
        ["line 2 of prompts: ", "no/b.mp4"],
    ),
    "one name": ('{"prompt": "a", "output": "x.mp4"}\n{"prompt": "b", "output": "x.mp4"}', [], 1, ["x.mp4", "once"]),
    "one file of latents": ("a\nb", ["--save-latents", "l.safetensors"], 1, ["more than once"]),
    "no line": ("\n \n", [], 1, ["holds no prompt"]),
    "a prompt beside them": ("a", ["b"], 2, ["PROMPT and --prompts do not go together"]),
    "two numbers of clips": ("a", ["--count", "2", "--seed", "1", "--seed", "2"], 2, ["--count and several --seed"]),
    "which clips go on": ("a", ["--resume"], 2, ["needs --seed"]),
    "too large": (
        'a\n{"prompt": "b", "frames": 800001}',
        ["--memory-limit", "4"],
        3,
        ["line 2 of prompts: 800001 frames"],
    ),
}


def test_what_is_wrong_with_all_clips_is_no_line_s(here: Here, tmp_path: Path) -> None:
    (tmp_path / "p").write_text("a")
    done = here("generate", "--prompts", tmp_path / "p", "--crf", "99")
    done.failed(2, "error: --crf 99 is not valid")
    here("generate", "--prompts", tmp_path / "p", "--keep", "audio").failed(2, "error: --keep has no effect without")


def test_a_line_gives_anew_what_an_earlier_run_was_given(here: Here, demo_f32: Path, tmp_path: Path) -> None:
    """A picture that is gone is asked for in the lines alone that use it."""
    gone, there = tmp_path / "gone.png", tmp_path / "there.png"
    Image.new("RGB", (64, 64)).save(there)
    request = {"prompt": "x", "image": [[str(gone), 0, 1]], "width": 64, "height": 64, "frames": 9}
    record = {"request": request, "inputs": [{"option": "image", "path": str(gone), "sha256": "0"}]}
    (tmp_path / "x.json").write_text(json.dumps(record | {"model": {"path": str(demo_f32), "files": {}}}))
    line = ["generate", "--from", tmp_path / "x.json", "--prompts", tmp_path / "p", "--seed", "1", "--dry-run", "-q"]
    (tmp_path / "p").write_text(json.dumps({"prompt": "a", "image": str(there)}))
    assert here(*line).code == 0
    (tmp_path / "p").write_text(json.dumps({"prompt": "a", "image": str(there)}) + "\nb")
    here(*line).failed(1, f"line 2 of {tmp_path / 'p'}: {gone} is gone")


@pytest.mark.parametrize("name", REFUSED)
def test_one_clip_that_is_refused_refuses_all(
    here: Here, demo_f32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    text, args, code, said = REFUSED[name]
    Path("prompts").write_text(text)
    size = ["--width", "64", "--height", "64"]
    here("generate", "--prompts", "prompts", "-m", demo_f32, "-o", "made", *size, *args).failed(code, *said)
    assert not list(tmp_path.glob("**/*.mp4*"))


def test_a_name_that_is_there_twice_is_named_in_its_folder(here: Here, demo_f32: Path, tmp_path: Path) -> None:
    (tmp_path / "p").write_text('{"prompt": "a", "output": "x.mp4"}\n{"prompt": "b", "output": "x.mp4"}')
    for more in ([], ["--dry-run"]):
        done = here("generate", "--prompts", tmp_path / "p", "-m", demo_f32, "-o", tmp_path / "new" / "made", *more)
        done.failed(1, f"{tmp_path / 'new' / 'made' / 'x.mp4'} would be written more than once")


def test_all_are_checked_before(demo_f32: Path) -> None:
    clip = {"prompt": "a red square", "width": 64, "height": 64, "frames": 9}
    with pytest.raises(InputError, match="clip 2: width 100"):
        ltx2.load(demo_f32).stream_all([clip, clip | {"width": 100}])
    with pytest.raises(UsageError, match="--low-memory is False for one clip and True for another"):
        ltx2.load(demo_f32).stream_all([clip, clip | {"low_memory": True}])


def test_several_machines_make_one() -> None:
    request = Request.from_options({"prompt": "a"})
    check_common([request], True)
    with pytest.raises(UsageError, match="several clips and several machines"):
        check_common([request, request], True)


def test_the_plan_is_the_largest_clips(demo_f32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the little that the others keep for later."""
    pipeline = Pipeline(demo_f32)
    small, large = (
        Request.from_options({"prompt": "a", "width": 64, "height": 64, "frames": frames}) for frames in (9, 121)
    )
    alone, both = pipeline.planned(large), pipeline.planned_all([small, large, small])
    assert both.job.sizes.frames == 121 and alone.peak < both.peak < 1.3 * alone.peak
    memory_of(monkeypatch, max(need.least for need in alone.needs) / 1e9)
    assert pipeline.planned(large).fits
    with pytest.raises(DoesNotFitError, match="121 frames"):
        pipeline.events_all([small, large, small])


def test_merged_orders() -> None:
    assert merged([["a", "c", "d"], ["b", "c"], ["a", "b", "d"]]) == ["a", "b", "c", "d"]
    assert merged([[], ["x"]]) == ["x"]
