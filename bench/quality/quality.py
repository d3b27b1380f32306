"""The cost of quantizing (or anything else) to a model, against the model that it was made from: layer by layer and
step by step on the reference's inputs, then as latents, pictures and sound of the same prompts and noise."""

import json
import shlex
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import resources
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ltx2.bench.quality.metrics import Difference, log_spectral_distance, psnr
from ltx2.bench.quality.teacher import (
    STREAMS,
    Case,
    Comparison,
    Differences,
    Recording,
    StepKey,
    compare,
    packed_layers,
    record,
)
from ltx2.bench.speed.run import Benched
from ltx2.convert.inspect import inspect
from ltx2.convert.plan.entries import Layer
from ltx2.runtime.errors import InputError
from ltx2.runtime.events import Event, Section
from ltx2.runtime.files.tensors import Array
from ltx2.runtime.generate.job import Job
from ltx2.runtime.generate.options.choices import with_fixed_length
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.generate.options.table import COSTS
from ltx2.runtime.generate.phases.order import components, phases
from ltx2.runtime.machine.facts import machine_facts
from ltx2.runtime.model.layout import ModelFolder

FORMS = ("quantization", "quantization_config")  # keys of a configuration about the storage of weights
PARTS = ("weight", "scales", "biases", "weight_scale")  # of a packed layer
STRIP = 5  # frames of a clip to keep for looking at
WORST = 10  # layers in the table
SAME = 1e9  # dB, stands for infinity in medians
Row = dict[str, Any]


@dataclass(frozen=True)
class Compared(Benched):
    """Last event of a comparison: the receipt, and for every prompt frames (STRIP, H, W, 3) of both clips, the
    reference's first."""

    strips: tuple[tuple[Array, Array], ...]


@dataclass
class Quality:
    """Sums over the compared clips of several prompts."""

    layers: dict[Layer, Difference] = field(default_factory=lambda: defaultdict(Difference))
    velocity: dict[StepKey, Differences] = field(default_factory=dict)
    contexts: Differences = field(default_factory=lambda: defaultdict(Difference))
    clips: list[Row] = field(default_factory=list)
    peaks: list[Row] = field(default_factory=list)
    request: Row = field(default_factory=dict)

    def add(self, recording: Recording, comparison: Comparison) -> None:
        """Add the clips of one more prompt."""
        for layer, difference in comparison.layers.items():
            self.layers[layer] += difference
        for step, streams in comparison.velocity.items():
            total = self.velocity.setdefault(step, dict.fromkeys(STREAMS, Difference()))
            self.velocity[step] = {name: total[name] + streams[name] for name in STREAMS}
        for name in STREAMS:
            self.contexts[name] += comparison.contexts[name]
        self.clips.append(clip_row(recording, comparison))
        self.request = recording.clip.record["request"]
        for clip in (recording.clip, comparison.clip):
            self.peaks += clip.record["phases"]


def run_quality(model: Path, reference: Path, prompts: Sequence[str], options: Mapping[str, Any]) -> Iterator[Event]:
    """Compare two model folders on some prompts; the last event is Compared.

    `options` are those of `generate` without the prompt; the first prompt has their seed, the next ones the following
    seeds. Packed weights are unpacked to multiply, so that weights are compared, not kernels. Raises InputError for
    folders of different architectures, and what a generation raises."""
    folders = ModelFolder.open(model), ModelFolder.open(reference)
    case = Case({"seed": 0, "matmul": "dequantized", **with_fixed_length(folders[1], options)})
    check_comparable(*folders, case)
    measured, strips = Quality(), []
    for number, prompt in enumerate(prompts):
        turn = replace(case, options={**case.options, "seed": case.options["seed"] + number})
        which = f"prompt {number + 1} of {len(prompts)}"
        strips.append((yield from _compare_on(prompt, which, folders, turn, measured)))
    yield Compared(make_receipt(folders, measured), tuple(strips))


def _compare_on(
    prompt: str, which: str, folders: tuple[ModelFolder, ModelFolder], case: Case, measured: Quality
) -> Generator[Event, None, tuple[Array, Array]]:
    """Add one prompt's clips; returns frames (STRIP, H, W, 3) of both. The recording is freed before the next
    prompt's."""
    model, reference = folders
    yield Section(f"reference, {which}", _command(reference.path, prompt, case))
    recording = yield from record(reference.path, prompt, case, packed_layers(model))
    yield Section(f"compared with it, {which}", _command(model.path, prompt, case))
    comparison = yield from compare(model.path, recording, case)
    measured.add(recording, comparison)
    return strip(recording.clip.frames), strip(comparison.clip.frames)


def built_in_prompts() -> tuple[str, ...]:
    """The default prompts to compare models on."""
    return tuple(json.loads((resources.files(__package__) / "prompts.json").read_text())["prompts"])


