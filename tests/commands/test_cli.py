"""The `ltx2` command as users and scripts meet it: exit codes, what is printed where, and what is left on disk."""

import json
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

import ltx2.demo
from ltx2 import __version__
from ltx2.commands.group import cli
from ltx2.demo import run_demo
from ltx2.runtime.errors import DoesNotFitError, UnsupportedError
from ltx2.runtime.events import Section
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.media.formats import FORMATS
from ltx2.runtime.model.layout import ModelFolder
from tests.support import published
from tests.support.command import SCRIPT, SIZE, Done, Here, script
from tests.support.machine import memory_of
from tests.support.media import read_video
from tests.support.official import DEMO, MONOLITH
from tests.support.stopped import listen
from tests.support.waiting import until

PROMPT = "a red square"
ERROR_PARTS = ["kind", "what", "why", "fix"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestHelp:
    def test_version(self) -> None:
        assert script("--version") == Done(0, f"ltx2, version {__version__}\n", "")

    def test_python_dash_m(self) -> None:
        done = subprocess.run([sys.executable, "-m", "ltx2", "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"ltx2, version {__version__}\n"

    def test_all_commands_are_there(self) -> None:
        expected = {"convert", "quantize", "generate", "bench", "inspect", "verify", "demo"}
        assert expected <= cli.commands.keys()
        listed = [line.split()[0] for line in script("--help").out.partition("Commands:")[2].splitlines() if line]
        assert listed == list(cli.commands), "in the order of their use"
        assert "..." not in script("--help").out.partition("Commands:")[2], "no explanation is cut off"

    @pytest.mark.parametrize("name", sorted(cli.commands))
    def test_every_command(self, here: Here, name: str) -> None:
        done = here(name, "--help")
        assert (done.code, done.err) == (0, "") and done.out.startswith(f"Usage: ltx2 {name} ")
        assert "-q, --quiet" in done.out and "--json" in done.out
        options = [p for p in cli.commands[name].params if p.param_type_name == "option"]
        assert all(getattr(option, "help", None) for option in options), "every option is explained"

    def test_every_kind_of_clip_is_named(self, here: Here) -> None:
        assert all(suffix in here("generate", "--help").out for suffix in (*FORMATS, ".wav"))

    def test_without_a_command(self) -> None:
        done = script()
        assert (done.code, done.out) == (2, "") and "Commands:" in done.err and "error:" not in done.err

    def test_loads_no_heavy_library(self) -> None:
        heavy = ("mlx", "numpy", "rich", "tokenizers", "safetensors", "transformers", "huggingface_hub", "torch")
        """So that help is instant."""
        runs = "".join(f"ltx2.cli.run(['{name}', '--help']); " for name in cli.commands)
        code = f"import sys, ltx2.cli; {runs}print(*(sys.modules.keys() & {set(heavy)}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == ""

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_shell_completion(self, shell: str) -> None:
        done = script(_LTX2_COMPLETE=f"{shell}_source")
        assert done.code == 0 and f"_LTX2_COMPLETE={shell}_complete" in done.out

    def test_completed_words(self) -> None:
        done = script(_LTX2_COMPLETE="bash_complete", COMP_WORDS="ltx2 gen", COMP_CWORD="1")
        assert done.out == "plain,generate\n"


USAGE = {
    "no such command": (["nonsense"], "No such command 'nonsense'"),
    "no such option": (["generate", "x", "--nonsense"], "No such option '--nonsense'"),
    "an option is missing": (["convert", "x"], "Missing option '-o'"),
    "an argument is missing": (["convert", "-o", "x"], "Missing argument 'SOURCES...'"),
    "a wrong choice": (["convert", "x", "-o", "y", "--dtype", "int8"], "'int8' is not one of"),
    "no number": (["generate", "x", "-m", "m", "-o", "c.mp4", "--frames", "many"], "'many' is not a whole number"),
    "an option without --bits": (["convert", "x", "-o", "y", "--group-size", "64"], "--group-size has no effect"),
    "an unknown mode": (["quantize", "x", "-o", "y", "--mode", "int4"], "'int4' is not one of 'affine', 'mxfp4'"),
    "a wrong rate": (["generate", "x", "--fps", "0"], "--fps 0 is not valid"),
    "a wrong quality": (["upscale", "x.mp4", "-m", "m", "-o", "c.mp4", "--crf", "60"], "--crf 60 is not valid"),
    "a wrong seed": (["generate", "x", "--seed", "-1"], "--seed -1 is not valid"),
    "wrong bits": (["convert", "x", "-o", "y", "--bits", "7"], "--bits 7 is not possible"),
    "no memory": (["plan", "--memory", "0"], "--memory 0 is not possible"),
    "no runs": (["bench", "x", "--repeat", "0"], "--repeat 0 "),
    "a wrong rest": (["bench", "x", "--cooldown", "-1"], "--cooldown -1 is not valid"),
    "too many arguments": (["generate", "two", "prompts", "-o", "c.mp4"], "unexpected extra argument"),
    "an option without its value": (["generate", "x", "--seed"], "'--seed' requires an argument"),
    "a value that nothing takes": (["generate", "x", "--force=1"], "'--force' does not take a value"),
    "nothing to download": (["download"], "nothing to download"),
    "no bundle": (["download", "x", "--convert"], "--convert takes one bundle"),
    "nothing to measure": (["bench"], "nothing to measure"),
    "a model beside --quality": (["bench", "x", "--quality", "y"], "MODEL has no effect with --quality"),
    "nothing to compare with": (["bench", "--quality", "y"], "--quality needs --reference"),
}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["generate", "x", "--guidance", "3"], "here it is --cfg;"),
        (["generate", "x", "--guidance-scale", "3"], "here it is --cfg;"),
        (["generate", "x", "--num-frames", "25"], "here it is --frames;"),
        (["generate", "x", "--quantize", "4"], "ltx2 quantize MODEL -o MODEL2 --bits 4;"),
        (["generate", "a", "red", "kite"], 'put the prompt in quotes: ltx2 generate "a red kite over dunes";'),
        (["verify", "x", "--guidance", "3"], "fix: see ltx2 verify --help"),
    ],
)
def test_the_words_of_other_tools_lead_to_ours(here: Here, args: list[str], said: str) -> None:
    here(*args).failed(2, said)


