"""docs/conditionings.md: every command is run as it stands, on the 2.5 demo model, where clips are small by default,
stages have one step, and sounds are silent."""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import ltx2
from ltx2.runtime.events import Event
from ltx2.runtime.generate.phases.base import Made, Tools
from ltx2.runtime.generate.phases.decode import Vocode
from ltx2.runtime.media.source import media_facts
from ltx2.runtime.media.video import AudioTrack, write_wav
from tests.support.command import Here
from tests.support.media import write_clip, write_frames
from tests.support.official import DEMO_25, LORA_25, random_temporal
from tests.support.sampling import first_steps

PAGE = Path(__file__).parent.parent.parent / "docs" / "conditionings.md"
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page's commands name: a model, pictures, clips, latents, a sound and a LoRA."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "weights").mkdir()
    upscaler = random_temporal(folder / "temporal.safetensors", spatial_scale=1.0, rational_resampler=True)
    ltx2.convert([*DEMO_25, upscaler], folder / "weights" / "demo", variant="distilled", dtype="f32")
    rng = np.random.default_rng(0)
    frames = np.cumsum(rng.integers(0, 3, (9, 64, 64, 3)), axis=1).astype(np.uint8)
    sound = AudioTrack(0.5 * np.sin(np.arange(32000) / 5, dtype=np.float32)[None], 8000)
    write_wav(folder / "rain.wav", sound)
    write_clip(folder / "talk.mkv", frames, 24, sound)
    write_clip(folder / "silent.mkv", frames, 24)
    for name in ("first.png", "turn.png"):
        write_frames(folder / name, frames[:1])
    latents = {"video": (1, 32, 2, 2, 2), "audio": (1, 2, 9, 16)}
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in latents.items()}
    save_file(values, folder / "talk.safetensors")
    shutil.copy(LORA_25, folder / "clay.safetensors")
    return folder


@pytest.fixture(autouse=True)
def small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    first_steps(monkeypatch, 1, width=64, height=64, frames=9)
    monkeypatch.setattr(Vocode, "run", silence)


def silence(_: Vocode, tools: Tools, made: Made) -> Iterator[Event]:
    """The vocoder takes half of a small clip's time."""
    tools.meter.loaded()
    made.track = AudioTrack(np.zeros((2, 18000), np.float32), 48000)
    yield tools.meter.step()


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.rsplit(" ", 1)[1])
def test_runs(here: Here, line: str) -> None:
    program, *args = shlex.split(line)
    done = here(*args)
    assert program == "ltx2" and done.code == 0, done
    made = Path(args[args.index("-o") + 1]) if "-o" in args else None
    assert made is not None and made.exists()
    if made.suffix == ".mp4":
        facts = media_facts(made)
        twice = "upscale" in args and "--temporal" not in args
        assert (facts.width, facts.height) == ((128, 128) if twice else (64, 64)) and facts.rate
    if "--preview" in args:
        assert sorted(path.name for path in Path("previews").iterdir()) == [
            "watched.stage1.step01.png",
            "watched.stage2.step01.png",
        ]
