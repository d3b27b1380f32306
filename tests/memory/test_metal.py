"""What Metal's convolutions hold, and how they are kept from holding more."""

import os
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import pytest

from ltx2.bench.random.model import random_folder
from ltx2.quant.apply import Settings
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.machine import winograd
from ltx2.runtime.memory import metal
from ltx2.runtime.memory.metal import transformed
from ltx2.runtime.memory.plan import on_another_mac
from ltx2.runtime.networks.video_vae import layers
from ltx2.runtime.networks.video_vae.config import Convolution, Stage, Tower
from tests.support.machine import gpu_of, memory_of

VARIABLE = "MLX_CONV_WINOGRAD_TILE_BATCH"
LARGEST = Convolution(128, 128, (121, 128, 192))  # of 121 frames of 768x512


def test_what_is_transformed() -> None:
    """22x32 tiles cover a frame of 128x192; their border makes it 134x194."""
    assert transformed(LARGEST) == 64 * 22 * 32 * 256 + 128 * 134 * 194 + 64 * 128 * 128


def test_small_frames_are_transformed_together() -> None:
    """12 tiles cover a frame of 16x24: eleven frames fill a product, or as many as there are."""
    layer = Convolution(1024, 1024, (16, 16, 24))
    frame = 64 * 12 * 2048 + 1024 * 20 * 26
    assert transformed(layer) == 11 * frame + 64 * 1024**2
    still = Convolution(1024, 1024, (1, 64, 64))
    assert transformed(still) == 64 * 121 * 2048 + 1024 * 68**2 + 64 * 1024**2


def test_convolutions_are_evaluated_with_so_many_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """And then it is one again. A stage convolves before it enlarges."""
    told: list[int] = [1]
    seen: list[int] = []
    monkeypatch.setattr(winograd, "tell", told.append)

    def evaluate(*arrays: mx.array) -> None:
        seen.append(told[-1])
        mx.eval(*arrays)

    monkeypatch.setattr(layers, "evaluate", evaluate)
    stages = [Stage(4, 4, layers=2), Stage(4, 4, stride=(1, 2, 2)), Stage(4, 4, layers=1)]
    border = layers.Border(causal=False, reflect=False)
    blocks = [
        layers.Upsample(stage, border) if stage.stride else layers.ResBlocks(4, stage.layers, border)
        for stage in stages
    ]
    layers.apply(layers.CausalConv3d(4, 4, border), blocks, mx.zeros((1, 1, 12, 24, 4)))
    assert seen == [16, 16, 16, 16, 4] and told[-1] == 1


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
    """Of the largest layer three results more, its kernels again, and what its three convolutions transform; a product
    in four parts where tokens are few, which they are in stage 1; and of the text's projection, whose inner axis is
    188160 long, 46."""
    folder = random_folder("ltx-2.3-distilled", Settings(bits=4))
    gpu_of(monkeypatch, 64)
    elsewhere = Pipeline(folder).plan("a red kite")
    memory_of(monkeypatch, 64)
    with on_another_mac():
        mac = Pipeline(folder).plan("a red kite")
    more = 2 * 3 * (128 * 121 * 128 * 192 + 9 * 128 * 128 + transformed(LARGEST))
    assert mac.phase("video_vae").total - elsewhere.phase("video_vae").total == more
    parts = {name: mac.phase(name).total - elsewhere.phase(name).total for name in ("connectors", "stage1")}
    tokens = parts["connectors"] // (4 * 46 * 4096)
    assert parts == {"connectors": 4 * 46 * tokens * 4096, "stage1": 4 * 4 * 1536 * 4096} and 0 < tokens < 1024
    assert mac.phase("stage2") == replace(elsewhere.phase("stage2"), cache=mac.phase("stage2").cache)


def test_small_layers_are_under_way_together() -> None:
    """Both convolutions of a block and, where the host does not wait, those of the block before."""
    stage = Stage(1024, 1024, layers=3)
    tower = Tower(1024, 1024, (stage,), 48, up=True, reflect=False)
    block = Convolution(1024, 1024, (16, 16, 24))
    one = 3 * 2 * (1024 * 6144 + 9 * 1024**2 + transformed(block))
    assert metal.tower(tower, block.size, 2) == (one, one)
    assert metal.tower(tower, block.size, 2, ahead=1) == (one, 3 * one)


SHOWS = """
import os, sys
sys.platform = {platform!r}
import ltx2
from ltx2.runtime.machine.winograd import transforming
print(os.environ.get({variable!r}))
with transforming(16, 24):
    print(os.environ.get({variable!r}))
"""


@pytest.mark.parametrize(
    ("platform", "given", "used"),
    [
        ("darwin", None, ["1", "11"]),
        ("darwin", "1", ["1", "11"]),  # a child of a process that has set it
        ("darwin", "4", ["4", "4"]),
        ("linux", None, ["None", "None"]),
    ],
)
def test_a_frame_or_a_few_are_transformed_at_a_time(platform: str, given: str | None, used: list[str]) -> None:
    """On Macs, unless the variable is set."""
    variables = {name: value for name, value in os.environ.items() if name != VARIABLE}
    variables |= {VARIABLE: given} if given else {}
    program = SHOWS.format(platform=platform, variable=VARIABLE)
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.split() == used
