"""The same networks in other wrappings: text encoders as one file, bare, tied or packed by MLX, split and bare LTX
files, folders as macOS and other tools leave them. What comes of them is what comes of the published ones."""

import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import ltx2
from ltx2.convert.inspect import inspect
from ltx2.convert.sources.sentencepiece import tokenizer_files
from ltx2.convert.verify import verify
from ltx2.runtime.errors import CheckpointError, Ltx2Error, UnsupportedError
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_weights
from ltx2.runtime.networks.text.tokenizer import Tokenizer
from tests.support import encoded
from tests.support.encoded import Tensors
from tests.support.folders import accept, contents
from tests.support.official import GEMMA, MONOLITH, UPSCALER, plan_of
from tests.support.parity import require

DIT = "model.diffusion_model."
CONFIG = json.loads((GEMMA / "config.json").read_text())


def gemma() -> Tensors:
    return encoded.file_tensors(GEMMA / "model.safetensors")


def bare() -> Tensors:
    """The language model's tensors as text-only exports and ComfyUI name them."""
    return {name.removeprefix("language_model."): value for name, value in gemma().items()}


def folder(path: Path, tensors: Tensors, name: str = "model.safetensors", **config: Any) -> Path:
    """Google's folder with other weights, under another name, with another configuration."""
    shutil.copytree(GEMMA, path)
    (path / "model.safetensors").unlink()
    encoded.write(path / name, tensors, {})
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    return path


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What comes of Google's folder, the manifest aside, which names the sources."""
    return text_encoder(ltx2.convert([GEMMA], tmp_path_factory.mktemp("usual") / "model"))


def text_encoder(model: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(model).items() if name.startswith("text_encoder/")}


