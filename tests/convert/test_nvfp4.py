"""NVFP4 files: nibbles in the other order and block scales in tiles, kept or decoded exactly, run, verified."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import ltx2
from ltx2.convert.plan.entries import plan_json
from ltx2.convert.tensors.codes import BlockScales, Nvfp4, Scale
from ltx2.convert.tensors.steps import Spec, from_float32
from ltx2.quant.plan.replan import repack
from ltx2.runtime.errors import Ltx2Error, NumericsError, UnsupportedError
from ltx2.runtime.files.tensors import FLOATS, open_tensorfile
from ltx2.runtime.layers.linear import Packed
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_network, load_weights
from ltx2.runtime.networks.transformer.model import Transformer
from tests.support import encoded
from tests.support.encoded import PREFIX, Tensors
from tests.support.folders import contents, verified
from tests.support.golden import golden_velocity
from tests.support.official import plan_of
from tests.support.parity import relative_l2

Figure = Callable[..., None]
LAYER = f"{PREFIX}1.attn1.to_q"
OURS = "transformer_blocks.1.attn1.to_q"


def stored_tensors(folder: Path) -> dict[str, mx.array]:
    return load_weights(ModelFolder.open(folder), "transformer")


def as_integers(values: object) -> list[int]:
    """float32 values as integers, which compare exactly (+0 and -0 differ, NaN equals itself)."""
    return np.asarray(values, np.float32).view(np.uint32).tolist()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The demo model as Lightricks would publish it in NVFP4, its other weights in float32."""
    return encoded.demo_sources(tmp_path_factory.mktemp("nvfp4"), encoded.four_bit)


