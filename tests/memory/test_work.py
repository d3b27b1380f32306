"""Work in pieces: what is timed, what is cut, that cutting changes nothing, and how much is evaluated at once at the
published sizes."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map

from ltx2.bench.random.model import random_folder
from ltx2.runtime.errors import DeviceError
from ltx2.runtime.layers.attention import Attention, FeedForward
from ltx2.runtime.machine import bounded as work
from ltx2.runtime.machine.bounded import Meter
from ltx2.runtime.memory.meter import Phase, explained
from ltx2.runtime.networks.load import build_network
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.networks.upsampler import PaddedConv3d
from ltx2.runtime.networks.video_vae.layers import Border, CausalConv3d
from ltx2.runtime.networks.video_vae.model import VideoAutoencoder
from ltx2.runtime.sampling.latents import Grid
from ltx2.runtime.streams import Streams
from tests.support.calls import states_of
from tests.support.sampling import sampled

PUBLISHED, TEXT_TOKENS = random_folder("ltx-2-distilled"), 1024
Limit = Callable[[float], None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Limit:
    """`machine(flops)`: one on which that is too much for one operation, from 1 on."""

    def has(flops: float) -> None:
        monkeypatch.setattr(work, "limit", lambda: flops)
        monkeypatch.setattr(work, "SMALL", min(flops, work.SMALL))

    return has


class TestMeter:
    @pytest.fixture
    def seconds(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        """What the next evaluations take."""
        times: list[float] = []
        clock = [0.0]

        def evaluate(*_: mx.array) -> None:
            clock[0] += times.pop(0)

        monkeypatch.setattr("ltx2.runtime.machine.bounded.time.perf_counter", lambda: clock[0])
        monkeypatch.setattr(mx, "eval", evaluate)
        monkeypatch.setattr(mx, "async_eval", lambda *_: None)
        return times

    def test_longest(self, seconds: list[float]) -> None:
        meter = Meter()
        assert meter.longest is None
        seconds += [1, 3, 2]
        for _ in range(3):
            meter.evaluate()
        assert meter.longest == 3
        meter.start()
        assert meter.longest is None

    def test_what_waits_for_earlier_work_is_not_one_evaluation(self, seconds: list[float]) -> None:
        meter = Meter()
        seconds += [9, 1]
        meter.queue()
        meter.queue()
        meter.evaluate()
        assert meter.longest is None
        meter.evaluate()
        assert meter.longest == 1

    def test_a_queue_is_timed_when_it_is_waited_for(self, seconds: list[float]) -> None:
        meter = Meter()
        meter.waits = True
        seconds += [2, 4, 1]
        meter.queue()
        meter.queue()
        meter.evaluate()
        assert meter.longest == 4

    def test_a_phase_waits_in_its_second_step(self) -> None:
        phase = Phase("stage1")
        waits = [work.meter.waits]
        for _ in range(3):
            phase.step()
            waits.append(work.meter.waits)
        assert waits == [False, True, False, False]
        work.evaluate(mx.ones(3) + 1)
        assert phase.finish().longest_eval_seconds is not None
        assert Phase("stage2").finish().longest_eval_seconds is None


class TestExplained:
    @pytest.mark.parametrize(
        ("said", "fix"),
        [
            ("[METAL] Command buffer execution failed: Impacting Interactivity (0000000e)", "keeps the display"),
            ("[METAL] Command buffer execution failed: Insufficient Memory (00000008:...).", "close other programs"),
            ("[malloc] Unable to allocate 9000000000 bytes.", "--low-memory"),
        ],
    )
    def test_what_a_gpu_did_not_finish(self, said: str, fix: str) -> None:
        with pytest.raises(DeviceError, match=r"the GPU did not finish stage2") as caught, explained("stage2"):
            raise RuntimeError(said)
        assert caught.value.why == said and fix in caught.value.fix

    def test_a_bug_stays_one(self) -> None:
        with pytest.raises(RuntimeError, match="shapes"), explained("stage2"):
            raise RuntimeError("shapes (1,2) and (3) cannot be broadcast")


class TestLimit:
    def test_depends_on_the_machine(self, machine: Limit) -> None:
        machine(2e12)
        assert [work.too_large(flops) for flops in (1e9, 1e12, 2e12, 2.1e12)] == [False, False, False, True]

    def test_a_processor_is_given_all_at_once(self) -> None:
        assert work.limit() == math.inf and not work.too_large(1e18) and work.ceiling() is None

    def test_limit_of_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Half a second's work, and never less than every GPU does in that time."""
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
        for speed, limit in ((2.0**44, 2.0**43), (2.0**39, work.SMALL)):
            monkeypatch.setattr(work, "speed", lambda speed=speed: speed)
            assert work.limit() == limit
            assert work.ceiling() == 4 * limit / speed

    def test_speed_is_measured_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(work, "SIDE", 128)
        work.speed.cache_clear()
        speed = work.speed()
        assert speed == 2 ** round(math.log2(speed)) and 1e6 < speed < 1e15
        assert work.speed() == speed and work.speed.cache_info().misses == 1
        work.speed.cache_clear()


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


