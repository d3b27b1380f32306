"""Sampling defaults of each release and variant, as data: sizes, noise levels, stages."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from ltx2.runtime.errors import UnsupportedError


@dataclass(frozen=True)
class Stage:
    """One pass of the sampler: the output size divided by `downscale`, denoised along `sigmas` (last one 0)."""

    downscale: int
    sigmas: tuple[float, ...]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1


@dataclass(frozen=True)
class Preset:
    """How one variant of a release samples. `defaults` are request options."""

    defaults: Mapping[str, Any]
    text_tokens: int
    stages: tuple[Stage, ...]  # none where latents are decoded only

    def single_stage(self) -> "Preset":
        """The first stage's noise levels at full size, without the upscaler."""
        return Preset(self.defaults, self.text_tokens, (Stage(1, self.stages[0].sigmas),))


def load_preset(release: str | None, variant: str | None) -> Preset:
    """Raises UnsupportedError for a release or variant without sampling defaults."""
    data = _read(release)
    if variant not in data["variants"]:
        raise UnsupportedError(
            f"the {variant or 'unnamed'} variant of LTX-{release} cannot be sampled",
            f"this version samples {', '.join(data['variants'])}; other variants need guidance",
            "convert the distilled checkpoint, or give --variant distilled to convert if the file is one",
        )
    stages = tuple(Stage(s["downscale"], tuple(s["sigmas"])) for s in data["variants"][variant]["stages"])
    return Preset(data["defaults"], data["text_tokens"], stages)


def decoding_preset(release: str | None) -> Preset:
    """For latents that are there already, which every variant decodes alike. Raises UnsupportedError as above."""
    data = _read(release)
    return Preset(data["defaults"], data["text_tokens"], ())


@cache
def sampled_releases() -> Mapping[str, Mapping[str, Any]]:
    """The releases that can be sampled, by name, with their data."""
    files = [file for file in resources.files(__name__).iterdir() if file.name.endswith(".json")]
    return {data["release"]: data for data in (json.loads(file.read_text()) for file in files)}


def check_release(release: str | None) -> None:
    """Raises UnsupportedError for a release that is converted and cannot be sampled yet, or for none."""
    if release in sampled_releases():
        return
    able = " and ".join(f"LTX-{name}" for name in sorted(sampled_releases()))
    if release is None:
        raise UnsupportedError(
            "this model folder cannot generate",
            "it was made without a transformer, so that its release is not known",
            f"convert a whole checkpoint of {able}",
        )
    raise UnsupportedError(
        f"this version of ltx2 cannot generate with LTX-{release}",
        f"it converts and verifies its files, and generates with {able} only",
        f"keep the folder for a newer ltx2 (pip install -U ltx2), or convert a checkpoint of {able}",
    )


def _read(release: str | None) -> Mapping[str, Any]:
    check_release(release)
    return sampled_releases()[str(release)]