def check_comparable(model: ModelFolder, reference: ModelFolder, case: Case) -> None:
    """Raises InputError for folders of different releases, variants or architectures."""

    def refuse(what: str, ours: object, theirs: object) -> InputError:
        return InputError(
            f"{model.path} cannot be compared with {reference.path}",
            f"{what} is {ours} in the one and {theirs} in the other",
            "compare a model folder with the one that it was quantized from",
        )

    for name in ("release", "variant"):
        ours, theirs = (getattr(folder.manifest, name) for folder in (model, reference))
        if ours != theirs:
            raise refuse(f"the {name}", ours, theirs)
    job = Job(reference, Request.from_options({"prompt": "any", **case.options}))
    for component in components(phases(job)):
        ours, theirs = (_architecture(folder, component) for folder in (model, reference))
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                raise refuse(f"{key} of the {component}", ours.get(key), theirs.get(key))


def _architecture(folder: ModelFolder, component: str) -> dict[str, Any]:
    """The component's class and configuration, without the storage of weights."""
    config = {key: value for key, value in folder.config(component).items() if key not in FORMS}
    return {"class": folder.record(component).cls, **config}


def strip(frames: Array) -> Array:
    """At most STRIP frames of (F, H, W, 3), from the first to the last."""
    return frames[np.linspace(0, len(frames) - 1, min(STRIP, len(frames))).round().astype(int)]


def clip_row(recording: Recording, comparison: Comparison) -> Row:
    """The distances of one prompt's two clips, which each model made on its own."""
    ours, theirs = comparison.clip, recording.clip
    distance = None
    if ours.audio is not None and theirs.audio is not None:
        distance = _digits(log_spectral_distance(theirs.audio, ours.audio))
    ratio = psnr(theirs.frames, ours.frames)
    return {
        "prompt": recording.prompt,
        "seed": theirs.record["request"]["seed"],
        "latents": {name: _digits(comparison.latents[name].relative) for name in STREAMS},
        "psnr_db": round(ratio, 3) if isfinite(ratio) else None,  # None: no value differs
        "log_spectral_distance_db": distance,
    }


def _command(model: Path, prompt: str, case: Case) -> str:
    """The command that makes the same clip."""
    words = ["ltx2", "generate", prompt, "-m", str(model), "-o", "clip.mp4"]
    for name, value in case.options.items():
        option = f"--{name.replace('_', '-')}"
        words += [option] if value is True else [option, str(value)]
    return shlex.join(words)


def make_receipt(folders: tuple[ModelFolder, ModelFolder], measured: Quality) -> Row:
    """The receipt of the first folder compared with the second."""
    model, reference = folders
    receipt = {
        "kind": "quality",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_facts(),
        "model": model_facts(model),
        "reference": model_facts(reference),
        "case": {name: measured.request[name] for name in COSTS},
        **{f"{name}_peak_bytes": max(p[f"{name}_peak_bytes"] for p in measured.peaks) for name in ("mlx", "process")},
        "contexts": {name: _digits(measured.contexts[name].relative) for name in STREAMS},
        "layers": _layer_rows(model, measured.layers),
        "steps": [_step_row(key, streams) for key, streams in measured.velocity.items()],
        "clips": measured.clips,
    }
    velocity = {name: sum((streams[name] for streams in measured.velocity.values()), Difference()) for name in STREAMS}
    return receipt | {"summary": _summary(measured.clips, velocity)}


def model_facts(folder: ModelFolder) -> Row:
    """The identity of a model folder, and the size of its tensors: of all, and of the packed layers."""
    manifest, components = folder.manifest, inspect(folder.path)["components"]
    sizes = {name: (part["bytes"], part["parameters"]) for name, part in components.items()}
    return {
        "path": str(folder.path),
        "release": manifest.release,
        "variant": manifest.variant,
        "files": folder.hashes(),
        **_size(sum(size for size, _ in sizes.values()), sum(weights for _, weights in sizes.values())),
        "components": {name: _size(*size) | _packed_size(folder, name) for name, size in sizes.items()},
    }


def _size(size: int, weights: int) -> Row:
    return {"bytes": size, "bits_per_weight": round(8 * size / weights, 3)}


