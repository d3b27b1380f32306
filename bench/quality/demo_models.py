"""The embedded demo model in every form to compare (demo_models.json): made by users' commands, and again with the
codes of mx.quantize in place of ours."""

import json
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ltx2.bench.quality.demo_prompts import random_prompts
from ltx2.runtime.errors import ModelFolderError
from ltx2.runtime.files.atomic import write_text
from ltx2.runtime.files.ranges import sha256
from ltx2.runtime.files.tensors import Array, FileRecord, open_tensorfile, write_tensorfile
from ltx2.runtime.model.layout import FORMAT_METADATA, MANIFEST, ModelFolder
from ltx2.runtime.networks.load import load_weights

SIZE = {"width": 192, "height": 128, "frames": 25}  # the model was trained for this
REFERENCE = "bf16"
MOST_PROMPTS = 256  # to compare models on
CALIBRATION_PROMPTS, CALIBRATION_SEED = 16, 1
FIRST_SEED = 1000  # of the noise for calibrating; seeds for comparing begin with 0
PARTS = ("weight", "scales", "biases")  # of a packed layer


@dataclass(frozen=True)
class DemoModel:
    """One form of the demo model: quantized with these arguments, or a `stock` model's copy with codes of mx.quantize.
    `shown`: the plot has some of its frames."""

    name: str
    series: str
    quantize: tuple[str, ...] = ()
    stock: str | None = None
    shown: bool = False


def demo_models(names: Collection[str] = ()) -> list[DemoModel]:
    """All models, or those of the given names and the ones that they are made from."""
    models = [DemoModel(**{**row, "quantize": tuple(row.get("quantize", ()))}) for row in _data()["models"]]
    wanted = {*names, *(model.stock for model in models if model.name in names)}
    return [model for model in models if model.name in wanted or not names]


def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((resources.files(__package__) / "demo_models.json").read_text())
    return data


def make_models(folder: Path, models: Sequence[DemoModel]) -> dict[str, Path]:
    """Folders of the reference and of the models, by name; made anew each time, which takes seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / name for name in (REFERENCE, *(model.name for model in models))}
    with resources.as_file(resources.files("ltx2") / "demo" / "model") as sources:
        found = sorted(path for path in sources.iterdir() if path.is_dir() or path.suffix == ".safetensors")
        _ltx2("convert", *found, "-o", paths[REFERENCE], "--variant", "distilled", "--force")
    arguments: list[str] = _data()["calibrate"]
    stats = folder / f"stats{''.join(arguments)}.safetensors"
    if any("{stats}" in part for model in models for part in model.quantize) and not stats.exists():
        _calibrate(paths[REFERENCE], stats, arguments)
    for model in models:
        if model.stock is None:
            how = [part.format(stats=stats) for part in model.quantize]
            _ltx2("quantize", paths[REFERENCE], "-o", paths[model.name], "--force", *how)
        else:
            fill_with_stock(paths[model.stock], paths[REFERENCE], paths[model.name])
    return paths


def _calibrate(model: Path, stats: Path, arguments: Sequence[str]) -> None:
    """On other prompts than those for comparing."""
    compared = {prompt.text for prompt in random_prompts(MOST_PROMPTS)}
    others = [prompt.text for prompt in random_prompts(MOST_PROMPTS, CALIBRATION_SEED) if prompt.text not in compared]
    prompts = stats.with_name("calibration.txt")
    prompts.write_text("\n".join(others[:CALIBRATION_PROMPTS]) + "\n")
    size = [word for name, value in SIZE.items() for word in (f"--{name}", value)]
    _ltx2("calibrate", model, "-o", stats, "--prompts", prompts, "--seed", FIRST_SEED, *size, *arguments)


def _ltx2(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "ltx2", *map(str, arguments), "--quiet"], check=True)


def fill_with_stock(packed: Path, source: Path, out: Path) -> None:
    """Copy a quantized folder with codes, scales and biases that mx.quantize makes of the source's weights, in the same
    bits and groups. Raises ModelFolderError for modes without biases, whose codes mx.quantize shares."""
    if out.exists():
        shutil.rmtree(out)
    shutil.copytree(packed, out)
    folder, records = ModelFolder.open(out), {}
    for component, record in folder.manifest.components.items():
        if record.quantization is not None:
            _fill(folder, component, load_weights(ModelFolder.open(source), component))
            record = replace(record, files=tuple(_recorded(out / component / file.name) for file in record.files))
        records[component] = record
    write_text(out / MANIFEST, replace(folder.manifest, components=records).to_json())


def _fill(folder: ModelFolder, component: str, weights: Mapping[str, mx.array]) -> None:
    """`weights` of packed layers: (outputs, inputs)."""
    quantization = folder.quantization(component)
    for path in folder.weight_files(component):
        file = open_tensorfile(path)
        values = {name: np.array(file.array(name)) for name in file.tensors}
        for layer in [name.removesuffix(".scales") for name in values if name.endswith(".scales")]:
            form = quantization.of(layer)
            if not form.biased:
                raise ModelFolderError(f"{layer} has no biases", f"its mode is {form.mode}", "use affine models")
            made = mx.quantize(weights[f"{layer}.weight"], form.group_size, form.bits)
            values |= {f"{layer}.{part}": _stored(array) for part, array in zip(PARTS, made, strict=True)}
        tensors = {name: (info.dtype, values[name]) for name, info in file.tensors.items()}
        write_tensorfile(path, tensors, FORMAT_METADATA)


def _stored(values: mx.array) -> Array:
    """An array of any shape as files hold it: 16-bit floats as their codes."""
    return np.array(values.view(mx.uint16) if values.dtype == mx.bfloat16 else values)


def _recorded(path: Path) -> FileRecord:
    return FileRecord(path.name, path.stat().st_size, sha256(path))
