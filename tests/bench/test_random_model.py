"""Random weights in place of a published model's: the tensors that a conversion would write, values that compute."""

from pathlib import Path

import mlx.core as mx
import pytest

from ltx2.bench.random import model as random_model
from ltx2.bench.random.model import random_folder
from ltx2.bench.random.values import POOL, RandomValues
from ltx2.bench.speed.cases import RandomWeights, bench_cases
from ltx2.bench.speed.run import Benched, run_bench
from ltx2.bench.speed.suite import Schedule, load_suite
from ltx2.convert.sources.checkpoint import open_sources
from ltx2.convert.tensors.steps import Spec
from ltx2.quant.apply import Settings, quantize_plan
from ltx2.runtime.errors import InputError
from ltx2.runtime.events import Warned
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.memory.streaming import streamed
from ltx2.runtime.model.forms import Form, Quantization
from ltx2.runtime.networks.load import encode_prompt, load_network
from ltx2.runtime.networks.transformer.model import Transformer
from tests.memory.test_streaming import same, steps
from tests.support import published
from tests.support.command import SIZE, Here
from tests.support.machine import small_ceilings
from tests.support.memory import settled
from tests.support.official import DEMO, DEMO_25, plan_of
from tests.support.sampling import first_steps

SMALL = {"width": 64, "height": 64, "frames": 1}
NAME = "ltx-2-19b-distilled"


@pytest.mark.parametrize("settings", [None, Settings(bits=4), Settings(mode="mxfp8")])
def test_tensors_are_those_of_a_conversion(settings: Settings | None, tmp_path: Path) -> None:
    distilled = next(p for p in published.write_published(tmp_path, published.MONOLITH) if "distilled" in p.name)
    (upscaler,) = published.write_published(tmp_path, published.SPATIAL)
    plan = plan_of(distilled, upscaler, published.write_gemma(tmp_path / "gemma"))
    plan = plan if settings is None else quantize_plan(plan, settings)
    made = random_folder(NAME, settings)
    for component, file in made.files.items():
        found = {name: Spec(tensor.shape, tensor.dtype) for name, tensor in file.tensors.items()}
        assert found == {key: spec for move in plan.moves(component) for key, spec in move.stored().items()}, component
        assert made.record(component).quantization == plan.components[component].quantization
        assert made.record(component).cls == plan.components[component].cls
    assert set(made.files) == set(plan.components)


@pytest.mark.parametrize(
    ("name", "form", "size"),
    [("ltx-2-distilled-fp8", Form(8, 32, "mxfp8"), 21.6), ("ltx-2.5-distilled-nvfp4", Form(4, 16, "nvfp4"), 14.7),
     ("ltx-2.5-distilled-int8", Form(8, 128, rotation=256, hadamard="regular"), 19.5)],
)  # fmt: skip
def test_published_codes(name: str, form: Form, size: float) -> None:
    """As a conversion keeps them."""
    made = random_folder(name)
    assert made.quantization("transformer").of("transformer_blocks.3.attn1.to_q") == form
    held = sum(tensor.nbytes for tensor in made.files["transformer"].tensors.values())
    assert held == pytest.approx(size * 1e9, rel=0.01) and Pipeline(made).plan("x", memory_limit=1000).fits


@pytest.mark.parametrize("name", ["ltx-2.3-distilled", "ltx-2.5-dev"])
def test_newer_releases(name: str) -> None:
    """A plan of memory for a clip by either video decoder."""
    made = random_folder(name)
    for vae in ("conv", "diffusion") if made.has("diffusion_vae") else ("conv",):
        planned = Pipeline(made).plan("x", vae=vae, frames=121, pipeline="one-stage", memory_limit=1000)
        assert 40e9 < planned.peak < 80e9 and planned.fits


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("ltx-2-spatial-upscaler-x2-1.0", InputError, "is no model"),
        ("ltx-2-19b-destilled", InputError, "did you mean ltx-2-19b-distilled or"),
    ],
)
def test_other_names(name: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        random_folder(name)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (Settings(bits=4), "q4"), (Settings(mode="nvfp4"), "nvfp4"), (Settings(recipe="uniform"), "uniform"),
        (Settings(bits=3, recipe="uniform"), "q3-uniform"), (Settings(mode="mxfp8", recipe="uniform"), "mxfp8-uniform"),
    ],
)  # fmt: skip
def test_named_like_a_folder(settings: Settings, name: str) -> None:
    assert random_folder(NAME, settings).path.name == f"{NAME}-{name}"


def test_a_bundle_is_its_model() -> None:
    files = [random_folder(name).files for name in ("ltx-2-distilled", NAME, f"{NAME}.safetensors")]
    assert [{name: file.tensors for name, file in found.items()} for found in files[1:]] == [
        {name: file.tensors for name, file in files[0].items()}
    ] * 2


