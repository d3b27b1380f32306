"""Measure what quantizing costs the embedded demo model, which is small enough for many prompts: how many of them its
clips follow, and how far every model is from its reference.

`python -m ltx2.bench.quality.demo_quality --out receipt.json`"""

import argparse
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from math import inf, isfinite, sqrt
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple, TypeVar, cast

import mlx.core as mx

from ltx2.bench.plots.demo import packed_bits, plot_demo
from ltx2.bench.plots.plot import check_plot
from ltx2.bench.quality.classify import classify
from ltx2.bench.quality.demo_models import REFERENCE, SIZE, DemoModel, demo_models, make_models
from ltx2.bench.quality.demo_prompts import Prompt, random_prompts
from ltx2.bench.quality.metrics import Difference
from ltx2.bench.quality.quality import clip_row, model_facts, strip
from ltx2.bench.quality.teacher import STREAMS, Case, Comparison, Recording, compare, make, packed_layers, record
from ltx2.bench.speed.stats import write_receipt
from ltx2.runtime.events import Event
from ltx2.runtime.files.paths import check_output
from ltx2.runtime.files.tensors import Array
from ltx2.runtime.generate.records.clip import Clip
from ltx2.runtime.machine.facts import machine_facts
from ltx2.runtime.model.layout import TRANSFORMER, ModelFolder

PROMPTS = 64
COMPARED = 12  # of them: models are compared layer by layer and step by step, which takes four times as long as a clip
ATTRIBUTES = ("colour", "shape", "motion", "tone", "background")
FOLLOWED = ATTRIBUTES[:4]  # a clip that shows these follows its prompt
MEASURES = ("psnr_db", "log_spectral_distance_db", "layers")  # of a clip; of both streams:
PAIRS = ("contexts", "velocity", "cosine", "latents")
STRIPS = 3  # prompts whose clips are shown
Row = dict[str, Any]
Paths = Mapping[str, Path]  # folders of the models by name, the reference's among them
Value = TypeVar("Value")


class Result(NamedTuple):
    """One model's clip of one prompt: `wrong` has the attributes that it shows and the prompt does not ask for,
    `distances` from the reference's clip are empty unless compared, `strip` are some frames (STRIP, H, W, 3)."""

    wrong: Mapping[str, str]
    distances: Row
    strip: Array


Results = Sequence[Mapping[str, Result]]  # by prompt and model


def measure_prompt(paths: Paths, number: int, prompt: Prompt) -> dict[str, Result]:
    """Make the clips of one prompt with all models; the first COMPARED prompts' are compared."""
    # In float32 whatever the weights' dtype: a CPU computes bf16 coarsely, and weights are compared, not kernels.
    case = Case({**SIZE, "fps": 24.0, "seed": number, "matmul": "dequantized"}, mx.float32)
    measured = _compared(paths, prompt, case) if number < COMPARED else _made(paths, prompt, case)
    results = {}
    for name, clip, distances in measured:
        wrong = prompt.wrong(classify(clip.frames, clip.audio, clip.sample_rate))
        results[name] = Result(wrong, distances, strip(clip.frames))
    return results


Measured = Iterator[tuple[str, Clip, Row]]  # a model's name, its clip, the distances from the reference's


def _compared(paths: Paths, prompt: Prompt, case: Case) -> Measured:
    layers = {name: packed_layers(ModelFolder.open(path)) for name, path in paths.items()}
    recording = _end(record(paths[REFERENCE], prompt.text, case, _union(layers.values())))
    for name, path in paths.items():
        if name == REFERENCE:
            yield name, recording.clip, {}
        else:
            comparison = _end(compare(path, recording, case))
            yield name, comparison.clip, _distances(recording, comparison, layers[name])


def _made(paths: Paths, prompt: Prompt, case: Case) -> Measured:
    for name, path in paths.items():
        yield name, _end(make(path, prompt.text, case)), {}


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
    """The return value of a generator of events."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return cast(Value, end.value)


def summary(paths: Paths, prompts: Sequence[Prompt], chosen: Sequence[DemoModel], results: Results) -> Row:
    """The receipt."""
    models = [DemoModel(REFERENCE, REFERENCE), *chosen]
    return {
        "kind": "demo quality",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_facts(),
        "dtype": "float32",
        "prompts": len(prompts),
        "compared": min(COMPARED, len(prompts)),
        "size": SIZE,
        "models": [_model_row(paths[m.name], m, prompts, [found[m.name] for found in results]) for m in models],
    }


def _model_row(path: Path, model: DemoModel, prompts: Sequence[Prompt], results: Sequence[Result]) -> Row:
    """Size, how many prompts are followed, and medians over those that were compared."""
    facts, wrong = model_facts(ModelFolder.open(path)), [result.wrong for result in results]
    row = {
        **{"name": model.name, "series": model.series, "quantize": " ".join(model.quantize), "stock": model.stock},
        **{name: facts[name] for name in ("bytes", "bits_per_weight", "components", "files")},
        "followed": sum(not any(name in FOLLOWED for name in names) for names in wrong),
        "right": {name: sum(name not in names for names in wrong) for name in ATTRIBUTES},
        "misses": {p.text: names for p, names in zip(prompts, wrong, strict=True) if names.keys() & {*FOLLOWED}},
    }
    if not (compared := [result.distances for result in results if result.distances]):
        return row
    single = {name: _median(distances[name] for distances in compared) for name in MEASURES}
    pairs = {name: {end: _median(distances[name][end] for distances in compared) for end in STREAMS} for name in PAIRS}
    return row | single | pairs


def _median(values: Iterable[float | None]) -> float | None:
    """None, the decibels of two equal clips, counts as infinite."""
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


def run(paths: Paths, prompts: Sequence[Prompt], processes: int, say: Callable[[str], None]) -> Results:
    """Measure all prompts in several processes; `say` is told after each."""
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")  # a forked process cannot use MLX
    with ProcessPoolExecutor(processes, context) as pool:
        work = [pool.submit(measure_prompt, paths, number, prompt) for number, prompt in enumerate(prompts)]
        for done, finished in enumerate(as_completed(work), start=1):
            finished.result()
            say(f"{done} of {len(work)} prompts, {time.monotonic() - started:.0f} s")
    return [finished.result() for finished in work]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="receipt to write")
    parser.add_argument("--plot", type=Path, help="picture to write (.png or .svg)")
    parser.add_argument("--folder", type=Path, default=Path("build/demo-quality"), help="for the models")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    names = [model.name for model in demo_models()]
    parser.add_argument("--model", action="append", default=[], dest="names", choices=names, help="only these")
    cores = (os.cpu_count() or 1) if mx.default_device() == mx.Device(mx.cpu) else 1
    parser.add_argument("--processes", type=int, default=cores)
    args = parser.parse_args()
    check_output(args.out)
    if args.plot is not None:
        check_plot(args.plot)
    chosen = demo_models(args.names)
    paths, prompts = make_models(args.folder, chosen), random_prompts(args.prompts)
    results = run(paths, prompts, args.processes, _say)
    receipt = summary(paths, prompts, chosen, results)
    write_receipt(args.out, receipt)
    for row in table(receipt):
        _say("".join(f"{cell:>12s}" for cell in row))
    if args.plot is not None:
        names = [REFERENCE, *(model.name for model in chosen if model.shown)]
        strips = {name: [found[name].strip for found in results[:STRIPS]] for name in names}
        plot_demo(args.plot, receipt, strips)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
