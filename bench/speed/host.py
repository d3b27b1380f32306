"""Facts that decide a machine's speed, beside those that every clip records: GPU cores and power. A Mac on battery, or
in low power mode, is another machine."""

import os
import re
import subprocess
import sys
from typing import Any

from ltx2.runtime.distributed.machines import BACKENDS
from ltx2.runtime.distributed.ranks import RANK
from ltx2.runtime.machine.facts import machine_facts

MODES = {"0": "automatic", "1": "low", "2": "high"}


def host_facts() -> dict[str, Any]:
    """`machine_facts`, and `gpu_cores`, `power` ("AC Power", "Battery Power"), `power_mode` ("automatic", "low",
    "high"), each None where it is not known."""
    facts: dict[str, Any] = {"gpu_cores": None, "power": None, "power_mode": None}
    if sys.platform == "darwin":
        facts["gpu_cores"] = gpu_cores(_output("/usr/sbin/ioreg", "-l", "-r", "-d", "1", "-c", "AGXAccelerator"))
        facts["power"] = power_source(_output("/usr/bin/pmset", "-g", "ps"))
        facts["power_mode"] = power_mode(_output("/usr/bin/pmset", "-g"))
    return machine_facts() | facts


def mlx_environment() -> dict[str, str]:
    """The environment variables that change how MLX works, without those that name machines."""
    places = {RANK, "MLX_WORLD_SIZE", *BACKENDS}
    return {n: value for n, value in sorted(os.environ.items()) if n.startswith("MLX_") and n not in places}


def gpu_cores(registry: str) -> int | None:
    """From `ioreg`'s entry of the accelerator."""
    found = re.search(r'"gpu-core-count"\s*=\s*(\d+)', registry)
    return int(found[1]) if found else None


def power_source(status: str) -> str | None:
    """From `pmset -g ps`: Now drawing from 'AC Power'."""
    found = re.search(r"drawing from '([^']+)'", status)
    return found[1] if found else None


def power_mode(settings: str) -> str | None:
    """From `pmset -g`, which lists `powermode` on Macs that have three, `lowpowermode` on those that have two."""
    found = re.search(r"^\s*(?:low)?powermode\s+([012])\b", settings, re.MULTILINE)
    return MODES[found[1]] if found else None


def _output(*command: str) -> str:
    """The output of a system program; empty where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
