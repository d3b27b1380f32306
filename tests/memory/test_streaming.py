"""Blocks read from disk in every step: the same bits as from memory, in less of it, and whatever ends it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from itertools import combinations, count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import ltx2
from ltx2.render import memory_table
from ltx2.runtime.errors import CheckpointError
from ltx2.runtime.events import PhaseDone, StepDone, Warned
from ltx2.runtime.generate.observe import watch
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.generate.records.clip import Generated
from ltx2.runtime.layers.linear import LinearLayer
from ltx2.runtime.memory import streaming
from ltx2.runtime.memory.streaming import IN_MEMORY, choose_streamed, held_bytes, streamed
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_network, read_weights
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.sampling.latents import Grid
from ltx2.runtime.streams import Streams
from tests.support import encoded
from tests.support.command import SIZE, Here
from tests.support.memory import settled
from tests.support.official import GEMMA, MONOLITH
from tests.support.sampling import sampled
from tests.support.sparse_model import write_sparse_model
from tests.support.waiting import until

BLOCKS = 6  # of the demo model
EVERY = tuple(range(BLOCKS))
PROMPT = "a red square"
STEPS = 8
SIGMAS = (1.0, 0.6, 0.2)
# What the demo model's video decoder takes, and not all of its transformer.
TIGHT: dict[str, Any] = {"memory_limit": 0.0145}
# A generation that is killed in the middle of its fifth step, while blocks are read.
KILLED = """
import json, os, signal, sys
import mlx.core as mx
from ltx2.runtime.generate.observe import watch
from ltx2.runtime.generate.pipeline import Pipeline

mx.set_default_device(mx.cpu)  # as the test that compares

def observe(component, network):
    calls = []

    def seen(path, layer, x):
        calls.append(path)
        if calls.count("transformer_blocks.3.attn1.to_q") == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    if component == "transformer":
        watch(network, seen)

Pipeline(sys.argv[1], observe).generate(checkpoint_every=3, **json.loads(sys.argv[2]))
"""
Pictures = list[np.ndarray]


class Run(NamedTuple):
    """One from memory: the shortest there is, its options and its latents."""

    options: dict[str, Any]
    latents: Mapping[str, np.ndarray]

    def same(self, latents: Mapping[str, np.ndarray]) -> bool:
        return all(np.array_equal(latents[name], self.latents[name]) for name in self.latents)


@pytest.fixture(scope="module")
def whole(demo_f32: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    embeddings = str(tmp_path_factory.mktemp("whole") / "embeddings.safetensors")
    options: dict[str, Any] = {"width": 64, "height": 64, "frames": 9, "no_upscale": True, "no_audio": True}
    options["seed"] = 3
    latents = Pipeline(demo_f32).generate(PROMPT, save_embeddings=embeddings, **options).latents
    return Run(options | {"embeddings": embeddings}, latents)


def transformer(folder: Path) -> Transformer:
    return load_network(ModelFolder.open(folder), "transformer", Transformer)


def steps(network: Transformer, keep: bool = False) -> Pictures:
    """Latents after every step of a small clip. `keep`: with the text's keys and values kept over the steps."""
    config, grid = network.config, Grid(32, 2, 2, 2, 2, 9)
    text = mx.random.normal((1, 16, config.caption_channels), key=mx.random.key(0))
    noise = grid.segments.map(lambda segment: mx.random.normal(segment.shape, key=mx.random.key(1)))
    done = sampled(network, grid, Streams(text, text), SIGMAS, noise, keep=keep)
    return [np.array(value) for latents in done for value in latents.values()]


def size(module: nn.Module) -> int:
    """Bytes of its weights."""
    return sum(value.nbytes for _, value in cast(list[tuple[str, mx.array]], tree_flatten(module.parameters())))


def same(first: Pictures, second: Pictures) -> bool:
    return len(first) == len(second) > 0 and all(map(np.array_equal, first, second))


