"""GGUF files as sources: LTX-2's transformer as city96's converter lays it out, Gemma 3 as llama.cpp does. Files are
written by the `gguf` package; what is read from them is compared with the published files they were made of."""

import json
import struct
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import ltx2
from ltx2.convert.inspect import inspect
from ltx2.convert.plan.check import check_plan
from ltx2.convert.plan.entries import plan_json
from ltx2.convert.sources.ggufmodel import NAMES
from ltx2.convert.tensors.gguf import decoder
from ltx2.convert.write import write_plan
from ltx2.runtime.errors import CheckpointError, Ltx2Error, UnsupportedError
from ltx2.runtime.events import Warned
from ltx2.runtime.files.tensors import bf16_to_f32, open_tensorfile, to_float32
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.text.tokenizer import Tokenizer
from tests.convert.test_wrappings import sentencepiece_model
from tests.support import encoded
from tests.support.folders import accept
from tests.support.official import FOLDER_25, GEMMA, MONOLITH, UPSCALER, plan_of
from tests.support.parity import require

DIT = "model.diffusion_model."
TABLE = "scale_shift_table"
Q8, Q4 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0
F32, BF16 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.BF16


def transformer() -> dict[str, tuple[str, Any]]:
    """The transformer's tensors and the connectors', by their names without the prefix, as float32."""
    tensors = encoded.file_tensors(MONOLITH)
    return {n.removeprefix(DIT): (d, to_float32(v, d)) for n, (d, v) in tensors.items() if n.startswith(DIT)}


def write(path: Path, architecture: str, tensors: dict[str, Any], kind: Any, **values: Any) -> Path:
    """Matrices of whole blocks in `kind`, vectors and tables in float32, the rest in BF16, as the converters do."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        key = key.replace("__", ".")
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add: Any = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
            add(key, value)
    for name, value in tensors.items():
        exact = value.ndim == 1 or TABLE in name
        stored = F32 if exact else kind if value.shape[-1] % 32 == 0 else BF16
        writer.add_tensor(name, gguf.quants.quantize(value, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def transformer_file(path: Path, kind: Any = BF16, **values: Any) -> Path:
    config = open_tensorfile(MONOLITH).metadata["config"]
    tensors = {name: value for name, (_, value) in transformer().items()}
    return write(path, "ltxv", tensors, kind, **({"config": config} | values))


def gemma_file(path: Path, kind: Any = BF16, tokenizer: bool = True, **values: Any) -> Path:
    theirs = {ours: name for name, ours in NAMES.items()}
    tensors: dict[str, Any] = {}
    for name, (dtype, value) in encoded.file_tensors(GEMMA / "model.safetensors").items():
        parts = name.removeprefix("language_model.model.").removesuffix(".weight").split(".")
        block, own = (f"blk.{parts[1]}.", ".".join(parts[2:])) if parts[0] == "layers" else ("", parts[0])
        shift = np.float32(own.endswith("norm"))
        tensors[f"{block}{theirs[own]}.weight"] = to_float32(value, dtype) + shift
    return write(path, "gemma3", tensors, kind, **(pieces() if tokenizer else {}), **{
        "gemma3__context_length": 131072, "gemma3__attention__sliding_window": 1024, "gemma3__rope__freq_base": 1e6,
        "gemma3__attention__layer_norm_rms_epsilon": 1e-6, "gemma3__rope__scaling__type": "linear",
        "gemma3__rope__scaling__factor": 8.0,
    }, **values)  # fmt: skip


@cache
def pieces() -> dict[str, Any]:
    """The header's keys of a small SentencePiece model."""
    model = require("sentencepiece").SentencePieceProcessor(model_proto=sentencepiece_model())
    tests = {3: model.is_control, 2: model.is_unknown, 6: model.is_byte}
    kinds = [next((kind for kind, is_one in tests.items() if is_one(i)), 1) for i in range(len(model))]
    texts = [model.id_to_piece(i) for i in range(len(model))]
    kinds = [4 if text in ("<start_of_turn>", "\n\n") else kind for text, kind in zip(texts, kinds, strict=True)]
    ids = {"bos": model.bos_id(), "eos": model.eos_id(), "padding": model.pad_id(), "unknown": model.unk_id()}
    scores = [float(model.get_score(i)) for i in range(len(model))]
    listed = {"model": "llama", "tokens": texts, "scores": scores, "token_type": kinds}
    return {f"tokenizer__ggml__{key}": value for key, value in listed.items()} | {
        f"tokenizer__ggml__{key}_token_id": number for key, number in ids.items()
    }