FORMS = [Form(2, 32), Form(4, 64), Form(8, 128), Form(4, 32, "mxfp4"), Form(8, 32, "mxfp8"), Form(4, 16, "nvfp4")]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_packed_weights_are_as_large_as_others(form: Form) -> None:
    """Finite, of mean 0 and a deviation of 1 / sqrt(inputs); scales that are powers of two allow no better."""
    values, (rows, width) = RandomValues(Quantization(form)), (96, 4096)
    groups = ("BF16" if form.biased else "U8", (rows, width // form.group_size))
    codes = values.tensor("a.weight", "U32", (rows, width * form.bits // 32))
    scales = values.tensor("a.scales", *groups)
    biases = values.tensor("a.biases", *groups) if form.biased else None
    weight = mx.dequantize(codes, scales, biases, form.group_size, form.bits, form.mode, dtype=mx.float32)
    if form.multiplied:
        weight = weight * values.tensor("a.weight_scale", "F32", ())
    assert weight.shape == (rows, width) and mx.isfinite(weight).all().item()
    assert weight.mean().item() == pytest.approx(0, abs=0.002)
    assert weight.std().item() * width**0.5 == pytest.approx(1, abs=0.01 if form.biased else 0.45)


@pytest.mark.parametrize("form", [Form(8, 128), Form(8, 32, "mxfp8")], ids=["int8", "fp8"])
def test_published_codes_are_as_large_as_other_weights(form: Form) -> None:
    """Those that have a multiplier alone: int8 one per row, FP8 one per layer."""
    values, (rows, width) = RandomValues(Quantization(form)), (96, 4096)
    codes = values.tensor("a.weight", "U32", (rows, width // 4)).view(mx.uint8)
    plain = codes.astype(mx.float32) - 128 if form.biased else mx.from_fp8(codes, dtype=mx.float32)
    weight = plain * values.tensor("a.weight_scale", "F32", (rows, 1) if form.biased else ())
    assert mx.isfinite(weight).all().item()
    assert weight.std().item() * width**0.5 == pytest.approx(1, abs=0.01 if form.biased else 0.45)


def test_large_tensors_repeat_the_pool_in_memory_of_their_own() -> None:
    values = RandomValues(Quantization())
    large = values.tensor("a.weight", "F32", (3, POOL // 2))
    flat = large.reshape(-1)
    mx.eval(flat)
    assert mx.array_equal(flat[: flat.size - POOL], flat[POOL:]) and not mx.array_equal(large[0], large[1])
    small = [values.tensor("a.weight", "BF16", (8, 8)) for _ in range(2)]
    mx.eval(small)
    before = settled()
    del small
    assert before - settled() < 10_000


def test_norms_are_ones_and_biases_zeros() -> None:
    values = RandomValues(Quantization())
    for name, expected in (("q_norm.weight", 1), ("per_channel_statistics.std", 1), ("to_q.bias", 0)):
        assert (values.tensor(name, "BF16", (5,)) == expected).all().item(), name


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo model in place of the published ones."""
    monkeypatch.setattr(random_model, "bundle_sources", lambda _: open_sources(DEMO))


@pytest.mark.usefixtures("tiny")
class TestRuns:
    def test_tokens(self) -> None:
        encoded = encode_prompt(random_folder(NAME), "any", 64)
        assert encoded.mask.all() and encoded.ids.shape == (1, 64)
        assert encode_prompt(random_folder(NAME), "any", 1024).mask.sum() == 100

    def test_a_network_is_loaded_like_others(self) -> None:
        folder = random_folder(NAME, Settings(bits=4, group_size=32))
        network = load_network(folder, "transformer", Transformer)
        block = network.transformer_blocks[1]
        assert block.attn1.to_q.form.bits == 4 and block.attn1.to_q.weight.dtype == mx.uint32
        assert network.patchify_proj.weight.dtype == mx.bfloat16 and block.scale_shift_table.dtype == mx.float32

    def test_measured(self, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
        """Values are finite, or the pipeline would refuse them."""
        small_ceilings(monkeypatch)
        args = ["--random", NAME, "--bits", "4", "--part", "decode", "--repeat", "1", "--warmup", "0"]
        (case,) = here("bench", *args, "--width", "64", "--height", "64", "--frames", "1", "--json").json["cases"]
        assert case["model"]["weights"] == "random" and case["model"]["layers"]["video_vae"] == {}
        assert any(form.startswith("affine-4") for form in case["model"]["layers"]["transformer"])
        assert case["name"].split(",")[0] == f"{NAME}-q4"

    def test_blocks_that_are_not_kept_are_made_again(self) -> None:
        """The same ones, in every step."""
        folder, shown = random_folder(NAME, Settings(bits=4, group_size=32)), []
        for blocks in ((), (0, 2, 5)):
            network = load_network(folder, "transformer", Transformer)
            with streamed(folder, network, blocks):
                shown.append(steps(network))
        assert same(*shown)

    def test_what_would_be_read_in_every_step_is_told(self) -> None:
        suite = load_suite("quick").changed("denoise", SMALL | {"low_memory": True}, {})
        first = next(iter(run_bench(bench_cases([], RandomWeights(NAME), suite), Schedule(1, 0))))
        assert isinstance(first, Warned) and "made in memory instead" in first.message


def test_a_newer_release_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite values all through, and no length that follows from random weights."""
    monkeypatch.setattr(random_model, "bundle_sources", lambda _: open_sources(DEMO_25))
    suite = load_suite("quick").changed("clip", SMALL, {"repeat": 1, "warmup": 0})
    cases = bench_cases([], RandomWeights("ltx-2.5-distilled"), suite)
    first_steps(monkeypatch, 1)
    small_ceilings(monkeypatch)
    *_, last = run_bench(cases, suite.schedule)
    assert isinstance(last, Benched)
    names = [phase["name"] for phase in last.receipt["cases"][0]["phases"]]
    assert "text_encoder" in names and "vocoder" in names and "duration_head" not in names


def test_what_does_not_fit_is_refused_before_anything_is_made(here: Here) -> None:
    before = settled()
    done = here("bench", "--random", NAME, "--bits", "4", "--memory-limit", "1", *SIZE)
    done.failed(3, "not fit in memory", "the limit is 1.0 GB", "--memory-limit")
    assert mx.get_peak_memory() - before < 100 << 20
