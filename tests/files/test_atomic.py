"""Files that appear whole or not at all, held by one process, and where there is room for them."""

import errno
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from ltx2.runtime.errors import CheckpointError, DoesNotFitError, InputError
from ltx2.runtime.files import atomic
from ltx2.runtime.files.atomic import beside, claimed, growing, hold, write_file, write_text
from ltx2.runtime.files.paths import check_folder, check_output, check_room, free_bytes, write_failure
from ltx2.runtime.files.ranges import READ_BYTES, digesting, sha256

Usage = namedtuple("Usage", "total used free")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestWriting:
    def test_appears_when_complete_and_replaces(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        path.write_text("old")
        with growing(path) as partial:
            partial.write_text("new")
            assert path.read_text() == "old" and partial.name == "a.json.partial"
        assert path.read_text() == "new" and names(tmp_path) == ["a.json"]

    def test_failing_leaves_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        path.write_text("old")
        with pytest.raises(ZeroDivisionError), growing(path) as partial:
            partial.write_text(str(1 / 0))
        assert path.read_text() == "old" and names(tmp_path) == ["a.json"]

    def test_is_on_the_disk_before_it_has_its_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "a"
        path.write_text("old")

        def fail(_: int) -> None:
            raise OSError(errno.EIO, "the disk fails")

        with monkeypatch.context() as patched, pytest.raises(OSError, match="the disk fails"):
            patched.setattr(atomic, "flush", fail)
            write_file(path, [b"new"])
        assert path.read_text() == "old" and names(tmp_path) == ["a"]
        write_file(path, [b"1", memoryview(b"2")])
        assert path.read_bytes() == b"12"

    def test_text_that_cannot_be_written(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"cannot write .*a\.txt"):
            write_text(tmp_path / "missing" / "a.txt", "x")

    @pytest.mark.parametrize("length", [10, 247, 248, 255])
    def test_any_legal_name(self, tmp_path: Path, length: int) -> None:
        path = tmp_path / ("n" * length)
        write_text(path, "x")
        assert names(tmp_path) == ["n" * length]

    def test_names_beside_are_different_ones(self) -> None:
        long = [Path("é" * 120 + end) for end in ("a" * 10, "a" * 9 + "b")]
        made = [beside(path, suffix).name for path in long for suffix in (".partial", ".partial.done")]
        assert len(set(made)) == 4 and all(len(os.fsencode(name)) <= 255 for name in made)
        assert beside(Path("a/clip.mp4"), ".partial") == Path("a/clip.mp4.partial")


class TestHolding:
    def test_two_at_once(self, tmp_path: Path) -> None:
        with claimed(tmp_path / "a") as first:
            assert first.locked
            with pytest.raises(InputError, match="a is being written"), growing(tmp_path / "a"):
                pytest.fail("the file is held")
            first.partial.write_text("x")
            first.publish()
        assert names(tmp_path) == ["a"]

    def test_what_a_killed_process_left_makes_way(self, tmp_path: Path) -> None:
        code = (
            "import os, sys; from pathlib import Path; from ltx2.runtime.files.atomic import growing\n"
            "with growing(Path(sys.argv[1])) as p: p.write_text('half'); os.kill(os.getpid(), 9)"
        )
        killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=False)
        assert killed.returncode == -signal.SIGKILL and names(tmp_path) == ["a.partial"]
        write_text(tmp_path / "a", "whole")
        assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "whole"

    @pytest.mark.parametrize("answer", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
    def test_a_file_system_without_locks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int) -> None:
        """It is no second process."""

        def flock(*_: object) -> None:
            raise OSError(answer, os.strerror(answer))

        monkeypatch.setattr(fcntl, "flock", flock)
        with (tmp_path / "a").open("wb") as file:
            assert not hold(file, tmp_path / "a")
        with claimed(tmp_path / "b") as claim:
            assert not claim.locked
        write_text(tmp_path / "c", "x")
        assert (tmp_path / "c").read_text() == "x"


class TestPlaces:
    def test_folders(self, tmp_path: Path) -> None:
        check_folder(tmp_path / "to" / "be" / "made", tmp_path / "to")
        (tmp_path / "file").write_text("x")
        with pytest.raises(InputError, match=r"cannot write .*out: .*file is not a folder"):
            check_folder(tmp_path / "file" / "below", tmp_path / "out")
        with pytest.raises(InputError, match="does not exist"):
            check_output(tmp_path / "missing" / "a.json")

    def test_room_is_added_up_by_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**10, 0, 3 * 10**9))
        assert free_bytes(tmp_path / "not" / "there") == 3 * 10**9
        check_room((tmp_path, 10**9), (tmp_path / "a", 2 * 10**9))
        with pytest.raises(DoesNotFitError, match=r"3\.1 GB are needed, 3\.0 GB are free .* or fewer files"):
            check_room((tmp_path, 10**9), (tmp_path / "a", 21 * 10**8), else_=", or fewer files")

    def test_what_the_system_answers(self, tmp_path: Path) -> None:
        full, refused = (OSError(code, os.strerror(code)) for code in (errno.ENOSPC, errno.EACCES))
        assert isinstance(write_failure(full, tmp_path), DoesNotFitError)
        assert isinstance(write_failure(refused, tmp_path), InputError)


class TestHashes:
    @pytest.mark.parametrize("size", [0, 1, READ_BYTES, READ_BYTES + 1, 3 * READ_BYTES - 5])
    def test_any_size(self, tmp_path: Path, size: int) -> None:
        path = tmp_path / "a"
        path.write_bytes(bytes(range(251)) * (size // 251 + 1))
        os.truncate(path, size)
        assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
        assert sum(digesting(path)) == size

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="cannot read"):
            sha256(tmp_path / "a")
