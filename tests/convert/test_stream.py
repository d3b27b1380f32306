"""How data flow: in order through threads, hashed as they pass, in the sources' order, in little memory; and what is
checked before the first byte, with real file systems where they may be mounted."""

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltx2.convert.output import hashing
from ltx2.convert.output.files import component_files, stream_order
from ltx2.convert.output.hashing import SourceHashes, StreamingHash
from ltx2.convert.output.pieces import in_order
from ltx2.convert.plan.entries import Move, Plan
from ltx2.convert.write import WriteOptions, write_plan
from ltx2.runtime.errors import DoesNotFitError, InputError, ModelFolderError
from ltx2.runtime.events import Written
from ltx2.runtime.files.ranges import Bytes, RangeReader
from ltx2.runtime.files.tensors import TensorFile, TensorInfo, open_tensorfile
from ltx2.runtime.model.layout import ModelFolder
from tests.support import published
from tests.support.folders import contents
from tests.support.official import DEMO, MONOLITH, UPSCALER, plan_of

ROOT = Path(__file__).parent.parent.parent
SMALL_SHARDS = WriteOptions(shard_gb=0.001)
Usage = namedtuple("Usage", "total used free")


def run(plan: Plan, out: Path, options: WriteOptions | None = None) -> Written:
    *_, last = write_plan(plan, out, options)
    assert isinstance(last, Written)
    return last


@dataclass(frozen=True)
class Number:
    value: int
    memory: int = 1


