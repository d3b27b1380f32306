"""What quantizing costs the embedded demo model, which is small enough to be asked many times: of many prompts, how
many are followed, and how far every model is from its reference.
`python -m ltx2.bench.quality.demo_quality --out receipt.json`

Prompts are shared out among processes, and what is known of a prompt and a model is kept in a file: a run that was cut
off, or one with more prompts or models, only does what is missing."""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from math import inf, isfinite, sqrt
from pathlib import Path
from statistics import mean, median
from typing import Any, TypeVar, cast

import mlx.core as mx
import numpy as np

from ltx2 import __version__
from ltx2.bench.plots.demo import packed_bits, plot_demo
from ltx2.bench.plots.plot import check_plot
from ltx2.bench.quality.classify import classify
from ltx2.bench.quality.demo_models import REFERENCE, SIZE, DemoModel, demo_models, make_models
from ltx2.bench.quality.demo_prompts import Prompt, random_prompts
from ltx2.bench.quality.metrics import Array, Difference
from ltx2.bench.quality.quality import clip_row, model_facts, strip
from ltx2.bench.quality.teacher import STREAMS, Case, Comparison, Recording, compare, make, packed_layers, record
from ltx2.bench.speed.stats import write_receipt
from ltx2.runtime.events import Event
from ltx2.runtime.files.atomic import write_text
from ltx2.runtime.files.paths import check_output
from ltx2.runtime.generate.records.clip import Clip
from ltx2.runtime.machine.facts import machine_facts
from ltx2.runtime.model.layout import ModelFolder

PROMPTS = 64
COMPARED = 12  # of them: models are compared layer by layer and step by step, which takes four times as long as a clip
ATTRIBUTES = ("colour", "shape", "motion", "tone", "background")
FOLLOWED = ATTRIBUTES[:4]  # a prompt is followed whose clip shows all of these
MEASURES = ("psnr_db", "log_spectral_distance_db", "layers")  # of a clip; of both streams:
PAIRS = ("contexts", "velocity", "cosine", "latents")
TRANSFORMER = "transformer"
STRIPS = 3  # prompts whose clips are shown
Row = dict[str, Any]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Models:
    """Folders by name, the reference's among them, and where results are kept."""

    folder: Path
    paths: Mapping[str, Path]

    def result(self, name: str, number: int) -> Path:
        """The file of what is known of a model and a prompt."""
        return self.folder / "results" / name / f"{number:03d}.json"

    def strip(self, name: str, number: int) -> Path:
        """The file of some frames of that clip."""
        return self.result(name, number).with_suffix(".npy")


def measure_prompt(models: Models, number: int, prompt: Prompt) -> None:
    """Make the clips of one prompt with all models that have not yet made it, and keep what they show."""
    keys = {name: result_key(path, models.paths[REFERENCE], prompt) for name, path in models.paths.items()}
    missing = [name for name in models.paths if read_result(models.result(name, number), keys[name]) is None]
    if not missing:
        return
    # In float32 whatever the weights' dtype: a CPU computes bf16 coarsely, and what is compared are the weights.
    case = Case({**SIZE, "fps": 24.0, "seed": number, "matmul": "dequantized"}, mx.float32)
    measured = _compared(models, missing, prompt, case) if number < COMPARED else _made(models, missing, prompt, case)
    for name, clip, row in measured:
        if number < STRIPS:
            _write_array(models.strip(name, number), strip(clip.frames))
        _write_json(models.result(name, number), {"key": keys[name], **_shown(clip, prompt), **row})


Measured = Iterator[tuple[str, Clip, Row]]  # a model's name, its clip, how far it is from the reference's


def _compared(models: Models, names: Sequence[str], prompt: Prompt, case: Case) -> Measured:
    layers = {name: packed_layers(ModelFolder.open(models.paths[name])) for name in names}
    recording = _end(record(models.paths[REFERENCE], prompt.text, case, _union(layers.values())))
    for name in names:
        if name == REFERENCE:
            yield name, recording.clip, {}
            continue
        comparison = _end(compare(models.paths[name], recording, case))
        yield name, comparison.clip, _distances(recording, comparison, layers[name])


def _made(models: Models, names: Sequence[str], prompt: Prompt, case: Case) -> Measured:
    for name in names:
        yield name, _end(make(models.paths[name], prompt.text, case)), {}


def result_key(model: Path, reference: Path, prompt: Prompt) -> Row:
    """What a result depends on."""
    hashes = [ModelFolder.open(folder).hashes() for folder in (model, reference)]
    return {"prompt": prompt.text, "model": hashes[0], "reference": hashes[1], "size": SIZE, "ltx2": __version__}


def read_result(path: Path, key: Row) -> Row | None:
    """What was kept, unless it belongs to something else."""
    if not path.exists():
        return None
    row: Row = json.loads(path.read_text())
    return row if row["key"] == key else None


def _shown(clip: Clip, prompt: Prompt) -> Row:
    """What the clip shows, and what of that is not what the prompt asks for."""
    seen = classify(clip.frames, clip.audio, clip.sample_rate)
    return {"wrong": {name: seen[name] for name, value in prompt.want.items() if seen[name] != value}}


def _distances(recording: Recording, comparison: Comparison, layers: Mapping[str, Collection[str]]) -> Row:
    """`layers`: the root mean square of the relative errors of the transformer's packed layers."""
    known = ((layer, d.relative) for (component, layer), d in comparison.layers.items() if component == TRANSFORMER)
    errors = [error for layer, error in known if layer in layers[TRANSFORMER]]
    velocity = {name: sum((s[name] for s in comparison.velocity.values()), Difference()) for name in STREAMS}
    return {
        **clip_row(recording, comparison),
        "layers": sqrt(mean(error**2 for error in errors)),
        "contexts": {name: comparison.contexts[name].relative for name in STREAMS},
        "velocity": {name: velocity[name].relative for name in STREAMS},
        "cosine": {name: velocity[name].cosine for name in STREAMS},
    }


