"""Random weights in place of a published model's: the tensors that a conversion would write, values that compute."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from ltx2.bench import fullsize
from ltx2.bench.random import model as random_model
from ltx2.bench.random.model import RandomFolder, random_folder
from ltx2.bench.random.values import POOL, RandomValues
from ltx2.bench.speed.cases import RandomWeights, bench_cases
from ltx2.bench.speed.receipt import tables
from ltx2.bench.speed.run import run_bench
from ltx2.bench.speed.suite import Schedule, load_suite
from ltx2.convert.tensors.steps import Spec
from ltx2.quant.apply import Settings, quantize_plan
from ltx2.runtime.errors import InputError
from ltx2.runtime.events import Warned
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.memory.streaming import streamed
from ltx2.runtime.model.forms import Form, Quantization
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import encode_prompt, load_network
from ltx2.runtime.networks.transformer.model import Transformer
from tests.memory.test_streaming import same, steps
from tests.support import published
from tests.support.command import SIZE, Here
from tests.support.machine import small_ceilings
from tests.support.memory import settled
from tests.support.official import plan_of
from tests.support.sampling import first_steps

SMALL = {"width": 64, "height": 64, "frames": 1}
NAME = "ltx-2-19b-distilled"


def stored(folder: RandomFolder) -> dict[str, Mapping[str, Spec]]:
    return dict(folder.tensors)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The plan of the published files: their names and shapes."""
    folder = tmp_path_factory.mktemp("published")
    distilled = next(p for p in published.write_published(folder, published.MONOLITH) if "distilled" in p.name)
    (upscaler,) = published.write_published(folder, published.SPATIAL)
    return plan_of(distilled, upscaler, published.write_gemma(folder / "gemma"))


@pytest.mark.parametrize("settings", [None, Settings(bits=4), Settings(mode="mxfp8")])
def test_tensors_are_those_of_a_conversion(converted: Any, settings: Settings | None) -> None:
    plan = converted if settings is None else quantize_plan(converted, settings)
    made = random_folder(NAME, settings)
    for component, tensors in stored(made).items():
        moves = plan.moves(component)
        assert tensors == {key: spec for move in moves for key, spec in move.stored().items()}, component
        assert made.record(component).quantization == plan.components[component].quantization
        assert made.record(component).cls == plan.components[component].cls
    assert set(made.tensors) == set(plan.components)