def weights(model: Path, component: str) -> dict[str, Any]:
    return {
        name: (dtype, to_float32(value, dtype))
        for name, (dtype, value) in encoded.file_tensors(model / component / "model.safetensors").items()
    }


class TestTransformer:
    def test_not_quantized_gives_the_published_values(self, tmp_path: Path) -> None:
        """BF16 with float32 vectors, as the converter writes at first."""
        source = transformer_file(tmp_path / "ltx-2-distilled-BF16.gguf")
        projection = {n: v for n, v in encoded.file_tensors(MONOLITH).items() if n.startswith("text_embedding_")}
        side = encoded.write(tmp_path / "projection.safetensors", projection, {})
        out = ltx2.convert([source, side], tmp_path / "out")
        accept(out)
        usual = ltx2.convert([MONOLITH], tmp_path / "usual", variant="distilled", only=("transformer", "connectors"))
        assert ModelFolder.open(out).manifest.release == ModelFolder.open(usual).manifest.release
        for component in ("transformer", "connectors"):
            ours, theirs = weights(out, component), weights(usual, component)
            assert ours.keys() == theirs.keys()
            for name, (dtype, value) in theirs.items():
                assert ours[name][0] == dtype and np.array_equal(ours[name][1], value), name
            configs = ((folder / component / "config.json").read_text() for folder in (out, usual))
            assert json.loads(next(configs)) == json.loads(next(configs))

    @pytest.mark.parametrize("kind", [Q8, Q4])
    def test_quantized(self, tmp_path: Path, kind: Any) -> None:
        """The package's own values, rounded once; the plan names the steps, and the loss is said."""
        source = transformer_file(tmp_path / "ltx-2-distilled.gguf", kind)
        plan = plan_of(source, only=("transformer",))
        name = "transformer_blocks.0.attn1.to_q.weight"
        (entry,) = [e for e in plan_json(plan)["plan"] if e["name"] == name]
        value = transformer()[name][1]
        assert entry["dtype"] == kind.name and entry["shape"] == list(value.shape) == entry["out_shape"]
        assert entry["transform"] == [f"{kind.name.lower()}_dequantize", "cast(bf16)"]
        events = list(write_plan(plan, tmp_path / "out"))
        said = [event.message for event in events if isinstance(event, Warned)]
        assert any(f"quantized already: {kind.name}" in message for message in said)
        stored = weights(tmp_path / "out", "transformer")[name]
        wanted = gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind)
        assert stored[0] == "BF16" and np.array_equal(stored[1], bf16_to_f32(encoded.to_bf16(wanted)))
        tables = [dtype for name, (dtype, _) in weights(tmp_path / "out", "transformer").items() if TABLE in name]
        assert set(tables) == {"F32"}
        assert ltx2.verify(tmp_path / "out", sources=source)["compared"] > 0

    def test_inspect(self, tmp_path: Path) -> None:
        found = inspect(transformer_file(tmp_path / "ltx-2-dev-Q8_0.gguf", Q8))
        assert (found["storage"], found["variant"]) == ("GGUF (Q8_0)", "dev")
        published = inspect(MONOLITH)["components"]["transformer"]
        assert found["components"]["transformer"]["parameters"] == published["parameters"]
        assert found["release"] == inspect(MONOLITH)["release"]

    def test_without_its_configuration(self, tmp_path: Path) -> None:
        """Some converters leave it out; another source may have it."""
        source = transformer_file(tmp_path / "ltx-2-distilled.gguf", config="")
        with pytest.raises(CheckpointError, match="no configuration for its transformer"):
            ltx2.convert(source, tmp_path / "out", only=("transformer",))

    def test_connectors_twice(self, tmp_path: Path) -> None:
        """In the GGUF too, and unquantized in a file of their own: that one is taken."""
        source = transformer_file(tmp_path / "ltx-2-distilled.gguf", Q8)
        side = {n: v for n, v in encoded.file_tensors(MONOLITH).items() if "_connector." in n or "projection." in n}
        side = {n: v for n, v in side.items() if "caption_projection" not in n}
        plan = plan_of(source, encoded.write(tmp_path / "connectors.safetensors", side, {}))
        assert {move.file.path.suffix for move in plan.moves("connectors")} == {".safetensors"}
        assert {move.file.path.suffix for move in plan.moves("transformer")} == {".gguf"}
        check_plan(plan)
        with pytest.raises(CheckpointError, match=r"the text projection is missing.*file of connectors"):
            check_plan(plan_of(source))
        assert ltx2.inspect(source)["convert"] is False

    def test_a_dimension_that_the_format_drops(self, tmp_path: Path) -> None:
        path = FOLDER_25 / "ltx-2.5-demo-distilled-transformer-bf16.safetensors"
        published, values = open_tensorfile(path), encoded.file_tensors(path)
        names = ("keyframes_abs_pos_embedding", "transformer_blocks.0.audio_attn1.to_q.weight")
        tensors = {name: to_float32(values[DIT + name][1], "BF16").squeeze() for name in names}
        source = write(tmp_path / "ltx-distilled.gguf", "ltxv", tensors, BF16, config=published.metadata["config"])
        width = tensors[names[0]].size
        (entry,) = [e for e in plan_json(plan_of(source))["plan"] if e["name"] == "keyframes_abs_pos_embedding"]
        assert entry["transform"] == [f"reshape(1,{width})", "cast(bf16)"] and entry["out_shape"] == [1, width]


