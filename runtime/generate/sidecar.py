"""What is recorded of a run beside its clip: enough to repeat it and to know what made it; written and read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ltx2.runtime.errors import InputError
from ltx2.runtime.events import PhaseDone
from ltx2.runtime.files.jsonfile import read_object
from ltx2.runtime.generate.options import ROWS
from ltx2.runtime.generate.request import Request
from ltx2.runtime.machine.facts import machine_facts
from ltx2.runtime.model.layout import ModelFolder


def sidecar_path(video: Path) -> Path:
    """clip.mp4 -> clip.json"""
    return video.with_suffix(".json")


def make_record(folder: ModelFolder, request: Request, phases: Sequence[PhaseDone], seconds: float) -> dict[str, Any]:
    """The sidecar's content: a request with all its defaults, the model, this machine, and what each phase took."""
    manifest = folder.manifest
    return {
        "request": request.recorded(),
        "model": {
            "path": str(folder.path.absolute()),
            "release": manifest.release,
            "variant": manifest.variant,
            "files": folder.hashes(),
            "quantization": {n: c.quantization for n, c in manifest.components.items() if c.quantization},
            "sources": [{"name": s.name, "sha256": s.sha256} for s in manifest.sources],
            "converted_by": manifest.tool_version,
        },
        "machine": machine_facts(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "phases": [_phase(phase) for phase in phases],
    }


def _phase(phase: PhaseDone) -> dict[str, Any]:
    longest = phase.longest_eval_seconds
    return {
        "name": phase.name,
        "seconds": round(phase.seconds, 3),
        "load_seconds": round(phase.load_seconds, 3),
        "step_seconds": [round(s, 4) for s in phase.step_seconds],
        "longest_eval_seconds": None if longest is None else round(longest, 4),
        "mlx_peak_bytes": phase.mlx_peak_bytes,
        "process_peak_bytes": phase.process_peak_bytes,
    }


@dataclass(frozen=True)
class Sidecar:
    """What a sidecar says of an earlier run: the options it had, less what it saved, and its model folder with the
    hashes of every component's files."""

    request: Mapping[str, Any]
    model: Path
    files: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Sidecar":
        """Raises InputError when the file is not a sidecar."""
        try:
            record = read_object(path)
            request, model, files = dict(record["request"]), Path(record["model"]["path"]), record["model"]["files"]
        except OSError as error:
            raise _not_repeated(path, error.strerror or str(error)) from error
        except (ValueError, LookupError, TypeError) as error:
            raise _not_repeated(path, "it is not the record of a clip") from error
        again = {name for name, row in ROWS.items() if row.recorded and row.repeated}
        return cls({n: v for n, v in request.items() if v is not None and n in again}, model, files)


def _not_repeated(path: Path, why: str) -> InputError:
    return InputError(f"cannot repeat {path}", why, "use the .json that was written beside a clip")