class TestCodes:
    def codes(self, folder: Path, shape: tuple[int, int], scale: float) -> tuple[Nvfp4, np.ndarray, np.ndarray]:
        """Random codes and block scales for values of this shape; the bytes, and the values they stand for."""
        rng = np.random.default_rng(2)
        rows, columns = shape[0], shape[1] // 16
        linear = rng.integers(0, 127, (rows, columns), dtype=np.uint8)
        packed = rng.integers(0, 256, (rows, shape[1] // 2), dtype=np.uint8)
        tensors: Tensors = {
            "w": ("U8", packed), "b": ("F8_E4M3", encoded.tiled(linear)), "s": ("F32", np.array(scale, np.float32)),
        }  # fmt: skip
        file = open_tensorfile(encoded.write(folder / "f.safetensors", tensors, {}))
        blocks = BlockScales(file, file.tensors["b"], (rows, columns))
        codes = Nvfp4(file, file.tensors["w"], Scale(file, file.tensors["s"]), blocks)
        return codes, packed, encoded.from_nvfp4(packed, linear, tensors["s"][1])

    @pytest.mark.parametrize("shape", [(128, 64), (256, 192), (130, 80), (7, 16)])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_decoded(self, tmp_path: Path, shape: tuple[int, int], dtype: str) -> None:
        """Nibbles, tiles, whole and broken ones, and the order of products; in chunks of any rows."""
        codes, packed, values = self.codes(tmp_path, shape, 0.0123)
        spec, wanted = Spec(packed.shape, "U8"), from_float32(values, FLOATS[dtype])
        assert codes.shape(spec) == shape
        assert codes.decoded(packed, spec, 0, dtype).tobytes() == wanted.tobytes()
        for size in (1, 50, 128):
            parts = [codes.decoded(packed[i : i + size], spec, i, dtype) for i in range(0, shape[0], size)]
            assert np.concatenate(parts).tobytes() == wanted.tobytes()

    def test_values_beyond_f16(self, tmp_path: Path) -> None:
        codes, packed, values = self.codes(tmp_path, (128, 64), 30.0)
        assert np.abs(values).max() > 65504
        with pytest.raises(NumericsError, match="does not fit f16"):
            codes.decoded(packed, Spec(packed.shape, "U8"), 0, "f16")
        small = np.full_like(packed[:1], 0x11)
        assert np.isfinite(codes.decoded(small, Spec(small.shape, "U8"), 0, "f16")).all()


class TestConvert:
    def test_kept_exactly(self, kept: Path, sources: list[Path]) -> None:
        """MLX reads the stored codes and block scales, times the stored scale, as the values of the file."""
        tensors, stored = encoded.file_tensors(sources[0]), stored_tensors(kept)
        for layer in ("attn1.to_q", "audio_attn1.to_k", "audio_to_video_attn.to_q", "ff.net.2"):
            for block in (1, 4):
                key = f"transformer_blocks.{block}.{layer}".replace("net.2", "proj_out")
                codes, scales, scale = (stored[f"{key}.{part}"] for part in ("weight", "scales", "weight_scale"))
                assert (codes.dtype, scales.dtype, scale.dtype) == (mx.uint32, mx.uint8, mx.float32)
                assert codes.shape[1] * 8 == scales.shape[1] * 16 and scale.shape == ()
                values = mx.dequantize(codes, scales, group_size=16, bits=4, mode="nvfp4", dtype=mx.float32) * scale
                assert as_integers(values) == as_integers(encoded.decoded(tensors, f"{PREFIX}{block}.{layer}.weight"))

    @pytest.mark.parametrize("dtype", ["bf16", "f32"])
    def test_decoded_exactly(self, sources: list[Path], tmp_path: Path, dtype: str) -> None:
        folder = ltx2.convert(sources[0], tmp_path / "m", only=["transformer"], dtype=dtype)
        wanted = encoded.decoded(encoded.file_tensors(sources[0]), f"{LAYER}.weight")
        ours = stored_tensors(folder)[f"{OURS}.weight"]
        if dtype == "bf16":
            wanted = encoded.from_bf16(encoded.to_bf16(wanted))
        assert as_integers(ours.astype(mx.float32)) == as_integers(wanted)
        assert verified(folder, sources[:1]).compared == verified(folder).tensors

    def test_plan(self, sources: list[Path]) -> None:
        rows = {row["name"]: row for row in plan_json(plan_of(sources[0]))["plan"]}
        assert sorted(rows) == sorted(open_tensorfile(sources[0]).tensors)
        fields = ("key", "transform", "out_shape", "out_dtype")
        found = {
            part: [rows[f"{LAYER}.{part}"][field] for field in fields]
            for part in ("weight", "weight_scale", "weight_scale_2")
        }
        assert found == {
            "weight": [f"{OURS}.weight", ["nvfp4_keep"], [128, 16], "U32"],
            "weight_scale": [f"{OURS}.scales", ["nvfp4_keep"], [128, 8], "U8"],
            "weight_scale_2": [f"{OURS}.weight_scale", ["copy"], [], "F32"],
        }
        assert "activation scale" in rows[f"{LAYER}.input_scale"]["dropped"]
        rows = {row["name"]: row for row in plan_json(plan_of(sources[0], dtype="bf16"))["plan"]}
        for part in ("weight", "weight_scale", "weight_scale_2"):
            row = [rows[f"{LAYER}.{part}"][field] for field in fields]
            assert row == [f"{OURS}.weight", ["nvfp4_dequantize", "cast(bf16)"], [128, 128], "BF16"]


class TestRun:
    def test_layers(self, kept: Path) -> None:
        network = load_network(ModelFolder.open(kept), "transformer", Transformer)
        packed = {n: m for n, m in network.named_modules() if isinstance(m, Packed)}
        assert len(packed) == 28 * 4
        assert packed[OURS].parameters().keys() == {"weight", "scales", "weight_scale", "bias"}

    def test_transformer(self, kept: Path, plain: Path, figure: Figure) -> None:
        """The kept codes compute what the decoded weights compute."""
        ours, theirs = (golden_velocity(ModelFolder.open(folder)) for folder in (kept, plain))
        for name, one, other in zip(("video", "audio"), ours, theirs, strict=True):
            figure(f"NVFP4 as codes: {name} velocity, rel L2 vs decoded", relative_l2(one, other), limit=1e-5)

    def test_generate(self, kept: Path, small_runs: None) -> None:
        latents = ltx2.load(kept).generate("a red circle", width=64, height=64, frames=9, seed=3).latents
        assert all(np.isfinite(latents[name]).all() for name in ("video", "audio"))


class TestFolder:
    def test_quantize(self, sources: list[Path], kept: Path, tmp_path: Path) -> None:
        """4 bits and more leave the codes, fewer are refused; by way of a folder or not."""
        report = ltx2.quantize(kept, tmp_path / "two", bits=4)
        ltx2.convert(sources, tmp_path / "one", bits=4)
        assert contents(tmp_path / "one") == contents(tmp_path / "two")
        row = next(row for row in report.layers if row.layer == OURS)
        assert (row.bits, row.group_size, row.mode, row.relative_error) == (4, 16, "nvfp4", 0.0)
        assert row.bytes == 128 * 128 // 2 + 128 * 8 + 4
        before, after = stored_tensors(kept), stored_tensors(tmp_path / "two")
        for part in ("weight", "scales"):
            assert mx.array_equal(before[f"{OURS}.{part}"], after[f"{OURS}.{part}"]).item()
        assert verified(tmp_path / "one", sources, repack).compared == verified(tmp_path / "one").tensors
        with pytest.raises(UnsupportedError, match=r"transformer_blocks.*is not quantized to 3 bits"):
            ltx2.quantize(kept, tmp_path / "three", bits=3, recipe="uniform")

    def test_verify(self, sources: list[Path], kept: Path, tmp_path: Path) -> None:
        assert verified(kept, sources).compared == verified(kept).tensors
        tensors = encoded.file_tensors(sources[0])
        codes = tensors[f"{LAYER}.weight"][1].copy()
        codes[3, 5] ^= 0x10
        tensors[f"{LAYER}.weight"] = ("U8", codes)
        other = encoded.write(tmp_path / sources[0].name, tensors)
        with pytest.raises(Ltx2Error, match=rf"1 of 2048 values of tensor {OURS}\.weight differ"):
            verified(kept, [other])

    def test_inspect(self, kept: Path, sources: list[Path], here: Callable[..., Any]) -> None:
        assert here("inspect", sources[0], "--json").json["storage"] == "NVFP4"
        found = here("inspect", kept, "--json").json["components"]["transformer"]
        assert found["quantization"] == {"group_size": 16, "bits": 4, "mode": "nvfp4"}
        assert found["parameters"] == 2_781_760
