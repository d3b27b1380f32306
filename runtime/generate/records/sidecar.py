"""The record of a run beside its clip: enough to repeat the run, and to know what made the clip."""

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ltx2 import __version__
from ltx2.runtime.errors import InputError, MediaError, reason
from ltx2.runtime.events import PhaseDone
from ltx2.runtime.files.atomic import Claim, beside, write_text
from ltx2.runtime.files.jsonfile import parse_object, read_object
from ltx2.runtime.generate.job import Job
from ltx2.runtime.generate.options.kinds import digest, portable
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.generate.options.table import ROWS
from ltx2.runtime.generate.options.values import path_of
from ltx2.runtime.machine.facts import machine_facts
from ltx2.runtime.media.source import read_comment
from ltx2.runtime.sampling.guidance import passes

SETTINGS = ("ltx2", "request", "model", "stages", "sound", "inputs", "duration")


def sidecar_path(video: Path) -> Path:
    """clip.mp4 -> clip.json"""
    return beside(video.with_suffix(""), ".json")


def make_settings(job: Job) -> dict[str, Any]:
    """The settings that make the clip: the request with all defaults, the model, the stages, the sound's origin, and
    every given file."""
    manifest, request = job.folder.manifest, job.request
    sound = None if job.row is None else f"stage {job.sound_stage}"
    settings = {
        "ltx2": __version__,
        "request": request.recorded(),
        "model": {
            "path": portable(job.folder.path),
            "release": manifest.release,
            "variant": manifest.variant,
            "files": job.folder.hashes(),
            "quantization": {n: c.quantization for n, c in manifest.components.items() if c.quantization},
            "sources": [{"name": s.name, "sha256": s.sha256} for s in manifest.sources],
            "converted_by": manifest.tool_version,
        },
        "stages": [_stage(job, number) for number in job.numbers],
        "sound": "given" if request.audio is not None or request.upscale is not None else sound,
        "inputs": [
            {"option": name, "path": portable(path), "size": Path(path).stat().st_size, "sha256": digest(path)}
            for name, path in request.inputs()
        ],
    }
    return settings if job.length is None else settings | {"duration": asdict(job.length)}


def _stage(job: Job, number: int) -> dict[str, Any]:
    course, grid, row = job.course(number), job.stage_grid(number), job.stages[number - 1]
    return {
        "width": grid.width * job.scales.spatial,
        "height": grid.height * job.scales.spatial,
        "sigmas": course.sigmas,
        "sampler": row.sampler or "euler",
        "loras": [{"path": portable(use.path), "strength": use.strength(number)} for use, _ in job.loras.uses],
        "guidance": {name: asdict(g) for name, g in course.guidance.items()} if row.guided else None,
        "passes": len(passes(course.guidance, job.frozen)),
        "tokens": {name: {s.name: s.tokens for s in found} for name, found in job.segments(number).items()},
    }


def settings_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a record was made with."""
    return {name: record[name] for name in SETTINGS if name in record}


def make_record(settings: Mapping[str, Any], phases: Sequence[PhaseDone], seconds: float) -> dict[str, Any]:
    """The sidecar's content: the settings, this machine, and what each phase took."""
    return {
        **settings,
        "machine": machine_facts(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "phases": [_phase(phase) for phase in phases],
    }


def write_sidecar(path: Path, record: Mapping[str, Any], claim: Claim | None = None) -> None:
    """Write it to the `claim` that a run holds from its start, else to the path. Raises InputError if it cannot be
    written."""
    write_text(path, json.dumps(record, indent=2) + "\n", claim)


def _phase(phase: PhaseDone) -> dict[str, Any]:
    longest = phase.longest_eval_seconds
    exchanged = {"sent_bytes": phase.sent_bytes, "exchange_seconds": round(phase.exchange_seconds, 4)}
    return {
        "name": phase.name,
        "seconds": round(phase.seconds, 3),
        "load_seconds": round(phase.load_seconds, 3),
        "step_seconds": [round(s, 4) for s in phase.step_seconds],
        "longest_eval_seconds": None if longest is None else round(longest, 4),
        "mlx_peak_bytes": phase.mlx_peak_bytes,
        "process_peak_bytes": phase.process_peak_bytes,
        **(exchanged if phase.sent_bytes else {}),
    }


@dataclass(frozen=True)
class Sidecar:
    """The record of an earlier run: its options without what it saved; option, path and SHA-256 of the files that it
    was given; its model folder, and the hashes of every component's files."""

    request: Mapping[str, Any]
    inputs: Sequence[tuple[str, str, str]]
    model: Path
    files: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Sidecar":
        """From the .json beside a clip, or the clip itself. Raises InputError for anything else."""
        try:
            return cls.from_record(_record(path))
        except OSError as error:
            raise _not_repeated(path, reason(error)) from error
        except MediaError as error:
            raise _not_repeated(path, error.why) from error
        except (ValueError, LookupError, TypeError) as error:
            raise _not_repeated(path, "no settings of a clip stand in it") from error

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Sidecar":
        """Raises ValueError, LookupError or TypeError for anything else."""
        again = {name for name, row in ROWS.items() if row.recorded and row.repeated}
        request = {n: v for n, v in dict(record["request"]).items() if v is not None and n in again}
        inputs = [(str(i["option"]), path_of(i["path"]), str(i["sha256"])) for i in record.get("inputs", ())]
        return cls(request, inputs, Path(path_of(record["model"]["path"])), record["model"]["files"])

    def check_inputs(self, request: Request, given: Container[str]) -> None:
        """Raises InputError for a file that is used again and is gone or has changed; options that are `given` anew
        may."""
        used = set(request.named())
        for option, path, sha256 in self.inputs:
            if option in given or (option, path) not in used:
                continue
            fix = f"put the old file back, or give {ROWS[option].flag} anew"
            if not Path(path).exists():
                raise InputError(f"{path} is gone", f"the clip was made with it, for {ROWS[option].flag}", fix)
            if digest(path) != sha256:
                why = f"its content is not what the clip was made with, for {ROWS[option].flag}"
                raise InputError(f"{path} has changed", why, fix)


def is_sidecar(path: Path) -> bool:
    """Whether a file is the record of a clip."""
    try:
        Sidecar.from_record(read_object(path))
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return True


def _record(path: Path) -> Mapping[str, Any]:
    return read_object(path) if path.suffix.lower() == ".json" else parse_object(read_comment(path))


def _not_repeated(path: Path, why: str) -> InputError:
    return InputError(f"cannot repeat {path}", why, "use a clip that ltx2 made, or the .json beside it")
