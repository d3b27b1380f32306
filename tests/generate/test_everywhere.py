"""Every conditioning on packed weights, with blocks read from disk, in as little memory as possible, continued after it
was cut off, with previews, and repeated from its record."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import save_file

import ltx2
from ltx2.runtime.errors import InputError
from ltx2.runtime.events import Previewed, StepDone
from ltx2.runtime.generate.job import LATENTS, Job
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.generate.phases.preview import Preview
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.generate.records.clip import Sampled
from ltx2.runtime.generate.records.sidecar import Sidecar, make_settings
from ltx2.runtime.media.picture import read_picture
from ltx2.runtime.media.video import AudioTrack, write_wav
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_network
from ltx2.runtime.networks.video_vae.frames import decode_frames
from ltx2.runtime.networks.video_vae.model import VideoAutoencoder
from tests.support.media import write_clip
from tests.support.official import LORA_25
from tests.support.parity import relative_l2
from tests.support.sampling import first_steps

PROMPT = "a red square moves left on a white background with a low tone"
CASES: Mapping[str, Mapping[str, Any]] = {
    "pictures, slots, sound, reference": {
        "image": ["PICTURE", ("PICTURE", 8, 0.5)], "keyframe": [("PICTURE", 3)], "keyframe_slots": 1, "image_crf": 0,
        "audio": "SOUND", "reference": ["CLIP"], "reference_attention": 0.5, "lora": [str(LORA_25)],
        "width": 64, "height": 64, "frames": 9,
    },
    "retake": {"retake": ("LATENTS", 0.1, 0.2)},
    "keep": {"retake": ("LATENTS", 0.0, 0.2), "keep": "audio"},
    "extend": {"extend": ("LATENTS", 0.3)},
    "video": {"video": "LATENTS"},
    "no video": {"no_video": True, "frames": 9},
    "upscale": {"upscale": "LATENTS"},
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What is given, and embeddings in place of a prompt."""
    folder, rng = tmp_path_factory.mktemp("given"), np.random.default_rng(0)
    frames = np.cumsum(rng.integers(0, 3, (9, 64, 64, 3)), axis=1).astype(np.uint8)
    write_clip(folder / "clip.mkv", frames, 24)
    write_wav(folder / "sound.wav", AudioTrack(rng.uniform(-0.5, 0.5, (2, 8000)).astype(np.float32), 16000))

    def saved(name: str, **shapes: tuple[int, ...]) -> str:
        values = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
        save_file(values, folder / name)
        return str(folder / name)

    return {
        "CLIP": str(folder / "clip.mkv"),
        "PICTURE": str(folder / "clip.mkv"),  # a clip's first frame is a picture
        "SOUND": str(folder / "sound.wav"),
        "LATENTS": saved("a.safetensors", video=(1, 32, 2, 2, 2), audio=(1, 2, 9, 16)),
    }