@contextmanager
def evaluations() -> Iterator[list[int]]:
    """How many arrays each evaluation was of."""
    seen: list[int] = []
    evaluate = mx.eval

    def watched(*arrays: mx.array) -> None:
        seen.append(len(arrays))
        evaluate(*arrays)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "eval", watched)
        yield seen


class TestCutting:
    """The same values, three and a half positions' work at a time."""

    @pytest.mark.parametrize(("tokens", "count"), [(3, 0), (5, 2), (12, 4)])
    def test_attention_by_queries(self, machine: Limit, tokens: int, count: int) -> None:
        layer = Attention(16, 16, 2, 8, 1e-6)
        x, text, mask = random(1, tokens, 16), random(1, 7, 16, seed=1), random(1, 1, tokens, tokens, seed=2)
        whole = layer(x, text), layer(x), layer(x, mask=mask), layer(x, mask=mask[:, :, :1])
        machine(3.5 * 4 * 16 * 7)
        with evaluations() as seen:
            cut = layer(x, text)
        assert len(seen) == count
        assert mx.allclose(whole[0], cut, rtol=1e-5, atol=1e-6).item()
        others = layer(x), layer(x, mask=mask), layer(x, mask=mask[:, :, :1])
        assert all(mx.allclose(a, b, rtol=1e-5, atol=1e-6).item() for a, b in zip(whole[1:], others, strict=True))
        assert not mx.allclose(whole[1], whole[2], rtol=1e-2, atol=1e-2).item()

    def test_feed_forward_by_tokens(self, machine: Limit) -> None:
        layer, x = FeedForward(16), random(1, 10, 16)
        whole = layer(x)
        machine(3.5 * 8 * 16 * 16)
        with evaluations() as seen:
            cut = layer(x)
        assert len(seen) == 4 and mx.allclose(whole, cut, rtol=1e-5, atol=1e-6).item()

    @pytest.mark.parametrize("reflect", [True, False])
    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize(("frames", "count"), [(1, 0), (4, 2), (7, 3)])
    def test_convolution_by_frames(self, machine: Limit, reflect: bool, causal: bool, frames: int, count: int) -> None:
        layer, x = CausalConv3d(8, 4, Border(causal, reflect)), random(1, frames, 3, 4, 8)
        whole = layer(x)
        machine(3.5 * 2 * layer.conv.weight.size * 3 * 4)
        with evaluations() as seen:
            cut = layer(x)
        assert len(seen) == count and cut.shape == whole.shape
        assert mx.allclose(whole, cut, rtol=1e-5, atol=1e-6).item()

    @pytest.mark.parametrize(("outputs", "count"), [(96, 0), (128, 2), (224, 3)])
    def test_upscalers_convolution_by_channels(self, machine: Limit, outputs: int, count: int) -> None:
        layer, x = PaddedConv3d(8, outputs), random(1, 3, 3, 4, 8)
        layer.bias = random(outputs)
        whole = layer(x)
        machine(3.5 * 2 * 32 * layer.weight[0].size * 36)
        with evaluations() as seen:
            cut = layer(x)
        assert len(seen) == count and cut.shape == whole.shape
        assert mx.allclose(whole, cut, rtol=1e-5, atol=1e-5).item()