def _packed_size(folder: ModelFolder, component: str) -> Row:
    """The size of the packed weights, with their scales and biases; empty where there are none."""
    quantization = folder.quantization(component)
    tensors = {name: tensor for file in folder.tensor_files(component) for name, tensor in file.tensors.items()}
    layers = packed_layers(folder).get(component, set())
    size = sum(tensors[name].nbytes for layer in layers for part in PARTS if (name := f"{layer}.{part}") in tensors)
    codes = {layer: tensors[f"{layer}.weight"].nbytes for layer in layers}
    weights = sum(8 * nbytes // quantization.of(layer).bits for layer, nbytes in codes.items())
    return {"packed": _size(size, weights)} if layers else {}


def _layer_rows(model: ModelFolder, layers: Mapping[Layer, Difference]) -> list[Row]:
    """A row per layer, in the order of computation."""
    quantizations = {component: model.quantization(component) for component, _ in layers}
    rows = []
    for (component, layer), difference in layers.items():
        form = quantizations[component].of(layer)
        stored = {"bits": form.bits, "group_size": form.group_size, "mode": form.mode}
        error = {"relative_error": _digits(difference.relative)}
        rows.append({"component": component, "layer": layer, **stored, **error})
    return rows


def _step_row(key: StepKey, streams: Differences) -> Row:
    stage, step, sigma = key
    found = {name: {"relative_error": _digits(d.relative), "cosine": round(d.cosine, 8)} for name, d in streams.items()}
    return {"stage": stage, "step": step, "sigma": sigma, **found}


def _summary(clips: Sequence[Row], velocity: Differences) -> Row:
    """All steps together, and the median clip."""
    ratios = [SAME if clip["psnr_db"] is None else clip["psnr_db"] for clip in clips]
    distances = [d for clip in clips if (d := clip["log_spectral_distance_db"]) is not None]
    return {
        "velocity": {name: _digits(d.relative) for name, d in velocity.items()},
        "latents": {name: median(clip["latents"][name] for clip in clips) for name in velocity},
        "psnr_db": ratio if (ratio := median(ratios)) < SAME else None,
        "log_spectral_distance_db": median(distances) if distances else None,
    }


def _digits(value: float) -> float:
    return float(f"{value:.5g}")


def tables(receipt: Row) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Titles, columns and rows for people: sizes, the loss in all, every step, and the layers that lose most."""
    yield _size_table(receipt)
    yield _summary_table(receipt)
    columns = ["step", "noise", "video error", "cosine", "audio error", "cosine"]
    yield "velocity on the reference's tokens", columns, [_step_texts(row) for row in receipt["steps"]]
    if receipt["layers"]:
        worst = sorted(receipt["layers"], key=lambda row: -row["relative_error"])
        title = f"worst of {len(worst)} quantized layers: output error on the reference's inputs"
        rows = [[f"{r['component']}.{r['layer']}", _form(r), _percent(r["relative_error"])] for r in worst[:WORST]]
        yield title, ["layer", "stored as", "error"], rows


def _size_table(receipt: Row) -> tuple[str, list[str], list[list[str]]]:
    """The sizes of the components that differ, and of all together."""
    ours, theirs = (receipt[name] for name in ("model", "reference"))
    pairs = [(name, part, theirs["components"].get(name)) for name, part in ours["components"].items()]
    pairs = [*(pair for pair in pairs if pair[1] != pair[2]), ("all", ours, theirs)]
    rows = [[name, *(text for part in parts for text in _size_texts(part))] for name, *parts in pairs]
    title = f"{ours['path']} beside {theirs['path']}"
    return title, ["size", "model", "bits per weight", "reference", "bits per weight"], rows


def _size_texts(part: Row | None) -> list[str]:
    if part is None:
        return ["", ""]
    size = part["bytes"]
    return [f"{size / 1e9:.2f} GB" if size > 1e8 else f"{size / 1e6:.2f} MB", f"{part['bits_per_weight']:.2f}"]


def _summary_table(receipt: Row) -> tuple[str, list[str], list[list[str]]]:
    summary, count = receipt["summary"], len(receipt["clips"])
    ratio, distance = summary["psnr_db"], summary["log_spectral_distance_db"]
    pairs = (("text", receipt["contexts"]), ("velocity", summary["velocity"]), ("final latents", summary["latents"]))
    rows = [[f"{what}, relative error", *(_percent(found[name]) for name in STREAMS)] for what, found in pairs]
    rows += [
        ["frames, PSNR", "the same" if ratio is None else f"{ratio:.1f} dB", ""],
        ["sound, log-spectral distance", "", "" if distance is None else f"{distance:.2f} dB"],
    ]
    title = f"{count} prompts: all their texts and steps, the median of their clips" if count > 1 else "one prompt"
    return title, ["", "video", "audio"], rows


def _step_texts(row: Row) -> list[str]:
    found = (row[name] for name in STREAMS)
    streams = [text for one in found for text in (_percent(one["relative_error"]), f"{one['cosine']:.6f}")]
    return [f"stage {row['stage']}, step {row['step']}", f"{row['sigma']:g}", *streams]


def _form(row: Row) -> str:
    return f"{row['mode']} {row['bits']}, {row['group_size']}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
