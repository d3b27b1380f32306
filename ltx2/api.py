"""The Python interface: every function is a command, its arguments the command's options. Functions that take long call
`progress` with typed events (ltx2.events)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import ltx2
import ltx2.bench
from ltx2.convert import delete
from ltx2.convert.plan.entries import Plan
from ltx2.convert.plan.fuse import fuse as fused
from ltx2.convert.plan.make import Options, make_plan
from ltx2.convert.sources.checkpoint import open_sources
from ltx2.convert.write import SHARD_GB, WriteOptions, write_plan
from ltx2.quant.apply import Settings, write_quantized
from ltx2.quant.apply import quantize as quantize_folder
from ltx2.quant.codes.methods import SEARCH
from ltx2.quant.report import Quantized, Report
from ltx2.runtime.errors import InputError, UsageError
from ltx2.runtime.events import Event, watched
from ltx2.runtime.generate.options.values import Lora
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.model.forms import AFFINE
from ltx2.runtime.model.loras import LoraUse

StrPath = str | PathLike[str]
Sources = StrPath | Iterable[StrPath]
Watch = Callable[[Event], object]
FuseLora = StrPath | tuple[StrPath, float]


def load(model: StrPath) -> Pipeline:
    """Open a model folder. Headers are read now, weights phase by phase when generating."""
    return Pipeline(Path(model))


def download(names: str | Iterable[str], *, to: StrPath = "weights", progress: Watch | None = None) -> list[Path]:
    """Fetch published files or bundles by name (`ltx2 download --list`), or model folders by OWNER/NAME, into a folder;
    existing files are not fetched again. Returns the files and folders, for `convert` or `load`."""
    from ltx2.convert.fetch.download import download as fetch  # loads an HTTP library
    from ltx2.convert.fetch.repository import check_whole, choose
    from ltx2.runtime.events import Downloaded

    chosen = choose([names] if isinstance(names, str) else list(names))
    for event in watched(fetch(chosen, Path(to)), progress):
        if isinstance(event, Downloaded):
            check_whole(chosen, Path(to), event)
    return [published.source(Path(to)) for published in chosen]


def plan_conversion(
    sources: Sources,
    *,
    variant: str | None = None,
    dtype: str | None = None,
    only: Sequence[str] = (),
    fuse: Iterable[FuseLora] = (),
) -> Plan:
    """The plan of `convert`, from headers alone; writing it checks that it fills whole networks."""
    plan = make_plan(open_sources(_paths(sources)), Options(variant, dtype, tuple(only)))
    return fused(plan, [_use(lora) for lora in fuse], dtype)


def _use(lora: FuseLora) -> LoraUse:
    """A LoRA to fuse, as `convert --fuse` spells it or as a tuple."""
    try:
        read = Lora.read(lora)
    except (ValueError, TypeError) as error:
        why, fix = "it is a path, or a path and a strength", "name it like style.safetensors:0.8"
        raise InputError(f"{lora!r} is no LoRA to fuse", why, fix) from error
    if read.second is not None:
        raise InputError(f"{lora} cannot be fused", "fused, it has one strength in all stages", f"use {read.path}:1")
    return LoraUse(Path(read.path), (1.0 if read.strength is None else read.strength,))


def convert(
    sources: Sources,
    out: StrPath,
    *,
    variant: str | None = None,
    dtype: str | None = None,
    only: Sequence[str] = (),
    fuse: Iterable[FuseLora] = (),
    bits: int | None = None,
    mode: str | None = None,
    group_size: int | None = None,
    recipe: str | None = None,
    fit: int | None = None,
    stats: StrPath | None = None,
    method: str | None = None,
    shard_size: float = SHARD_GB,
    delete_sources: bool = False,
    force: bool = False,
    progress: Watch | None = None,
) -> Path:
    """Convert published checkpoints into a model folder; returns its path. With `bits`, `mode`, `recipe` or `fit` the
    folder is quantized, with the bytes of converting and quantizing in turn. LoRAs to `fuse`, paths or tuples of a path
    and a strength, are added to the transformer's weights before anything else. `delete_sources` removes the sources
    once the folder is whole and verified."""
    if delete_sources and only:
        why = "what --only leaves out would be lost"
        raise UsageError("delete_sources and only do not go together", why, "leave out one of them")
    how = {"bits": bits, "mode": mode, "group_size": group_size, "recipe": recipe}
    settings = packing(**how, fit=fit, stats=_path(stats), method=method)
    given = _paths(sources)
    plan = plan_conversion(given, variant=variant, dtype=dtype, only=only, fuse=fuse)
    if delete_sources:
        delete.check_deletion(plan)
    written = WriteOptions(shard_size, force)
    for _ in watched(conversion(plan, Path(out), settings, written, given if delete_sources else ()), progress):
        pass
    return Path(out)


def packing(**options: Any) -> Settings | None:
    """How a conversion quantizes, by those of `convert`'s options that are not None; None if it does not. Raises
    InputError for what is not possible, before any file is read."""
    given = {name: value for name, value in options.items() if value is not None}
    settings = Settings(**given)
    if given.keys().isdisjoint(("bits", "mode", "recipe", "fit")):
        if settings != Settings():
            why = "group_size, stats and method have no effect without bits, recipe or fit"
            raise InputError("nothing is quantized", why, "give bits=4")
        return None
    settings.check()
    return settings


def conversion(
    plan: Plan, out: Path, settings: Settings | None, options: WriteOptions, deleted: Sequence[Path] = ()
) -> Iterator[Event]:
    """Write a plan, quantized if there are settings; then verify the folder and remove the sources given in
    `deleted`."""
    if settings is None:
        yield from write_plan(plan, out, options)
    else:
        yield from write_quantized(plan, out, settings, options)
    if deleted:
        yield from delete.delete_sources(plan, deleted, out)


def calibrate(
    model: StrPath,
    out: StrPath,
    *,
    prompts: str | Iterable[str] = (),
    gptq: bool = False,
    sensitivity: bool = False,
    progress: Watch | None = None,
    **options: Any,
) -> Path:
    """Measure the inputs of a model's layers, for `quantize` and `convert`; returns the file. Generates the prompts
    (none: 16 that come with ltx2) up to their latents; `options` are those of `generate`. With `gptq` the file also
    serves the methods of that name, with `sensitivity` it says which layers matter most, for `fit`."""
    from ltx2.quant.measure.calibrate import calibrate as calibrate_folder

    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    for _ in watched(calibrate_folder(Path(model), Path(out), texts, options, gptq, sensitivity), progress):
        pass
    return Path(out)


def quantize(
    model: StrPath,
    out: StrPath,
    *,
    bits: int | None = None,
    mode: str = AFFINE,
    group_size: int | None = None,
    recipe: str | None = None,
    fit: int | None = None,
    stats: StrPath | None = None,
    method: str = SEARCH,
    only: Sequence[str] = (),
    shard_size: float = SHARD_GB,
    force: bool = False,
    progress: Watch | None = None,
) -> Report:
    """Write a smaller copy of a model folder; returns the report on every layer. `bits` defaults to the recipe's, else
    4 or the mode's; `recipe` to the preset for the bits (`q4`). `fit`, in place of `bits`, chooses them for a Mac with
    so many GB of memory. `stats` is a file by `calibrate`, which the `method`s "gptq" and "gptq-hadamard" need."""
    settings = Settings(bits, group_size, recipe, tuple(only), mode, _path(stats), fit, method)
    events = quantize_folder(Path(model), Path(out), settings, WriteOptions(shard_size, force))
    return next(event.report for event in list(watched(events, progress)) if isinstance(event, Quantized))


def plan(
    *names: str,
    memory: float | None = None,
    bits: int | None = None,
    width: int | None = None,
    height: int | None = None,
    frames: int | None = None,
) -> dict[str, Any]:
    """Whether bundles (`ltx2 download --list`) and model folders run on this Mac, or one of `memory` GB, as they are
    and in every preset; returns the object of `ltx2 plan --json`, sizes in bytes. Needs no network; without names all
    bundles."""
    from ltx2.bench.plan.rows import plan_models

    sizes = {"width": width, "height": height, "frames": frames}
    return plan_models(names, memory, bits, {name: n for name, n in sizes.items() if n is not None}).to_dict()


def bench(
    models: Sources = (),
    *,
    random: str | None = None,
    bits: Sequence[int] = (),
    mode: str | None = None,
    group_size: int | None = None,
    recipe: str | None = None,
    suite: str = "quick",
    part: str | None = None,
    repeat: int | None = None,
    warmup: int | None = None,
    cooldown: float | None = None,
    compare: StrPath | None = None,
    progress: Watch | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure time and memory of model folders, phase by phase, in turns; returns the receipt, the object of
    `ltx2 bench --json`. `random`: a published model with random weights, of `bits`, `mode`, `group_size` and `recipe`;
    `compare`: an earlier receipt; `options` are those of `generate`."""
    from ltx2.bench.speed.cases import bench_models
    from ltx2.bench.speed.run import Benched

    weights = {"random": random, "bits": bits, "mode": mode, "group_size": group_size, "recipe": recipe}
    runs = {"suite": suite, "part": part, "repeat": repeat, "warmup": warmup, "cooldown": cooldown}
    events = bench_models(_paths(models), {**options, **weights, **runs, "compare": _path(compare)})
    *_, receipt = (event.receipt for event in watched(events, progress) if isinstance(event, Benched))
    return receipt


