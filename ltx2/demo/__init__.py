"""The whole chain on an embedded tiny model (demos.json): convert, quantize, generate, bench. No network, no
downloads."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ltx2.api import plan_conversion
from ltx2.bench.speed.run import Benched, Case, run_bench
from ltx2.bench.speed.stats import write_receipt
from ltx2.bench.speed.suite import Schedule, Task
from ltx2.convert.write import write_plan
from ltx2.quant.apply import Settings, quantize
from ltx2.quant.report import Quantized
from ltx2.runtime.errors import InputError, reason
from ltx2.runtime.events import Event, Section
from ltx2.runtime.files.jsonfile import read_object
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.generate.records.sidecar import Sidecar, sidecar_path
from ltx2.runtime.model.layout import ModelFolder

FOLDER = Path(__file__).parent
DEMOS: dict[str, dict[str, str]] = json.loads((FOLDER / "demos.json").read_text())  # by release
PROMPT = "a yellow star moves right on a black background with a high tone"
SIZE: dict[str, Any] = {"width": 192, "height": 128, "frames": 25, "seed": 7}  # what the model was trained for
BITS = (8, 4)


@dataclass(frozen=True)
class Demonstrated(Event):
    """Last event: what was made. `clips` and `models` map a name to a path."""

    prompt: str
    models: dict[str, str]
    clips: dict[str, str]
    quantization: dict[str, Any]
    receipt: dict[str, Any]


def demo_sources(release: str | None = None) -> list[Path]:
    """The files of a release's tiny model, by default the first one's. Raises InputError if there is none."""
    name = next(iter(DEMOS)) if release is None else release
    if name not in DEMOS:
        what = f"there is no demo of release {name}"
        raise InputError(what, f"there are those of {' and '.join(DEMOS)}", f"use --release {next(iter(DEMOS))}")
    folder = FOLDER / DEMOS[name]["folder"]
    if not folder.is_dir():
        fix = "run it from a clone, or leave out --release"
        raise InputError(f"the demo of release {name} is not here", DEMOS[name].get("where", "it is missing"), fix)
    return sorted(path for path in folder.iterdir() if path.suffix == ".safetensors" or path.is_dir())


def run_demo(folder: Path, release: str | None = None) -> Iterator[Event]:
    """Run the chain in `folder` (made if needed); models that are there already are not written again.

    Raises InputError when the folder cannot be made, there is no demo of the release, or a file in a result's place is
    not of a demo.
    """
    sources = demo_sources(release)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}", reason(error), "name another one") from error
    clips = {name: folder / f"clip{suffix}.mp4" for name, suffix in (("full", ""), ("q4", "-q4"))}
    bench = folder / "bench.json"
    for path in (bench, *clips.values(), *map(sidecar_path, clips.values())):
        if path.exists() and not (_is_receipt(path) if path == bench else _is_own(path)):
            raise InputError(f"{path} is already there", "no demo made it", "name another DIR")
    models = {"full": folder / "model", **{f"q{bits}": folder / f"model-q{bits}" for bits in BITS}}
    yield from _convert(sources, models["full"])
    reports: dict[str, Any] = {}
    for bits in BITS:
        name = f"q{bits}"
        yield Section(f"quantize to {bits} bits", f"ltx2 quantize {models['full']} -o {models[name]} --bits {bits}")
        for event in quantize(models["full"], models[name], Settings(bits=bits)):
            if isinstance(event, Quantized):
                reports[name] = event.report.to_dict()["totals"]["all"]
            yield event
    for name, clip in clips.items():
        yield from _generate(models[name], clip)
    receipt: dict[str, Any] = {}
    command = f"ltx2 bench {models['full']} {_options(seed=False)} --repeat 2 --warmup 0 --out {bench}"
    yield Section("bench", command)
    case = Case(ModelFolder.open(models["full"]), Task("clip", tuple(SIZE.items())))
    for event in run_bench([case], Schedule(repeat=2, warmup=0)):
        if isinstance(event, Benched):
            receipt = event.receipt
        yield event
    write_receipt(bench, receipt)
    yield Demonstrated(PROMPT, _texts(models), _texts(clips), reports, receipt)


def _is_own(path: Path) -> bool:
    """Whether a clip, or the record of one, is a demo's."""
    try:
        request = Sidecar.read(path).request
    except InputError:
        return False
    return all(request.get(name) == value for name, value in {"prompt": PROMPT, **SIZE}.items())


def _is_receipt(path: Path) -> bool:
    try:
        return read_object(path).get("kind") == "bench"
    except (OSError, ValueError):
        return False


def _convert(sources: list[Path], model: Path) -> Iterator[Event]:
    # MLX computes 16-bit floats slowly and coarsely on a CPU.
    dtype = "f32" if mx.default_device() == mx.Device(mx.cpu) else None
    cast = f" --dtype {dtype}" if dtype else ""
    names = " ".join(str(source) for source in sources)
    yield Section("convert", f"ltx2 convert {names} -o {model} --variant distilled{cast}")
    yield from write_plan(plan_conversion(sources, variant="distilled", dtype=dtype), model)


def _generate(model: Path, clip: Path) -> Iterator[Event]:
    yield Section("generate", f'ltx2 generate "{PROMPT}" -m {model} -o {clip} --force {_options()}')
    yield from Pipeline(model).stream(PROMPT, output=clip, force=True, **SIZE)


def _options(*, seed: bool = True) -> str:
    """SIZE as the command line spells it; `bench` has no seed."""
    return " ".join(f"--{name} {value}" for name, value in SIZE.items() if seed or name != "seed")


def _texts(paths: dict[str, Path]) -> dict[str, str]:
    return {name: str(path) for name, path in paths.items()}