def test_a_pipeline_that_is_not_built_says_what_is_missing(here: Here) -> None:
    said = ("--pipeline dfr is not built", "where its keyframe slots are", "use one of distilled, one-stage")
    here("generate", "x", "--pipeline", "dfr").failed(1, *said)
    with pytest.raises(UnsupportedError, match="is not built"):
        Request("x", pipeline="dfr")


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage(here: Here, name: str) -> None:
    args, said = USAGE[name]
    here(*args).failed(2, *said.split(": "))
    done = here(args[0], "--json", *args[1:])
    assert done.code == 2 and list(done.json) == ["error"]
    assert list(done.json["error"]) == ERROR_PARTS and done.json["error"]["kind"] == "usage"
    _, what, why, fix = done.json["error"].values()
    assert said in f"{what}: {why}" and len(why) > 5 and why not in what and why != fix and "Usage:" not in why


@pytest.mark.parametrize("wrong", [("--shard-size", "0"), ("--shard-size", "nan"), ("--fit", "0")])
def test_a_size_that_nothing_has(here: Here, demo_f32: Path, tmp_path: Path, wrong: tuple[str, str]) -> None:
    here("quantize", demo_f32, "-o", tmp_path / "q", *wrong).failed(2, " ".join(wrong))


# Arguments with {names} of paths, and what must be said. CLIP is "-m {model} -o {clip}".
CLIP = ["-m", "{model}", "-o", "{clip}"]
FAILURES: dict[str, tuple[list[str], list[str]]] = {
    "width": (["generate", "x", *CLIP, "--width", "100"], ["width 100", "64 or 128"]),
    "height": (["generate", "x", *CLIP, "--height", "500"], ["height 500", "448 or 512"]),
    "frames": (["generate", "x", *CLIP, "--frames", "120"], ["frames 120", "113 or 121"]),
    "no width": (["generate", "x", *CLIP, "--width", "0"], ["width 0", "use 64"]),
    "one latent row": (["generate", "x", *CLIP, "--height", "32", "--no-upscale"], ["height 32", "use 64"]),
    "no prompt": (["generate", *CLIP], ["no prompt", "--embeddings"]),
    "no model": (["generate", "x", "-m", "{gone}", "-o", "{clip}"], ["{gone}", "ltx2 convert"]),
    "not a model": (["generate", "x", "-m", "{folder}", "-o", "{clip}"], ["not a model folder", "ltx2.json"]),
    "not a clip's name": (["generate", "x", "-m", "{model}", "-o", "{folder}/c.avi"], ["mp4", "{folder}/c.mp4"]),
    "clip without a place": (["generate", "x", "-m", "{model}", "-o", "{gone}/c.mp4"], ["{gone}", "does not exist"]),
    "latents without a place": (["generate", "x", *CLIP, "--save-latents", "{gone}/l"], ["{gone}", "does not exist"]),
    "embeddings without a place": (["generate", "x", *CLIP, "--save-embeddings", "{folder}"], ["it is a folder"]),
    "no noise": (["generate", "x", *CLIP, "--noise", "{gone}"], ["{gone}", "no such file"]),
    "not a tensor file": (["generate", "x", *CLIP, "--noise", "{text}"], ["text.json", "is a JSON file"]),
    "not a sidecar": (["generate", "--from", "{text}", "-o", "{clip}"], ["cannot repeat", "text.json"]),
    "no sidecar": (["generate", "--from", "{gone}", "-o", "{clip}"], ["cannot read", "{gone}"]),
    "no source": (["convert", "{gone}", "-o", "{folder}/m"], ["{gone}"]),
    "not a checkpoint": (["convert", "{text}", "-o", "{folder}/m"], ["text.json"]),
    "dev or distilled": (["convert", "{source}", "-o", "{folder}/m"], ["--variant dev", "--variant distilled"]),
    "no such component": (["convert", "{source}", "-o", "{folder}/m", "--only", "vae"], ["'vae'", "video_vae"]),
    "report without a place": (["quantize", "{model}", "-o", "{folder}/q", "--report", "{gone}/r"], ["does not exist"]),
    "receipt without a place": (["bench", "{model}", "--out", "{gone}/r.json"], ["does not exist"]),
    "demo into a file": (["demo", "{text}"], ["cannot make the folder", "text.json"]),
    "nothing to inspect": (["inspect", "{gone}"], ["{gone}"]),
    "nothing to verify": (["verify", "{folder}"], ["not a model folder"]),
}


