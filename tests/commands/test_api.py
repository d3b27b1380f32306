"""The Python interface: the commands as functions, their options as arguments."""

import dataclasses
import importlib
import inspect
import json
import pkgutil
import pydoc
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ltx2
from ltx2 import api
from ltx2.commands.group import cli
from ltx2.runtime.errors import InputError, ModelFolderError
from ltx2.runtime.events import Event, PhaseDone, PhaseStarted, StepDone
from ltx2.runtime.generate.options.table import COSTS, ROWS
from ltx2.runtime.generate.records.clip import Generated, Saved
from ltx2.runtime.model.layout import ModelFolder
from tests.support.machine import small_ceilings
from tests.support.media import read_video
from tests.support.official import GEMMA, MONOLITH, UPSCALER
from tests.support.sampling import shorten

PROMPT = "a red square"
# Steps on the way to something, what a machine that follows ends with, kinds of a kind, and what two commands end with.
INNER = {
    "Followed", "Sampled", "Predicted", "Fitted", "UnreachableError", "MissingError", "StoppedError", "Demonstrated",
    "Diagnosed",
}  # fmt: skip
SIZE: dict[str, Any] = {"width": 128, "height": 64, "frames": 9, "seed": 10}


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """Few steps, a short text."""
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch, (1.0, 0.7, 0.4, 0.0), (0.6, 0.3, 0.0))
        small_ceilings(patch)
        yield


@pytest.fixture(scope="module")
def clip(demo_f32: Path) -> ltx2.Clip:
    return ltx2.load(demo_f32).generate(PROMPT, **SIZE)


