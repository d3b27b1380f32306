"""Files by ranges of bytes."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from ltx2.runtime.errors import CheckpointError
from ltx2.runtime.files.ranges import RangeReader, RangeWriter

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
