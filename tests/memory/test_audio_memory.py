"""What the sound's networks hold on this computer, against what the plan says."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from ltx2.runtime.memory import activations, cpu
from ltx2.runtime.networks.audio import bandwidth
from ltx2.runtime.networks.audio import vae as audio_vae
from tests.networks.test_audio_vae import CONFIG
from tests.networks.test_vocoder import EXTENDED

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
        planned = plan.needed + cpu.encode_audio(vae.config, plan.largest)
        measured = peak(vae.encode, 1, 2, 16000)
    else:
        voice = bandwidth.build(WIDER)
        mx.eval(voice.parameters())
        plan = activations.vocode(voice.config, 50)
        planned, measured = plan.needed + cpu.vocode(voice.config, plan.largest), peak(voice, 1, 2, 50, 64)
    assert -0.05 * measured <= planned - measured <= 0.25 * measured, (planned, measured)