class TestChoice:
    @pytest.mark.parametrize("sizes", [[2] * 7, [5, 2, 2, 2, 2, 2, 5], [3, 1, 2, 1, 3, 3]])
    def test_fewest_bytes_that_fit(self, sizes: list[int]) -> None:
        """Against all that could be chosen."""
        every = [c for n in range(len(sizes) + 1) for c in combinations(range(len(sizes)), n)]
        for room in range(sum(sizes) + 2):
            chosen = choose_streamed(sizes, room)
            fitting = [sum(sizes[i] for i in c) for c in every if held_bytes(sizes, c) <= room]
            if fitting:
                assert held_bytes(sizes, chosen) <= room
                assert sum(sizes[i] for i in chosen) <= min(fitting) + max(sizes)
            else:
                assert chosen == tuple(range(len(sizes)))

    def test_what_fits_stays(self) -> None:
        assert choose_streamed([1] * 48, 48) == () == choose_streamed([], 0)
        assert len(choose_streamed([1] * 48, 47)) == 1 + IN_MEMORY, "two of those read are in memory"

    @pytest.mark.parametrize("several", [3, 10, 24, 47])
    def test_at_even_distances(self, several: int) -> None:
        chosen = choose_streamed([1] * 48, 48 - several + IN_MEMORY)
        assert len(chosen) == several
        gaps = {after - before for before, after in zip(chosen, [*chosen[1:], chosen[0] + 48], strict=True)}
        assert max(gaps) - min(gaps) <= 1

    def test_blocks_of_more_bits_stay(self) -> None:
        """As Lightricks' FP8 files have them: the first and the last five in 16 bits."""
        sizes = [2, *[1] * 42, *[2] * 5]
        chosen = choose_streamed(sizes, 40)
        assert chosen and all(sizes[i] == 1 for i in chosen) and held_bytes(sizes, chosen) == 40
        assert choose_streamed(sizes, 2 * IN_MEMORY) == tuple(range(48))


class TestSameBits:
    @pytest.mark.parametrize("form", ["bf16", "4 bits in shards", "fp8", "nvfp4", "int8"])
    def test_of_every_form(self, demo_f32: Path, tmp_path: Path, form: str) -> None:
        folder = converted(form, demo_f32, tmp_path)
        assert ("shards" in form) == (len(ModelFolder.open(folder).weight_files("transformer")) > 1)
        resident = transformer(folder)
        read_weights(resident)
        expected = steps(resident)
        network = transformer(folder)
        with streamed(ModelFolder.open(folder), network, EVERY) as stream:
            assert same(steps(network), expected)
            assert stream is not None and stream.read_bytes % (len(SIGMAS) - 1) == 0

    @pytest.mark.parametrize("blocks", [(0, 3), (1, 2, 5), EVERY])
    def test_of_any_blocks(self, demo_f32: Path, blocks: tuple[int, ...]) -> None:
        network = transformer(demo_f32)
        read_weights(network)
        expected = steps(network)
        with streamed(ModelFolder.open(demo_f32), network, blocks) as stream:
            assert same(steps(network), expected)
        assert stream is not None and network.supply is None
        once = sum(size(network.transformer_blocks[i]) for i in blocks)
        assert stream.read_bytes == (len(SIGMAS) - 1) * once, "each is read once in every step"

    def test_with_text_that_is_kept(self, demo_f32: Path) -> None:
        """Made when a block is there for the first time."""
        network = transformer(demo_f32)
        with streamed(ModelFolder.open(demo_f32), network, (1, 2, 5)):
            assert same(steps(network, keep=True), steps(network))

    def test_after_a_pass_that_was_left(self, demo_f32: Path) -> None:
        network = transformer(demo_f32)
        with streamed(ModelFolder.open(demo_f32), network, EVERY):
            expected = steps(network)
            with pytest.raises(ZeroDivisionError):
                left(network, after=3)
            assert same(steps(network), expected)

    def test_of_a_generation(self, demo_f32: Path, whole: Run) -> None:
        """The plan decides which."""
        plan = Pipeline(demo_f32).plan(**whole.options, **TIGHT)
        assert plan.fits and 0 < len(plan.phase("stage1").streamed) < BLOCKS
        assert whole.same(Pipeline(demo_f32).generate(**whole.options, **TIGHT).latents)

    def test_of_a_generation_that_is_watched(self, demo_f32: Path, whole: Run) -> None:
        seen: dict[str, int] = {}

        def observe(component: str, network: Any) -> None:
            if component == "transformer":
                watch(network, lambda path, layer, x: seen.update({path: seen.get(path, 0) + 1}))

        assert whole.same(Pipeline(demo_f32, observe).generate(**whole.options, **TIGHT).latents)
        assert {path.split(".")[1] for path in seen if path.startswith("transformer_blocks.")} == set("012345")
        assert set(seen.values()) == {1, STEPS}, "the text's projections once, all others in every step"


