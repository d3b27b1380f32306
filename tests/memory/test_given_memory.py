"""The memory plan of what is given, and of previews, against measured peaks on this computer."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ltx2.runtime.events import PhaseDone
from ltx2.runtime.generate.job import LATENTS, Job
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.generate.phases.sample import Denoise
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.model.layout import ModelFolder
from tests.support.media import write_clip
from tests.support.memory import settled, waiting
from tests.support.official import LORA_25

SLACK = 10**6 / 2
MOST = {"encode_video": 0.3, "stage1": 0.25}  # above the measured peak, as a part of it
PROMPT = "a red square"
SIZE: dict[str, Any] = {"width": 128, "height": 128, "frames": 17, "no_upscale": True, "seed": 1}  # 48 tokens
Options = dict[str, Any]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A clip; its first frame is a picture."""
    frames = np.cumsum(np.random.default_rng(0).integers(0, 3, (17, 128, 128, 3)), axis=1).astype(np.uint8)
    return str(write_clip(tmp_path_factory.mktemp("given") / "clip.mkv", frames, 24))


CASES: dict[str, Callable[[str, Path], Options]] = {
    "all that appends": lambda clip, _: {
        "image": [clip], "keyframe": [(clip, 4), (clip, 12)], "keyframe_slots": 7, "reference": [clip] * 3,
        "lora": [str(LORA_25)],
    },
    "image and references, less seen": lambda clip, _: {
        "image": [clip], "reference": [clip] * 4, "reference_attention": 0.5, "lora": [str(LORA_25)],
    },
    "image and reference of a stage at half size": lambda clip, _: {
        "image": [clip], "reference": [clip], "lora": [str(LORA_25)], "no_upscale": False, "width": 256, "height": 256,
    },
    "preview": lambda _, folder: {"preview": folder / "seen"},
}  # fmt: skip


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_on_a_cpu(
    demo_25: Path, clip: str, case: str, waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tests/memory/test_estimate.py has it for a clip of a prompt alone."""
    asked, pipeline = Request.from_options({"prompt": PROMPT, **SIZE, **CASES[case](clip, tmp_path)}), Pipeline(demo_25)
    plan, before = pipeline.planned(asked, LATENTS), settled()
    with waiting() if waits else nullcontext():
        if waits:
            monkeypatch.setattr(mx, "set_memory_limit", lambda limit: 0)
        done = {event.name: event for event in pipeline.events(asked, LATENTS) if isinstance(event, PhaseDone)}
        monkeypatch.undo()
    for need in (need for need in plan.needs if need.name in MOST):
        measured = done[need.name].mlx_peak_bytes - before
        used = need.activations.needed if waits else need.activations.full
        above = need.weights + used + plan.phase(need.name).kept - measured
        most = MOST[need.name] * measured if waits else math.inf
        assert -0.05 * measured - SLACK <= above <= most + SLACK, (need.name, measured, above)


def test_tokens_of_other_sizes(demo_25: Path, clip: str, tmp_path: Path) -> None:
    """The nearest sizes that fit are looked for with what is given."""
    asked = Request.from_options({"prompt": PROMPT, **SIZE, **CASES["all that appends"](clip, tmp_path)})
    job = Job(ModelFolder.open(demo_25), asked, LATENTS)
    stage = Denoise(job, 1)
    assert stage.appended() == 9 * 16 + 3 * 48
    assert stage.appended(replace(job.sizes, width=256)) == 2 * stage.appended()
    assert Denoise(Job(ModelFolder.open(demo_25), replace(asked, no_upscale=False), LATENTS), 2).appended() == 2 * 16
