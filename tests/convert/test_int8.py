"""int8 files as ComfyUI writes them, rows rotated or not: kept as the codes they are or decoded, run, quantized,
verified; the transformer and the text encoder of 2.5."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import ltx2
from ltx2.convert.plan.entries import plan_json
from ltx2.convert.tensors.codes import Int8, Scale
from ltx2.convert.tensors.scales import find_codes
from ltx2.convert.tensors.steps import Spec, from_float32
from ltx2.quant.plan.replan import repack
from ltx2.runtime.errors import Ltx2Error
from ltx2.runtime.files.tensors import FLOATS, open_tensorfile
from ltx2.runtime.layers.linear import Packed
from ltx2.runtime.layers.packed import choose_products
from ltx2.runtime.model.forms import Form
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_network, load_weights
from ltx2.runtime.networks.transformer.model import Transformer
from tests.support import encoded
from tests.support.encoded import PREFIX, Tensors
from tests.support.folders import accept, contents, verified
from tests.support.loras import random_factors, write_lora
from tests.support.official import DEMO_25, plan_of
from tests.support.parity import relative_l2

Figure = Callable[..., None]
SIZE: dict[str, Any] = {"width": 64, "height": 64, "frames": 9, "seed": 3}
LAYER = f"{PREFIX}1.attn1.to_q"
OURS = "transformer_blocks.1.attn1.to_q"
TEXT = "model.layers.5.mlp.down_proj"
ROTATED = Form(8, 128, rotation=64, hadamard="regular")


def stored_tensors(folder: Path, component: str = "transformer") -> dict[str, mx.array]:
    return load_weights(ModelFolder.open(folder), component)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The demo model of 2.5 as Lightricks would publish it in int8, its other weights in float32."""
    return encoded.demo_sources_25(tmp_path_factory.mktemp("int8"), encoded.signed)


@pytest.fixture(scope="module")
def file(sources: list[Path]) -> Path:
    (path,) = (path for path in sources if "transformer" in path.name)
    return path


@pytest.fixture(scope="module")
def text_file(sources: list[Path]) -> Path:
    (path,) = (path for path in sources if "gemma" in path.name)
    return path


class TestCodes:
    @pytest.mark.parametrize("size", [0, 16, 64, 256])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_decoded(self, tmp_path: Path, size: int, dtype: str) -> None:
        """Turned back exactly, scaled, rounded once; every code, -128 too; in chunks as at once, from a file and from a
        folder."""
        codes = np.random.default_rng(2).integers(-128, 128, (30, 512)).astype(np.int8)
        scale = np.random.default_rng(3).uniform(1e-4, 1e-2, (30, 1)).astype(np.float32)
        path = encoded.write(tmp_path / "f.safetensors", {"w": ("I8", codes), "s": ("F32", scale)}, {})
        opened = open_tensorfile(path)
        form = Form(8, 128, rotation=size, hadamard="regular" if size else "sylvester")
        ours = Int8(opened, opened.tensors["w"], Scale(opened, opened.tensors["s"]), form)
        wanted = from_float32(encoded.from_signed(codes, scale, size), FLOATS[dtype]).tobytes()
        words = ours.words(codes)
        for rows in (codes, words):
            spec = Spec(rows.shape, "I8" if rows is codes else "U32")
            assert ours.shape(spec) == codes.shape
            assert ours.decoded(rows, spec, 0, dtype).tobytes() == wanted
            parts = [ours.decoded(rows[i : i + 7], spec, i, dtype) for i in range(0, 30, 7)]
            assert np.concatenate(parts).tobytes() == wanted

    def test_is_the_weight(self, file: Path, figure: Figure) -> None:
        """But for what rounding to int8 has lost."""
        tensors = encoded.file_tensors(file)
        (original,) = (path for path in DEMO_25 if path.name == file.name)
        weight = encoded.from_bf16(encoded.file_tensors(original)[f"{LAYER}.weight"][1])
        error = relative_l2(encoded.decoded(tensors, f"{LAYER}.weight"), weight)
        figure("int8 with rotated rows: error of a layer's weights", error, limit=0.01)


