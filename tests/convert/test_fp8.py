"""FP8 files: found by their tensors, kept as the codes they are or decoded exactly, run, quantized, verified."""

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import ltx2
from ltx2.bench.quality.classify import classify
from ltx2.convert.plan.entries import plan_json
from ltx2.convert.tensors.codes import Fp8, Scale
from ltx2.convert.tensors.steps import Spec, from_float32
from ltx2.quant.apply import Settings, quantize_plan
from ltx2.quant.plan.replan import repack
from ltx2.runtime.errors import CheckpointError, InputError, Ltx2Error, NumericsError
from ltx2.runtime.files.tensors import FLOATS, open_tensorfile
from ltx2.runtime.layers.linear import Packed
from ltx2.runtime.layers.packed import choose_products
from ltx2.runtime.model.forms import Form
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import build_network, load_network, load_weights, parameter_shapes
from ltx2.runtime.networks.transformer.model import Transformer
from tests.support import encoded
from tests.support.encoded import PREFIX, Encode, Tensors
from tests.support.folders import contents, verified
from tests.support.golden import golden_velocity
from tests.support.official import plan_of
from tests.support.parity import relative_l2, require

Figure = Callable[..., None]
LAYER = f"{PREFIX}1.attn1.to_q"
OURS = "transformer_blocks.1.attn1.to_q"
SPELLINGS = [encoded.scaled, encoded.scale_weight, encoded.row_scaled, encoded.plain_cast]


def convert(folder: Path, tensors: Tensors, **options: Any) -> Path:
    """A model folder of the transformer's among these tensors."""
    source = encoded.write(folder / "source.safetensors", encoded.denoiser(tensors))
    return ltx2.convert(source, folder / "model", variant="distilled", only=["transformer"], **options)


def transformer(folder: Path) -> dict[str, mx.array]:
    return load_weights(ModelFolder.open(folder), "transformer")


