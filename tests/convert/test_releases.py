"""Releases that are converted and cannot be generated with yet: tiny files of theirs, from end to end."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ltx2
from ltx2.convert.inspect import inspect
from ltx2.convert.output.files import component_files
from ltx2.convert.write import write_plan
from ltx2.quant.plan.replan import repack
from ltx2.runtime.errors import UnsupportedError, VerificationError
from ltx2.runtime.events import Warned
from ltx2.runtime.files.tensors import open_tensorfile
from ltx2.runtime.model.layout import ModelFolder
from tests.support import published
from tests.support.folders import accept, rewrite, verified
from tests.support.official import plan_of
from tests.support.parity import relative_l2, require

SPLIT = (
    "ltx-2.5-22b-transformer-bf16", "gemma4-12b-with-proj-ltx-2.5-bf16", "ltx-2.5-video-vae-bf16",
    "ltx-2.5-audio-vae-bf16", "ltx-2.5-duration-head-bf16", "ltx-2.5-latent-spatial-upscaler-x2-bf16-1.0",
)  # fmt: skip
TEXT_ENCODER = SPLIT[1]
# Sizes of a text encoder whose tensors fit its configuration.
TEXT_LAYERS = 6
TEXT_WIDTHS = {
    3840: 64, 15360: 96, 262144: 128, 4096: 4 * 16, 2048: 2 * 16, 8192: 4 * 32, 512: 32, 256: 16,
    188160: 64 * (TEXT_LAYERS + 1),
}  # fmt: skip
TEXT_SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "head_dim": 16, "global_head_dim": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8, "vocab_size_per_layer_input": 128,
}  # fmt: skip


def convert(out: Path, *sources: Path) -> tuple[Path, list[str]]:
    """The converted folder, and the warnings."""
    plan = plan_of(*sources, variant="dev")
    warnings = [event.message for event in write_plan(plan, out) if isinstance(event, Warned)]
    return out, warnings


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("split")
    return [published.write_tiny(folder, name) for name in SPLIT]


@pytest.fixture(scope="module")
def monolith(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.write_tiny(tmp_path_factory.mktemp("monolith"), "ltx-2.3-22b")


@pytest.fixture(scope="module")
def model(split: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tmp_path_factory.mktemp("converted") / "model", *split)[0]


class TestSplitFiles:
    def test_whole(self, model: Path, split: list[Path]) -> None:
        """All components, every value, without a warning."""
        report = verified(model, split)
        assert report.components == (
            "audio_vae", "connectors", "duration_head", "spatial_upscaler", "text_encoder", "transformer", "video_vae",
            "vocoder",
        )  # fmt: skip
        assert report.compared == report.tensors
        assert ModelFolder.open(model).manifest.release == "2.5"

    def test_predicted_sizes(self, split: list[Path], model: Path) -> None:
        plan = plan_of(*split, variant="dev")
        files = [f for c in plan.components.values() for f in component_files(plan, c, 5 * 10**9)]
        assert {f.path: f.size for f in files} == {f.path: (model / f.path).stat().st_size for f in files}
        assert len(files) == len([p for p in model.glob("*/*") if p.is_file()])

    def test_tokenizer(self, model: Path, split: list[Path]) -> None:
        made_from = {"tokenizer.json": "tokenizer_json", "chat_template.jinja": "hf_asset__chat_template.jinja"}
        for name, tensor in made_from.items():
            assert json.loads((model / "text_encoder" / name).read_text()) == {"made from": tensor}
        path = model / "text_encoder" / "tokenizer.json"
        content = path.read_bytes()
        try:
            path.write_bytes(content.replace(b"made", b"maid"))
            accept(model)
            with pytest.raises(VerificationError, match=r"text_encoder: tokenizer\.json differs from the source"):
                verified(model, split)
        finally:
            path.write_bytes(content)
            accept(model)

    def test_parts_come_alone(self, split: list[Path], tmp_path: Path) -> None:
        """What a component lacks then is said, and such a folder is what it claims to be."""
        transformer, warnings = convert(tmp_path / "transformer", split[0])
        assert [w.partition(" is missing")[0] for w in warnings] == ["connectors: text projection"]
        assert verified(transformer, [split[0]]).components == ("connectors", "transformer")
        text, warnings = convert(tmp_path / "text", split[1])
        assert [w.partition(" is missing")[0] for w in warnings] == ["connectors: embeddings connectors"]
        assert verified(text, [split[1]]).components == ("connectors", "text_encoder")


class TestMonolith:
    def test_whole(self, monolith: Path, tmp_path: Path) -> None:
        out, warnings = convert(tmp_path / "out", monolith)
        assert verified(out, [monolith]).compared == 2162 - 86 * 2 and not warnings

    def test_quantized(self, tmp_path: Path) -> None:
        """Quantizing needs no network."""
        monolith = published.write_tiny(tmp_path, "ltx-2.3-22b", widths={4096: 64, 2048: 64})
        out = ltx2.convert(monolith, tmp_path / "out", variant="dev", only=["transformer"], bits=4, recipe="uniform")
        assert inspect(out)["components"]["transformer"]["quantization"]["bits"] == 4
        assert verified(out, [monolith], repack).compared > 200

    def test_missing_tensor_in_a_folder(self, monolith: Path, tmp_path: Path) -> None:
        out, _ = convert(tmp_path / "out", monolith)
        rewrite(out / "vocoder" / "model.safetensors", {"mel_stft.mel_basis": None})
        accept(out)
        with pytest.raises(VerificationError, match=r"vocoder: tensor mel_stft\.mel_basis is missing"):
            verified(out)


class TestGenerate:
    SAID = r"cannot generate with LTX-2\.5: it converts and verifies its files, and generates with LTX-2\.0 only"

    def test_says_so_at_once(self, model: Path) -> None:
        with pytest.raises(UnsupportedError, match=self.SAID) as error:
            ltx2.load(model)
        assert error.value.exit_code == 1 and "newer ltx2" in error.value.fix

    def test_command(self, model: Path, here: Any, tmp_path: Path) -> None:
        done = here("generate", "a kite", "-m", model, "-o", tmp_path / "clip.mp4", "--json")
        assert done.code == 1 and json.loads(done.out)["error"]["kind"] == "unsupported"
        assert not list(tmp_path.glob("clip*"))


class TestInspect:
    def test_model(self, model: Path, demo_model: Path) -> None:
        assert (inspect(model)["release"], inspect(model)["generate"]) == ("2.5", False)
        assert inspect(demo_model)["generate"] is True

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("ltx-2-19b-fp8", ("checkpoint", "2.0", "dev", "FP8 (E4M3)", True, False)),  # dev needs guidance
            ("ltx-2.3-22b", ("checkpoint", "2.3", "dev", None, True, False)),
            ("ltx-2.5-22b-transformer-nvfp4", ("checkpoint", "2.5", "distilled", "NVFP4", True, False)),
            ("ltx-2.5-22b-transformer-int8", ("checkpoint", "2.5", "dev", "int8", False, False)),
            ("ltx-2.5-latent-temporal-upscaler-x2-bf16-1.0", ("temporal_upscaler", None, None, None, True, False)),
            ("gemma4-12b-with-proj-ltx-2.5-bf16", ("text_encoder", "2.5", None, None, True, False)),
        ],
    )
    def test_published(self, name: str, expected: tuple[object, ...], tmp_path: Path) -> None:
        found = inspect(published.write_published(tmp_path, name)[0])
        assert tuple(found[k] for k in ("kind", "release", "variant", "storage", "convert", "generate")) == expected
        assert ("rotated" in found["reason"]) if not found["convert"] else found["reason"] is None

    @pytest.mark.parametrize("name", [published.TEMPORAL, published.LORA])
    def test_what_is_not_used_yet(self, name: str, tmp_path: Path) -> None:
        found = inspect(published.write_published(tmp_path, name)[0])
        assert (found["release"], found["convert"], found["generate"]) == ("2.0", True, False)

    def test_distilled_generates(self, tmp_path: Path) -> None:
        _, distilled = published.write_published(tmp_path, published.MONOLITH)
        assert inspect(distilled)["generate"] is True

    def test_releases(self, tmp_path: Path) -> None:
        assert inspect(published.write_gemma(tmp_path / "gemma"))["releases"] == ["2.0", "2.3"]

    def test_parameters_do_not_depend_on_the_storage(self, tmp_path: Path) -> None:
        names = ("ltx-2-19b", "ltx-2-19b-fp8", "ltx-2-19b-fp4")
        found = [inspect(published.write_published(tmp_path, name)[0])["components"] for name in names]
        assert {part["transformer"]["parameters"] for part in found} == {18_876_174_592}
        plain, *smaller = (part["transformer"]["bytes"] for part in found)
        assert all(size < plain / 1.7 for size in smaller)


def text_encoder(folder: Path) -> Path:
    """A tiny text encoder file whose tensors fit its configuration."""
    path = published.write_tiny(folder, TEXT_ENCODER, TEXT_LAYERS, TEXT_WIDTHS)
    metadata = open_tensorfile(path).metadata
    config = json.loads(metadata["gemma_config"])
    config["text_config"] |= TEXT_SIZES
    fitting = folder / "fitting.safetensors"
    save_file(load_file(path), fitting, {**metadata, "gemma_config": json.dumps(config)})
    return fitting


def test_text_encoder_is_what_mlx_lm_loads(tmp_path: Path, figure: Any) -> None:
    """Folder and configuration describe the model that transformers computes."""
    mlx_lm = require("mlx_lm.utils")
    torch = require("torch")
    transformers = require("transformers")
    source = text_encoder(tmp_path)
    out, _ = convert(tmp_path / "out", source)
    ids = np.array([[2, 5, 7, 9, 11, 3, 4, 8, 19, 22, 100, 50]])
    network, config = mlx_lm.load_model(out / "text_encoder")
    assert config["gemma_version"] == "gemma4-12b-ltx-v1"
    logits = np.array(network(mx.array(ids)))

    file = open_tensorfile(source)
    text_config = json.loads(file.metadata["gemma_config"])["text_config"]
    reference = transformers.Gemma4UnifiedForCausalLM(transformers.Gemma4UnifiedTextConfig(**text_config)).eval()
    weights = {n: torch.from_numpy(np.array(file.array(n))) for n in file.tensors if n.startswith("model.")}
    assert reference.load_state_dict(weights, strict=False).unexpected_keys == []
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids)).logits.numpy()
    figure("Gemma 4 as converted, mlx-lm vs transformers, rel L2", relative_l2(logits, expected), limit=1e-5)