def verify(
    model: StrPath, *, sources: Sources = (), stats: StrPath | None = None, progress: Watch | None = None
) -> dict[str, Any]:
    """Check every file, hash, tensor and shape of a model folder and, with the `sources` it was converted from, every
    value; returns the object of `ltx2 verify --json`. Raises VerificationError with the differences."""
    from functools import partial

    from ltx2.convert.verify import Verified
    from ltx2.convert.verify import verify as check_folder
    from ltx2.quant.measure.statistics import Statistics
    from ltx2.quant.plan.replan import repack

    statistics = None if stats is None else Statistics.open(Path(stats))
    events = check_folder(Path(model), _paths(sources), partial(repack, statistics=statistics))
    return next(event.to_dict() for event in watched(events, progress) if isinstance(event, Verified))


def inspect(path: StrPath) -> dict[str, Any]:
    """The contents of a published file, a folder of them or a model folder, from headers alone."""
    from ltx2.convert.inspect import inspect as describe

    return describe(Path(path))


def _path(path: StrPath | None) -> Path | None:
    return None if path is None else Path(path)


def _paths(paths: Sources) -> list[Path]:
    return [Path(path) for path in ([paths] if isinstance(paths, str | PathLike) else paths)]


# Importing packages has bound their names; the public ones are the functions'. `from ltx2.convert import …` works on.
vars(ltx2).update(bench=bench, convert=convert)
