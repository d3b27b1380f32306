"""Pipelines and sampling defaults as data: presets/pipelines.json has the stages of every pipeline, presets/ltx-*.json
what a release's defaults are."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from ltx2.runtime.errors import UnsupportedError
from ltx2.runtime.model.layout import Manifest
from ltx2.runtime.sampling.schedule import Schedule

DISTILLED, ONE_STAGE, TWO_STAGE, HQ = "distilled", "one-stage", "two-stage", "hq"
UPSCALE = "upscale"  # of a clip that is there: not for generate to choose


@dataclass(frozen=True)
class StageRow:
    """One stage as a pipeline's data has it: each side of the output is divided by `downscale`. `enter` is the upscaler
    before it. `lora` says which strength of the distilled LoRA it takes; None: it runs without."""

    downscale: int
    schedule: Schedule
    sampler: str | None = None  # None: euler, or what the release samples its first distilled stage with
    guided: bool = False
    enter: str | None = None
    lora: int | None = None


@dataclass(frozen=True)
class PipelineRow:
    """A plan of stages. `sound`: number of the stage that the clip's sound is from. `lora`: default strengths of the
    distilled LoRA, which a dev model needs where they are there. `options`: defaults that go before the release's."""

    name: str
    stages: tuple[StageRow, ...]
    sound: int
    lora: tuple[float, ...]
    options: Mapping[str, Any]

    @property
    def guided(self) -> bool:
        return any(stage.guided for stage in self.stages)


@dataclass(frozen=True)
class Preset:
    """A release's settings of sampling. `defaults` and `guided` (for guided pipelines) are values of options."""

    release: str
    text_tokens: int
    distilled_sampler: str
    image_crf: int
    defaults: Mapping[str, Any]
    guided: Mapping[str, Any]


@cache
def _read(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((resources.files(__package__) / "presets" / f"{name}.json").read_text())
    return data


def negative_prompt() -> str:
    """Lightricks' text of what a clip should not show."""
    return str(_read("pipelines")["negative_prompt"])


def pipeline_row(name: str) -> PipelineRow:
    """The stages of a pipeline."""
    data = _read("pipelines")
    row, fixed = data["pipelines"][name], data["sigmas"]
    stages = tuple(
        StageRow(
            stage["downscale"],
            Schedule.from_dict(fixed[stage["sigmas"]] if "sigmas" in stage else {"tokens": stage["tokens"]}),
            stage.get("sampler"),
            stage.get("guided", False),
            stage.get("enter"),
            stage.get("lora"),
        )
        for stage in row["stages"]
    )
    return PipelineRow(name, stages, row["sound"], tuple(row.get("lora", (1.0, 1.0))), row.get("options", {}))


@cache
def sampled_releases() -> Mapping[str, Preset]:
    """The releases that can be sampled, by name."""
    names = [file.name.removesuffix(".json") for file in (resources.files(__package__) / "presets").iterdir()]
    found = [Preset(**_read(name)) for name in names if name.startswith("ltx-")]
    return {preset.release: preset for preset in sorted(found, key=lambda preset: preset.release)}


def preset_of(manifest: Manifest) -> Preset:
    """A model folder's: its release's, with the sizes that the model itself was made for. Raises as `load_preset`."""
    preset = load_preset(manifest.release)
    return replace(preset, defaults={**preset.defaults, **manifest.sizes})


def load_preset(release: str | None) -> Preset:
    """Raises UnsupportedError for a release that is converted and cannot be sampled, or for none."""
    if (preset := sampled_releases().get(release or "")) is not None:
        return preset
    able = [f"LTX-{name}" for name in sampled_releases()]
    if release is None:
        raise UnsupportedError(
            "this model folder cannot generate",
            "it was made without a transformer, so its release is not known",
            f"convert a whole checkpoint of {' or '.join(able)}",
        )
    raise UnsupportedError(
        f"this version of ltx2 cannot generate with LTX-{release}",
        f"it converts and verifies its files, and generates with {' and '.join(able)} only",
        f"keep the folder for a newer ltx2 (pip install -U ltx2), or convert a checkpoint of {' or '.join(able)}",
    )
