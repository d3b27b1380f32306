"""Where a run's files go: made sure of before the work, never a clip that was there."""

import json
import os
import shutil
from collections import namedtuple
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

import ltx2
from ltx2.runtime.errors import InputError
from ltx2.runtime.events import PhaseStarted
from ltx2.runtime.files.atomic import claimed
from ltx2.runtime.generate.job import LATENTS
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.generate.records.places import check_places, state_path
from ltx2.runtime.generate.records.sidecar import Sidecar, sidecar_path
from ltx2.runtime.media.source import read_comment
from tests.support.command import Here
from tests.support.media import read_video

pytestmark = pytest.mark.usefixtures("few_steps")
PROMPT = "a red square"
SIZE: dict[str, Any] = {"width": 64, "height": 64, "frames": 9, "seed": 1, "no_audio": True}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


class TestNames:
    def test_beside_the_clip(self) -> None:
        assert sidecar_path(Path("a/kite.mp4")) == Path("a/kite.json")
        assert state_path(Path("a/kite.v2.mp4")) == Path("a/kite.v2.unfinished.safetensors")

    @pytest.mark.parametrize("letters", ["n" * 221, "ä" * 114, "ä" * 120, "ä" * 125, "n" * 251])
    def test_any_legal_length(self, demo_f32: Path, tmp_path: Path, letters: str) -> None:
        """In bytes before `.mp4`; a file system allows 255 in all."""
        clip = tmp_path / letters / f"{letters}.mp4"
        clip.parent.mkdir()
        list(ltx2.load(demo_f32).stream(PROMPT, output=clip, state=state_path(clip), **SIZE))
        assert set(clip.parent.iterdir()) == {clip, sidecar_path(clip)}
        assert len(os.fsencode(state_path(clip).name)) <= 255

    def test_a_sound_alone_is_a_wav_file_unasked(self, here: Here, demo_f32: Path) -> None:
        assert here("generate", PROMPT, "-m", demo_f32, "--no-video", "--dry-run").code == 0

    @pytest.mark.parametrize("target", [".", "..", "/"])
    def test_a_folder(self, here: Here, demo_f32: Path, target: str) -> None:
        here("generate", PROMPT, "-m", demo_f32, "-o", target).failed(1, f"cannot write {target}", "it is a folder")


class TestUnasked:
    @pytest.mark.parametrize("name", ["ltx2.mp4", "transformer/config.mp4"])
    def test_a_clip_replaces_no_file_of_the_model(self, demo_f32: Path, name: str) -> None:
        """Its record would be the model's own ltx2.json, or a network's configuration."""
        before = sorted(demo_f32.rglob("*"))
        with pytest.raises(InputError, match="is only read"):
            list(ltx2.load(demo_f32).stream(PROMPT, output=demo_f32 / name, force=True, **SIZE))
        assert sorted(demo_f32.rglob("*")) == before

    def test_a_clip_is_not_replaced(self, generate: Here, tmp_path: Path) -> None:
        (tmp_path / "clip.mp4").write_bytes(b"mine")
        generate(PROMPT).failed(1, "clip.mp4 is already there", "--force")
        assert (tmp_path / "clip.mp4").read_bytes() == b"mine" and names(tmp_path) == ["clip.mp4"]
        assert generate(PROMPT, "--force").code == 0
        assert len(read_video(tmp_path / "clip.mp4")[0]) == 9

    def test_nor_a_file_that_would_become_its_record(self, generate: Here, tmp_path: Path) -> None:
        (tmp_path / "clip.json").write_text('{"my": "notes"}')
        generate(PROMPT).failed(1, "clip.json is already there", "--force")

    def test_a_record_without_its_clip_is(self, generate: Here, tmp_path: Path) -> None:
        assert generate(PROMPT).code == 0
        (tmp_path / "clip.mp4").unlink()
        assert generate(PROMPT).code == 0

    def test_its_own_source_never(self, tmp_path: Path) -> None:
        """Not even with --force: it could not be repeated, and what was given is gone."""
        (clip := tmp_path / "clip.mp4").write_bytes(b"mine")
        for given in ({"video": clip}, {"upscale": clip}, {"retake": (clip, 0, 1)}):
            request = Request.from_options({"prompt": PROMPT, "output": clip, "force": True} | given)
            with pytest.raises(InputError, match="would be lost"):
                check_places(request, tmp_path / "model")

    def test_in_python(self, demo_f32: Path, tmp_path: Path) -> None:
        pipe, clip = ltx2.load(demo_f32), tmp_path / "clip.mp4"
        clip.touch()
        with pytest.raises(InputError, match="already there"):
            pipe.stream(PROMPT, output=clip, **SIZE)
        list(pipe.stream(PROMPT, output=clip, force=True, **SIZE))
        assert clip.stat().st_size

    def test_a_second_run_of_the_same_name(self, generate: Here, tmp_path: Path) -> None:
        """It ends at its start, and the first one goes on."""
        with claimed(tmp_path / "clip.mp4") as claim:
            generate(PROMPT).failed(1, "clip.mp4 is being written", "another process")
            assert claim.partial.exists()
        assert generate(PROMPT).code == 0

    def test_has_nothing_to_continue(self, demo_f32: Path, generate: Here, tmp_path: Path) -> None:
        """The state that is there is the first one's."""
        state = state_path(clip := tmp_path / "clip.mp4")
        with closing(ltx2.load(demo_f32).stream(PROMPT, output=clip, state=state, **SIZE)) as other:
            next(_ for _ in other if state.exists())
            for options in ([], ["--resume"]):
                done = generate(PROMPT, "--seed", "1", "--no-audio", *options)
                done.failed(1, "clip.mp4 is being written", "another process")
                assert "continues" not in done.err

    def test_a_second_run_of_latents_alone(self, here: Here, demo_f32: Path, tmp_path: Path) -> None:
        """It ends at its start too, made from a prompt or enlarged; and the first one's appear."""
        old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
        pipe, offered = ltx2.load(demo_f32), ["--width", "64", "--height", "64", "--frames", "9", "--save-latents"]
        list(pipe.events(Request.from_options({"prompt": PROMPT, "save_latents": old, **SIZE}), LATENTS))
        for made in ({"prompt": PROMPT, **SIZE}, {"upscale": old}):
            with closing(pipe.events(Request.from_options({"save_latents": new, **made}), LATENTS)) as other:
                next(event for event in other if isinstance(event, PhaseStarted))
                for args in (["generate", PROMPT, *offered, new], ["upscale", old, "-o", new]):
                    done = here(*args, "-m", demo_f32)
                    done.failed(1, "new.safetensors is being written", "another process")
                    assert "continues" not in done.err
                list(other)
            assert names(tmp_path) == [new.name, old.name]
            new.unlink()

    def test_two_clips_with_one_record(self, demo_f32: Path, generate: Here, tmp_path: Path) -> None:
        """clip.gif and clip.mp4 at once: one's record and state would replace the other's."""
        with closing(ltx2.load(demo_f32).stream(PROMPT, output=tmp_path / "clip.gif", **SIZE)) as other:
            next(other)
            next(other)
            generate(PROMPT).failed(1, "clip.json is being written", "another process")
            list(other)
        assert names(tmp_path) == ["clip.gif", "clip.json"]