@pytest.mark.parametrize("name", FAILURES)
def test_expected_failures(here: Here, demo_f32: Path, tmp_path: Path, name: str) -> None:
    paths = {"model": demo_f32, "source": MONOLITH, "clip": tmp_path / "clip.mp4", "gone": tmp_path / "gone"}
    paths |= {"folder": tmp_path, "text": tmp_path / "text.json"}
    paths["text"].write_text("{}")
    args, said = ([text.format(**paths) for text in texts] for texts in FAILURES[name])
    here(*args).failed(1, *said)
    done = here(*args, "--json")
    assert done.code == 1 and list(done.json) == ["error"] and list(done.json["error"]) == ERROR_PARTS
    assert all(done.json["error"].values()) and done.json["error"]["kind"] not in ("usage", "error")
    assert names(tmp_path) == ["text.json"], "nothing is left behind"


def test_a_dry_run_finds_what_is_missing(here: Here, tmp_path: Path) -> None:
    _, metadata, tensors = published.read_header(published.TEMPORAL)
    source = published.write_sparse(tmp_path / "up.safetensors", tensors, metadata)
    whole = here("convert", source, "-o", tmp_path / "m", "--dry-run")
    assert whole.code == 0 and "warning" not in whole.err
    del tensors["final_conv.bias"]
    published.write_sparse(source, tensors, metadata)
    lacking = here("convert", source, "-o", tmp_path / "m", "--dry-run", "--json")
    assert lacking.code == 0 and len(lacking.json["plan"]) == len(tensors)
    assert "convert would refuse" in lacking.err and "final_conv.bias" in lacking.err
    here("convert", source, "-o", tmp_path / "m").failed(1, "final_conv.bias")