class TestConvert:
    def test_kept_exactly(self, kept: Path, file: Path, text_file: Path) -> None:
        """The file's bytes but for their first bit, and its scales; nothing beside them."""
        for path, layer, component, ours in (
            (file, LAYER, "transformer", OURS), (text_file, TEXT, "text_encoder", TEXT),
        ):  # fmt: skip
            tensors, stored = encoded.file_tensors(path), stored_tensors(kept, component)
            codes, scale = stored[f"{ours}.weight"], stored[f"{ours}.weight_scale"]
            assert np.array_equal(np.array(codes).view(np.uint8) ^ 128, tensors[f"{layer}.weight"][1].view(np.uint8))
            assert scale.dtype == mx.float32
            assert np.array_equal(np.array(scale), tensors[f"{layer}.weight_scale"][1][:, 0])
            assert not any(name.endswith((".scales", ".biases", "quant")) for name in stored)
            assert ModelFolder.open(kept).quantization(component).of(ours).rotation == 64

    @pytest.mark.parametrize("dtype", ["bf16", "f32"])
    def test_decoded_exactly(self, file: Path, tmp_path: Path, dtype: str) -> None:
        folder = ltx2.convert(file, tmp_path / "m", only=["transformer"], dtype=dtype)
        wanted = encoded.decoded(encoded.file_tensors(file), f"{LAYER}.weight")
        if dtype == "bf16":
            wanted = encoded.from_bf16(encoded.to_bf16(wanted))
        assert np.array_equal(np.array(stored_tensors(folder)[f"{OURS}.weight"].astype(mx.float32)), wanted)
        assert "quantization" not in ModelFolder.open(folder).config("transformer")
        assert verified(folder, [file]).compared == verified(folder).tensors

    def test_rows_that_are_not_rotated(self, tmp_path: Path) -> None:
        tensors = encoded.denoiser(encoded.demo_encoded(lambda name, weight: encoded.signed(name, weight, 0)))
        source = encoded.write(tmp_path / "distilled.safetensors", tensors)
        folder = ModelFolder.open(ltx2.convert(source, tmp_path / "m", only=["transformer"]))
        assert folder.quantization("transformer").of(OURS) == Form(8, 128)
        network = load_network(folder, "transformer", Transformer)
        layer = dict(network.named_modules())[OURS]
        x = mx.random.normal((3, 128), key=mx.random.key(0))
        layer.bias = layer.bias.astype(mx.float32)
        wanted = np.array(x) @ encoded.decoded(tensors, f"{LAYER}.weight").T + np.array(layer.bias)
        assert relative_l2(np.array(layer(x)), wanted) < 1e-6

    def test_plan(self, file: Path) -> None:
        rows = {row["name"]: row for row in plan_json(plan_of(file))["plan"]}
        assert sorted(rows) == sorted(open_tensorfile(file).tensors)
        fields = ("key", "transform", "out_shape", "out_dtype")
        found = {part: [rows[f"{LAYER}.{part}"][field] for field in fields] for part in ("weight", "weight_scale")}
        assert found == {
            "weight": [f"{OURS}.weight", ["int8_keep"], [128, 32], "U32"],
            "weight_scale": [f"{OURS}.weight_scale", ["reshape(128)"], [128], "F32"],
        }
        assert "config.json" in rows[f"{LAYER}.comfy_quant"]["dropped"]
        rows = {row["name"]: row for row in plan_json(plan_of(file, dtype="bf16"))["plan"]}
        for part in ("weight", "weight_scale"):
            row = [rows[f"{LAYER}.{part}"][field] for field in fields]
            assert row == [f"{OURS}.weight", ["int8_dequantize", "cast(bf16)"], [128, 128], "BF16"]


