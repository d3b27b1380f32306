"""Inspecting what ltx2 has made."""

import json
from pathlib import Path
from typing import Any

import pytest

from ltx2.convert.inspect import inspect
from ltx2.runtime.errors import InputError
from ltx2.runtime.media.video import AudioTrack, write_wav
from tests.support.command import Here
from tests.support.media import ffmpeg, noise_frames, write_clip

RECORD: dict[str, Any] = {
    "request": {"prompt": "a red square", "seed": 7},
    "model": {"path": "~/weights/kite", "release": "2.0", "variant": "distilled", "files": {}},
}
LINES = ["prompt a red square", "seed 7", "model ~/weights/kite 2.0 distilled"]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "clip.mkv", noise_frames(9, 64, 32), 12)


def test_a_clip(here: Here, clip: Path) -> None:
    """One that others have made has no settings."""
    found = inspect(clip)
    size = {"kind": "clip", "width": 32, "height": 64, "frames": 9, "fps": 12.0, "sound_rate": None}
    assert found == {"path": str(clip), "bytes": clip.stat().st_size} | size
    assert here("inspect", clip).out == f"{clip}: clip, 9 frames of 32x64, 12 fps, no sound\n"


def test_its_settings_are_in_it(here: Here, clip: Path) -> None:
    named = clip.with_name("named.mp4")
    ffmpeg("-i", clip, "-c:v", "mpeg4", "-metadata", f"comment={json.dumps(RECORD)}", named)
    assert inspect(named)["request"] == RECORD["request"]
    assert [line.strip() for line in here("inspect", named).out.splitlines()[1:]] == LINES


def test_or_beside_it(here: Here, clip: Path) -> None:
    clip.with_suffix(".json").write_text(json.dumps(RECORD))
    assert inspect(clip)["model"] == RECORD["model"]
    assert [line.strip() for line in here("inspect", clip).out.splitlines()[1:]] == LINES
    assert [line.strip() for line in here("inspect", clip.with_suffix(".json")).out.splitlines()[1:]] == LINES


def test_sound(here: Here, tmp_path: Path) -> None:
    write_wav(tmp_path / "s.wav", AudioTrack(noise_frames(1, 8, 8)[0, ..., 0].astype("f4")[:2] / 255, 24000))
    assert inspect(tmp_path / "s.wav")["kind"] == "sound"
    assert here("inspect", tmp_path / "s.wav").out.endswith("sound, sound at 24000 Hz\n")


def test_one_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(99))
    with pytest.raises(InputError, match=r"cannot read .*clip\.mp4"):
        inspect(tmp_path / "clip.mp4")


def test_a_receipt(here: Here, tmp_path: Path) -> None:
    receipt = {"kind": "bench", "suite": "quick", "created": "2026-11-29", "machine": {"device": "M4"}, "cases": []}
    (tmp_path / "bench.json").write_text(json.dumps(receipt))
    assert inspect(tmp_path / "bench.json")["kind"] == "receipt"
    first, *lines = here("inspect", tmp_path / "bench.json").out.splitlines()
    assert first.endswith("receipt of bench")
    assert [line.strip() for line in lines] == ["suite quick", "created 2026-11-29", "machine M4"]


def test_a_file_of_a_model_folder(here: Here, demo_model: Path) -> None:
    path = demo_model / "transformer" / "model.safetensors"
    found, model = inspect(path), inspect(demo_model)["components"]["transformer"]
    assert (found["kind"], found["of"], found["release"]) == ("component", str(demo_model), "2.0")
    assert found["components"]["transformer"].items() <= model.items()
    assert here("inspect", path).out.startswith(f"{path}: component of {demo_model}, release 2.0\n  transformer ")