class TestNames:
    def test_all_are_there(self) -> None:
        assert {"load", "convert", "quantize", "Clip", "__version__"} <= set(dir(ltx2))
        assert all(callable(getattr(ltx2, name)) for name in ("load", "convert", "quantize", "Clip"))

    def test_errors_events_and_checks(self, demo_f32: Path) -> None:
        assert issubclass(ltx2.UsageError, ltx2.InputError) and issubclass(ltx2.InputError, ltx2.Ltx2Error)
        assert ltx2.events.StepDone is StepDone and ltx2.events.Saved is Saved
        assert ltx2.verify(demo_f32)["verified"] is True
        assert "transformer" in ltx2.inspect(demo_f32)["components"]

    def test_bench(self, demo_f32: Path) -> None:
        receipt = ltx2.bench(demo_f32, part="text", repeat=1, warmup=0, **{n: SIZE[n] for n in ("width", "frames")})
        assert [case["name"].split(",")[0] for case in receipt["cases"]] == [demo_f32.name]
        cases: list[dict[str, Any]] = [{}, {"models": demo_f32, "bits": [4]}]
        for wrong in cases:
            with pytest.raises(ltx2.UsageError):
                ltx2.bench(**wrong)

    def test_others_are_not(self) -> None:
        with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
            _ = ltx2.nonsense

    def test_convert_is_a_function_and_a_package(self) -> None:
        """In whatever order they are imported."""
        programs = [
            "import ltx2; assert callable(ltx2.convert); import ltx2.convert.write; assert callable(ltx2.convert)",
            "import ltx2; ltx2.load; import ltx2.convert.plan.entries; assert callable(ltx2.convert)",
            "import ltx2.api, ltx2; from ltx2.convert.plan import entries; assert callable(ltx2.convert)",
            "from ltx2 import convert; assert callable(convert); from ltx2.convert import plan",
            "import ltx2; assert callable(ltx2.bench); import ltx2.bench.speed.run; assert callable(ltx2.bench)",
            "from ltx2 import load, quantize, Clip; import ltx2.quant, ltx2.bench, ltx2.runtime",
        ]
        anew = "for name in [n for n in sys.modules if n.split('.')[0] == 'ltx2']: del sys.modules[name]"
        code = "\n".join(["import sys", *(f"{anew}\nexec({program!r}, {{}})" for program in programs)])
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_importing_is_instant(self) -> None:
        code = "import sys, ltx2; print(*(sys.modules.keys() & {'mlx', 'numpy', 'click', 'rich', 'tokenizers'}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "\n"

    def test_everything_public_is_exported(self) -> None:
        """Every error, and every event that a run may yield."""
        for module in pkgutil.walk_packages(ltx2.__path__, "ltx2."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
        for found, place in ((ltx2.Ltx2Error, ltx2), (Event, ltx2.events)):
            for kind in every_subclass(found):
                own = kind.__module__.startswith("ltx2.") and not kind.__module__.startswith("ltx2.bench")
                assert not own or hasattr(place, kind.__name__) or kind.__name__ in INNER, kind

    def test_help_shows_the_interface(self) -> None:
        text = pydoc.plain(pydoc.render_doc(ltx2))
        for said in ("load(model", "convert(sources", "delete_sources", "class Pipeline", "negative_prompt: str | None",
                     "class Clip", "class MismatchError", "verify(model", "inspect(path"):  # fmt: skip
            assert said in text, said

    def test_type_checkers_know_the_arguments(self, demo_f32: Path) -> None:
        """mypy reads this file, and reports an ignored error that is none."""
        pipe = ltx2.load(demo_f32)
        with pytest.raises(InputError):
            pipe.generate(PROMPT, widht=64)  # type: ignore[call-arg]
        with pytest.raises(InputError):
            pipe.generate(PROMPT, width="wide")  # type: ignore[arg-type]
        with pytest.raises(InputError):
            pipe.generate(PROMPT, progress="no function")  # type: ignore[arg-type]


def options(command: str) -> set[str]:
    """The command's arguments and options by their flags, less those that only a command line needs, or that say which
    clips `stream_all` is given."""
    only_there = {"quiet", "as_json", "dry_run", "report", "sidecar", "target", "model", "sources", "prompts", "count"}
    names = {p.name for p in cli.commands[command].params if p.name is not None} - only_there
    return {"seed" if name == "seeds" else name for name in names}


def every_subclass(kind: type[object]) -> Iterator[type[object]]:
    for sub in kind.__subclasses__():
        yield sub
        yield from every_subclass(sub)


class TestSameAsTheCommandLine:
    def test_generate(self) -> None:
        # a target, its state beside it, a line of the file, a screen, `ltx2 upscale`
        elsewhere = {"output", "state", "name", "progress", "upscale"}
        assert options("generate") == ROWS.keys() - elsewhere

    @pytest.mark.parametrize("name", ["convert", "quantize", "plan"])
    def test_functions(self, name: str) -> None:
        function: Callable[..., Any] = getattr(api, name)
        assert options(name) <= set(inspect.signature(function).parameters)

    @pytest.mark.parametrize("name", ["convert", "quantize"])
    def test_defaults(self, name: str) -> None:
        """Of the command when only what it requires is given."""
        given = cli.commands[name].make_context(name, ["source", "-o", "out"]).params
        signature = inspect.signature(getattr(api, name)).parameters
        defaults = {option: given[option] for option in options(name)}
        assert defaults == {option: signature[option].default for option in defaults}

    def test_bench_takes_options_of_generate(self) -> None:
        """Those that change what a clip costs; the others say what is measured, how often, and what becomes of it."""
        own = {"models", "part", "suite", "repeat", "warmup", "cooldown", "compare", "out", "plot", "verbose"}
        own |= {"random", "bits", "mode", "group_size", "recipe"} | {"compared", "reference", "prompts"}
        assert options("bench") - own <= options("generate") and set(COSTS) <= options("bench")
        only_there = {"out", "plot", "verbose", "compared", "reference", "prompts"}
        assert own - only_there <= set(inspect.signature(api.bench).parameters)


class TestConvert:
    def test_paths_of_any_kind(self, tmp_path: Path) -> None:
        out = ltx2.convert([str(MONOLITH), UPSCALER, str(GEMMA)], str(tmp_path / "model"), variant="distilled")
        assert out == tmp_path / "model" and ModelFolder.open(out).manifest.variant == "distilled"

    @pytest.mark.parametrize("source", [UPSCALER, str(UPSCALER), iter([UPSCALER])])
    def test_one_path_needs_no_list(self, tmp_path: Path, source: Any) -> None:
        assert ModelFolder.open(ltx2.convert(source, tmp_path / "model")).has("spatial_upscaler")

    @pytest.mark.parametrize("option", [{"group_size": 32}, {"stats": "stats.safetensors"}])
    def test_no_option_is_ignored(self, tmp_path: Path, option: dict[str, Any]) -> None:
        with pytest.raises(InputError, match="no effect without bits"):
            ltx2.convert([MONOLITH], tmp_path / "model", variant="distilled", **option)

    def test_quantizing_on_the_way_gives_the_same_bytes(self, tmp_path: Path) -> None:
        common: dict[str, Any] = {"variant": "distilled", "only": ["transformer"]}
        whole = ltx2.convert([MONOLITH], tmp_path / "whole", **common)
        report = ltx2.quantize(whole, tmp_path / "two-steps", bits=4)
        ltx2.convert([MONOLITH], tmp_path / "one-step", bits=4, **common)
        first, second = (
            {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.safetensors")}
            for name in ("two-steps", "one-step")
        )
        assert first == second and len(first) == 1
        assert report.to_dict()["totals"]["all"]["bits_per_weight"] < 16


class TestLoad:
    @pytest.mark.parametrize("kind", [str, Path])
    def test_reads_headers_only(self, demo_f32: Path, kind: Callable[[Path], Any]) -> None:
        assert ltx2.load(kind(demo_f32)).folder.manifest.release == "2.0"

    def test_something_else(self, tmp_path: Path) -> None:
        with pytest.raises(ModelFolderError, match="not a model folder"):
            ltx2.load(tmp_path)


class TestGenerate:
    def test_clip(self, clip: ltx2.Clip) -> None:
        assert clip.frames.shape == (9, 64, 128, 3) and clip.frames.dtype == np.uint8
        assert clip.audio is not None and clip.audio.dtype == np.float32 and clip.audio.shape[0] == 2
        assert (clip.sample_rate, clip.fps) == (24000, 24.0)
        assert {name: value.shape for name, value in clip.latents.items()} == {
            "video": (1, 32, 2, 2, 4),
            "audio": (1, 2, 9, 16),
        }
        assert clip.audio.shape[1] / clip.sample_rate == pytest.approx(9 / 24, abs=0.05), "as long as the picture"

    def test_save(self, clip: ltx2.Clip, tmp_path: Path) -> None:
        assert clip.save(str(tmp_path / "kite.mp4")) == tmp_path / "kite.mp4"
        frames, fps = read_video(tmp_path / "kite.mp4")
        assert frames.shape == clip.frames.shape and fps == 24
        assert np.abs(frames.astype(int) - clip.frames).mean() < 8
        assert json.loads((tmp_path / "kite.json").read_text()) == json.loads(json.dumps(clip.record))

    def test_what_is_there_is_replaced_only_when_asked(self, clip: ltx2.Clip, tmp_path: Path) -> None:
        """As on the command line, a file in the record's place too."""
        path, record = tmp_path / "kite.mp4", tmp_path / "kite.json"
        for taken in (path, record):
            taken.write_text("mine")
            with pytest.raises(InputError, match=f"{taken.name} is already there.*overwrite=True"):
                clip.save(path)
            assert taken.read_text() == "mine" and list(tmp_path.iterdir()) == [taken]
            taken.unlink()
        path.write_text("mine"), record.write_text("mine")
        clip.save(path, overwrite=True)
        assert "mine" not in record.read_text() and read_video(path)[0].shape == clip.frames.shape
        with pytest.raises(InputError, match=r"kite\.mp4 is already there"):
            clip.save(path)

    def test_save_elsewhere(self, clip: ltx2.Clip, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="does not exist"):
            clip.save(tmp_path / "gone" / "kite.mp4")

    def test_options_are_the_commands_with_underscores(self, demo_f32: Path, tmp_path: Path) -> None:
        """Also as numpy and pathlib know them; the clip can still be saved."""
        size: dict[str, Any] = {name: np.int32(value) for name, value in SIZE.items()}
        latents = tmp_path / "l.safetensors"
        silent = ltx2.load(demo_f32).generate(PROMPT, no_audio=True, no_upscale=True, save_latents=latents, **size)
        assert silent.audio is None and latents.is_file()
        silent.save(tmp_path / "silent.mp4")
        decoded = ltx2.load(demo_f32).generate(latents=latents)
        np.testing.assert_array_equal(decoded.frames, silent.frames)

    def test_a_pipeline_is_used_again(self, demo_f32: Path, clip: ltx2.Clip) -> None:
        pipe = ltx2.load(demo_f32)
        first, second = (pipe.generate(PROMPT, **SIZE) for _ in range(2))
        np.testing.assert_array_equal(first.frames, second.frames)
        np.testing.assert_array_equal(first.frames, clip.frames)

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [({"widht": 64}, "widht"), ({"width": 100}, "64 or 128"), ({"seed": -1}, "seed"), ({"frames": 9.0}, "frames")],
    )
    def test_is_checked_before_the_first_event(self, demo_f32: Path, wrong: dict[str, Any], said: str) -> None:
        with pytest.raises(InputError, match=said):
            ltx2.load(demo_f32).stream(PROMPT, **wrong)


@pytest.fixture(scope="module")
def events(demo_f32: Path) -> list[Event]:
    return list(ltx2.load(demo_f32).stream(PROMPT, **SIZE))


class TestProgress:
    def test_generate(self, demo_f32: Path) -> None:
        seen: list[Event] = []
        clip = ltx2.load(demo_f32).generate(PROMPT, no_upscale=True, progress=seen.append, **SIZE)
        assert any(isinstance(event, StepDone) for event in seen)
        assert isinstance(seen[-1], Generated) and seen[-1].clip is clip

    def test_other_functions(self, tmp_path: Path) -> None:
        seen: list[Event] = []
        model = ltx2.convert(UPSCALER, tmp_path / "model", progress=seen.append)
        assert isinstance(seen[-1], ltx2.events.Written)
        ltx2.verify(model, progress=seen.append)
        assert isinstance(seen[-1], ltx2.events.Verified)


class TestNotebook:
    def test_it_plays(self, clip: ltx2.Clip, monkeypatch: pytest.MonkeyPatch) -> None:
        assert clip._repr_html_().startswith("<video controls")
        assert len(repr(clip)) < 120 and clip != dataclasses.replace(clip)
        monkeypatch.setattr("ltx2.runtime.generate.records.clip.NOTEBOOK_BYTES", 100)
        assert "too large to play here" in clip._repr_html_() and len(clip._repr_html_()) < 300


class TestStream:
    def test_ends_with_the_clip(self, events: list[Event], clip: ltx2.Clip) -> None:
        *before, last = events
        assert isinstance(last, Generated) and not any(isinstance(event, Generated) for event in before)
        np.testing.assert_array_equal(last.clip.frames, clip.frames)

    def test_frames_go_into_a_file(self, demo_f32: Path, clip: ltx2.Clip, tmp_path: Path) -> None:
        """While they are decoded, with the bytes of saving the clip; generate, which returns them, takes no file."""
        clip.save(tmp_path / "saved.mp4")
        pipe, path = ltx2.load(demo_f32), tmp_path / "kite.mp4"
        *_, last = pipe.stream(PROMPT, output=path, **SIZE)
        assert isinstance(last, Saved) and last.path == path
        assert path.read_bytes() == (tmp_path / "saved.mp4").read_bytes()
        assert json.loads(path.with_suffix(".json").read_text()) == json.loads(json.dumps(last.record))
        with pytest.raises(InputError, match="leave it out and use clip"):
            pipe.generate(PROMPT, output=path)

    @pytest.mark.parametrize("name", ["gone/kite.mp4", "kite.avi"])
    def test_a_file_that_cannot_be_written(self, demo_f32: Path, tmp_path: Path, name: str) -> None:
        with pytest.raises(InputError, match="cannot write"):
            ltx2.load(demo_f32).stream(PROMPT, output=tmp_path / name)

    def test_phases_are_started_and_done_one_after_the_other(self, events: list[Event]) -> None:
        open_phase: str | None = None
        for event in events:
            if isinstance(event, PhaseStarted):
                assert open_phase is None
                open_phase = event.name
            elif isinstance(event, PhaseDone | StepDone):
                assert open_phase == (event.name if isinstance(event, PhaseDone) else event.phase)
                open_phase = None if isinstance(event, PhaseDone) else open_phase
        assert open_phase is None

    def test_steps_are_counted(self, events: list[Event]) -> None:
        for phase, steps in (("stage1", 3), ("stage2", 2)):
            found = [(e.step, e.steps) for e in events if isinstance(e, StepDone) and e.phase == phase]
            assert found == [(number, steps) for number in range(1, steps + 1)]

    def test_can_be_left_early(self, demo_f32: Path, clip: ltx2.Clip) -> None:
        """As a user interface does when its user cancels; the next run is a whole one."""
        pipe = ltx2.load(demo_f32)
        for event in pipe.stream(PROMPT, **SIZE):
            if isinstance(event, StepDone) and event.phase == "stage1":
                break
        np.testing.assert_array_equal(pipe.generate(PROMPT, **SIZE).frames, clip.frames)
