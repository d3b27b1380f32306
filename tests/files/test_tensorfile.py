"""safetensors reading and streaming: what the library rejects is rejected, what we write it reads back."""

import json
import struct
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from ltx2.runtime.errors import CheckpointError, UnsupportedError
from ltx2.runtime.files.tensors import (
    NUMPY_DTYPES,
    Array,
    bf16_to_f32,
    f32_to_bf16,
    file_header,
    open_tensorfile,
    tensor_bytes,
    write_tensorfile,
)  # fmt: skip


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def raw_file(path: Path, header: dict[str, Any] | bytes, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


class TestReading:
    def test_values_metadata_and_ranges(self, tmp_path: Path) -> None:
        values: dict[str, np.ndarray] = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array(7, np.int64)}
        save_file(values, tmp_path / "x.safetensors", metadata={"config": "{}"})
        file = open_tensorfile(tmp_path / "x.safetensors")
        assert file.metadata == {"config": "{}"}
        assert file.size == (tmp_path / "x.safetensors").stat().st_size
        for name, value in values.items():
            got = file.array(name)
            assert got.dtype == value.dtype and got.shape == value.shape
            np.testing.assert_array_equal(got, value)
            assert file.tensors[name].nbytes == value.nbytes

    def test_arrays_are_read_only_views(self, tmp_path: Path) -> None:
        save_file({"a": np.zeros(4, np.float32)}, tmp_path / "x.safetensors")
        array = open_tensorfile(tmp_path / "x.safetensors").array("a")
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1

    @pytest.mark.parametrize("dtype", NUMPY_DTYPES)
    def test_every_dtype_keeps_its_bits(self, tmp_path: Path, dtype: str) -> None:
        kind = np.dtype(NUMPY_DTYPES[dtype])
        bits = np.arange(64, dtype=np.uint8) % (2 if dtype == "BOOL" else 64)
        raw_file(tmp_path / "x.safetensors", {"a": entry(0, 64, [64 // kind.itemsize], dtype)}, bits.tobytes())
        assert open_tensorfile(tmp_path / "x.safetensors").array("a").tobytes() == bits.tobytes()

    def test_odd_but_valid_files(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        one = struct.pack("<f", 1.5)
        file = open_tensorfile(raw_file(path, {"a": entry(0, 1, [1], "U8"), "b": entry(1, 5, [1])}, b"\7" + one))
        assert file.array("b")[0] == 1.5  # not aligned
        file = open_tensorfile(raw_file(path, {"a": entry(0, 4, []), "z": entry(4, 4, [0, 3])}, one))
        assert file.array("a") == 1.5 and file.array("z").shape == (0, 3)
        file = open_tensorfile(raw_file(path, {"__metadata__": None, "a": entry(0, 4, [1])}, one))
        assert file.metadata == {}
        assert open_tensorfile(raw_file(path, {})).tensors == {}

    def test_dtype_without_a_reader_is_named(self, tmp_path: Path) -> None:
        file = open_tensorfile(raw_file(tmp_path / "x.safetensors", {"a": entry(0, 8, [1], "C64")}, bytes(8)))
        with pytest.raises(UnsupportedError, match="C64"):
            file.array("a")

    @pytest.mark.parametrize(
        ("header", "data"),
        [
            ({"a": entry(0, 4, [1])}, bytes(3)),
            ({"a": entry(0, 4, [1])}, bytes(5)),
            ({"a": entry(0, 4, [2])}, bytes(4)),
            ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)),
            ({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, bytes(4)),
            ({"a": entry(0, 4, [1], "F23")}, bytes(4)),
            ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
            ({"__metadata__": {"n": 1}, "a": entry(0, 4, [1])}, bytes(4)),
            (b"[]", b""),
            (b"{", b""),
            (b'{"\xff": 1}', b""),
        ],
    )
    def test_malformed_header(self, tmp_path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
        with pytest.raises(CheckpointError, match=r"x\.safetensors is not a valid safetensors file"):
            open_tensorfile(raw_file(tmp_path / "x.safetensors", header, data))

    @pytest.mark.parametrize("content", [b"", bytes(7), struct.pack("<Q", 1 << 60), struct.pack("<Q", 100) + b"{}"])
    def test_not_a_safetensors_file(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError):
            open_tensorfile(tmp_path / "x.safetensors")

    @pytest.mark.parametrize("content", [b"# ltx2", b"# ltx2\n\nMLX runtime for LTX-2\n"])
    def test_a_text_is_named(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "README.md").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"README\.md is a text: it holds no tensors"):
            open_tensorfile(tmp_path / "README.md")

    def test_every_truncation_is_noticed(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        save_file({"a": np.arange(3, dtype=np.float32), "b": np.zeros((2, 2), np.float16)}, path)
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(CheckpointError):
                open_tensorfile(path)

    def test_duplicate_names(self, tmp_path: Path) -> None:
        one = json.dumps(entry(0, 4, [1])).encode()
        with pytest.raises(CheckpointError, match="'a' occurs twice"):
            open_tensorfile(raw_file(tmp_path / "x.safetensors", b'{"a":' + one + b',"a":' + one + b"}", bytes(4)))

    def test_unreadable_paths(self, tmp_path: Path) -> None:
        for path in (tmp_path, tmp_path / "absent.safetensors"):
            with pytest.raises(CheckpointError, match="cannot read"):
                open_tensorfile(path)


class TestWriting:
    def tensors(self) -> dict[str, tuple[str, Array]]:
        rng = np.random.default_rng(0)
        return {
            "w": ("F32", rng.standard_normal((5, 3)).astype(np.float32)),
            "h": ("BF16", rng.integers(0, 65536, (4, 2)).astype(np.uint16)),
            "s": ("F32", np.array(3.5, np.float32)),
            "e": ("F32", np.zeros((0, 4), np.float32)),
            "t": ("F32", np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)),
        }

    def test_the_library_reads_it_back(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        write_tensorfile(path, self.tensors(), {"format": "mlx"})
        mine = open_tensorfile(path)
        with safe_open(path, framework="numpy") as theirs:
            assert theirs.metadata() == {"format": "mlx"}
            assert list(mine.tensors) == list(self.tensors())  # in the order given
            for name, (dtype, values) in self.tensors().items():
                np.testing.assert_array_equal(mine.array(name), values)
                assert mine.tensors[name].nbytes == tensor_bytes(dtype, values.shape)
                if dtype == "F32":
                    np.testing.assert_array_equal(theirs.get_tensor(name), values)
        assert mine.tensors["w"].start % 8 == 0

    def test_mlx_reads_it_back(self, tmp_path: Path) -> None:
        values = np.linspace(-3, 3, 12, dtype=np.float32).reshape(3, 4)
        path = tmp_path / "x.safetensors"
        write_tensorfile(path, {"b": ("BF16", f32_to_bf16(values)), "f": ("F32", values)}, {})
        loaded = mx.load(str(path))
        assert isinstance(loaded, dict) and loaded["b"].dtype == mx.bfloat16
        assert mx.array_equal(loaded["b"], mx.array(values).astype(mx.bfloat16))
        assert mx.array_equal(loaded["f"], mx.array(values))

    def test_same_tensors_same_bytes(self, tmp_path: Path) -> None:
        for name in ("x", "y"):
            write_tensorfile(tmp_path / name, self.tensors(), {"b": "1", "a": "2"})
        assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()

    def test_header(self) -> None:
        header = file_header({"a": ("BF16", (2, 3)), "b": ("F32", ())}, {})
        length = int.from_bytes(header[:8], "little")
        assert len(header) == 8 + length and len(header) % 8 == 0
        assert json.loads(header[8:]) == {
            "__metadata__": {},
            "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
            "b": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
        }

    def test_rows(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        write_tensorfile(path, self.tensors(), {})
        file = open_tensorfile(path)
        for name, start, stop in (("w", 1, 4), ("h", 0, 4), ("t", 3, 4), ("e", 0, 0), ("w", 2, 2)):
            np.testing.assert_array_equal(file.rows(name, start, stop), file.array(name)[start:stop])


class TestBfloat16:
    def test_every_code_survives(self) -> None:
        codes = np.arange(1 << 16, dtype=np.uint16)
        values = bf16_to_f32(codes)
        back = f32_to_bf16(values)
        nan = np.isnan(values)
        np.testing.assert_array_equal(back[~nan], codes[~nan])
        assert np.isnan(bf16_to_f32(back[nan])).all()

    @pytest.mark.parametrize(
        ("bits", "code"),
        [
            (0x3F808000, 0x3F80),  # tie, even below: down
            (0x3F818000, 0x3F82),  # tie, odd below: up
            (0x3F808001, 0x3F81),  # just above a tie
            (0x3F817FFF, 0x3F81),  # just below a tie
            (0xBF818000, 0xBF82),  # sign does not matter
            (0x7F7FFFFF, 0x7F80),  # largest float32 rounds to infinity
            (0x7F800000, 0x7F80),  # infinity
            (0xFF800000, 0xFF80),
            (0x00000000, 0x0000),
            (0x80000000, 0x8000),  # negative zero
            (0x00018000, 0x0002),  # subnormal tie
            (0x00000001, 0x0000),
        ],
    )
    def test_rounding(self, bits: int, code: int) -> None:
        assert f32_to_bf16(np.array([bits], np.uint32).view(np.float32))[0] == code

    @pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF, 0xFF800001])
    def test_nan_stays_nan(self, bits: int) -> None:
        code = f32_to_bf16(np.array([bits], np.uint32).view(np.float32))
        assert np.isnan(bf16_to_f32(code)).all()

    def test_agrees_with_mlx(self) -> None:
        bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, np.uint32)
        values = bits.view(np.float32)
        values = values[np.isfinite(values)]
        theirs = np.array(mx.array(values).astype(mx.bfloat16).view(mx.uint16))
        np.testing.assert_array_equal(f32_to_bf16(values), theirs)

    def test_shapes_and_strides(self) -> None:
        values = np.arange(12, dtype=np.float32).reshape(3, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert f32_to_bf16(np.array(1.5, np.float32)).shape == ()
            np.testing.assert_array_equal(bf16_to_f32(f32_to_bf16(values.T)), values.T)
            assert f32_to_bf16(values[:0]).shape == (0, 4)
