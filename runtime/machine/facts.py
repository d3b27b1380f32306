"""Facts about this computer, for sidecars, receipts and memory limits."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx

from ltx2.runtime.version import tool_version


def device_memory() -> int:
    """Bytes the GPU can use: the recommended working set on a Mac, else the device's or the computer's memory."""
    info = mx.device_info()
    for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if key in info:
            return int(info[key])
    return total_memory()


def available_memory() -> int:
    """Bytes that a generation may take: a Mac's recommended working set, another GPU's free memory, or, without a GPU,
    the computer's free memory."""
    info = mx.device_info()
    for key in ("max_recommended_working_set_size", "free_memory"):
        if key in info:
            return int(info[key])
    if sys.platform != "linux":
        return total_memory()
    facts = Path("/proc/meminfo").read_text()
    return int(facts.split("MemAvailable:")[1].split()[0]) * 1024


def total_memory() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def chip_name() -> str:
    """The processor's name, e.g. "Apple M4 Max"."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return str(mx.device_info(mx.cpu).get("device_name", platform.processor() or platform.machine()))


def machine_facts() -> dict[str, Any]:
    """Chip, GPU, memory, system and versions."""
    return {
        "chip": chip_name(),
        "device": str(mx.device_info().get("device_name", mx.default_device())),
        "memory_bytes": total_memory(),
        "device_memory_bytes": device_memory(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.mac_ver()[0] or platform.release()}",
        "python": platform.python_version(),
        "mlx": metadata.version("mlx"),
        "ltx2": tool_version(),
    }