NEWER = {
    "ltx-2.3-distilled": ("ltx-2.3-22b", "ltx-2.3-spatial-upscaler-x2"),
    "ltx-2.5-dev": (
        "ltx-2.5-22b-transformer-bf16", "gemma4-12b-with-proj-ltx-2.5-bf16", "ltx-2.5-video-vae-conv-bf16",
        "ltx-2.5-video-vae-bf16", "ltx-2.5-audio-vae-bf16", "ltx-2.5-latent-spatial-upscaler-x2-bf16-1.0",
        "ltx-2.5-duration-head-bf16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEWER)
def test_newer_releases(name: str, tmp_path: Path) -> None:
    """All networks that a bundle's conversion has, and a plan of memory for a clip by either video decoder."""
    files = [published.write_published(tmp_path, header)[0] for header in NEWER[name]]
    gemma = [] if "2.5" in name else [published.write_gemma(tmp_path / "gemma")]
    plan, made = plan_of(*files, *gemma, variant="dev"), random_folder(name)
    assert set(made.tensors) == set(plan.components)
    for component, tensors in stored(made).items():
        moves = plan.moves(component)
        assert tensors == {key: spec for move in moves for key, spec in move.stored().items()}, component
    for vae in ("conv", "diffusion") if made.has("diffusion_vae") else ("conv",):
        planned = Pipeline(made).plan("x", vae=vae, frames=121, pipeline="one-stage", memory_limit=1000)
        assert 40e9 < planned.peak < 80e9 and planned.fits


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("ltx-2-19b-distilled-fp8", InputError, "name the 16-bit model"),
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
    assert random_model._kind(settings) == name


def test_a_bundle_is_its_model() -> None:
    assert stored(random_folder("ltx-2-distilled")) == stored(random_folder(f"{NAME}.safetensors"))


FORMS = [Form(2, 32), Form(4, 64), Form(8, 128), Form(4, 32, "mxfp4"), Form(8, 32, "mxfp8"), Form(4, 16, "nvfp4")]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_packed_weights_are_as_large_as_others(form: Form) -> None:
    """Finite, of mean 0 and a deviation of 1 / sqrt(inputs); scales that are powers of two allow no better."""
    values, (rows, width) = RandomValues(Quantization(form)), (96, 4096)
    groups = Spec((rows, width // form.group_size), "BF16" if form.biased else "U8")
    codes = values.tensor("a.weight", Spec((rows, width * form.bits // 32), "U32"))
    scales = values.tensor("a.scales", groups)
    biases = values.tensor("a.biases", groups) if form.biased else None
    weight = mx.dequantize(codes, scales, biases, form.group_size, form.bits, form.mode, dtype=mx.float32)
    if form.multiplied:
        weight = weight * values.tensor("a.weight_scale", Spec((), "F32"))
    assert weight.shape == (rows, width) and mx.isfinite(weight).all().item()
    assert weight.mean().item() == pytest.approx(0, abs=0.002)
    assert weight.std().item() * width**0.5 == pytest.approx(1, abs=0.01 if form.biased else 0.45)


def test_large_tensors_repeat_the_pool_in_memory_of_their_own() -> None:
    values = RandomValues(Quantization())
    large = values.tensor("a.weight", Spec((3, POOL // 2), "F32"))
    flat = large.reshape(-1)
    mx.eval(flat)
    assert mx.array_equal(flat[: flat.size - POOL], flat[POOL:]) and not mx.array_equal(large[0], large[1])
    small = [values.tensor("a.weight", Spec((8, 8), "BF16")) for _ in range(2)]
    mx.eval(small)
    before = settled()
    del small
    assert before - settled() < 10_000


def test_norms_are_ones_and_biases_zeros() -> None:
    values = RandomValues(Quantization())
    for name, expected in (("q_norm.weight", 1), ("per_channel_statistics.std", 1), ("to_q.bias", 0)):
        assert (values.tensor(name, Spec((5,), "BF16")) == expected).all().item(), name


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, demo_f32: Path) -> None:
    """The demo model's networks in place of the published ones."""
    demo = ModelFolder.open(demo_f32)
    networks = {name: [record.cls, demo.config(name)] for name, record in demo.manifest.components.items()}
    data = {"release": "2.0", "networks": networks, "prompt_tokens": 7}
    monkeypatch.setattr(random_model, "published", lambda _: data)


@pytest.mark.usefixtures("tiny")
class TestRuns:
    def test_tokens(self) -> None:
        encoded = encode_prompt(random_folder(NAME), "any", 64)
        assert encoded.mask.sum() == 7 and encoded.mask[0, -7:].all() and encoded.ids.shape == (1, 64)

    def test_a_network_is_loaded_like_others(self) -> None:
        folder = random_folder(NAME, Settings(bits=4, group_size=32))
        network = load_network(folder, "transformer", Transformer)
        block = network.transformer_blocks[1]
        assert block.attn1.to_q.form.bits == 4 and block.attn1.to_q.weight.dtype == mx.uint32
        assert network.patchify_proj.weight.dtype == mx.bfloat16 and block.scale_shift_table.dtype == mx.float32

    def test_measured(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """Values are finite, or the pipeline would refuse them."""
        small_ceilings(monkeypatch)
        suite = load_suite("quick").changed("decode", SMALL, {"repeat": 1, "warmup": 0})
        receipt = fullsize.run(bench_cases([], RandomWeights(NAME, (4,)), suite), suite, fullsize.show_event)
        (case,) = receipt["cases"]
        assert case["model"]["weights"] == "random" and case["model"]["layers"]["video_vae"] == {}
        assert any(form.startswith("affine-4") for form in case["model"]["layers"]["transformer"])
        assert case["name"].split(",")[0] == f"{NAME}-q4"
        fullsize.show_table(*tables(receipt)[0])
        shown = capsys.readouterr().out
        assert shown.count("video_vae") == 2 and f"run 1 of 1: {NAME}-q4" in shown and "total" in shown

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


def test_a_newer_release_runs(demo_25: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite values all through, and no length that follows from random weights."""
    demo = ModelFolder.open(demo_25)
    networks = {name: [record.cls, demo.config(name)] for name, record in demo.manifest.components.items()}
    data = {"release": "2.5", "networks": networks, "prompt_tokens": 7}
    monkeypatch.setattr(random_model, "published", lambda _: data)
    suite = load_suite("quick").changed("clip", SMALL, {"repeat": 1, "warmup": 0})
    cases = bench_cases([], RandomWeights("ltx-2.5-distilled"), suite)
    first_steps(monkeypatch, 1)
    small_ceilings(monkeypatch)
    receipt = fullsize.run(cases, suite, fullsize.show_event)
    names = [phase["name"] for phase in receipt["cases"][0]["phases"]]
    assert "text_encoder" in names and "vocoder" in names and "duration_head" not in names


def test_what_does_not_fit_is_refused_before_anything_is_made(here: Here) -> None:
    before = settled()
    done = here("bench", "--random", NAME, "--bits", "4", "--memory-limit", "1", *SIZE)
    done.failed(3, "not fit in memory", "the limit is 1.0 GB", "--bits")
    assert mx.get_peak_memory() - before < 100 << 20


def test_without_the_command_lines_libraries() -> None:
    """As GPU machines are that have MLX, numpy and safetensors only."""
    missing = ("click", "rich", "imageio_ffmpeg", "PIL", "tokenizers", "huggingface_hub", "matplotlib", "pytest")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
        "from ltx2.bench import fullsize; sys.argv[1:] = ['--name', 'nothing', '--out', 'r.json']; fullsize.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: nothing is published as nothing"), done.stderr
