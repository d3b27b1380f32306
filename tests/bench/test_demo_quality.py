"""The demo model's evidence: stock codes in place of ours, and what clips show of their prompts."""

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

import ltx2
from ltx2.bench.plots.demo import plot_demo
from ltx2.bench.quality import demo_quality
from ltx2.bench.quality.demo_models import REFERENCE, DemoModel, demo_models, fill_with_stock
from ltx2.bench.quality.demo_prompts import Prompt, random_prompts
from ltx2.bench.quality.demo_quality import Result, measure_prompt, summary, table
from ltx2.commands.group import cli
from ltx2.runtime.errors import ModelFolderError
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_weights
from tests.support.folders import contents, verified
from tests.support.sampling import shorten

SMALL = {"width": 64, "height": 64, "frames": 9}
PROMPT = Prompt("a red circle", {"colour": "red", "shape": "circle"})
Q4 = DemoModel("q4", "ltx2", ("--bits", "4"))


@pytest.fixture(scope="module")
def folders(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bf16 model, at 4 bits, and with stock codes."""
    folder = tmp_path_factory.mktemp("demo-quality")
    ltx2.quantize(demo_model, folder / "q4", bits=4, recipe="uniform")
    fill_with_stock(folder / "q4", demo_model, folder / "q4-stock")
    return {REFERENCE: demo_model, "q4": folder / "q4", "q4-stock": folder / "q4-stock"}


class TestStock:
    def test_codes_are_those_of_mx_quantize(self, folders: dict[str, Path]) -> None:
        source, ours, stock = (ModelFolder.open(folders[name]) for name in (REFERENCE, "q4", "q4-stock"))
        for component, layer in (
            ("transformer", "transformer_blocks.2.ff.proj_in"), ("text_encoder", "model.embed_tokens")
        ):  # fmt: skip
            form = ours.quantization(component).of(layer)
            weight = load_weights(source, component)[f"{layer}.weight"]
            expected = mx.quantize(weight, form.group_size, form.bits)
            found, own = load_weights(stock, component), load_weights(ours, component)
            for part, value in zip(("weight", "scales", "biases"), expected, strict=True):
                assert mx.array_equal(found[f"{layer}.{part}"], value) and value.dtype == own[f"{layer}.{part}"].dtype
            assert not mx.array_equal(own[f"{layer}.weight"], expected[0])

    def test_nothing_else_differs(self, folders: dict[str, Path]) -> None:
        verified(folders["q4-stock"])
        ours, stock = contents(folders["q4"]), contents(folders["q4-stock"])
        assert {name: len(content) for name, content in ours.items()} == {n: len(c) for n, c in stock.items()}
        different = {name for name, content in ours.items() if stock[name] != content}
        weights = {f"{part}/model.safetensors" for part in ("transformer", "connectors", "text_encoder")}
        assert different == {*weights, "ltx2.json"}
        for component in ("transformer", "connectors"):
            own, theirs = (load_weights(ModelFolder.open(folders[n]), component) for n in ("q4", "q4-stock"))
            changed = {name for name, value in own.items() if not mx.array_equal(value, theirs[name])}
            assert {name.rpartition(".")[2] for name in changed} == {"weight", "scales", "biases"}

    def test_only_affine_codes(self, demo_model: Path, tmp_path: Path) -> None:
        ltx2.quantize(demo_model, tmp_path / "q", mode="mxfp8", only=("connectors",))
        with pytest.raises(ModelFolderError, match="its mode is mxfp8"):
            fill_with_stock(tmp_path / "q", demo_model, tmp_path / "stock")


class TestLists:
    def test_models(self) -> None:
        models = {model.name: model for model in demo_models()}
        assert {"q8", "q6", "q4", "q4-small", "q3"} <= models.keys()
        for model in models.values():
            if model.stock is not None:
                assert models[model.stock].stock is None
            else:
                context = cli.commands["quantize"].make_context("quantize", ["m", "-o", "out", *model.quantize])
                assert context.params["model"] == Path("m")
        assert [model.name for model in demo_models(["q4-stock"])] == ["q4", "q4-stock"]

    def test_prompts_differ_and_say_what_they_want(self) -> None:
        prompts = random_prompts(256)
        assert len({prompt.text for prompt in prompts}) == 256 and prompts[:64] == random_prompts(64)
        for prompt in prompts:
            assert prompt.want["colour"] in prompt.text and prompt.want["shape"] in prompt.text
            assert prompt.want["background"] in prompt.text
            assert ("silence" in prompt.text) == (prompt.want["tone"] == "silence")


class TestMeasuring:
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def small(cls) -> Iterator[None]:
        """Clips, texts and schedules that take a tenth of the time."""
        with pytest.MonkeyPatch.context() as patch:
            shorten(patch, (1.0, 0.0), (0.6, 0.0), **SMALL)
            patch.setattr(demo_quality, "SIZE", SMALL)
            yield

    @pytest.fixture(scope="class")
    @classmethod
    def paths(cls, folders: dict[str, Path]) -> dict[str, Path]:
        return {name: folders[name] for name in (REFERENCE, "q4")}

    @pytest.fixture(scope="class")
    @classmethod
    def results(cls, paths: dict[str, Path]) -> dict[str, Result]:
        return measure_prompt(paths, 0, PROMPT)

    def test_receipt(self, paths: dict[str, Path], results: dict[str, Result]) -> None:
        receipt = summary(paths, [PROMPT], [Q4], [results])
        reference, q4 = receipt["models"]
        assert (reference["name"], q4["name"], q4["quantize"]) == (REFERENCE, "q4", "--bits 4")
        assert "velocity" not in reference and reference["bytes"] > q4["bytes"]
        assert 0.01 < q4["layers"] < 0.2 and 10 < q4["psnr_db"] < 80 and q4["log_spectral_distance_db"] > 0
        assert 0 < q4["velocity"]["video"] < 0.5 and 0.9 < q4["cosine"]["video"] < 1
        assert q4["components"]["transformer"]["packed"]["bits_per_weight"] == 4.5
        assert 4.5 < q4["bits_per_weight"] < 16
        header, *rows = table(receipt)
        assert {len(row) for row in rows} == {len(header)} and rows[1][header.index("followed")].endswith("/1")

    @pytest.mark.parametrize(
        ("wrong", "followed"), [({}, 1), ({"background": "white"}, 1), ({"shape": "star", "tone": "low"}, 0)]
    )
    def test_a_prompt_is_followed(
        self, paths: dict[str, Path], results: dict[str, Result], wrong: dict[str, str], followed: int
    ) -> None:
        """By a clip with its colour, shape, motion and tone."""
        found = results | {"q4": results["q4"]._replace(wrong=wrong)}
        row = summary(paths, [PROMPT], [Q4], [found])["models"][1]
        assert row["followed"] == followed and row["misses"] == ({} if followed else {PROMPT.text: wrong})
        assert row["right"] == {name: name not in wrong for name in ("colour", "shape", "motion", "tone", "background")}

    def test_plot(self, paths: dict[str, Path], results: dict[str, Result], tmp_path: Path) -> None:
        strips = {name: [result.strip] for name, result in results.items()}
        plot_demo(tmp_path / "p.svg", summary(paths, [PROMPT], [Q4], [results]), strips)
        text = (tmp_path / "p.svg").read_text()
        assert text.startswith("<?xml") and text.count("<image") == 1