@pytest.mark.parametrize("option", ["--save-latents", "--save-embeddings"])
class TestTensors:
    def test_replace_only_their_kind_unasked(self, generate: Here, tmp_path: Path, option: str) -> None:
        """Not noise, nor the other kind, nor what only has the suffix."""
        file = tmp_path / "mine.safetensors"
        other = {"format": "embeddings" if option == "--save-latents" else "latents"}
        for content in (b"notes", save({"a": np.zeros(1)}), save({"a": np.zeros(1)}, other)):
            file.write_bytes(content)
            generate(PROMPT, option, file).failed(1, "mine.safetensors is already there", "--force")
            assert file.read_bytes() == content and names(tmp_path) == ["mine.safetensors"]
        assert generate(PROMPT, option, file, "--force").code == 0
        assert generate(PROMPT, option, file, to="2.mp4").code == 0
        assert file.read_bytes() != content and "a" not in load_file(file)

    @pytest.mark.parametrize("name", ["mine.png", "mine", "mine.safetensors.txt"])
    def test_have_their_suffix(self, generate: Here, tmp_path: Path, option: str, name: str) -> None:
        generate(PROMPT, option, tmp_path / name, "--force").failed(
            2, f"cannot write {tmp_path / name}", ".safetensors"
        )
        assert names(tmp_path) == []

    def test_go_nowhere_into_the_model(self, demo_f32: Path, tmp_path: Path, option: str) -> None:
        (tmp_path / "link").symlink_to(demo_f32)
        folders = (demo_f32, demo_f32 / "vocoder", tmp_path / "link" / "transformer", demo_f32 / "loras" / "..")
        for path in (folder / name for folder in folders for name in ("model.safetensors", "new.safetensors")):
            named: dict[str, Any] = {option[2:].replace("-", "_"): path}
            with pytest.raises(InputError, match=r"only read|does not exist"):
                ltx2.load(demo_f32).stream(PROMPT, force=True, **named, **SIZE)