class TestGemma:
    def test_text_only(self, tmp_path: Path, usual: dict[str, bytes]) -> None:
        """`model.*`, the configuration of the language model alone, and its embedding a second time."""
        tensors = bare() | {"lm_head.weight": bare()["model.embed_tokens.weight"]}
        source = folder(tmp_path / "gemma", tensors)
        own = CONFIG["text_config"] | {key: CONFIG[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        (source / "config.json").write_text(json.dumps(own | {"architectures": ["Gemma3ForCausalLM"]}))
        assert text_encoder(ltx2.convert([source], tmp_path / "out")) == usual
        (dropped,) = [e for e in plan_of(source).entries if e.tensor.name == "lm_head.weight"]
        assert "embedding" in getattr(dropped, "reason", "")

    @pytest.mark.parametrize("alone", [False, True])
    def test_any_file_name(self, tmp_path: Path, usual: dict[str, bytes], alone: bool) -> None:
        name = "gemma-3-12b-it-qat.safetensors"
        source = folder(tmp_path / "gemma", gemma(), name)
        assert text_encoder(ltx2.convert([source / name if alone else source], tmp_path / "out")) == usual

    @pytest.mark.parametrize("apart", [False, True])
    def test_one_file_of_comfyui(self, tmp_path: Path, usual: dict[str, bytes], apart: bool) -> None:
        """With a vision tower and a tokenizer inside; configuration and tokenizer beside it, or in a folder of their
        own."""
        extra: Tensors = {
            "vision_model.post_layernorm.weight": ("BF16", np.zeros(4, np.uint16)),
            "multi_modal_projector.mm_input_projection_weight": ("BF16", np.zeros((4, 4), np.uint16)),
            "spiece_model": ("U8", np.zeros(9, np.uint8)),
        }
        source = folder(tmp_path / "gemma", {} if apart else bare() | extra, "gemma_3_12B_it.safetensors")
        if apart:
            (source / "gemma_3_12B_it.safetensors").unlink()
        file = encoded.write(tmp_path / "gemma_3_12B_it.safetensors", bare(), {})
        sources = [file, source] if apart else [source / file.name]
        assert text_encoder(ltx2.convert(sources, tmp_path / "out")) == usual

    def test_scaled_fp8(self, tmp_path: Path) -> None:
        """ComfyUI's: codes with a scale and a mark; they stay codes."""
        name = "model.layers.0.mlp.up_proj"
        weight = encoded.from_bf16(bare()[f"{name}.weight"][1])
        mark = np.frombuffer(b'{"format": "float8_e4m3fn"}', np.uint8)
        tensors = bare() | encoded.scaled(f"{name}.weight", weight) | {f"{name}.comfy_quant": ("U8", mark)}
        out = ltx2.convert([folder(tmp_path / "gemma", tensors)], tmp_path / "out")
        accept(out)
        quantization = ModelFolder.open(out).quantization("text_encoder")
        assert quantization.of(name).mode == "mxfp8"
        files = ModelFolder.open(out).tensor_files("text_encoder")
        assert f"{name}.weight_scale" in files[0].tensors

    def test_diffusers(self, tmp_path: Path, usual: dict[str, bytes]) -> None:
        """The tokenizer stands in the folder beside."""
        source = folder(tmp_path / "text_encoder", gemma())
        (tmp_path / "tokenizer").mkdir()
        for path in source.glob("*token*"):
            path.rename(tmp_path / "tokenizer" / path.name)
        assert text_encoder(ltx2.convert([source], tmp_path / "out")) == usual

    def test_our_own(self, tmp_path: Path, usual: dict[str, bytes]) -> None:
        model = ltx2.convert([GEMMA], tmp_path / "model")
        assert text_encoder(ltx2.convert([model / "text_encoder"], tmp_path / "out")) == usual

    @pytest.mark.parametrize("prefix", ["", "language_model."])
    def test_packed_by_mlx(self, tmp_path: Path, prefix: str) -> None:
        """Codes are kept as they are; a float type decodes them as MLX does."""
        ltx2.convert([GEMMA], tmp_path / "model")
        ltx2.quantize(tmp_path / "model", tmp_path / "q", bits=4, recipe="uniform")
        packed = encoded.file_tensors(tmp_path / "q" / "text_encoder" / "model.safetensors")
        config = json.loads((tmp_path / "q" / "text_encoder" / "config.json").read_text())["quantization"]
        common = {key: config[key] for key in ("group_size", "bits")}
        assert common.keys() == config.keys() - {"mode"}
        source = folder(tmp_path / "mlx", {prefix + name: value for name, value in packed.items()}, quantization=common)
        out = ltx2.convert([source], tmp_path / "out")
        accept(out)
        assert encoded.file_tensors(out / "text_encoder" / "model.safetensors").keys() == packed.keys()
        for name, (dtype, value) in encoded.file_tensors(out / "text_encoder" / "model.safetensors").items():
            assert dtype == packed[name][0] and np.array_equal(value, packed[name][1]), name
        plain = ltx2.convert([source], tmp_path / "f32", dtype="f32")
        layer, floats = "model.layers.0.mlp.up_proj", load_weights(ModelFolder.open(out), "text_encoder")
        scales, biases = (floats[f"{layer}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
        wanted = mx.dequantize(floats[f"{layer}.weight"], scales, biases, **common)
        found = encoded.file_tensors(plain / "text_encoder" / "model.safetensors")[f"{layer}.weight"][1]
        np.testing.assert_allclose(found, np.array(wanted), rtol=1e-6, atol=1e-8)

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        source = folder(tmp_path / "gemma", gemma())
        for path in source.glob("*token*"):
            path.unlink()
        with pytest.raises(CheckpointError, match=r"without a tokenizer.*hf download google/gemma-3-12b-it"):
            ltx2.convert([source], tmp_path / "out")
        assert inspect(source)["convert"] is False

    def test_one_file_alone(self, tmp_path: Path) -> None:
        """The configuration follows from its shapes, the tokenizer is inside."""
        model = sentencepiece_model()
        tensors = bare() | {"spiece_model": ("U8", np.frombuffer(model, np.uint8))}
        out = ltx2.convert([encoded.write(tmp_path / "gemma.safetensors", tensors, {})], tmp_path / "out")
        accept(out)
        made, known = ModelFolder.open(out).config("text_encoder"), CONFIG["text_config"]
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                    "intermediate_size", "vocab_size", "query_pre_attn_scalar"):  # fmt: skip
            assert made[key] == known[key], key
        assert (out / "text_encoder" / "tokenizer.model").read_bytes() == model
        assert Tokenizer.load(out / "text_encoder").encode("a red kite", 16).ids.shape == (1, 16)


def sentencepiece_model() -> bytes:
    """A small one, trained on words at random, as Gemma's is made."""
    spm = require("sentencepiece")
    words = ["a", "red", "square", "moves", "left", "kite", "dunes", "wind", "the", "grass", "漢字", "é", "\n\n", ""]
    draw = random.Random(0)
    lines = [" ".join(draw.choices(words, k=draw.randint(3, 12))) for _ in range(1000)]
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=330, model_type="bpe", byte_fallback=True,
        add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity", pad_id=0, eos_id=1,
        bos_id=2, unk_id=3, user_defined_symbols=["<start_of_turn>", "\n\n"], minloglevel=2,
    )  # fmt: skip
    return out.getvalue()


class TestSentencePiece:
    def test_same_tokens(self) -> None:
        """As the library itself cuts texts, whatever is in them."""
        tokenizers = require("tokenizers")
        model = sentencepiece_model()
        theirs = require("sentencepiece").SentencePieceProcessor(model_proto=model)
        ours = tokenizers.Tokenizer.from_str(tokenizer_files(model, "x")["tokenizer.json"].decode())
        draw = random.Random(1)
        texts = ["".join(draw.choices("a redsqu mve lft kiwng é漢 \n🎉", k=40)) for _ in range(200)]
        for text in [*texts, "", " ", "  two  spaces", "<start_of_turn>user\n\nkite"]:
            assert ours.encode(text).ids == [theirs.bos_id(), *theirs.encode(text)], repr(text)

    @pytest.mark.parametrize("content", [b"", bytes(100), b"\xff" * 40, b"not one", b"\x0a\x05\x0a\x01a\x15\x00"])
    def test_what_is_none(self, content: bytes) -> None:
        with pytest.raises(CheckpointError, match="is no tokenizer"):
            tokenizer_files(content, "spiece_model")


Parts = tuple[Tensors, Tensors, dict[str, Any]]


@pytest.fixture(scope="module")
def parts() -> Parts:
    """Tensors of the connectors and of the transformer, and the configuration."""
    tensors = encoded.file_tensors(MONOLITH)
    side = {n: v for n, v in tensors.items() if "_embeddings_connector." in n or n.startswith("text_embedding_")}
    dit = {name: value for name, value in tensors.items() if name.startswith(DIT) and name not in side}
    return side, dit, dict(plan_of(MONOLITH, variant="dev").components["transformer"].config)


class TestSplitFiles:
    @pytest.mark.parametrize("told", ["prefixed", "bare", "one name"])
    def test_configuration_of_another_source(self, tmp_path: Path, parts: Parts, told: str) -> None:
        side, dit, section = parts
        config = {"config": json.dumps({"transformer": section})}
        usual = ltx2.convert([MONOLITH], tmp_path / "usual", variant="dev", only=("transformer", "connectors"))
        if told != "prefixed":
            side = {name.removeprefix(DIT): value for name, value in side.items()}
        if told == "one name":
            side["text_embedding_projection.weight"] = side.pop("text_embedding_projection.aggregate_embed.weight")
        bare_dit = {name.removeprefix(DIT) if told != "prefixed" else name: value for name, value in dit.items()}
        sources = [
            encoded.write(tmp_path / "ltx-2-dev.safetensors", bare_dit, config),
            encoded.write(tmp_path / "connectors.safetensors", side, {}),
        ]
        out = ltx2.convert(sources, tmp_path / "out")
        assert ModelFolder.open(out).manifest.release == ModelFolder.open(usual).manifest.release
        for component in ("transformer", "connectors"):
            for name in ("config.json", "model.safetensors"):
                path = Path(component) / name
                assert tensors_of(usual / path) == tensors_of(out / path)

    def test_nowhere_a_configuration(self, tmp_path: Path, parts: Parts) -> None:
        with pytest.raises(CheckpointError, match="no configuration for its connectors"):
            plan_of(encoded.write(tmp_path / "connectors.safetensors", parts[0], {}))


def tensors_of(path: Path) -> Any:
    """A file's content, whatever the order of its tensors."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    return {name: (dtype, value.tobytes()) for name, (dtype, value) in encoded.file_tensors(path).items()}


class TestFolders:
    def test_companions_of_macos(self, tmp_path: Path) -> None:
        """`._name` beside every file, as on file systems that have no place for its attributes."""

        def shadow(path: Path) -> None:
            for file in [file for file in path.rglob("*") if file.is_file()]:
                (file.parent / f"._{file.name}").write_bytes(bytes.fromhex("0005160700020000") + bytes(4088))

        (tmp_path / "files").mkdir()
        shutil.copy(UPSCALER, tmp_path / "files")
        shadow(tmp_path / "files")
        out = ltx2.convert([tmp_path / "files"], tmp_path / "out")
        assert inspect(tmp_path / "files")["files"][0]["kind"] == "spatial_upscaler"
        shadow(out)
        list(verify(out))

    def test_is_what_its_tensors_say(self, tmp_path: Path) -> None:
        """Whatever a config.json says."""
        shutil.copy(UPSCALER, tmp_path)
        for config in ({}, {"model_type": "t5"}):
            (tmp_path / "config.json").write_text(json.dumps(config))
            assert list(plan_of(tmp_path).components) == ["spatial_upscaler"]

    @pytest.mark.parametrize(
        ("tensors", "said"),
        [({f"{DIT}transformer_blocks.0.attn1.to_q.weight": ("BF16", np.zeros((2, 2), np.uint16))}, "LTX-Video"),
         ({"video": ("F32", np.zeros(2, np.float32)), "audio": ("F32", np.zeros(2, np.float32))}, "holds latents"),
         ({"video_context": ("F32", np.zeros(2, np.float32))}, "holds embeddings"),
         ({"stage1.video": ("F32", np.zeros(2, np.float32))}, "holds noise")],
    )  # fmt: skip
    def test_other_files_are_named(self, tmp_path: Path, tensors: Tensors, said: str) -> None:
        path = encoded.write(tmp_path / "x.safetensors", tensors, {})
        with pytest.raises(Ltx2Error, match=said):
            plan_of(path)

    @pytest.mark.parametrize(
        ("content", "said"),
        [(b"\0\0\0\x20ftypisom" + bytes(99), "is a video"), (b'{\n  "request": {}}', "is a JSON file"),
         (b"A red kite over dunes, wind in the grass", "is a text"), (b"\x89PNG\r\n\x1a\n" + bytes(9), "is a picture")],
    )  # fmt: skip
    def test_no_weights(self, tmp_path: Path, content: bytes, said: str) -> None:
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"x\.safetensors {said}"):
            plan_of(tmp_path / "x.safetensors")

    def test_inspecting_our_own_files(self, tmp_path: Path) -> None:
        video = ("F32", np.zeros((1, 2), np.float32))
        for name, tensors, metadata, kind in (
            ("a", {"video": video}, {}, "latents"), ("b", {"x": video}, {"run": "{}"}, "state"),
            ("c", {"video_context": video}, {}, "embeddings"), ("d", {"x": video}, {"about": "{}"}, "statistics"),
        ):  # fmt: skip
            path = encoded.write(tmp_path / f"{name}.safetensors", tensors, metadata)
            assert inspect(path)["kind"] == kind
        (tmp_path / "clip.json").write_text('{"request": {"prompt": "a"}}')
        assert inspect(tmp_path / "clip.json") | {"request": {"prompt": "a"}} == inspect(tmp_path / "clip.json")

    def test_quantized_by_other_tools(self, tmp_path: Path) -> None:
        packed: Tensors = {
            "transformer_blocks.0.audio_attn1.to_q.weight": ("U32", np.zeros((2, 2), np.uint32)),
            "transformer_blocks.0.audio_attn1.to_q.scales": ("BF16", np.zeros((2, 2), np.uint16)),
        }
        with pytest.raises(UnsupportedError, match="MLX-quantized"):
            plan_of(encoded.write(tmp_path / "x.safetensors", packed, {}))