@pytest.mark.parametrize("said", [{"params": {"convrot": True, "convrot_groupsize": 64}}, {"convrot": True}])
def test_other_places_of_the_rotation(tmp_path: Path, said: dict[str, Any]) -> None:
    """Under `params`, and unsaid, which is 256."""
    tensors: Tensors = {
        "layer.weight": ("I8", np.ones((4, 512), np.int8)), "layer.weight_scale": ("F32", np.ones((4, 1), np.float32)),
        "layer.comfy_quant": ("U8", np.frombuffer(json.dumps({"format": "int8_tensorwise"} | said).encode(), np.uint8)),
    }  # fmt: skip
    opened = open_tensorfile(encoded.write(tmp_path / "f.safetensors", tensors, {}))
    found = find_codes([opened]).codes["layer.weight"]
    assert isinstance(found, Int8) and (found.form.rotation, found.form.hadamard) == (
        64 if "params" in said else 256,
        "regular",
    )


class TestRun:
    def test_layers(self, kept: Path) -> None:
        """Codes and scale as parameters; what all groups share once per shape, and no parameter."""
        network = load_network(ModelFolder.open(kept), "transformer", Transformer)
        packed = {n: m for n, m in network.named_modules() if isinstance(m, Packed)}
        assert len(packed) == 28 * 6
        assert packed[OURS].form == ROTATED
        assert packed[OURS].parameters().keys() == {"weight", "weight_scale", "bias"}
        shared = {id(array) for layer in packed.values() for array in layer._shared}
        assert len(shared) == 2 * len({layer._shared[0].shape for layer in packed.values()})

    @pytest.mark.parametrize(
        ("product", "dtype"),
        [("packed", mx.float32), ("packed", mx.float16), ("dequantized", mx.float32), ("dequantized", mx.float16),
         ("dequantized", mx.bfloat16), ("widened", mx.float32), ("widened", mx.bfloat16)],
    )  # fmt: skip
    def test_product(self, product: str, dtype: mx.Dtype) -> None:
        """In x's dtype and as precise as that. (MLX's own kernel adds up in bf16 on CPUs.)"""
        rng = np.random.default_rng(0)
        weight = rng.standard_normal((48, 512)).astype(np.float32) * 0.05
        tensors = encoded.signed("l.weight", weight, 256)
        form = Form(8, 128, rotation=256, hadamard="regular")
        layer = Packed(512, 48, form, (mx.ones((48, 4), mx.bfloat16), mx.full((48, 4), -128, mx.bfloat16)))
        layer.weight = mx.array(tensors["l.weight"][1].view(np.uint8) ^ 128).view(mx.uint32)
        layer.weight_scale = mx.array(tensors["l.weight_scale"][1][:, 0])
        layer.bias = mx.array(rng.standard_normal(48), dtype)
        choose_products(layer, product)
        x = mx.array(rng.standard_normal((7, 512)) * 10, dtype)
        wide = (np.array(value.astype(mx.float32)) for value in (x, layer.bias))
        wanted = next(wide) @ encoded.decoded(tensors, "l.weight").T + next(wide)
        y = layer(x)
        assert y.dtype == dtype
        limits = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 2e-2}  # a CPU rotates in bf16
        assert relative_l2(np.array(y.astype(mx.float32)), wanted) < limits[dtype]

    def test_generate(self, kept: Path, plain: Path, demo_25: Path, figure: Figure, small_runs: None) -> None:
        """The kept codes compute what the decoded weights compute, near to what the weights did before."""
        ours, theirs, before = (
            ltx2.load(folder).generate("a red circle", **SIZE).latents for folder in (kept, plain, demo_25)
        )
        for name in ("video", "audio"):
            figure(f"int8 as codes: final {name} latents, rel L2", relative_l2(ours[name], theirs[name]), limit=1e-4)
            figure(f"int8: final {name} latents, rel L2 vs bf16", relative_l2(ours[name], before[name]), limit=0.2)

    def test_memory(self, kept: Path, tmp_path: Path) -> None:
        """Inputs are there twice where they are rotated."""
        other = shutil.copytree(kept, tmp_path / "other")
        text = (other / "transformer" / "config.json").read_text()
        (other / "transformer" / "config.json").write_text(text.replace('"rotation": 64', '"rotation": 0'))
        accept(other)
        ours, theirs = (ltx2.load(folder).plan("a red circle", **SIZE).needs for folder in (kept, other))
        more = [one.activations.needed - other.activations.needed for one, other in zip(ours, theirs, strict=True)]
        assert [n > 0 for n in more] == [need.name.startswith("stage") for need in ours]

    def test_with_a_lora(self, kept: Path, plain: Path, tmp_path: Path, small_runs: None) -> None:
        lora = write_lora(tmp_path / "lora.safetensors", random_factors({OURS: (128, 128)}))
        ours, theirs = (
            ltx2.load(folder).generate("a red circle", lora=f"{lora}:4", **SIZE).latents for folder in (kept, plain)
        )
        without = ltx2.load(plain).generate("a red circle", **SIZE).latents
        assert relative_l2(ours["video"], theirs["video"]) < 1e-4 < relative_l2(without["video"], theirs["video"])