def converted(form: str, demo_f32: Path, tmp_path: Path) -> Path:
    """The demo model's transformer."""
    out = tmp_path / "model"
    if form == "4 bits in shards":
        ltx2.quantize(demo_f32, out, bits=4, only=["transformer"], shard_size=0.002)
        return out
    encode = {"fp8": encoded.scaled, "nvfp4": encoded.four_bit, "int8": encoded.signed}.get(form)
    sources = encoded.demo_sources(tmp_path, encode) if encode else [MONOLITH]
    return ltx2.convert(sources, out, variant="distilled", only=["transformer"])


def left(network: Transformer, after: int) -> None:
    """A pass that ends with an error in a block."""

    def fails(path: str, layer: LinearLayer, x: mx.array) -> None:
        if path.startswith(f"transformer_blocks.{after}."):
            raise ZeroDivisionError

    watch(network, fails)
    try:
        steps(network)
    finally:
        watch(network, lambda path, layer, x: None)


class TestMemory:
    def test_two_blocks_are_there(self, demo_f32: Path) -> None:
        network = transformer(demo_f32)
        (block,) = {size(b) for b in network.transformer_blocks}
        rest = size(network) - BLOCKS * block
        peaks = []
        for blocks in ((), EVERY):
            network = transformer(demo_f32)
            before = settled()
            with streamed(ModelFolder.open(demo_f32), network, blocks):
                steps(network)
            peaks.append(mx.get_peak_memory() - before)
        assert mx.get_active_memory() - before == pytest.approx(rest, abs=1 << 16), "they are dropped at the end"
        assert peaks[0] - peaks[1] > (BLOCKS - IN_MEMORY - 0.5) * block

    def test_a_block_is_read_while_others_compute(self, demo_f32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first block waits until reading of the second one has begun, which it would do for ever if that began
        when the second one is asked for; likewise the third waits for the fifth."""
        read, begun = mx.load, list[object]()

        def reading(*args: Any, **kwargs: Any) -> Any:
            begun.append(args)
            return read(*args, **kwargs)

        def waits(path: str, layer: LinearLayer, x: mx.array) -> None:
            wanted = {"transformer_blocks.0.attn1.to_q": 1, "transformer_blocks.2.attn1.to_q": 2}.get(path, 0)
            until(lambda: len(begun) >= wanted)

        network = transformer(demo_f32)
        monkeypatch.setattr(mx, "load", reading)
        watch(network, waits)
        with streamed(ModelFolder.open(demo_f32), network, (1, 4)):
            steps(network)
        assert len(begun) >= 2 * (len(SIGMAS) - 1)


class TestEnds:
    @pytest.fixture
    def model(self, demo_f32: Path, tmp_path: Path) -> Path:
        """A copy to spoil."""
        return Path(shutil.copytree(demo_f32, tmp_path / "model"))

    def test_a_file_that_becomes_shorter(self, model: Path, demo_f32: Path, whole: Run, tmp_path: Path) -> None:
        """Is an expected failure; what was computed is kept, and another run can read."""
        (weights,) = ModelFolder.open(model).weight_files("transformer")
        state = tmp_path / "state.safetensors"
        with pytest.raises(CheckpointError, match="became shorter"):
            for event in Pipeline(model).stream(state=state, checkpoint_every=1, **whole.options, **TIGHT):
                if isinstance(event, StepDone) and (event.phase, event.step) == ("stage1", 2):
                    os.truncate(weights, weights.stat().st_size // 2)
        *_, last = Pipeline(demo_f32).stream(state=state, resume=True, **whole.options, **TIGHT)
        assert isinstance(last, Generated) and whole.same(last.clip.latents)

    def test_a_file_that_is_removed(self, model: Path, whole: Run) -> None:
        """It is open: the stage ends with what was in it."""
        (weights,) = ModelFolder.open(model).weight_files("transformer")
        for event in Pipeline(model).stream(**whole.options, **TIGHT):
            if isinstance(event, StepDone) and event.phase == "stage1":
                weights.unlink(missing_ok=True)
        assert isinstance(event, Generated) and whole.same(event.clip.latents)

    def test_an_interrupt(self, demo_f32: Path) -> None:
        """Nothing is left of the blocks, and nothing reads on."""
        network = transformer(demo_f32)
        before = settled()
        with pytest.raises(KeyboardInterrupt), streamed(ModelFolder.open(demo_f32), network, EVERY) as stream:
            assert stream is not None
            stream.ready(0)
            raise KeyboardInterrupt
        assert network.supply is None
        rest = size(network) - sum(map(size, network.transformer_blocks))
        assert mx.get_active_memory() - before <= rest + (1 << 16)
        with streamed(ModelFolder.open(demo_f32), network, EVERY):
            assert len(steps(network)) == 2 * (len(SIGMAS) - 1)

    def test_what_is_no_fault_of_the_file(self, demo_f32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Memory that runs out, say, is not said to be one."""

        def load(*_: object, **__: object) -> None:
            raise RuntimeError("[malloc] Unable to allocate 5 bytes.")

        network = transformer(demo_f32)
        monkeypatch.setattr(mx, "load", load)
        with streamed(ModelFolder.open(demo_f32), network, EVERY), pytest.raises(RuntimeError, match="malloc"):
            steps(network)

    def test_a_kill_leaves_a_state(self, demo_f32: Path, whole: Run, tmp_path: Path) -> None:
        """A real one, between reading and computing; the rest runs from memory, to the same bits."""
        state = str(tmp_path / "state.safetensors")
        options = whole.options | TIGHT | {"state": state}
        command = [sys.executable, "-c", KILLED, str(demo_f32), json.dumps(options)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL and not done.stderr, done.stderr
        *events, last = Pipeline(demo_f32).stream(state=state, resume=True, **whole.options)
        (stage,) = (e for e in events if isinstance(e, PhaseDone) and e.name == "stage1")
        assert len(stage.step_seconds) == STEPS - 3
        assert isinstance(last, Generated) and whole.same(last.clip.latents)


class TestSaid:
    def test_before_it_starts(self, here: Here, tmp_path: Path) -> None:
        """A model of the published size."""
        model = write_sparse_model(tmp_path / "model", GEMMA, 4)
        args = ["generate", PROMPT, "-m", model, "-o", tmp_path / "clip.mp4", *SIZE, "--memory-limit", "8", "--dry-run"]
        done = here(*args)
        assert done.code == 0 and "warning: the transformer is not kept in memory as a whole" in done.err
        plan = here(*args, "--json").json["plan"]
        for phase in plan["phases"]:
            assert bool(phase["streamed"]) == phase["name"].startswith("stage") == (phase["read"] > 0)

    def test_in_the_table(self, demo_f32: Path, whole: Run) -> None:
        plan = Pipeline(demo_f32).plan(**whole.options, **TIGHT)
        _, columns, rows = memory_table(plan.to_dict())
        assert columns[-1] == "read per step"
        blocks = len(plan.phase("stage1").streamed)
        assert {row[0]: row[-1] for row in rows} == {"stage1": f"0.01, {blocks} blocks", "video_vae": ""}

    def test_when_the_disk_was_too_slow(self, demo_f32: Path, whole: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        """By a clock on which a second passes whenever somebody looks: half of the looks are before and after waiting
        for a block."""
        monkeypatch.setattr(streaming, "time", SimpleNamespace(perf_counter=count().__next__))
        said = [e.message for e in Pipeline(demo_f32).stream(**whole.options, **TIGHT) if isinstance(e, Warned)]
        assert any(re.match("stage1 has waited .* for blocks to be read", message) for message in said)