class TestRoom:
    @pytest.mark.parametrize("free", [0, 8000])
    def test_a_disk_that_is_too_small(
        self, generate: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int
    ) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - free, free))
        generate(PROMPT).failed(3, "the disk is too small")
        assert names(tmp_path) == []

    def test_a_side_file_that_cannot_be_written_is_a_warning(
        self, generate: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        for writer in ("write_latents", "write_sidecar"):
            monkeypatch.setattr(f"ltx2.runtime.generate.run.{writer}", full)
        monkeypatch.setattr("ltx2.runtime.generate.records.resume.write_tensors", full)
        done = generate(PROMPT, "--save-latents", tmp_path / "latents.safetensors")
        assert done.code == 0 and names(tmp_path) == ["clip.mp4"]
        for name in ("clip.unfinished.safetensors", "latents.safetensors", "clip.json"):
            assert any(name in line and "the disk is full" in line for line in done.err.splitlines()), name

    def test_latents_alone_that_cannot_be_written_are_a_failure(
        self, here: Here, demo_f32: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """They are all that was asked for; and the run can be continued."""
        args = ["generate", PROMPT, "-m", demo_f32, "--width", "64", "--height", "64", "--frames", "9", "--seed", "1"]
        args += ["--save-latents", latents := tmp_path / "new.safetensors"]
        with monkeypatch.context() as patch:
            patch.setattr("ltx2.runtime.generate.run.write_latents", full)
            here(*args).failed(3, "the disk is full", "new.safetensors", "this continues: ltx2 generate")
        assert names(tmp_path) == ["new.unfinished.safetensors"]
        assert here(*args, "--resume").code == 0 and names(tmp_path) == [latents.name]


class TestSettings:
    """Inside the clip."""

    @pytest.fixture(scope="class")
    def made(self, demo_f32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        clip = tmp_path_factory.mktemp("made") / "clip.mp4"
        prompt = 'a "red" square; 50 % = half #1, \\ and\na new line ü'
        list(ltx2.load(demo_f32).stream(prompt, output=clip, **SIZE))
        return clip

    def test_are_those_beside_it(self, made: Path) -> None:
        record, settings = json.loads(sidecar_path(made).read_text()), json.loads(read_comment(made))
        assert settings == {name: record[name] for name in settings}
        assert settings["request"]["seed"] == 1 and "\n" in settings["request"]["prompt"]

    def test_repeat_the_clip(self, here: Here, made: Path, tmp_path: Path) -> None:
        (tmp_path / "moved.mp4").write_bytes(made.read_bytes())
        assert here("generate", "--from", tmp_path / "moved.mp4", "-o", tmp_path / "again.mp4").code == 0
        assert (tmp_path / "again.mp4").read_bytes() == made.read_bytes()

    def test_may_be_left_out(self, generate: Here, here: Here, tmp_path: Path) -> None:
        assert generate(PROMPT, "--no-metadata").code == 0
        assert read_comment(tmp_path / "clip.mp4") == ""
        here("generate", "--from", tmp_path / "clip.mp4").failed(1, "cannot repeat", "the .json beside it")

    def test_a_clip_in_memory_has_them_too(self, demo_f32: Path, made: Path, tmp_path: Path) -> None:
        prompt = json.loads(read_comment(made))["request"]["prompt"]
        clip = ltx2.load(demo_f32).generate(prompt, **SIZE)
        assert clip.save(tmp_path / "clip.mp4").read_bytes() == made.read_bytes()

    def test_home_is_not_named(
        self, here: Here, demo_f32: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        model = tmp_path / "models" / "demo"
        shutil.copytree(demo_f32, model)
        latents, size = tmp_path / "l.safetensors", ["--width", "64", "--height", "64", "--frames", "9", "--no-audio"]
        assert here("generate", PROMPT, "-m", model, *size, "--save-latents", latents).code == 0
        clip = tmp_path / "clip.mp4"
        assert here("generate", "--latents", latents, "-m", model, "-o", clip, "--no-audio").code == 0
        assert str(tmp_path) not in sidecar_path(clip).read_text() + read_comment(clip)
        earlier = Sidecar.read(clip)
        assert (earlier.model, earlier.request["latents"]) == (model, "~/l.safetensors")
        assert here("generate", "--from", clip, "-o", tmp_path / "again.mp4").code == 0

    def test_a_given_file_that_has_changed_or_is_gone(self, generate: Here, here: Here, tmp_path: Path) -> None:
        latents, clip, again = tmp_path / "l.safetensors", tmp_path / "clip.mp4", tmp_path / "again.mp4"
        assert generate(PROMPT, "--save-latents", latents, to="first.mp4").code == 0
        assert generate("--latents", latents, size=[]).code == 0
        content = bytearray(latents.read_bytes())
        content[-1] ^= 1
        latents.write_bytes(content)
        here("generate", "--from", clip, "-o", again).failed(1, "has changed", "--latents anew")
        moved = latents.rename(tmp_path / "moved.safetensors")
        here("generate", "--from", clip, "-o", again).failed(1, "l.safetensors is gone", "--latents anew")
        assert here("generate", "--from", clip, "--latents", moved, "-o", again).code == 0