class TestFolder:
    def test_fewer_bits(self, sources: list[Path], kept: Path, tmp_path: Path) -> None:
        """Layers with fewer bits are quantized from their bf16 values, the others stay; by way of a folder or not."""
        ltx2.quantize(kept, tmp_path / "two", bits=4)
        ltx2.convert(sources, tmp_path / "one", bits=4)
        assert contents(tmp_path / "one") == contents(tmp_path / "two")
        whole = ltx2.convert(sources, tmp_path / "bf16", dtype="bf16", only=["transformer"])
        ltx2.quantize(whole, tmp_path / "q", bits=4)
        one, q = stored_tensors(tmp_path / "one"), stored_tensors(tmp_path / "q")
        for part in ("weight", "scales", "biases"):
            assert mx.array_equal(one[f"{OURS}.{part}"], q[f"{OURS}.{part}"]).item()
        assert verified(tmp_path / "one", sources, repack).compared > 0

    def test_eight_bits_leave_the_codes(self, kept: Path, tmp_path: Path) -> None:
        report = ltx2.quantize(kept, tmp_path / "q8", bits=8)
        before, after = stored_tensors(kept), stored_tensors(tmp_path / "q8")
        for part in ("weight", "weight_scale"):
            assert mx.array_equal(before[f"{OURS}.{part}"], after[f"{OURS}.{part}"]).item()
        row = next(row for row in report.layers if row.layer == OURS)
        assert (row.bits, row.group_size, row.mode, row.rotation, row.relative_error) == (8, 128, "affine", 64, 0.0)
        assert row.bytes == 128 * 128 + 4 * 128

    def test_fused(self, file: Path, tmp_path: Path) -> None:
        """A LoRA is added to what the codes stand for."""
        factors = random_factors({OURS: (128, 128)})
        lora = write_lora(tmp_path / "lora.safetensors", factors)
        folder = ltx2.convert(file, tmp_path / "m", only=["transformer"], fuse=[f"{lora}:0.5"], dtype="f32")
        down, up = factors[OURS]
        wanted = encoded.decoded(encoded.file_tensors(file), f"{LAYER}.weight") + 0.5 * up @ down
        assert relative_l2(np.array(stored_tensors(folder)[f"{OURS}.weight"]), wanted) < 1e-6

    def test_verify(self, sources: list[Path], kept: Path, file: Path, tmp_path: Path) -> None:
        assert verified(kept, sources).compared == verified(kept).tensors
        tensors = encoded.file_tensors(file)
        codes = tensors[f"{LAYER}.weight"][1].copy()
        codes[3, 5] ^= 1
        tensors[f"{LAYER}.weight"] = ("I8", codes)
        other = encoded.write(tmp_path / file.name, tensors, open_tensorfile(file).metadata)
        with pytest.raises(Ltx2Error, match=rf"1 of 4096 values of tensor {OURS}\.weight differ"):
            verified(kept, [other if path == file else path for path in sources])

    def test_inspect(self, kept: Path, plain: Path, file: Path, here: Callable[..., Any]) -> None:
        source = here("inspect", file, "--json").json
        assert (source["storage"], source["convert"], source["generate"]) == ("int8", True, True)
        found, decoded = (here("inspect", folder, "--json").json["components"] for folder in (kept, plain))
        assert found["transformer"]["quantization"]["hadamard"] == "regular"
        for name in ("transformer", "text_encoder", "connectors"):
            assert found[name]["parameters"] == decoded[name]["parameters"]