@pytest.mark.usefixtures("small_runs")
class TestIncompleteModels:
    @pytest.fixture
    def lacking(self, demo_f32: Path, tmp_path: Path) -> Callable[..., Path]:
        """A copy of the model without some components, or of another variant."""

        def make(*components: str, **changes: str) -> Path:
            model = tmp_path / "lacking"
            shutil.copytree(demo_f32, model)
            manifest = json.loads((model / "ltx2.json").read_text())
            for component in components:
                del manifest["components"][component]
                shutil.rmtree(model / component)
            (model / "ltx2.json").write_text(json.dumps(manifest | changes))
            return model

        return make

    @pytest.mark.parametrize("component", ["transformer", "text_encoder", "connectors", "video_vae", "vocoder"])
    def test_the_missing_component_is_named(
        self, here: Here, lacking: Callable[..., Path], tmp_path: Path, component: str
    ) -> None:
        done = here("generate", "x", "-m", lacking(component), "-o", tmp_path / "c.mp4", *SIZE)
        done.failed(1, f"has no {component}", "convert again")

    def test_the_upscaler_can_be_left_out(self, here: Here, lacking: Callable[..., Path], tmp_path: Path) -> None:
        args = ["generate", "x", "-m", lacking("spatial_upscaler"), "-o", tmp_path / "c.mp4", *SIZE]
        here(*args).failed(1, "spatial_upscaler", "--no-upscale")
        assert here(*args, "--no-upscale").code == 0

    def test_sound_can_be_left_out(self, here: Here, lacking: Callable[..., Path], tmp_path: Path) -> None:
        args = ["generate", "x", "-m", lacking("vocoder"), "-o", tmp_path / "c.mp4", *SIZE]
        assert here(*args, "--no-audio").code == 0

    def test_a_missing_tensor_is_named(self, here: Here, lacking: Callable[..., Path], tmp_path: Path) -> None:
        weights = lacking() / "vocoder" / "model.safetensors"
        tensors = load_file(weights)
        del tensors["conv_pre.bias"]
        save_file(tensors, weights, metadata={"format": "mlx"})
        done = here("generate", "x", "-m", weights.parent.parent, "-o", tmp_path / "c.mp4", *SIZE)
        assert done.code == 1 and "conv_pre.bias is missing" in done.err and not (tmp_path / "c.mp4").exists()