class TestInOrder:
    def test_results_come_in_the_items_order(self) -> None:
        def work(item: Number) -> int:
            time.sleep(0.001 * (item.value % 3))
            return item.value

        assert list(in_order(work, map(Number, range(50)), threads=4, window=8)) == list(range(50))

    def test_no_more_is_under_way_than_the_window(self) -> None:
        begun: list[int] = []
        results = in_order(lambda item: begun.append(item.value), (Number(n, 10) for n in range(100)), 1, window=35)
        for done, _ in enumerate(islice(results, 90)):
            assert len(begun) <= done + 5
        results.close()

    def test_one_that_is_larger_than_the_window(self) -> None:
        assert list(in_order(lambda item: item.value, [Number(1, 99), Number(2, 99)], 1, window=10)) == [1, 2]

    def test_an_error_comes_when_it_is_its_turn(self) -> None:
        results = in_order(lambda item: 6 // item.value, [Number(2), Number(0), Number(3)])
        assert next(results) == 3
        with pytest.raises(ZeroDivisionError):
            next(results)

    def test_closing_ends_the_threads(self) -> None:
        before, begun = threading.active_count(), []

        def work(item: Number) -> None:
            begun.append(item)
            time.sleep(0.01)

        results = in_order(work, map(Number, range(1000)), 2, window=20)
        next(results)
        results.close()
        assert threading.active_count() == before and len(begun) < 100

    def test_results_are_not_kept(self) -> None:
        """Memory of what was used is free again."""
        results = in_order(lambda item: np.zeros(1 << 20, np.uint8), map(Number, range(30)), threads=1, window=2)
        references = [weakref.ref(block) for block in results]
        assert sum(reference() is not None for reference in references) <= 1


class TestStreamingHash:
    DATA = np.random.default_rng(0).bytes(300_000)

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        (tmp_path / "file").write_bytes(self.DATA)
        return tmp_path / "file"

    def hashed(self, file: Path, blocks: list[tuple[int, int]], ready: int | None = None) -> str:
        each = StreamingHash(RangeReader(file))
        for start, end in blocks:
            each.feed(start, memoryview(self.DATA[start:end]), start if ready is None else ready)
        digest = each.finish(len(self.DATA)).result()
        each.close()
        return digest

    @pytest.mark.parametrize(
        "blocks",
        [
            [],
            [(0, 300_000)],
            [(0, 100_000), (100_000, 200_000), (200_000, 300_000)],
            [(5, 100), (200_000, 200_001)],  # gaps
            [(200_000, 300_000), (100_000, 200_000), (0, 100_000)],  # backwards
            [(0, 100), (100, 200), (50, 150), (150, 250), (0, 10)],  # known already, in part
            [(0, 0), (300_000, 300_000)],
        ],
    )
    def test_any_order(self, file: Path, blocks: list[tuple[int, int]]) -> None:
        for ready in (None, 0, len(self.DATA)):
            assert self.hashed(file, blocks, ready) == hashlib.sha256(self.DATA).hexdigest()

    def test_random_orders(self, file: Path) -> None:
        rng = np.random.default_rng(1)
        for _ in range(20):
            cuts = np.sort(rng.integers(0, len(self.DATA), 30)).tolist()
            blocks = [b for b in pairwise([0, *cuts, len(self.DATA)]) if rng.random() < 0.8]
            rng.shuffle(blocks)
            assert self.hashed(file, [(a, b) for a, b in blocks]) == hashlib.sha256(self.DATA).hexdigest()

    def test_what_is_contiguous_is_not_read(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(bytes(len(self.DATA)))
        blocks = [(start, start + 30_000) for start in range(0, len(self.DATA), 30_000)]
        assert self.hashed(tmp_path / "file", blocks) == hashlib.sha256(self.DATA).hexdigest()

    def test_what_is_not_ready_is_not_read(self, tmp_path: Path) -> None:
        """A file that is being written: what is not there yet must not be hashed."""
        path = tmp_path / "file"
        path.write_bytes(bytes(len(self.DATA)))
        each = StreamingHash(RangeReader(path))
        each.feed(200_000, memoryview(self.DATA[200_000:]), 0)
        each.feed(0, memoryview(self.DATA[:100_000]), 0)
        path.write_bytes(self.DATA)
        assert each.finish(len(self.DATA)).result() == hashlib.sha256(self.DATA).hexdigest()
        each.close()

    def test_far_behind_it_catches_up_by_itself(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nobody waits for it: the prefix of a run that continues."""
        monkeypatch.setattr(hashing, "FAR", 1000)
        reader = RangeReader(file)
        go, read = threading.Event(), reader.read

        def slow(start: int, end: int) -> Bytes:
            go.wait()
            return read(start, end)

        monkeypatch.setattr(reader, "read", slow)
        each = StreamingHash(reader)
        each.feed(100_000, memoryview(self.DATA[100_000:200_000]), 300_000)
        for start in range(200_000, 300_000, 10_000):
            each.feed(start, memoryview(self.DATA[start : start + 10_000]), 300_000)
        go.set()
        assert each.finish(len(self.DATA)).result() == hashlib.sha256(self.DATA).hexdigest()
        each.close()

    def test_an_error_of_reading_is_not_lost(self, file: Path) -> None:
        each = StreamingHash(RangeReader(file))
        each.feed(299_000, memoryview(b""), 299_000)
        os.truncate(file, 1000)
        with pytest.raises(Exception, match="became shorter"):
            each.finish(300_000).result()
        each.close()

    def test_sources(self, file: Path) -> None:
        with SourceHashes([TensorFile(file, {}, {}, len(self.DATA))], {}) as hashes:
            list(hashes.wait())
            assert [path for path, _ in hashes.collect()] == [str(file)]
            assert hashes.records()[0].sha256 == hashlib.sha256(self.DATA).hexdigest()


class TestOrder:
    def move(self, file: TensorFile, key: str, start: int, size: int) -> Move:
        return Move(file, TensorInfo(key, "U8", (size,), start, start + size), "transformer", key)

    def keys(self, moves: list[Move]) -> list[str]:
        return [move.key for move in stream_order(moves)]

    def test_blocks_stand_where_their_largest_tensor_stands(self) -> None:
        file = TensorFile(Path("x"), {}, {}, 0)
        places = {"blocks.1.table": (0, 4), "blocks.0.table": (4, 4), "a": (8, 9), "blocks.0.w": (20, 50), "b": (70, 9),
                  "blocks.1.v": (80, 9), "blocks.1.w": (90, 50), "c": (140, 1)}  # fmt: skip
        moves = [self.move(file, key, *place) for key, place in sorted(places.items())]
        ordered = ["a", "blocks.0.table", "blocks.0.w", "b", "blocks.1.table", "blocks.1.v", "blocks.1.w", "c"]
        assert self.keys(moves) == ordered

    def test_files_follow_each_other(self) -> None:
        first, second = (TensorFile(Path(name), {}, {}, 0) for name in "xy")
        moves = [self.move(first, "blocks.0.w", 50, 9), self.move(second, "blocks.0.v", 0, 5),
                 self.move(second, "blocks.1.w", 5, 9), self.move(first, "a", 0, 50)]  # fmt: skip
        assert self.keys(moves) == ["a", "blocks.0.w", "blocks.0.v", "blocks.1.w"]

    def test_a_block_in_two_files_stands_in_the_second(self) -> None:
        """Files of several layers are sorted by name: layer 10 stands before the end of layer 6."""
        first, second = (TensorFile(Path(name), {}, {}, 0) for name in "xy")
        moves = [self.move(first, "l.5.w", 0, 9), self.move(first, "l.6.w", 9, 99), self.move(second, "l.10.w", 0, 9),
                 self.move(second, "l.6.v", 9, 1), self.move(second, "l.7.w", 10, 9)]  # fmt: skip
        assert self.keys(moves) == ["l.5.w", "l.10.w", "l.6.w", "l.6.v", "l.7.w"]

    def test_what_is_in_order_stays(self) -> None:
        """So a quantized copy has the bytes of converting and quantizing at once."""
        moves = [e for e in plan_of(MONOLITH, variant="dev").entries if isinstance(e, Move)]
        assert stream_order(stream_order(moves)) == stream_order(moves)

    def test_a_model_folder_is_in_the_sources_order(self, demo_model: Path) -> None:
        place = {name: t.start for name, t in open_tensorfile(MONOLITH).tensors.items()}
        stored = ModelFolder.open(demo_model).tensor_files("transformer")[0].tensors.values()
        weights = [place.get(f"model.diffusion_model.{t.name}") for t in sorted(stored, key=lambda t: t.start)
                   if t.dtype != "F32"]  # fmt: skip
        known = [start for start in weights if start is not None]
        assert known == sorted(known) and len(known) > 300


MEMORY = """
import re, sys, threading, time
from pathlib import Path
import ltx2, ltx2.api

def anonymous():
    return int(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1e3

def watch():
    while True:
        peaks.append(anonymous())
        time.sleep(0.002)

peaks = [anonymous()]
threading.Thread(target=watch, daemon=True).start()
ltx2.convert([sys.argv[1]], sys.argv[2], **eval(sys.argv[3]))
print(max(peaks) - peaks[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("options", [{}, {"dtype": "f16"}], ids=["copied", "cast"])
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, figure: Callable[..., None], options: dict[str, Any]
) -> None:
    """Nor beyond a few of its kernels, of 44 MB. Quantizing: tests/quant/test_quant.py."""
    source = published.write_upscaler(tmp_path / "up.safetensors", 640)
    size = source.stat().st_size / 1e6
    command = [sys.executable, "-c", MEMORY, str(source), str(tmp_path / "out"), repr(options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert size > 380
    figure(f"anonymous memory of converting {size:.0f} MB {options or ''}, MB", float(done.stdout), limit=250)


class TestDisk:
    @pytest.fixture
    def mount(self, tmp_path: Path) -> Iterator[Callable[[str], Path]]:
        """Mounts a file system in memory, and changes its options."""
        folder = tmp_path / "mount"
        folder.mkdir()

        def mount(options: str) -> Path:
            how = ["-o", f"remount,{options}"] if folder.is_mount() else ["-t", "tmpfs", "-o", options, "tmpfs"]
            if shutil.which("mount") is None or subprocess.run(["mount", *how, folder], capture_output=True).returncode:
                pytest.skip("file systems may not be mounted here")
            return folder

        yield mount
        if folder.is_mount():
            subprocess.run(["umount", folder], check=True)

    def little(self, monkeypatch: pytest.MonkeyPatch, free: int = 10**6) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, free))

    def test_too_small(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Said before anything is made, with the size there will be."""
        self.little(monkeypatch)
        with pytest.raises(DoesNotFitError, match=r"0\.0\d+ GB are needed, 0\.0010 GB are free") as error:
            run(plan_of(UPSCALER), tmp_path / "new" / "out")
        assert error.value.exit_code == 3 and not list(tmp_path.iterdir())

    def test_what_is_needed_is_more_than_what_is_free(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also where only the room for the journal is missing."""
        plan = plan_of(UPSCALER)
        size = sum(f.size for c in plan.components.values() for f in component_files(plan, c, 10**9))
        self.little(monkeypatch, size + 10**6)
        with pytest.raises(DoesNotFitError) as error:
            run(plan, tmp_path / "out")
        needed, free = map(float, re.findall(r"([\d.]+) GB", error.value.why))
        assert needed > free > size / 1e9

    def test_too_small_for_the_rest(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is there already counts, and is kept."""
        plan, out = plan_of(*DEMO, variant="distilled"), tmp_path / "out"
        assert len(list(islice(write_plan(plan, out, SMALL_SHARDS), 300))) == 300
        for file in (tmp_path / "out.partial").rglob("*.partial"):
            with file.open("r+b") as f:
                f.truncate(0)  # not reserved any more
        kept = contents(tmp_path / "out.partial").keys()
        self.little(monkeypatch)
        with pytest.raises(DoesNotFitError):
            run(plan, out, SMALL_SHARDS)
        assert contents(tmp_path / "out.partial").keys() == kept and len(kept) > 5

    def test_what_is_reserved_needs_no_more(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if not hasattr(os, "posix_fallocate"):
            pytest.skip("this system cannot reserve space")
        plan, out = plan_of(*DEMO, variant="distilled"), tmp_path / "out"
        next(iter(write_plan(plan, out)))
        self.little(monkeypatch, 17 << 20)
        run(plan, out)

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_full_while_writing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        """In the thread that writes: the error is the command's, and the same command goes on."""
        write, left = os.pwrite, iter(range(100))

        def full(*args: Any) -> int:
            if next(left, None) is None:
                raise OSError(number, os.strerror(number))
            return write(*args)

        with monkeypatch.context() as patched, pytest.raises(DoesNotFitError, match="the disk is full"):
            patched.setattr(os, "pwrite", full)
            run(plan_of(MONOLITH, variant="dev"), tmp_path / "out", SMALL_SHARDS)
        assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
        run(plan_of(MONOLITH, variant="dev"), tmp_path / "out", SMALL_SHARDS)
        run(plan_of(MONOLITH, variant="dev"), tmp_path / "other", SMALL_SHARDS)
        assert contents(tmp_path / "out") == contents(tmp_path / "other")

    def test_a_failing_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr("ltx2.runtime.files.ranges.flush", fail)
        with pytest.raises(InputError, match="cannot write"):
            run(plan_of(UPSCALER), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("reserving", [True, False])
    def test_a_full_file_system(
        self, mount: Callable[[str], Path], demo_model: Path, monkeypatch: pytest.MonkeyPatch, reserving: bool
    ) -> None:
        """A real one; another program takes the space between the check and the writing."""
        folder = mount("size=4m")
        plan, out = plan_of(*DEMO, variant="distilled"), folder / "out"
        with pytest.raises(DoesNotFitError, match="the disk is too small"):
            run(plan, out)
        assert not list(folder.iterdir())
        with monkeypatch.context() as patched:
            self.little(patched, 10**9)
            if not reserving:
                patched.delattr(os, "posix_fallocate", raising=False)
            with pytest.raises(DoesNotFitError, match="the disk is full"):
                run(plan, out)
        assert not out.exists()
        mount("size=64m")
        run(plan, out)
        assert contents(out) == contents(demo_model)

    def test_a_read_only_file_system(self, mount: Callable[[str], Path]) -> None:
        folder = mount("size=4m")
        mount("ro")
        for out in (folder / "out", folder / "new" / "out"):
            with pytest.raises(InputError, match=r"cannot write .*: the folder .* cannot be written"):
                run(plan_of(UPSCALER), out)

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(InputError, match="cannot be written"):
            run(plan_of(UPSCALER), tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="is not a folder"):
            run(plan_of(UPSCALER), tmp_path / "file" / "out")

    def test_folders_above_are_made(self, tmp_path: Path) -> None:
        run(plan_of(UPSCALER), tmp_path / "a" / "b" / "out")
        assert (tmp_path / "a" / "b" / "out" / "ltx2.json").is_file()

    @pytest.mark.parametrize("name", ["out", "out.partial"])
    @pytest.mark.parametrize("target", ["absent", "folder"])
    def test_links_are_not_followed(self, tmp_path: Path, name: str, target: str) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / name).symlink_to(tmp_path / target)
        with pytest.raises((InputError, ModelFolderError), match=r"is a link|in the way"):
            run(plan_of(UPSCALER), tmp_path / "out")
        assert not list((tmp_path / "folder").iterdir()) and not (tmp_path / "absent").exists()

    def test_a_link_to_a_finished_model_is_that_model(self, tmp_path: Path) -> None:
        run(plan_of(UPSCALER), tmp_path / "model")
        (tmp_path / "out").symlink_to(tmp_path / "model")
        assert run(plan_of(UPSCALER), tmp_path / "out").reused
