"""The facts of this computer, and whether it computes right: every kernel, and the embedded model."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ltx2.api import plan_conversion
from ltx2.bench.doctor.kernels import Checked, check_kernels, relative
from ltx2.convert.fetch.hub import has_token
from ltx2.convert.write import write_plan
from ltx2.demo import SIZE, demo_sources
from ltx2.runtime.errors import Ltx2Error, MediaError, VerificationError
from ltx2.runtime.events import Event, Noted
from ltx2.runtime.files.paths import free_bytes
from ltx2.runtime.files.tensors import open_tensorfile
from ltx2.runtime.generate.job import LATENTS
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.generate.records.clip import Sampled
from ltx2.runtime.machine.facts import available_memory, machine_facts
from ltx2.runtime.media.ffmpeg import ffmpeg_program
from ltx2.runtime.units import gb

GOLDEN = Path(__file__).parent / "demo" / "golden"  # what Lightricks' own modules made of this noise
LIMIT = 2e-2  # of latents: the rounding of eleven steps adds up


@dataclass(frozen=True)
class Diagnosed(Event):
    """The last event: all findings."""

    machine: dict[str, Any]
    kernels: tuple[Checked, ...]
    latents: tuple[Checked, ...]

    @property
    def error(self) -> Ltx2Error | None:
        """The failure and its fix; None if all is right."""
        wrong = [check for check in (*self.kernels, *self.latents) if not check.right]
        if wrong:
            return _failure(wrong, self.machine)
        if self.machine["ffmpeg"] is None:
            return MediaError("ffmpeg was not found", "clips are written with it", self.machine["ffmpeg_fix"])
        return None

    def told(self) -> dict[str, str]:
        """The facts, for people."""
        facts = self.machine
        return {
            "system": f"{facts['system']}, Python {facts['python']}",
            "chip": f"{facts['chip']}, {facts['cores']} cores",
            "device": facts["device"],
            "memory": gb(facts["memory_bytes"]),
            "a generation may take": gb(facts["limit_bytes"]),
            "mlx": ", ".join(f"{name} {version}" for name, version in facts["mlx_packages"].items()),
            "ltx2": facts["ltx2"],
            "ffmpeg": facts["ffmpeg"] or "not found",
            "free disk here": gb(facts["disk_free_bytes"]),
            "Hugging Face login": "a token is stored"
            if facts["hub_login"]
            else "none (for gated files: hf auth login)",
        }

    def to_dict(self) -> dict[str, Any]:
        """For `--json`; sizes in bytes."""
        return {
            "machine": self.machine,
            "kernels": [check.to_dict() for check in self.kernels],
            "latents": [check.to_dict() for check in self.latents],
            "right": self.error is None,
        }


def doctor_tables(found: Diagnosed) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """The computer's facts, and the worst relative error of every group of kernels with its limit."""
    yield "this computer", ["fact", "value"], [[name, text] for name, text in found.told().items()]
    groups: dict[str, list[Checked]] = {}
    for check in found.kernels:
        groups.setdefault(check.group, []).append(check)
    rows = []
    for name, checks in groups.items():
        wrong = [check for check in checks if not check.right]
        shown = wrong or [max(checks, key=lambda check: (check.error or 0.0) / check.limit)]
        for check in shown:
            which = f"{name}: {check.name}" if wrong else name
            rows.append([which, str(len(checks)), check.dtype, _error(check), f"{check.limit:g}", _verdict(check)])
    yield "kernels, against float32 on the CPU", ["kernel", "cases", "type", "error", "limit", "is"], rows
    latents = [[check.name, _error(check), f"{check.limit:g}", _verdict(check)] for check in found.latents]
    yield "the embedded model, against its golden latents", ["latents", "error", "limit", "is"], latents


def _error(check: Checked) -> str:
    return "failed" if check.error is None else f"{check.error:.1e}"


def _verdict(check: Checked) -> str:
    return "right" if check.right else "WRONG"


def diagnose() -> Iterator[Event]:
    """Run all checks; the last event is Diagnosed."""
    kernels = []
    group = ""
    for check in check_kernels():
        if check.group != group:
            yield Noted(f"checking {check.group}")
            group = check.group
        kernels.append(check)
    yield Noted("checking the embedded model")
    yield Diagnosed(_facts(), tuple(kernels), tuple(_golden_latents()))


def _facts() -> dict[str, Any]:
    names = [name for name in ("mlx", "mlx-metal", "mlx-cuda", "mlx-cpu") if _version(name)]
    found: dict[str, Any] = machine_facts() | {
        "limit_bytes": available_memory(),
        "mlx_packages": {name: _version(name) for name in names},
        "disk_free_bytes": free_bytes(Path()),
        "hub_login": has_token(),
    }
    try:
        program = ffmpeg_program()
        said = subprocess.run([program, "-version"], capture_output=True, text=True, check=True).stdout
        return found | {"ffmpeg": " ".join(said.split()[:3])}
    except (MediaError, OSError, subprocess.CalledProcessError) as error:
        fix = error.fix if isinstance(error, MediaError) else "pip install --force-reinstall imageio-ffmpeg"
        return found | {"ffmpeg": None, "ffmpeg_fix": fix}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _golden_latents() -> Iterator[Checked]:
    """The embedded model's latents in float32 from given noise, against those of Lightricks' own modules."""
    golden = open_tensorfile(GOLDEN / "latents.safetensors")
    with TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        for _ in write_plan(plan_conversion(demo_sources(), variant="distilled", dtype="f32"), model):
            pass
        options = {name: size for name, size in SIZE.items() if name != "seed"}
        options |= {"prompt": golden.metadata["prompt"], "noise": str(GOLDEN / "noise.safetensors")}
        *_, done = Pipeline(model).events(Request.from_options(options), LATENTS)
    assert isinstance(done, Sampled), "a run that ends with its latents"
    for name, latents in done.latents.items():
        error = relative(np.array(latents), golden.array(name))
        yield Checked("the embedded model", name, "float32", error, LIMIT)


def _failure(wrong: list[Checked], machine: dict[str, Any]) -> VerificationError:
    first, more = wrong[0], len(wrong) - 1
    error = first.said or "values that are not finite" if first.error is None else f"an error of {first.error:.1e}"
    what = f"{first.group}: {first.name} is wrong on this {machine['device']}"
    why = f"{error}, where {first.limit:g} is the most" + (f"; {more} more are wrong" if more else "")
    update = "update MLX and macOS (pip install -U mlx)"
    packed = all(check.name.endswith(" packed") for check in wrong)
    fix = f"use generate --matmul dequantized, or {update}" if packed else update
    return VerificationError(what, why, f"{fix}; if it stays, report it with the output of ltx2 doctor --json")