@pytest.fixture(scope="module")
def packed(demo_25: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "q4"
    ltx2.quantize(demo_25, out, bits=4, only=["transformer"])
    return out


@pytest.fixture(scope="module")
def text(demo_25: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prompt's embeddings, 128 tokens of them."""
    rng, path = np.random.default_rng(1), tmp_path_factory.mktemp("text") / "text.safetensors"
    widths = Job(ModelFolder.open(demo_25), Request("a", width=64, height=64, frames=9)).transformer_config.context_dims
    values = {f"{n}_context": rng.standard_normal((1, 128, width)).astype(np.float32) for n, width in widths.items()}
    save_file(values, path)
    return str(path)


def asked(name: str, files: Mapping[str, str], text: str, **more: Any) -> Request:
    def named(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(named(part) for part in value)
        return files.get(value, value) if isinstance(value, str) else value

    given = {option: named(value) for option, value in CASES[name].items()}
    return Request.from_options({"embeddings": text, "seed": 3, **given, **more})


def latents(run: Iterator[Any]) -> dict[str, mx.array]:
    *_, last = run
    assert isinstance(last, Sampled)
    return dict(last.latents.items())


def same(ours: Mapping[str, mx.array], theirs: Mapping[str, mx.array]) -> bool:
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[n], theirs[n]) for n in theirs)


@pytest.mark.parametrize("name", CASES)
def test_conditioning(
    name: str, demo_25: Path, packed: Path, files: dict[str, str], text: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    first_steps(monkeypatch, 3)
    pipe = Pipeline(demo_25)
    seen = {} if name == "no video" else {"preview": str(tmp_path / "seen")}
    whole = list(pipe.events(asked(name, files, text, **seen), LATENTS))
    base, steps = latents(iter(whole)), [event for event in whole if isinstance(event, StepDone)]
    pictures = [(event.phase, event.step) for event in whole if isinstance(event, Previewed)]
    wanted = [(step.phase, step.step) for step in steps if step.phase.startswith("stage")]
    assert pictures == (wanted if seen else [])

    state, last = str(tmp_path / "state.safetensors"), wanted[-1]
    started = pipe.events(asked(name, files, text, state=state), LATENTS)
    for event in started:
        if isinstance(event, StepDone) and (event.phase, event.step) == (last[0], last[1] - 1):
            started.close()  # cut off before the last step
            break
    rest = list(pipe.events(asked(name, files, text, state=state, resume=True), LATENTS))
    assert sum(isinstance(event, StepDone) and event.phase.startswith("stage") for event in rest) == 1
    assert same(latents(iter(rest)), base)

    job = Job(ModelFolder.open(demo_25), asked(name, files, text), LATENTS)
    again = Request.again(Sidecar.from_record(make_settings(job)).request, {})
    assert again.identity() == job.request.identity()

    ours = latents(Pipeline(packed).events(asked(name, files, text), LATENTS))
    assert 0 < max(relative_l2(ours[n], base[n]) for n in base) < 1.5

    with monkeypatch.context() as patch:
        patch.setattr("ltx2.runtime.memory.plan.choose_streamed", lambda blocks, _: tuple(range(len(blocks))))
        low = asked(name, files, text, low_memory=True)
        plan = Pipeline(demo_25).planned(low, LATENTS)
        assert all(phase.streamed for phase in plan.phases if phase.name.startswith("stage"))
        assert same(latents(Pipeline(demo_25).events(low, LATENTS)), base)


class TestPreviews:
    def test_the_last_shows_the_clip(self, demo_25: Path, tmp_path: Path) -> None:
        """Its middle latent, decoded by itself, is what the decoder makes of it among the others."""
        request = Request.from_options(
            {"prompt": PROMPT, "seed": 5, "width": 128, "height": 64, "frames": 17, "preview": tmp_path / "seen"}
        )
        *_, last = events = list(Pipeline(demo_25).events(request, LATENTS))
        assert isinstance(last, Sampled) and last.latents.video is not None
        shown = [event for event in events if isinstance(event, Previewed)]
        names = [f"stage{stage}.step{step:02}.png" for stage, count in ((1, 8), (2, 3)) for step in range(1, count + 1)]
        assert [Path(event.path).name for event in shown] == names
        assert {event.picture.shape for event in shown} == {(32, 64, 3), (64, 128, 3)}
        picture = read_picture(Path(shown[-1].path))
        np.testing.assert_array_equal(picture, shown[-1].picture)
        vae = load_network(ModelFolder.open(demo_25), "video_vae", VideoAutoencoder)
        frames = np.concatenate(list(decode_frames(vae, last.latents.video))).astype(np.float32)
        found = [float(np.square(frame - picture).mean()) for frame in frames]
        assert min(found[5:9]) < 80 < found[0], found

    def test_of_the_smallest_clip(self, demo_25: Path, text: str, tmp_path: Path) -> None:
        """Of one latent row and column in stage 1, which no decoder takes."""
        asked = Request.from_options({"embeddings": text, "width": 64, "height": 64, "frames": 9, "preview": tmp_path})
        shown = [event for event in Pipeline(demo_25).events(asked, LATENTS) if isinstance(event, Previewed)]
        assert [event.picture.shape for event in shown] == [(32, 32, 3)] * 8 + [(64, 64, 3)] * 3

    def test_its_memory_is_planned(self, demo_25: Path, text: str, tmp_path: Path) -> None:
        options: dict[str, Any] = {"embeddings": text, "width": 64, "height": 64, "frames": 9}
        plain = Pipeline(demo_25).plan(**options)
        seen = Pipeline(demo_25).plan(**options, preview=tmp_path / "seen")
        preview = Preview.load(ModelFolder.open(demo_25))
        parameters: Any = tree_flatten(preview.decoder.parameters())
        weights = sum(array.nbytes for _, array in parameters)
        assert 3 * weights < plain.phase("video_vae").weights
        for name in ("stage1", "stage2"):
            assert seen.phase(name).weights == plain.phase(name).weights + weights
        assert not list(tmp_path.iterdir())

    def test_a_place_that_cannot_be_written(self, demo_25: Path, text: str, tmp_path: Path) -> None:
        (tmp_path / "seen").write_text("a file")
        with pytest.raises(InputError, match="cannot write"):
            Pipeline(demo_25).plan(embeddings=text, width=64, height=64, frames=9, preview=tmp_path / "seen")
