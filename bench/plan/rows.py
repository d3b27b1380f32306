"""Whether models run on a machine, as they are and in every preset, and the memory and disk that they take."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ltx2.bench.plan.models import PROMPT, Planned, PlannedBundle, PlannedFolder
from ltx2.convert.fetch.catalogue import catalogue
from ltx2.quant.apply import Settings
from ltx2.quant.choose.budget import MOST_GB, gpu_bytes
from ltx2.quant.recipes.recipe import BITS
from ltx2.runtime.errors import InputError, UnsupportedError, UsageError
from ltx2.runtime.files.paths import free_bytes
from ltx2.runtime.generate.options.preset import DISTILLED, load_preset
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.machine.facts import available_memory
from ltx2.runtime.memory.plan import on_another_mac
from ltx2.runtime.model.layout import MANIFEST, ModelFolder

RESIDENT, STREAMED, NOT = "resident", "streamed", "does not run"
AS_IS = 16  # bits of weights that are not quantized
PRESETS = ("q8", "q6", "q4", "q4-small", "q3")  # from the best to the smallest
ENOUGH = PRESETS[:4]  # better streamed than replaced by fewer bits
GB = 10**9


@dataclass(frozen=True)
class Row:
    """A model in one preset. In bytes: `read` from disk in every step of the largest stage; `peak` of memory, the least
    possible where it does not run; `size` of the model folder; on disk while downloading, while converting, and after
    without the sources. `command` makes the folder."""

    preset: str
    runs: str
    read: int
    peak: int
    size: int
    downloading: int
    converting: int
    after: int
    command: str
    recommended: bool = False


@dataclass(frozen=True)
class ModelRows:
    """A model and its rows."""

    name: str
    purpose: str
    release: str | None
    variant: str | None
    bits: int
    rows: tuple[Row, ...]

    @property
    def best(self) -> Row | None:
        """The best row: the most bits that stay in memory; else the least to read, of rows with enough bits."""
        able = [row for row in self.rows if row.runs != NOT]
        enough = [row for row in able if row.preset not in PRESETS or row.preset in ENOUGH]
        resident = [row for row in enough if row.runs == RESIDENT]
        if resident:
            return resident[0]
        return min(enough or able, key=lambda row: row.read, default=None)


@dataclass(frozen=True)
class Plan:
    """The rows of all models, and the machine. `memory_gb`: of another Mac, None for this computer; `limit`: bytes that
    a generation may take there; `free`: bytes on this disk."""

    memory_gb: float | None
    limit: int
    free: int
    clip: Mapping[str, Any]
    models: tuple[ModelRows, ...]

    @property
    def recommended(self) -> tuple[ModelRows, Row] | None:
        """The recommended row and its model."""
        found = [(model, row) for model in self.models for row in model.rows if row.recommended]
        return found[0] if found else None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`; sizes in bytes."""
        best = self.recommended
        return asdict(self) | {"recommended": {"name": best[0].name, **asdict(best[1])} if best else None}


def plan_models(
    names: Sequence[str] = (),
    memory: float | None = None,
    bits: int | None = None,
    sizes: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan bundles by name and model folders by path; without names all bundles. `memory`: GB of another Mac; `bits`:
    only these (16: as it is); `sizes`: width, height and frames of the clip.

    Raises InputError for an unknown name or invalid sizes, UsageError for invalid bits or a Mac that does not exist."""
    if bits not in (None, AS_IS, *BITS):
        raise UsageError(f"--bits {bits} is not possible", "weights have 2, 3, 4, 5, 6, 8 or 16 bits", "use --bits 4")
    if memory is not None and not 0 < memory <= MOST_GB:
        raise UsageError(f"--memory {memory:g} is not possible", "it is a Mac's memory in GB", "use --memory 24")
    limit = available_memory() if memory is None else gpu_bytes(memory)
    presets, planned = _presets(bits), list(_models(names))
    if memory is None:
        models = [_rows(model, presets, limit, sizes or {}) for model in planned]
    else:
        with on_another_mac():
            models = [_rows(model, presets, limit, sizes or {}) for model in planned]
    marked = _marked(models)
    clip = _usual(planned[0]) | dict(sizes or {})
    shown = {name: clip[name] for name in ("width", "height", "frames", "fps")}
    return Plan(memory, limit, free_bytes(Path()), shown, marked)


def _models(names: Sequence[str]) -> Iterator[Planned]:
    known = catalogue()
    for name in names or known.bundles:
        if name in known.bundles:
            yield PlannedBundle(known.bundles[name])
        elif (Path(name).exists() and name not in known.published) or (Path(name) / MANIFEST).exists():
            yield PlannedFolder(ModelFolder.open(Path(name)))
        else:
            yield PlannedBundle(known.bundle(name))


def _presets(bits: int | None) -> dict[str, Settings | None]:
    if bits is not None:
        return {"": None} if bits == AS_IS else {f"q{bits}": Settings(bits=bits)}
    return {"": None} | {name: Settings(recipe=name) for name in PRESETS}


def _rows(model: Planned, presets: Mapping[str, Settings | None], limit: int, sizes: Mapping[str, Any]) -> ModelRows:
    """The model's rows, without presets that do not fit it."""
    defaults = {"frames": _usual(model)["frames"]}
    options = {"prompt": PROMPT, "output": "clip.mp4", "memory_limit": limit / GB}
    request = Request.from_options(defaults | dict(sizes) | options)
    rows = []
    for name, settings in presets.items():
        try:
            rows.append(_row(model, name or f"{model.bits} bit", settings, request))
        except (InputError, UnsupportedError):
            if settings is None or len(presets) == 1:
                raise
    return ModelRows(model.name, model.purpose, model.release, model.variant, model.bits, tuple(rows))


def _usual(model: Planned) -> dict[str, Any]:
    """The default options of a clip of the model."""
    return {**load_preset(model.release).defaults, **model.sizes}


def _row(model: Planned, preset: str, settings: Settings | None, request: Request) -> Row:
    plan, size = model.memory(settings, request), model.size(settings)
    read = max((phase.read for phase in plan.phases), default=0)
    runs = NOT if not plan.fits else STREAMED if read else RESIDENT
    source = model.source if settings is not None else 0
    made = model.download + size + source
    return Row(preset, runs, read, plan.peak, size, model.download, made, size, _command(model, settings, preset))


def _command(model: Planned, settings: Settings | None, preset: str) -> str:
    """The command that makes the folder; empty where it exists."""
    how = "" if settings is None else f" --recipe {preset}" if settings.recipe else f" --bits {settings.bits}"
    if model.download:
        return f"ltx2 download {model.name} --convert{how}"
    return f"ltx2 quantize {model.name} -o {model.name}-{preset}{how}" if settings is not None else ""


def _marked(models: Sequence[ModelRows]) -> tuple[ModelRows, ...]:
    """With the recommended row marked: resident before streamed, distilled before dev, 16 bits before fewer, the newest
    release."""
    able = [model for model in models if model.best is not None]
    if not able:
        return tuple(models)

    def rank(model: ModelRows) -> tuple[bool, bool, bool, str]:
        resident = model.best is not None and model.best.runs == RESIDENT
        return resident, model.variant == DISTILLED, model.bits == AS_IS, model.release or ""

    chosen = max(able, key=rank)
    rows = tuple(replace(row, recommended=row is chosen.best) for row in chosen.rows)
    return tuple(replace(model, rows=rows) if model is chosen else model for model in models)