def bits(array: mx.array) -> np.ndarray:
    """Values as the integers of the same size, which compare exactly."""
    return np.array(array.view({1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.dtype.size]))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The demo model as Lightricks would publish it in FP8, its other weights in float32."""
    return encoded.demo_sources(tmp_path_factory.mktemp("fp8"), encoded.scaled)


@pytest.fixture(scope="module")
def fp8_file(sources: list[Path]) -> Path:
    return sources[0]


class TestCodes:
    def codes(self, folder: Path, scale: float | None, codes: np.ndarray) -> Fp8:
        tensors: Tensors = {"w": ("F8_E4M3", codes)}
        if scale is not None:
            tensors["s"] = ("F32", np.array(scale, np.float32))
        file = open_tensorfile(encoded.write(folder / "f.safetensors", tensors, {}))
        return Fp8(file, file.tensors["w"], None if scale is None else Scale(file, file.tensors["s"]))

    def test_every_code(self, tmp_path: Path) -> None:
        """Against the bits spelt out, MLX and torch; the two NaN are refused."""
        every = np.array([code for code in range(256) if code & 127 != 127], np.uint8)
        codes = self.codes(tmp_path, None, every)
        ours = codes.decoded(every, Spec(every.shape, "F8_E4M3"), 0, "f32")
        assert ours.view(np.uint32).tolist() == encoded.E4M3[every].view(np.uint32).tolist()
        np.testing.assert_array_equal(ours, np.array(mx.from_fp8(mx.array(every), dtype=mx.float32)))
        torch = require("torch")
        theirs = torch.from_numpy(every.copy()).view(torch.float8_e4m3fn).float().numpy()
        np.testing.assert_array_equal(ours, theirs)
        for nan in (0x7F, 0xFF):
            with pytest.raises(CheckpointError, match=r"tensor w of .* holds codes that are not a number"):
                codes.decoded(np.array([1, nan], np.uint8), Spec((2,), "F8_E4M3"), 0, "f32")

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("scale", [1.0, 0.0013, 3.1e-6, 1e-41, 77.7, -0.25])
    def test_the_table_is_the_definition(self, tmp_path: Path, dtype: str, scale: float) -> None:
        """float32(code) * scale, rounded once, for every pair of codes; in chunks as at once."""
        rng = np.random.default_rng(1)
        every = np.array([code for code in range(256) if code & 127 != 127], np.uint8)
        values = np.concatenate([every, rng.choice(every, 258)]).reshape(64, 8)
        codes, spec = self.codes(tmp_path, scale, values), Spec((64, 8), "F8_E4M3")
        wanted = from_float32(encoded.E4M3[values] * np.float32(scale), FLOATS[dtype])
        ours = codes.decoded(values, spec, 0, dtype)
        assert ours.dtype == wanted.dtype and ours.tobytes() == wanted.tobytes()
        parts = [codes.decoded(values[i : i + 5], spec, i, dtype) for i in range(0, 64, 5)]
        assert np.concatenate(parts).tobytes() == wanted.tobytes()
        odd = codes.decoded(values.reshape(-1)[:255], Spec((255,), "F8_E4M3"), 0, dtype)
        assert odd.tobytes() == wanted.reshape(-1)[:255].tobytes()

    def test_values_beyond_f16(self, tmp_path: Path) -> None:
        """An error where they occur, none where only other codes would be too large."""
        small, large = np.array([[1, 2]], np.uint8), np.array([[1, 0x7E]], np.uint8)
        codes, spec = self.codes(tmp_path, 1000.0, small), Spec((1, 2), "F8_E4M3")
        assert codes.decoded(small, spec, 0, "f16").tolist() == np.float16(encoded.E4M3[small] * 1000).tolist()
        with pytest.raises(NumericsError, match="448000 does not fit f16"):
            codes.decoded(large, spec, 0, "f16")


class TestConvert:
    @pytest.mark.parametrize("encode", SPELLINGS)
    def test_kept_exactly(self, tmp_path: Path, encode: Encode) -> None:
        """MLX reads the stored codes, times the stored scale, as the values of the file; no byte is added."""
        tensors = encoded.demo_encoded(encode)
        stored = transformer(convert(tmp_path, tensors))
        assert not any(name.endswith((".scales", ".biases", "_scale_2", "input", "quant")) for name in stored)
        for name in encoded.demo_linears(encoded.demo_tensors()):
            key = name.removeprefix("model.diffusion_model.").replace("to_out.0", "to_out")
            key = key.replace("net.0.proj", "proj_in").replace("net.2", "proj_out").removesuffix(".weight")
            codes, scale = stored[f"{key}.weight"], stored[f"{key}.weight_scale"]
            assert np.array(codes).tobytes() == tensors[name][1].tobytes()
            assert scale.dtype == mx.float32 and scale.shape in ((), codes.shape[:1])
            unit = mx.full((codes.shape[0], codes.shape[1] // 8), 127, mx.uint8)
            values = mx.dequantize(codes, unit, group_size=32, bits=8, mode="mxfp8", dtype=mx.float32)
            wanted = encoded.decoded(tensors, name)
            np.testing.assert_array_equal(bits(values * scale[..., None]), wanted.view(np.uint32))

    @pytest.mark.parametrize(
        ("encode", "dtype"),
        [(encoded.scaled, "f32"), (encoded.scale_weight, "bf16"), (encoded.row_scaled, "f32"),
         (encoded.row_scaled, "bf16"), (encoded.plain_cast, "f32")],
    )  # fmt: skip
    def test_decoded_exactly(self, tmp_path: Path, encode: Encode, dtype: str) -> None:
        tensors = encoded.demo_encoded(encode)
        folder = convert(tmp_path, tensors, dtype=dtype)
        stored = transformer(folder)
        wanted = encoded.decoded(tensors, f"{LAYER}.weight")
        wanted = encoded.to_bf16(wanted) if dtype == "bf16" else wanted.view(np.uint32)
        np.testing.assert_array_equal(bits(stored[f"{OURS}.weight"]), wanted)
        assert "quantization" not in ModelFolder.open(folder).config("transformer")
        assert f"{OURS}.weight_scale" not in stored

    def test_plan(self, tmp_path: Path, fp8_file: Path) -> None:
        """Every tensor once; what a step is called."""

        def rows(**options: Any) -> dict[str, dict[str, Any]]:
            plan = plan_json(plan_of(fp8_file, **options))["plan"]
            assert sorted(row["name"] for row in plan) == sorted(open_tensorfile(fp8_file).tensors)
            return {row.pop("name"): row for row in plan}

        where = {"source": str(fp8_file), "component": "transformer"}
        weight = where | {"shape": [128, 128], "dtype": "F8_E4M3", "key": f"{OURS}.weight"}
        scale = where | {"shape": [], "dtype": "F32"}
        found = rows()
        assert found[f"{LAYER}.weight"] == weight | {
            "transform": ["fp8_keep"], "out_shape": [128, 32], "out_dtype": "U32",
        }  # fmt: skip
        assert found[f"{LAYER}.weight_scale"] == scale | {
            "key": f"{OURS}.weight_scale", "transform": ["copy"], "out_shape": [], "out_dtype": "F32",
        }  # fmt: skip
        assert "activation scale" in found[f"{LAYER}.input_scale"]["dropped"]
        decoded = {"transform": ["fp8_dequantize", "cast(bf16)"], "out_shape": [128, 128], "out_dtype": "BF16"}
        found = rows(dtype="bf16")
        assert found[f"{LAYER}.weight"] == weight | decoded
        assert found[f"{LAYER}.weight_scale"] == scale | decoded | {"key": f"{OURS}.weight"}
        assert rows(dtype="f32")[f"{LAYER}.weight"]["transform"] == ["fp8_dequantize"]

    def test_markers_are_dropped(self, tmp_path: Path) -> None:
        tensors = encoded.demo_encoded(encoded.scale_weight)
        tensors |= {"scaled_fp8": ("F8_E4M3", np.zeros(0, np.uint8))}
        path = encoded.write(tmp_path / "distilled.safetensors", tensors)
        reasons = {row["name"]: row.get("dropped", "") for row in plan_json(plan_of(path))["plan"]}
        assert "opaque metadata" in reasons["scaled_fp8"] and "config.json" in reasons[f"{LAYER}.comfy_quant"]
        assert "activation scale" in reasons[f"{LAYER}.scale_input"]

    def test_what_is_no_linear_layer_is_decoded(self, tmp_path: Path) -> None:
        """A file cast as a whole: biases, norms and kernels become bf16, and embeddings of the wrong width too."""
        tensors = {
            name: value if "scale_shift_table" in name else ("F8_E4M3", encoded.to_e4m3(encoded.from_bf16(value[1])))
            for name, value in encoded.demo_tensors().items()
        }
        source = encoded.write(tmp_path / "distilled.safetensors", tensors)
        rows = {row["name"]: row for row in plan_json(plan_of(source))["plan"]}
        assert rows[f"{LAYER}.bias"]["transform"] == ["fp8_dequantize", "cast(bf16)"]
        kernel = "vae.decoder.conv_in.conv.weight"
        assert rows[kernel]["transform"] == ["fp8_dequantize", "cast(bf16)", "transpose(0,2,3,4,1)"]
        assert rows[f"{LAYER}.weight"]["transform"] == ["fp8_keep"]
        folder = ltx2.convert(source, tmp_path / "model")
        wanted = encoded.to_bf16(encoded.E4M3[tensors[kernel][1]]).transpose(0, 2, 3, 4, 1)
        stored = load_weights(ModelFolder.open(folder), "video_vae")
        np.testing.assert_array_equal(bits(stored[kernel.removeprefix("vae.")]), wanted)
        assert ModelFolder.open(folder).record("transformer").dtype == "BF16"
        assert verified(folder, [source]).compared == len(rows) - sum("dropped" in r for r in rows.values()) + sum(
            row["transform"] == ["fp8_keep"] for row in rows.values() if "transform" in row
        )


class TestRun:
    def test_layers(self, kept: Path) -> None:
        """Codes and scale as parameters; MLX's unit scales once per shape, and no parameter."""
        network = load_network(ModelFolder.open(kept), "transformer", Transformer)
        packed = {n: m for n, m in network.named_modules() if isinstance(m, Packed)}
        assert len(packed) == 28 * 4 and OURS in packed
        assert packed[OURS].parameters().keys() == {"weight", "weight_scale", "bias"}
        shared = {id(array): array.shape for layer in packed.values() for array in layer._shared}
        assert len(shared) == len(set(shared.values())) == len({layer.weight.shape for layer in packed.values()})

    def test_transformer(self, kept: Path, plain: Path, figure: Figure) -> None:
        """The kept codes compute what the decoded weights compute."""
        ours, theirs = (golden_velocity(ModelFolder.open(folder)) for folder in (kept, plain))
        for name, one, other in zip(("video", "audio"), ours, theirs, strict=True):
            figure(f"FP8 as codes: {name} velocity, rel L2 vs decoded", relative_l2(one, other), limit=1e-5)

    @pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
    @pytest.mark.parametrize("rows", [False, True])
    def test_product(self, dtype: mx.Dtype, rows: bool) -> None:
        """In x's dtype and as precise as that: the scale is applied in float32. float16 would overflow without."""
        rng = np.random.default_rng(0)
        shape = (48,) if rows else ()
        layer = Packed(256, 48, Form(8, 32, "mxfp8"), (mx.full((48, 8), 127, mx.uint8),))
        scale = 10 ** rng.uniform(-4, -3, shape)
        codes = encoded.to_e4m3(rng.standard_normal((48, 256)) * 200)
        layer.weight, layer.bias = mx.array(codes).view(mx.uint32), mx.array(rng.standard_normal(48), dtype)
        layer.weight_scale = mx.array(scale, mx.float32)
        x = mx.array(rng.standard_normal((7, 256)) * 10, dtype)
        weight = encoded.E4M3[codes].astype(np.float64) * np.asarray(scale, np.float32)[..., None]
        wanted = np.array(x.astype(mx.float32)) @ weight.T + np.array(layer.bias.astype(mx.float32))
        choose_products(layer, "dequantized")  # MLX's own kernel adds in bf16 on CPUs
        y = layer(x)
        assert y.dtype == dtype
        limits = {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 4e-3}
        assert relative_l2(np.array(y.astype(mx.float32)), wanted) < limits[dtype]

    def test_generate(self, kept: Path, plain: Path, figure: Figure, small_runs: None) -> None:
        size: dict[str, Any] = {"width": 64, "height": 64, "frames": 9, "seed": 3}
        ours, theirs = (ltx2.load(folder).generate("a red circle", **size).latents for folder in (kept, plain))
        for name in ("video", "audio"):
            figure(f"FP8 as codes: final {name} latents, rel L2", relative_l2(ours[name], theirs[name]), limit=1e-4)

    @pytest.mark.prompts
    def test_a_prompt_is_followed(self, kept: Path) -> None:
        prompt = "a blue square moves left on a white background with a high tone"
        clip = ltx2.load(kept).generate(prompt, width=192, height=128, frames=25, seed=0)
        seen = classify(clip.frames, clip.audio, clip.sample_rate)
        wanted = {"shape": "square", "colour": "blue", "background": "white", "motion": "left", "tone": "high"}
        assert {name: seen[name] for name in wanted} == wanted