class Counted:
    """Floating-point operations: of every evaluation so far, then of what is not evaluated yet; and the most of a
    single operation."""

    def __init__(self) -> None:
        self.evaluations = [0.0]
        self.operation = 0.0

    def add(self, flops: float) -> None:
        self.evaluations[-1] += flops
        self.operation = max(self.operation, flops)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Nothing is computed: graphs know their shapes."""
    counts = Counted()

    def watch(owner: Any, name: str, flops: Callable[..., float]) -> None:
        original = getattr(owner, name)

        def spy(*args: Any, **options: Any) -> Any:
            result = original(*args, **options)
            counts.add(flops(result, *args))
            return result

        monkeypatch.setattr(owner, name, spy)

    watch(mx.fast, "scaled_dot_product_attention", lambda _, q, k, v: 4 * q.size * k.shape[2])
    watch(nn.Linear, "__call__", lambda _, layer, x: 2 * x.size * layer.weight.shape[0])
    for name in ("conv1d", "conv2d", "conv3d"):
        watch(mx, name, lambda y, x, weight, *_: 2 * weight.size * y.size / y.shape[-1])
    for name in ("eval", "async_eval"):
        monkeypatch.setattr(mx, name, lambda *_: counts.evaluations.append(0.0))
    return counts


def network(name: str, **changes: Any) -> Any:
    """In 16 bits, and without values."""
    built = build_network(PUBLISHED.record(name).cls, PUBLISHED.config(name) | changes)
    built.update(tree_map(lambda value: value.astype(mx.bfloat16), built.parameters()))
    return built


M1 = 2.3e12  # floating-point operations per second
SIZES = {"768x512, 121 frames": (16, 16, 24), "1280x704, 121 frames": (16, 22, 40), "768x512, 481 frames": (61, 16, 24)}


class TestPublishedSizes:
    """How much the slowest GPU is given at once: half a second's work in one operation, at the speed of a matrix
    product, and in one evaluation, which MLX submits as several commands (see work.py), two seconds'."""

    @pytest.fixture(autouse=True)
    def m1(self, machine: Limit) -> None:
        machine(work.SMALL)

    @pytest.fixture
    def bounded(self, counted: Counted, note: Callable[[str], None]) -> Callable[[str], None]:
        def check(what: str) -> None:
            single, most = counted.operation, max(counted.evaluations)
            note(f"TFLOP at once on an M1, {what}: one operation {single / 1e12:.2f}, evaluation {most / 1e12:.2f}")
            assert 0 < single <= work.SMALL <= work.SECONDS * M1
            assert most <= 2 * M1

        return check

    @pytest.mark.parametrize("size", SIZES)
    def test_denoise_step(self, bounded: Callable[[str], None], size: str) -> None:
        transformer: Transformer = network("transformer", num_layers=2)
        grid = Grid(128, *SIZES[size], 8, 126)
        text = mx.zeros((1, TEXT_TOKENS, transformer.config.caption_channels), mx.bfloat16)
        noise = grid.segments.map(lambda segment: mx.zeros(segment.shape))
        next(sampled(transformer, grid, Streams(text, text), (0.9, 0.5, 0.0), noise))
        bounded(f"step of {size}")

    @pytest.mark.parametrize("tile", [(11, 16, 24), (16, 16, 24)], ids=str)
    def test_video_decode(self, bounded: Callable[[str], None], tile: tuple[int, int, int]) -> None:
        vae: VideoAutoencoder = network("video_vae")
        vae.decode(mx.zeros((1, 128, *tile)))
        bounded(f"video decode of {tile}")

    @pytest.mark.parametrize("size", [(16, 8, 12), (61, 17, 30)], ids=str)
    def test_upscaler(self, bounded: Callable[[str], None], size: tuple[int, int, int]) -> None:
        network("spatial_upscaler")(mx.zeros((1, 128, *size)))
        bounded(f"upscaler of {size}")

    def test_text_encoder(self, bounded: Callable[[str], None]) -> None:
        """One layer of each kind, of a prompt that is as long as they get."""
        ids = mx.ones((1, TEXT_TOKENS), mx.int32)
        for _ in states_of(network("text_encoder", num_hidden_layers=6), ids, mx.ones_like(ids)):
            pass
        bounded("text encoder")

    def test_connectors(self, bounded: Callable[[str], None]) -> None:
        config = PUBLISHED.config("connectors")
        width, tokens = config["caption_channels"], TEXT_TOKENS
        states = [mx.zeros((1, tokens, width), mx.bfloat16)] * (config["text_projection_in_features"] // width)
        network("connectors")(states, mx.ones((1, tokens), mx.int32))
        bounded("connectors")

    def test_sound(self, bounded: Callable[[str], None]) -> None:
        """20 seconds of it."""
        network("audio_vae").decode(mx.zeros((1, 8, 501, 16)))
        network("vocoder")(mx.zeros((1, 2, 2001, 64)))
        bounded("20 s of sound")
