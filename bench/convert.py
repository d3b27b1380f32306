"""Time `ltx2 convert` against `cp` of the same file, and measure its memory: on files of random values with the
published names and shapes, each run from a cold cache to the disk.

`python -m ltx2.bench.convert --out receipt.json`"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ltx2.bench.random.synthetic import write_checkpoint
from ltx2.bench.speed.stats import Timing, write_receipt
from ltx2.runtime.machine.facts import machine_facts

BLOCKS = 5  # of the published 48: a file of about 4 GB, 2 GB with FP8
ROUNDS = 5
POLL_SECONDS = 0.01
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One way to convert a checkpoint of 16 or 8 bits."""

    name: str
    bits: int
    options: tuple[str, ...] = ()


CASES = (
    Case("bf16, copied", 16),
    Case("FP8, kept", 8),
    Case("FP8 to bf16", 8, ("--dtype", "bf16")),
    Case("bf16 to 4 bits", 16, ("--bits", "4")),
)


@dataclass(frozen=True)
class Run:
    """Seconds of one run until its output was on the disk, and its peak of anonymous memory, where known."""

    seconds: float
    memory: int | None


def run(folder: Path, blocks: int, rounds: int, names: Sequence[str], show: Callable[[Row], None]) -> Row:
    """Measure the cases of these names (all if empty) in `folder`, each in turns with `cp`; `show` gets each row.
    Returns the receipt."""
    rows = []
    chosen = [case for case in CASES if case.name in names or not names]
    for bits in sorted({case.bits for case in chosen}):
        path = folder / f"random-{bits}-bits-distilled.safetensors"
        write_checkpoint(path, blocks, bits)
        for case in chosen:
            if case.bits == bits:
                rows.append(measure(case, path, rounds))
                show(rows[-1])
        path.unlink()
    return {
        "kind": "convert",
        "weights": "random",
        "blocks": blocks,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_facts(),
        "cache_dropped": _can_drop_all(),
        "results": rows,
    }


def measure(case: Case, source: Path, rounds: int) -> Row:
    """One case and `cp` of its source in turns; they swap order every round."""
    runs: dict[str, list[Run]] = {"cp": [], "convert": []}
    out, copy = source.with_name("model"), source.with_name("copy")
    convert = [sys.executable, "-m", "ltx2", "convert", str(source), "-o", str(out), "--quiet", *case.options]
    written = 0
    for number in range(rounds):
        for what in sorted(runs, reverse=number % 2 == 0):
            shutil.rmtree(out, ignore_errors=True)
            copy.unlink(missing_ok=True)
            forget(source)
            command = ["cp", str(source), str(copy)] if what == "cp" else convert
            runs[what].append(timed(command, copy if what == "cp" else None))
            if what == "convert":
                written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    copy.unlink(missing_ok=True)
    return _row(case, source.stat().st_size, written, runs)


def _row(case: Case, read: int, written: int, runs: dict[str, list[Run]]) -> Row:
    times = {what: [run.seconds for run in done] for what, done in runs.items()}
    ratios = [ours / theirs for ours, theirs in zip(times["convert"], times["cp"], strict=True)]
    seconds = statistics.median(times["convert"])
    return {
        "case": case.name,
        "bytes_read": read,
        "bytes_written": written,
        "seconds": Timing.of(times["convert"]).to_dict(),
        "cp_seconds": Timing.of(times["cp"]).to_dict(),
        "ratio": round(seconds / statistics.median(times["cp"]), 3),
        "ratio_of_pairs": round(statistics.median(ratios), 3),
        "gigabytes_per_second": {"read": round(read / seconds / 1e9, 3), "written": round(written / seconds / 1e9, 3)},
        "peak_anonymous_bytes": max((run.memory for run in runs["convert"] if run.memory is not None), default=None),
    }


def timed(command: Sequence[str], to_sync: Path | None) -> Run:
    """Run a command; `to_sync` is a file to sync afterwards, as part of the time."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = None
    while process.poll() is None:
        peak = max(filter(None, (peak, anonymous_memory(process.pid))), default=None)
        time.sleep(POLL_SECONDS)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    if to_sync is not None:
        with to_sync.open("rb") as f:
            os.fsync(f.fileno())
    return Run(time.perf_counter() - started, peak)


def anonymous_memory(process: int) -> int | None:
    """Bytes of a process's memory that belong to no file; None where the system does not say."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), None)


def forget(file: Path) -> None:
    """Sync, then drop the page cache: all of it where we may, else this file's."""
    os.sync()
    if _can_drop_all():
        DROP_CACHES.write_text("3")
    elif hasattr(os, "posix_fadvise"):
        with file.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _can_drop_all() -> bool:
    return os.access(DROP_CACHES, os.W_OK)


def show_row(row: Row) -> None:
    """One line on stdout."""
    ours, theirs, memory = row["seconds"], row["cp_seconds"], row["peak_anonymous_bytes"]
    times = f"{ours['median']:6.2f} s, cp {theirs['median']:6.2f} s, ratio {row['ratio']:.2f}"
    spread = f"spread {100 * ours['spread']:.0f} % and {100 * theirs['spread']:.0f} %"
    used = "" if memory is None else f", {memory / 1e6:.0f} MB"
    sys.stdout.write(f"{row['case']:16s} {times} ({spread}){used}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="receipt to write")
    parser.add_argument("--folder", type=Path, default=Path("build/bench-convert"), help="where 13 GB are free")
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--case", action="append", default=[], choices=[case.name for case in CASES], dest="cases")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    write_receipt(args.out, run(args.folder, args.blocks, args.rounds, args.cases, show_row))


if __name__ == "__main__":
    main()