class TestDoesNotFit:
    def test_disk(self, here: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
        args = ["convert", MONOLITH, "-o", tmp_path / "model", "--variant", "distilled"]
        here(*args).failed(3, "the disk is too small", "free some space")
        assert here(*args, "--json").json["error"]["kind"] == "does-not-fit"
        assert not (tmp_path / "model").exists()

    def test_memory(self, here: Here, demo_f32: Path, tmp_path: Path) -> None:
        """Smaller weights are what helps where all else fits; a quantized model cannot be quantized again."""
        assert here("quantize", demo_f32, "-o", tmp_path / "q").code == 0
        for model, fix in ((demo_f32, "ltx2 quantize"), (tmp_path / "q", "fewer --bits")):
            plan = Pipeline(model).plan(PROMPT, width=64, height=64, frames=9, memory_limit=0.0214)
            with pytest.raises(DoesNotFitError, match=f"not fit in memory.*{fix}"):
                plan.check()

    def test_the_computers_memory(self, generate: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        memory_of(monkeypatch, 1e-6)
        generate(PROMPT).failed(3, "does not fit in memory", "use a computer with 0.")
        assert names(tmp_path) == []

    @pytest.mark.parametrize("limit", ["0.000001", "0.008", "0.012"])
    def test_what_no_smaller_weights_would_mend(self, generate: Here, limit: str) -> None:
        """The limit that is named is enough."""
        done = generate(PROMPT, "--memory-limit", limit)
        done.failed(3, "not fit in memory", "fix: use --memory-limit")
        assert "quantize" not in done.err
        enough = done.err.split("use --memory-limit ")[1].split()[0]
        assert generate(PROMPT, "--memory-limit", enough, "--dry-run").code == 0

    @pytest.mark.parametrize(
        ("size", "fix"), [(("1048576", "1048576", "9"), "--width"), (("64", "64", "100000000001"), "--frames")]
    )
    def test_memory_for_the_frames(self, generate: Here, tmp_path: Path, size: tuple[str, str, str], fix: str) -> None:
        width, height, frames = size
        done = generate(PROMPT, size=["--width", width, "--height", height, "--frames", frames])
        done.failed(3, "do not fit in memory", f"use {fix}")
        assert names(tmp_path) == []


class TestUnexpected:
    def test_keeps_its_traceback(self, generate: Here, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: Any, **__: Any) -> None:
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(Pipeline, "events_all", broken)
        with pytest.raises(ZeroDivisionError, match="a bug"):
            generate(PROMPT)

    def test_a_reader_that_stops_reading(self) -> None:
        """As in `ltx2 ... | head`."""
        command = [str(SCRIPT), "convert", "--dry-run", "--json", str(MONOLITH), "-o", "x", "--variant", "distilled"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b"" and process.wait() == 1


def test_interrupt_keeps_what_is_finished(demo_f32: Path, tmp_path: Path) -> None:
    embeddings = tmp_path / "embeddings.safetensors"
    command = [SCRIPT, "generate", PROMPT, "-m", demo_f32, "-o", tmp_path / "clip.mp4", "--save-embeddings", embeddings]
    command += ["--width", "384", "--height", "256", "--frames", "49", "--json"]
    pipe, parts = subprocess.PIPE, [str(part) for part in command]
    with subprocess.Popen(parts, stdout=pipe, stderr=pipe, text=True, preexec_fn=listen) as process:
        until(lambda: embeddings.exists() or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130 and "Traceback" not in err and "error: interrupted" in err
    assert json.loads(out)["error"]["kind"] == "interrupted"
    assert names(tmp_path) == [embeddings.name]
    assert set(load_file(embeddings)) == {"video_context", "audio_context"}


def test_interrupt_is_told_to_people(generate: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "events_all", interrupted)
    done = generate(PROMPT)
    assert (done.code, done.out, names(tmp_path)) == (130, "", []) and done.err.startswith("error: interrupted")


@pytest.mark.usefixtures("small_runs")
class TestOutput:
    """What the commands print when all goes well."""

    def test_quiet(self, here: Here, generate: Here, demo_f32: Path, tmp_path: Path) -> None:
        silence = Done(0, "", "")
        assert here("convert", *DEMO, "-o", tmp_path / "m", "--variant", "distilled", "-q") == silence
        assert here("quantize", tmp_path / "m", "-o", tmp_path / "q", "-q") == silence
        assert here("verify", tmp_path / "m", *(f"--source={source}" for source in DEMO), "-q") == silence
        assert here("inspect", tmp_path / "m", "-q") == silence
        assert generate(PROMPT, "-q") == silence
        assert here("bench", demo_f32, *SIZE, "--repeat", "1", "--warmup", "0", "-q") == silence

    def test_quiet_in_a_process_of_its_own(self, demo_f32: Path, tmp_path: Path) -> None:
        """Libraries that write past Python's streams would be seen here."""
        assert script("generate", PROMPT, "-m", demo_f32, "-o", tmp_path / "c.mp4", *SIZE, "-q") == Done(0, "", "")

    def test_people_read_progress_on_stderr_and_the_result_on_stdout(self, generate: Here) -> None:
        done = generate(PROMPT)
        assert done.code == 0 and "clip.mp4" in done.out and "9 frames" in done.out
        titles = ["reading the prompt", "preparing the prompt", "denoising, stage 1 of 2"]
        titles += ["doubling the picture's size", "denoising, stage 2 of 2", "decoding the sound"]
        titles += ["making the sound's waves", "decoding the picture"]
        for number, title in enumerate(titles, 1):
            assert f"[{number}/8] {title}: done in" in done.err
        assert "\x1b" not in done.err and "\r" not in done.err, "no terminal, no control characters"

    def test_convert_and_quantize_as_json(self, here: Here, tmp_path: Path) -> None:
        model, smaller = tmp_path / "m", tmp_path / "q"
        done = here("convert", MONOLITH, "-o", model, "--variant", "distilled", "--json").json
        assert (done["model"], done["reused"]) == (str(model), False) and done["bytes"] > 1e6
        again = here("convert", MONOLITH, "-o", model, "--variant", "distilled", "--json").json
        assert again["reused"] and again["bytes"] == done["bytes"]
        report = tmp_path / "report.json"
        done = here("quantize", model, "-o", smaller, "--bits", "8", "--report", report, "--json").json
        assert done["report"] == json.loads(report.read_text()) and done["report"]["totals"]["all"]["bytes_before"]

    def test_plan_as_json(self, here: Here, tmp_path: Path) -> None:
        args = ["convert", MONOLITH, "-o", tmp_path / "m", "--variant", "distilled", "--dry-run"]
        plan = here(*args, "--json").json["plan"]
        assert all(entry.keys() & {"key", "dropped"} for entry in plan) and names(tmp_path) == []
        summary = here(*args).out.splitlines()
        assert [line.split()[0] for line in summary[-2:]] == ["total", "dropped"] and "transformer" in summary[2]

    def test_inspect_and_verify_as_json(self, here: Here, demo_f32: Path) -> None:
        assert "transformer" in here("inspect", demo_f32, "--json").json["components"]
        assert here("verify", demo_f32, "--json").json["verified"] is True

    def test_bench_as_json(self, here: Here, demo_f32: Path, tmp_path: Path) -> None:
        receipt = tmp_path / "receipt.json"
        args = ["bench", demo_f32, *SIZE, "--warmup", "0"]
        done = here(*args, "--repeat", "2", "--out", receipt, "--json")
        assert done.json == json.loads(receipt.read_text())
        (case,) = done.json["cases"]
        assert [phase["name"] for phase in case["phases"]][2:5] == ["stage1", "spatial_upscaler", "stage2"]
        table = here(*args, "--repeat", "1")
        assert "spatial_upscaler" in table.out and "seconds" not in table.err, "names are never cut off"

    def test_demo_as_json(self, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(ltx2.demo, "SIZE", {"width": 128, "height": 64, "frames": 9, "seed": 7})
        done = here("demo", "chain", "--json")
        assert done.code == 0 and "$ ltx2 generate" in done.err
        for path in [*done.json["clips"].values(), *done.json["models"].values()]:
            assert (tmp_path / path).exists()
        frames, fps = read_video(tmp_path / done.json["clips"]["full"])
        assert frames.shape == (9, 64, 128, 3) and fps == 24
        assert isinstance(next(run_demo(tmp_path / "chain")), Section), "its own files are replaced"

    @pytest.mark.parametrize("name", ["clip.mp4", "clip.json", "clip-q4.mp4", "clip-q4.json", "bench.json"])
    @pytest.mark.parametrize("content", ["mine", "{}", '{"request": {"prompt": "mine"}, "model": {}}'])
    def test_demo_replaces_nothing_of_others(self, here: Here, tmp_path: Path, name: str, content: str) -> None:
        (tmp_path / name).write_text(content)
        here("demo", tmp_path).failed(1, f"{tmp_path / name} is already there", "no demo made it")
        assert (tmp_path / name).read_text() == content and len(list(tmp_path.iterdir())) == 1

    def test_demo_replaces_no_clip_of_others(self, generate: Here, here: Here, tmp_path: Path) -> None:
        assert generate("a red square", "--force").code == 0
        here("demo", tmp_path).failed(1, f"{tmp_path / 'clip.mp4'} is already there", "no demo made it")

    def test_demo_of_a_newer_release(self, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Up to its converted model; which is there in a clone only."""
        for event in run_demo(tmp_path, "2.5"):
            if isinstance(event, Section) and event.title.startswith("quantize"):
                break
        folder = ModelFolder.open(tmp_path / "model")
        assert folder.manifest.release == "2.5" and folder.has("duration_head")
        here("demo", tmp_path, "--release", "9.9").failed(1, "there is no demo of release 9.9", "--release 2.0")
        monkeypatch.setattr("ltx2.demo.FOLDER", tmp_path)
        here("demo", tmp_path, "--release", "2.5").failed(1, "2.5 is not here", "a clone of the repository")