def _union(found: Iterable[Mapping[str, Collection[str]]]) -> dict[str, set[str]]:
    union: dict[str, set[str]] = defaultdict(set)
    for layers in found:
        for component, names in layers.items():
            union[component].update(names)
    return union


def _end(work: Generator[Event, None, Value]) -> Value:
    """What a generator of events returns."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return cast(Value, end.value)


def _write_json(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(row) + "\n")


def _write_array(path: Path, values: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values)


def summary(models: Models, prompts: Sequence[Prompt], chosen: Sequence[DemoModel]) -> Row:
    """The receipt, of all results."""
    rows = [_model_row(models, DemoModel(REFERENCE, REFERENCE), prompts)]
    rows += [_model_row(models, model, prompts) for model in chosen]
    return {
        "kind": "demo quality",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_facts(),
        "dtype": "float32",
        "prompts": len(prompts),
        "compared": min(COMPARED, len(prompts)),
        "size": SIZE,
        "models": rows,
    }


def _model_row(models: Models, model: DemoModel, prompts: Sequence[Prompt]) -> Row:
    """Size, how many prompts are followed, and medians over the first of them."""
    path = models.paths[model.name]
    results = [
        read_result(models.result(model.name, number), result_key(path, models.paths[REFERENCE], prompt))
        for number, prompt in enumerate(prompts)
    ]
    found = [result for result in results if result is not None]
    facts = model_facts(ModelFolder.open(path))
    wrong = [result["wrong"] for result in found]
    row = {
        **{"name": model.name, "series": model.series, "quantize": " ".join(model.quantize), "stock": model.stock},
        **{name: facts[name] for name in ("bytes", "bits_per_weight", "components", "files")},
        "followed": sum(not any(name in FOLLOWED for name in names) for names in wrong),
        "right": {name: sum(name not in names for names in wrong) for name in ATTRIBUTES},
        "misses": {p.text: names for p, names in zip(prompts, wrong, strict=True) if names.keys() & {*FOLLOWED}},
    }
    if model.name == REFERENCE:
        return row
    compared = found[:COMPARED]
    single = {name: _median(result[name] for result in compared) for name in MEASURES}
    pairs = {name: {end: _median(r[name][end] for r in compared) for end in STREAMS} for name in PAIRS}
    return row | single | pairs


def _median(values: Iterable[float | None]) -> float | None:
    """None, of two clips without any difference, is more than any number of decibels."""
    middle = median(inf if value is None else value for value in values)
    return float(f"{middle:.6g}") if isfinite(middle) else None


def table(receipt: Row) -> list[list[str]]:
    """For people: a header, and a row per model."""
    count = receipt["prompts"]
    rows = [["model", "MB", "bits", "layers %", "video %", "latents %", "PSNR dB", "LSD dB", "followed", *FOLLOWED]]
    for model in receipt["models"]:
        row = [model["name"], f"{model['bytes'] / 1e6:.2f}", *[""] * 6]
        if model["name"] != REFERENCE:
            shares = model["layers"], model["velocity"]["video"], model["latents"]["video"]
            row[2:] = [f"{packed_bits(model):.2f}", *(f"{100 * share:.2f}" for share in shares)]
            row += ["same" if model[name] is None else f"{model[name]:.3f}" for name in MEASURES[:2]]
        rows.append([*row, f"{model['followed']}/{count}", *(str(model["right"][name]) for name in FOLLOWED)])
    return rows


def run(models: Models, prompts: Sequence[Prompt], processes: int, say: Callable[[str], None]) -> None:
    """Measure all prompts; `say` is told after each."""
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")  # a forked process cannot use MLX
    with ProcessPoolExecutor(processes, context) as pool:
        work = [pool.submit(measure_prompt, models, number, prompt) for number, prompt in enumerate(prompts)]
        for done, finished in enumerate(as_completed(work), start=1):
            finished.result()
            say(f"{done} of {len(work)} prompts, {time.monotonic() - started:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="receipt to write")
    parser.add_argument("--plot", type=Path, help="picture to write (.png or .svg)")
    parser.add_argument("--folder", type=Path, default=Path("build/demo-quality"), help="for models and results")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    names = [model.name for model in demo_models()]
    parser.add_argument("--model", action="append", default=[], dest="names", choices=names, help="only these")
    cores = (os.cpu_count() or 1) if mx.default_device() == mx.Device(mx.cpu) else 1
    parser.add_argument("--processes", type=int, default=cores)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    check_output(args.out)
    if args.plot is not None:
        check_plot(args.plot)
    chosen = demo_models(args.names)
    models, prompts = Models(args.folder, make_models(args.folder, chosen)), random_prompts(args.prompts)
    run(models, prompts, args.processes, lambda text: _say(text))
    receipt = summary(models, prompts, chosen)
    write_receipt(args.out, receipt)
    for row in table(receipt):
        _say("".join(f"{cell:>12s}" for cell in row))
    if args.plot is not None:
        shown = range(min(STRIPS, len(prompts)))
        names = [REFERENCE, *(model.name for model in chosen if model.shown)]
        strips = {name: [np.load(models.strip(name, number)) for number in shown] for name in names}
        plot_demo(args.plot, receipt, strips)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