class TestQuantize:
    def test_fewer_bits(self, sources: list[Path], kept: Path, tmp_path: Path) -> None:
        """Layers with fewer bits are quantized from their bf16 values, the others stay; by way of a folder or not."""
        report = ltx2.quantize(kept, tmp_path / "two", bits=4)
        ltx2.convert(sources, tmp_path / "one", bits=4)
        assert contents(tmp_path / "one") == contents(tmp_path / "two")
        rows = {(row.component, row.layer): row for row in report.layers}
        assert rows["transformer", OURS].bits == 4 and rows["transformer", OURS].mode == "affine"
        whole = ltx2.convert(sources, tmp_path / "bf16", dtype="bf16", only=["transformer"])
        ltx2.quantize(whole, tmp_path / "q", bits=4)
        one, q = transformer(tmp_path / "one"), transformer(tmp_path / "q")
        for part in ("weight", "scales", "biases"):
            assert bits(one[f"{OURS}.{part}"]).tolist() == bits(q[f"{OURS}.{part}"]).tolist()
        assert verified(tmp_path / "one", sources, repack).compared > 0
        with pytest.raises(InputError, match="quantized already"):
            ltx2.quantize(tmp_path / "one", tmp_path / "three", bits=4)

    def test_the_plan_of_fewer_bits(self, fp8_file: Path, here: Callable[..., Any]) -> None:
        done = here("convert", fp8_file, "-o", "m", "--bits", "4", "--dry-run", "--json")
        rows = {row["name"]: row for row in done.json["plan"]}
        steps = ["fp8_dequantize", "cast(bf16)", "quantize(4,64,affine)"]
        assert rows[f"{LAYER}.weight"]["transform"] == rows[f"{LAYER}.weight_scale"]["transform"] == steps
        assert rows[f"{LAYER}.weight"]["out_dtype"] == "U32"

    def test_widths_that_do_not_fit(self, fp8_file: Path) -> None:
        """A layer that cannot be packed in groups of 128 stays as it is; decoded it would be larger."""
        plan = quantize_plan(plan_of(fp8_file), Settings(4, 128, "uniform"))
        rows = {row.get("key"): row["transform"] for row in plan_json(plan)["plan"] if "key" in row}
        assert rows["transformer_blocks.1.audio_attn1.to_q.weight"] == ["fp8_keep"]  # 64 wide
        assert rows[f"{OURS}.weight"][-1] == "quantize(4,128,affine)"

    def test_eight_bits_leave_the_codes(self, kept: Path, tmp_path: Path) -> None:
        """They are the lossless 8 bits; the report lists them."""
        report = ltx2.quantize(kept, tmp_path / "q8", bits=8)
        before, after = transformer(kept), transformer(tmp_path / "q8")
        for part in ("weight", "weight_scale"):
            assert bits(before[f"{OURS}.{part}"]).tolist() == bits(after[f"{OURS}.{part}"]).tolist()
        row = next(row for row in report.layers if row.layer == OURS)
        assert (row.bits, row.group_size, row.mode, row.relative_error) == (8, 32, "mxfp8", 0.0)
        assert row.bytes == 128 * 128 + 4
        first = next(row for row in report.layers if row.layer == OURS.replace(".1.", ".0."))
        assert (first.bits, first.mode) == (8, "affine")
        config = ModelFolder.open(tmp_path / "q8").config("transformer")["quantization"]
        entries = {row.layer: config.get(row.layer, config) for row in report.layers if row.component == "transformer"}
        assert entries[OURS]["mode"] == "mxfp8" and entries[first.layer]["mode"] == "affine"
        for ours in golden_velocity(ModelFolder.open(tmp_path / "q8")):
            assert np.isfinite(ours).all()

    def test_other_components_are_untouched(self, kept: Path, tmp_path: Path) -> None:
        ltx2.quantize(kept, tmp_path / "q", bits=4, only=["text_encoder"])
        assert contents(tmp_path / "q" / "transformer") == contents(kept / "transformer")


