"""The choices that a request leaves to the model folder: the pipeline, its stages, values of other options, and the
clip's length."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ltx2.runtime.errors import InputError, UsageError
from ltx2.runtime.generate.options.preset import (
    DISTILLED,
    HQ,
    ONE_STAGE,
    TWO_STAGE,
    UPSCALE,
    PipelineRow,
    Preset,
    StageRow,
    negative_prompt,
    preset_of,
)
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.generate.options.table import LED, ROWS
from ltx2.runtime.generate.options.values import Auto
from ltx2.runtime.model.layout import DURATION_HEAD, ModelFolder
from ltx2.runtime.sampling.latents import Scales, Sizes

SMALLER = 3  # times smaller than what a model was made for, it still works
# Options that fix the clip's length.
LENGTHS = ("video", "retake", "extend", "upscale", "latents", "noise")


def asked_length(folder: ModelFolder, request: Request) -> Auto | None:
    """The seconds between which the duration head chooses, where it does: as asked, or where a model has one and
    nothing says how long the clip is. Raises InputError where it is asked and missing."""
    if isinstance(request.frames, Auto):
        if folder.has(DURATION_HEAD):
            return request.frames
        why = f"{folder.path} has no duration_head, which chooses it"
        raise InputError(
            f"the length {request.frames} cannot be chosen", why, "give --frames N, or use an LTX model that has one"
        )
    fixed = request.frames is not None or any(getattr(request, name) is not None for name in LENGTHS)
    return None if fixed or not folder.has(DURATION_HEAD) else Auto()


def with_fixed_length(folder: ModelFolder, options: Mapping[str, Any]) -> dict[str, Any]:
    """With the release's usual frames where options say none: what is compared does not follow a prediction."""
    return {"frames": preset_of(folder.manifest).defaults["frames"]} | dict(options)


def samples(request: Request) -> bool:
    """Whether anything is made from noise: an enlarged clip only with a prompt, which refines it."""
    refined = request.prompt is not None or request.embeddings is not None
    if refined and request.upscale is not None and request.temporal_upscale:
        what = "a prompt and twice the frame rate do not go together"
        raise UsageError(what, "only a clip of twice the size is refined", "leave out --prompt or --temporal")
    return request.latents is None and (request.upscale is None or refined)


def grown(sizes: Sizes, request: Request, scales: Scales) -> Sizes:
    """The sizes made from a source's: twice its sides, or with the whole latent frames that extend it."""
    if request.upscale is not None and not request.temporal_upscale:
        return replace(sizes, width=2 * sizes.width, height=2 * sizes.height)
    if request.extend is None:
        return sizes
    more = max(1, round(abs(request.extend.seconds) * sizes.fps / scales.temporal)) * scales.temporal
    return replace(sizes, frames=sizes.frames + more)


def chosen_pipeline(folder: ModelFolder, request: Request) -> str:
    """The pipeline that is asked for, else what the model calls for. Raises InputError where it cannot run."""
    distilled, name = folder.manifest.variant == DISTILLED, request.pipeline
    lora = request.distilled_lora is not None or folder.distilled_lora is not None
    single = request.no_upscale or request.source is not None or request.no_video
    if request.upscale is not None:
        name = UPSCALE
    if name is None:
        dev = TWO_STAGE if lora and folder.has("spatial_upscaler") and not single else ONE_STAGE
        return DISTILLED if distilled else dev
    if distilled and name == HQ:
        why = "its sampler takes steps that a distilled model was not made for"
        raise InputError(f"{folder.path} cannot run the hq pipeline", why, "use a dev model, or leave out --pipeline")
    if not distilled and name != ONE_STAGE and not lora:
        raise InputError(
            f"the {name} pipeline needs a distilled LoRA",
            f"{folder.path} is a dev model, and has none in its loras folder",
            "give --distilled-lora FILE, convert again with it among the sources, or use "
            + ("no prompt" if name == UPSCALE else "--pipeline one-stage"),
        )
    return name


def stages_of(rows: tuple[StageRow, ...], request: Request, first: str) -> tuple[StageRow, ...]:
    """The pipeline's stages as the request wants them; `first` is the sampler of stage 1 where the pipeline names
    none."""
    if not rows:
        return ()
    if request.source is not None or request.no_video:
        return (replace(rows[0], downscale=1),)
    start = replace(rows[0], sampler=rows[0].sampler or ("euler" if request.reference else first))
    return (replace(start, downscale=1),) if request.no_upscale else (start, *rows[1:])


def defaults_of(preset: Preset, row: PipelineRow | None, request: Request, layers: int) -> dict[str, Any]:
    """Options that have values where the request gives none, in a pipeline (None: nothing is sampled) of a transformer
    with so many `layers`. Raises InputError for a block that is not among them."""
    if row is None:
        return {**preset.defaults}
    defaults = {**preset.defaults, "image_crf": preset.image_crf}
    if row.name != UPSCALE:
        defaults["pipeline"] = row.name
    if row.guided:
        blocks = tuple(min(block, layers - 1) for block in preset.guided["stg_blocks"])
        defaults |= {**preset.guided, "stg_blocks": blocks, "negative_prompt": negative_prompt()}
        defaults |= {"skip_steps": 0, "audio_skip_steps": 0, **row.options}
        if missing := [block for block in request.stg_blocks or () if not 0 <= block < layers]:
            why = f"the transformer has blocks 0 to {layers - 1}"
            raise InputError(f"there is no block {missing[0]} for --stg-blocks", why, f"use {layers - 1}")
    return defaults


def doubts(folder: ModelFolder, row: PipelineRow, asked: Request, sizes: Sizes, reach: float) -> Iterator[str]:
    """Warnings about what was asked of a model folder: what the pipeline has no use for, and what the model was not
    made for. `sizes`: of the clip; `reach`: seconds that the model's positions cover."""
    if row.guided and folder.manifest.variant == DISTILLED:
        yield f"this is a distilled model: the {row.name} pipeline guides it, which it was not made for"
    idle = [ROWS[name].flag for name in LED if name in asked.given]
    if not row.guided and asked.pipeline is None and idle:
        why = f"the {row.name} pipeline, which this model calls for, has fixed steps and is not guided"
        yield f"{why}: {', '.join(idle)} without effect (--pipeline one-stage is guided)"
    usual = {name: value for name, value in folder.manifest.sizes.items() if name != "fps"}
    chosen = {name: value for name in usual if isinstance(value := getattr(asked, name), int)}
    if any(not usual[name] / SMALLER <= value <= usual[name] for name, value in chosen.items()):
        spelt = " ".join(f"--{name} {value:g}" for name, value in usual.items())
        yield f"this model was made for {spelt}: another clip may not show what the prompt says"
    if sizes.frames / sizes.fps > reach:
        yield f"the clip has {sizes.frames / sizes.fps:.1f} s, and this model was made for {reach:g} s at most"