class TestGemma:
    def test_not_quantized_gives_the_published_values(self, tmp_path: Path) -> None:
        out = ltx2.convert(gemma_file(tmp_path / "gemma-3-12b-it-BF16.gguf"), tmp_path / "out")
        accept(out)
        usual = ltx2.convert(GEMMA, tmp_path / "usual")
        ours, theirs = weights(out, "text_encoder"), weights(usual, "text_encoder")
        assert ours.keys() == theirs.keys()
        for name, (dtype, value) in theirs.items():
            assert ours[name][0] == dtype
            np.testing.assert_allclose(ours[name][1], value, rtol=0, atol=6e-8 if "norm" in name else 0, err_msg=name)
        made, known = (ModelFolder.open(folder).config("text_encoder") for folder in (out, usual))
        assert {key: made[key] for key in known} | {"eos_token_id": 0} == known | {"eos_token_id": 0}

    def test_its_tokenizer(self, tmp_path: Path) -> None:
        """As SentencePiece itself cuts texts."""
        out = ltx2.convert(gemma_file(tmp_path / "gemma.gguf", Q8), tmp_path / "out")
        theirs = require("sentencepiece").SentencePieceProcessor(model_proto=sentencepiece_model())
        tokenizer = Tokenizer.load(out / "text_encoder")
        for text in ("a red kite", "  two  spaces", "<start_of_turn>user\n\nkite", "é漢 🎉"):
            tokens = tokenizer.encode(text, 64)
            found = np.array(tokens.ids)[np.array(tokens.mask, bool)].tolist()
            assert found == [theirs.bos_id(), *theirs.encode(text.strip())], text

    def test_a_tokenizer_beside_it(self, tmp_path: Path) -> None:
        source = gemma_file(tmp_path / "gemma.gguf", tokenizer=False)
        with pytest.raises(CheckpointError, match="without a tokenizer"):
            ltx2.convert(source, tmp_path / "out")
        for path in GEMMA.glob("*token*"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
        out = ltx2.convert(source, tmp_path / "out")
        assert (out / "text_encoder" / "tokenizer.json").read_bytes() == (GEMMA / "tokenizer.json").read_bytes()

    def test_two_in_a_folder(self, tmp_path: Path) -> None:
        for kind in (Q8, Q4):
            gemma_file(tmp_path / f"gemma-{kind.name}.gguf", kind)
        with pytest.raises(CheckpointError, match="two sources hold a text_encoder"):
            ltx2.convert(tmp_path, tmp_path / "out")

    def test_whole_model(self, tmp_path: Path) -> None:
        """A transformer and a text encoder in GGUF, the rest as published."""
        files = [transformer_file(tmp_path / "ltx-2-distilled-Q8_0.gguf", Q8), gemma_file(tmp_path / "gemma.gguf", Q8)]
        rest = {n: v for n, v in encoded.file_tensors(MONOLITH).items() if not n.startswith(DIT)}
        rest_file = encoded.write(tmp_path / "rest.safetensors", rest, open_tensorfile(MONOLITH).metadata)
        out = ltx2.convert([*files, rest_file, UPSCALER], tmp_path / "out", bits=8)
        accept(out)
        assert ltx2.load(out).plan("a red square").phases


class TestBlocks:
    def test_k_quants(self) -> None:
        """Q4_K after its published layout: two float16, twelve bytes of 6-bit scales and minima, 128 of codes."""
        draw = np.random.default_rng(0)
        block = draw.integers(0, 256, 144, np.uint8)
        block[:4] = np.array([0.5, 0.25], np.float16).view(np.uint8)
        packed, codes, wanted = block[4:16].astype(int), block[16:].reshape(4, 32), np.zeros(256, np.float32)
        for group in range(8):
            if group < 4:
                scale, least = packed[group] & 63, packed[group + 4] & 63
            else:
                scale = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
                least = packed[group + 4] >> 4 | packed[group] >> 6 << 4
            nibbles = codes[group // 2] >> 4 * (group % 2) & 15
            wanted[32 * group : 32 * group + 32] = 0.5 * scale * nibbles - 0.25 * least
        assert np.array_equal(decoder("Q4_K")(block[None])[0], wanted)

    def test_unknown_ones(self) -> None:
        with pytest.raises(UnsupportedError, match="cannot be decoded"):
            decoder("Q8_K")


class TestRefused:
    def test_other_models(self, tmp_path: Path) -> None:
        tower = write(tmp_path / "mmproj.gguf", "clip", {"v.patch_embd.weight": np.zeros((4, 32), np.float32)}, F32)
        with pytest.raises(UnsupportedError, match=r"vision tower.*leave it out"):
            ltx2.convert(tower, tmp_path / "out")
        other = write(tmp_path / "llama.gguf", "llama", {"token_embd.weight": np.zeros((4, 32), np.float32)}, F32)
        with pytest.raises(Ltx2Error, match="is not an LTX-2 file"):
            ltx2.convert(other, tmp_path / "out")
        with pytest.raises(UnsupportedError, match=r"one part of 2.*--merge"):
            ltx2.convert(transformer_file(tmp_path / "a.gguf", split__count=2), tmp_path / "out")

    def test_damaged(self, tmp_path: Path) -> None:
        """Cut anywhere, or with a number in its header that cannot be: one error, without taking memory."""
        whole = gemma_file(tmp_path / "whole.gguf", tokenizer=False).read_bytes()
        damaged = [whole[:length] for length in (4, 8, 20, 24, 60, 300, 5000, len(whole) - 1)]
        damaged += [whole[:at] + struct.pack("<Q", 1 << 62) + whole[at + 8 :] for at in (8, 16, 24)]
        damaged += [whole[:4] + struct.pack(">I", 3) + whole[8:]]
        for number, content in enumerate(damaged):
            (tmp_path / "bad.gguf").write_bytes(content)
            with pytest.raises(CheckpointError, match="not a valid GGUF"):
                ltx2.convert(tmp_path / "bad.gguf", tmp_path / f"out{number}")
