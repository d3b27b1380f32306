"""What Metal's convolutions hold, and how they are kept from holding more."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from ltx2.bench.random.model import random_folder
from ltx2.quant.apply import Settings
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.memory.metal import transformed
from ltx2.runtime.memory.plan import on_another_mac
from ltx2.runtime.networks.video_vae.config import Convolution
from tests.support.machine import gpu_of, memory_of

LARGEST = Convolution(128, 128, (121, 128, 192))  # of 121 frames of 768x512
VARIABLE = "MLX_CONV_WINOGRAD_TILE_BATCH"


def test_what_is_transformed() -> None:
    """22x32 tiles cover a frame of 128x192; their border makes it 134x194."""
    assert transformed(LARGEST) == 64 * 22 * 32 * 256 + 128 * 134 * 194 + 64 * 128 * 128


@pytest.mark.parametrize(
    "layer",
    [
        LARGEST._replace(outputs=48),  # no multiple of 32
        Convolution(96, 96, (121, 128, 192)),  # few channels
        Convolution(1024, 1024, (2, 16, 24)),  # few positions
    ],
)
def test_what_is_not(layer: Convolution) -> None:
    assert transformed(layer) == 0


def test_plans_for_macs_count_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the widest layer three results more, and what its three convolutions transform; nothing in the stages."""
    folder = random_folder("ltx-2.3-distilled", Settings(bits=4))
    gpu_of(monkeypatch, 64)
    elsewhere = Pipeline(folder).plan("a red kite")
    memory_of(monkeypatch, 64)
    with on_another_mac():
        mac = Pipeline(folder).plan("a red kite")
    widest = Convolution(256, 512, (121, 64, 96))
    more = 2 * 3 * (512 * 121 * 64 * 96 + transformed(widest))
    assert mac.phase("video_vae").total - elsewhere.phase("video_vae").total == more
    assert mac.phase("stage2") == replace(elsewhere.phase("stage2"), cache=mac.phase("stage2").cache)


@pytest.mark.parametrize(("platform", "given", "used"), [("darwin", "", "1"), ("darwin", "4", "4"), ("linux", "", "")])
def test_a_frame_is_transformed_at_a_time(platform: str, given: str, used: str) -> None:
    """On Macs, unless the variable is set."""
    variables = {name: value for name, value in os.environ.items() if name != VARIABLE}
    variables |= {VARIABLE: given} if given else {}
    program = f"import os, sys; sys.platform = {platform!r}; import ltx2; print(os.environ.get({VARIABLE!r}, ''))"
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == used
