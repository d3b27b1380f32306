"""Many clips in one run: each network is loaded once, and each clip is what it would be by itself."""

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import ltx2
from ltx2.cli import run
from ltx2.runtime.errors import DoesNotFitError, InputError
from ltx2.runtime.generate.clip import Generated
from ltx2.runtime.generate.phases.order import merged
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.generate.request import Request
from ltx2.runtime.networks.load import load_network
from tests.support.command import SIZE, Here
from tests.support.machine import memory_of

PROMPTS = 'a red square\n\n{"prompt": "a green star", "seed": 3, "no-audio": true, "output": "%s"}\n'
FILES = ["a-red-square-10.mp4", "star.mp4"]


# Runs `ltx2 generate ...`, and kills it when the second clip's picture is decoded.
KILLED = """
import os, sys
from ltx2.cli import run
from ltx2.runtime.events import PhaseStarted
from ltx2.runtime.generate.pipeline import Pipeline

original = Pipeline.events_all

def watched(*args):
    for event in original(*args):
        if event == PhaseStarted("video_vae", 1):
            os.kill(os.getpid(), 9)
        yield event

Pipeline.events_all = watched
run(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(demo_f32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips that were made together, and the file of their prompts; `loads.json` says what was loaded."""
    folder, loads = tmp_path_factory.mktemp("together"), Counter[str]()
    (folder / "prompts.txt").write_text(PROMPTS % (folder / "star.mp4"), encoding="utf-8-sig")

    def counted(model: Any, component: str, *more: Any) -> Any:
        loads[component] += 1
        return load_network(model, component, *more)

    args = ["generate", "--prompts", folder / "prompts.txt", "-m", demo_f32, "-o", folder, *SIZE, "--seed", "10"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ltx2.runtime.generate.networks.load_network", counted)
        assert run([str(arg) for arg in [*args, "--no-metadata"]]) == 0
    (folder / "loads.json").write_text(json.dumps(loads))
    return folder


class TestBatch:
    def test_each_network_is_loaded_once(self, folder: Path) -> None:
        loads = json.loads((folder / "loads.json").read_text())
        assert set(loads.values()) == {1} and len(loads) == 7, loads

    @pytest.mark.parametrize(("name", "options"), [(FILES[0], {}), (FILES[1], {"seed": 3, "no_audio": True})])
    def test_a_clip_is_what_it_would_be_alone(
        self, folder: Path, demo_f32: Path, tmp_path: Path, name: str, options: dict[str, Any]
    ) -> None:
        """And its record says so; the run's plan is the larger clip's."""
        record = json.loads((folder / name).with_suffix(".json").read_text())
        prompt = "a red square" if name == FILES[0] else "a green star"
        wanted: dict[str, Any] = {"width": 64, "height": 64, "frames": 9, "seed": 10, "no_metadata": True} | options
        clip = ltx2.load(demo_f32).generate(prompt, **wanted)
        assert clip.save(tmp_path / "alone.mp4").read_bytes() == (folder / name).read_bytes()
        assert record["request"] == clip.record["request"]
        assert [phase["name"] for phase in record["phases"]] == [phase["name"] for phase in clip.record["phases"]]

    def test_nothing_else_is_left(self, folder: Path) -> None:
        clips = [name for clip in FILES for name in (clip, clip.replace(".mp4", ".json"))]
        assert sorted(path.name for path in folder.iterdir()) == sorted([*clips, "loads.json", "prompts.txt"])


def test_a_killed_run_goes_on(here: Here, demo_f32: Path, folder: Path, tmp_path: Path) -> None:
    """While the second clip is decoded: the first is there, and is not made again."""
    (tmp_path / "prompts.txt").write_text(PROMPTS % (tmp_path / "star.mp4"), encoding="utf-8-sig")
    args = ["generate", "--prompts", tmp_path / "prompts.txt", "-m", demo_f32, "-o", tmp_path, *SIZE]
    args += ["--seed", "10", "--no-metadata"]
    command = [sys.executable, "-c", KILLED, *map(str, args)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    made = (tmp_path / FILES[0]).stat()
    assert (tmp_path / "star.unfinished.safetensors").exists() and not (tmp_path / "star.mp4").exists()
    done = here(*args, "--resume", "--json")
    assert [Path(clip["clip"]).name for clip in done.json["clips"]] == FILES and "stage" not in done.err
    assert (tmp_path / FILES[0]).stat() == made
    assert (tmp_path / FILES[1]).read_bytes() == (folder / FILES[1]).read_bytes()
    assert not list(tmp_path.glob("*.safetensors"))


class TestSeedsAndNames:
    def names(self, here: Here, demo_f32: Path, tmp_path: Path, *args: str) -> list[tuple[str, int]]:
        """Of the clips that would be made."""
        asked: list[Request] = []

        def planned(self: Pipeline, requests: list[Request], until: str | None = None) -> Any:
            asked.extend(requests)
            raise InputError("not", "this", "time")

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
            (["a", "--seed", "5"], [("a-5.mp4", 5)]),
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

    def test_drawn_seeds_are_each_clips_own(self, here: Here, demo_f32: Path, tmp_path: Path) -> None:
        first, second = (seed for _, seed in self.names(here, demo_f32, tmp_path, "a", "--count", "2"))
        assert second == first + 1


REFUSED = {
    "a line that is no JSON": ('{"prompt": "a"\n', [], 1, ["line 1 of", "no JSON object"]),
    "an unknown option": ('a\n{"prompt": "b", "guidance": 3}', [], 1, ["line 2 of", "'guidance'", "cfg"]),
    "an option of the whole run": ('{"prompt": "b", "low_memory": true}', [], 1, ["line 1 of", "the whole run's"]),
    "a wrong value": ('a\n{"prompt": "b", "width": "wide"}', [], 1, ["line 2 of", "width 'wide'"]),
    "a wrong size": ('a\n{"prompt": "b", "width": 100}', [], 1, ["clip 2", "width 100", "64 or 128"]),
    "one name": ('{"prompt": "a", "output": "x.mp4"}\n{"prompt": "b", "output": "x.mp4"}', [], 1, ["x.mp4", "once"]),
    "one file of latents": ("a\nb", ["--save-latents", "l"], 1, ["more than once"]),
    "no line": ("\n \n", [], 1, ["holds no prompt"]),
    "a prompt beside them": ("a", ["b"], 2, ["PROMPT and --prompts do not go together"]),
    "two numbers of clips": ("a", ["--count", "2", "--seed", "1", "--seed", "2"], 2, ["--count and several --seed"]),
    "which clips go on": ("a", ["--resume"], 2, ["needs --seed"]),
    "too large": ('a\n{"prompt": "b", "frames": 800001}', ["--memory-limit", "4"], 3, ["do not fit in memory"]),
}


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


def test_python(demo_f32: Path) -> None:
    size: dict[str, Any] = {"width": 64, "height": 64, "frames": 9, "no_audio": True, "no_upscale": True}
    clips = [{"prompt": "a red square", "seed": seed, **size} for seed in (1, 2)]
    made = [event.clip for event in ltx2.load(demo_f32).stream_all(clips) if isinstance(event, Generated)]
    assert [clip.seed for clip in made] == [1, 2]
    with pytest.raises(InputError, match="clip 2: width 100"):
        ltx2.load(demo_f32).stream_all([*clips[:1], clips[1] | {"width": 100}])
    with pytest.raises(InputError, match="--low-memory is False for one clip and True for another"):
        ltx2.load(demo_f32).stream_all([*clips[:1], clips[1] | {"low_memory": True}])


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
