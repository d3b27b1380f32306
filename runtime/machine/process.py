"""This process: its memory now and at most, the bytes it has read from disks, open files, and no sleep."""

import ctypes
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

# macOS keeps a ledger per process: `struct rusage_info_v4` of sys/resource.h, 16 bytes of UUID, then 64-bit fields.
# The footprint is what Activity Monitor calls memory, and counts the GPU's buffers; the resident size does not.
RUSAGE_INFO_V4 = 4
UUID_BYTES, FIELDS = 16, 35
FOOTPRINT, DISK_READ, LARGEST_FOOTPRINT = 7, 16, 28
CAFFEINATE = "/usr/bin/caffeinate"  # ends with the process that it watches, however that ends


def memory_now() -> int:
    """Bytes of memory this process holds: the footprint on macOS, the resident size elsewhere."""
    if sys.platform == "darwin":
        return _ledger()[FOOTPRINT]
    return _kilobytes(Path("/proc/self/status").read_text(), "VmRSS")


def process_peak_memory() -> int:
    """The most bytes of memory this process has held so far."""
    if sys.platform == "darwin":
        return _ledger()[LARGEST_FOOTPRINT]
    return _kilobytes(Path("/proc/self/status").read_text(), "VmHWM")  # ru_maxrss would start at the parent's peak


def disk_bytes_read() -> int | None:
    """Bytes that this process has read from disks, not from cached files; None where the system does not tell."""
    if sys.platform == "darwin":
        return _ledger()[DISK_READ]
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:  # some containers forbid it
        return None
    return int(_by_name(lines)["read_bytes"])


def allow_files(count: int) -> None:
    """Let this process open so many files at once, as far as the system allows; macOS begins with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        with suppress(ValueError, OSError):
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (count if hard == resource.RLIM_INFINITY else min(count, hard), hard)
            )


@contextmanager
def awake() -> Iterator[None]:
    """Keep an idle Mac awake while this process works; closing its lid or choosing Sleep still puts it to sleep. Does
    nothing elsewhere."""
    keeper = None
    if sys.platform == "darwin":
        with suppress(OSError):
            command, none = [CAFFEINATE, "-i", "-w", str(os.getpid())], subprocess.DEVNULL
            keeper = subprocess.Popen(command, stdin=none, stdout=none, stderr=none)
    try:
        yield
    finally:
        if keeper is not None:
            keeper.terminate()
            keeper.wait()


def _kilobytes(status: str, name: str) -> int:
    return int(_by_name(status.splitlines())[name].split()[0]) * 1024


def _by_name(lines: list[str]) -> Mapping[str, str]:
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _ledger() -> list[int]:
    """The fields of this process's ledger."""
    buffer = (ctypes.c_uint64 * (UUID_BYTES // 8 + FIELDS))()
    if ctypes.CDLL(None, use_errno=True).proc_pid_rusage(os.getpid(), RUSAGE_INFO_V4, buffer):
        raise OSError(ctypes.get_errno(), "proc_pid_rusage")
    return list(buffer)[UUID_BYTES // 8 :]