class TestVerify:
    def test_kept_and_decoded(self, sources: list[Path], kept: Path, plain: Path) -> None:
        tensors = sum(len(load_weights(ModelFolder.open(kept), name)) for name in ModelFolder.open(kept).hashes())
        assert verified(kept).tensors == verified(kept, sources).compared == tensors
        assert verified(plain, sources).compared == tensors - 28 * 4

    def test_a_changed_scale_is_found(self, sources: list[Path], kept: Path, tmp_path: Path) -> None:
        tensors = encoded.file_tensors(sources[0])
        dtype, scale = tensors[f"{LAYER}.weight_scale"]
        tensors[f"{LAYER}.weight_scale"] = (dtype, np.nextafter(scale, np.float32(1)))
        other = encoded.write(tmp_path / sources[0].name, tensors)
        with pytest.raises(Ltx2Error, match=f"1 of 1 values of tensor {OURS}.weight_scale differ"):
            verified(kept, [other])

    def test_inspect(self, kept: Path, fp8_file: Path, here: Callable[..., Any]) -> None:
        source = here("inspect", fp8_file, "--json").json
        assert source["storage"] == "FP8 (E4M3)" and source["components"]["transformer"]["dtypes"]["F8_E4M3"] == 112
        found = here("inspect", kept, "--json").json["components"]["transformer"]
        assert found["quantization"] == {"group_size": 32, "bits": 8, "mode": "mxfp8"}
        network = build_network("AVTransformer3DModel", ModelFolder.open(kept).config("transformer"))
        assert found["parameters"] == sum(prod(shape) for shape in parameter_shapes(network).values())
