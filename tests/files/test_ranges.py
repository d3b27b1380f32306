"""Files by ranges of bytes, and safetensors files written whole."""

import errno
import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from ltx2.runtime.errors import CheckpointError
from ltx2.runtime.files.ranges import RangeReader, RangeWriter
from ltx2.runtime.files.tensors import Array, f32_to_bf16, file_header, open_tensorfile, tensor_bytes, write_tensorfile

DATA = np.random.default_rng(0).bytes(100_000)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    return path


class TestReading:
    @pytest.mark.parametrize(("start", "end"), [(0, 100_000), (1, 2), (4095, 8193), (5000, 5000), (99_999, 100_000)])
    def test_any_range(self, file: Path, start: int, end: int) -> None:
        assert RangeReader(file).read(start, end).tobytes() == DATA[start:end]

    def test_what_is_read_can_be_changed(self, file: Path) -> None:
        """It is a copy; the file stays."""
        block = RangeReader(file).read(0, 10)
        block[:] = 0
        assert file.read_bytes() == DATA

    def test_reads_that_return_less(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = os.preadv
        monkeypatch.setattr(os, "preadv", lambda d, blocks, at: whole(d, [blocks[0][:777]], at))
        assert RangeReader(file).read(5, 50_000).tobytes() == DATA[5:50_000]

    def test_a_file_that_shrinks(self, file: Path) -> None:
        """Where a mapped file would end the process."""
        reader = RangeReader(file)
        os.truncate(file, 500)
        with pytest.raises(CheckpointError, match="changed while it was read: it became shorter"):
            reader.read(400, 600)

    def test_a_disk_that_fails(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> int:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(CheckpointError, match=r"cannot read .*: .*the disk failed"):
            RangeReader(file).read(0, 10)

    def test_what_cannot_be_opened(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path, tmp_path / "absent", tmp_path / "pipe"):
            with pytest.raises(CheckpointError, match="cannot read"):
                RangeReader(path)

    def test_files_are_closed(self, file: Path) -> None:
        before = len(list(Path("/dev/fd").iterdir()))
        for _ in range(20):
            RangeReader(file).read(0, 1)
        assert len(list(Path("/dev/fd").iterdir())) <= before + 1


class TestWriting:
    def test_any_order(self, tmp_path: Path) -> None:
        writer = RangeWriter(tmp_path / "x", len(DATA))
        for start in (70_000, 0, 30_000):
            writer.write(start, DATA[start : start + (40_000 if start == 30_000 else 30_000)])
        writer.sync()
        writer.forget(len(DATA))
        writer.close()
        assert (tmp_path / "x").read_bytes() == DATA

    def test_has_its_size_at_once(self, tmp_path: Path) -> None:
        RangeWriter(tmp_path / "x", 12345)
        assert (tmp_path / "x").stat().st_size == 12345

    def test_continues(self, file: Path) -> None:
        RangeWriter(file, 90_000).write(10, b"new")
        assert file.read_bytes() == DATA[:10] + b"new" + DATA[13:90_000]

    def test_writes_that_take_less(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda d, block, at: whole(d, block[:999], at))
        RangeWriter(tmp_path / "x", len(DATA)).write(0, DATA)
        assert (tmp_path / "x").read_bytes() == DATA

    @pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve space")
    @pytest.mark.parametrize(
        ("number", "raises"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EOPNOTSUPP, False)]
    )
    def test_reserving(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, raises: bool) -> None:
        """Too little space is an error at once; a file system that cannot say is none."""

        def refuse(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "posix_fallocate", refuse)
        if raises:
            with pytest.raises(OSError, match=os.strerror(number)):
                RangeWriter(tmp_path / "x", 1000)
        else:
            RangeWriter(tmp_path / "x", 1000).write(0, b"data")


class TestTensorFiles:
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
