"""What the sound's networks hold on this computer, against what the plan says."""

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ltx2.bench.random.model import random_folder
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.media.video import AudioTrack, write_wav
from ltx2.runtime.memory import activations, cpu
from ltx2.runtime.networks.audio import bandwidth
from ltx2.runtime.networks.audio import vae as audio_vae
from tests.networks.test_audio_vae import CONFIG
from tests.networks.test_vocoder import EXTENDED
from tests.support.machine import gpu_of, memory_of

WIDER = {part: section | {"upsample_initial_channel": 128} for part, section in EXTENDED.items()}


def peak(call: Callable[[mx.array], mx.array], *shape: int) -> int:
    """Bytes beside what there was before, the second time."""
    for _ in range(2):
        given = mx.zeros(shape)
        mx.eval(given)
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(call(given))
    return int(mx.get_peak_memory()) - before


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="a CPU's kernels hold more")
@pytest.mark.parametrize("part", ["encode", "vocode"])
def test_on_a_cpu(part: str) -> None:
    """Never more than 5 % below, at most 25 % above."""
    if part == "encode":
        config: dict[str, Any] = copy.deepcopy(CONFIG["audio_vae"])
        config["model"]["params"]["ddconfig"]["ch_mult"] = [1, 2, 4]
        vae = audio_vae.build(config)
        mx.eval(vae.parameters())
        plan = activations.encode_audio(vae.config, 16000)
        planned = plan.needed + cpu.encode_audio(plan.largest)
        measured = peak(vae.encode, 1, 2, 16000)
    else:
        voice = bandwidth.build(WIDER)
        mx.eval(voice.parameters())
        plan = activations.vocode(voice.config, 50)
        planned, measured = plan.needed + cpu.vocode(voice.config, plan.largest), peak(voice, 1, 2, 50, 64)
    assert -0.05 * measured <= planned - measured <= 0.25 * measured, (planned, measured)


def test_plans_on_a_cpu_count_the_convolutions_of_a_given_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sound = random_folder("ltx-2.3-distilled"), tmp_path / "a.wav"
    write_wav(sound, AudioTrack(np.zeros((1, 8000 * 6), np.float32), 8000))
    gpu_of(monkeypatch, 64)
    gpu = Pipeline(folder).plan("a red kite", audio=sound)
    monkeypatch.undo()
    memory_of(monkeypatch, 64)
    more = Pipeline(folder).plan("a red kite", audio=sound).phase("encode_audio").total
    more -= gpu.phase("encode_audio").total
    spectrogram = (round(gpu.job.sizes.frames / gpu.job.sizes.fps * 16000) // 160 + 1) * 64
    assert more == 9 * 4 * 128 * spectrogram
