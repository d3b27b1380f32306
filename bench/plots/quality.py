"""A plot of a comparison's receipt: every layer's error by block and kind, the velocity's by step, and frames of both
clips."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np

from ltx2.bench.plots.plot import COLOURS, INK, WHITE, draw_strips, drawing, log_scale
from ltx2.bench.quality.teacher import STREAMS
from ltx2.runtime.files.tensors import Array

if TYPE_CHECKING:
    from ltx2.bench.plots.plot import Axes, SubFigure

Row = Mapping[str, Any]
Maps = Mapping[str, Mapping[str, Mapping[int, float]]]  # component -> kind of layer -> block -> relative error
Strips = Sequence[tuple[Array, Array]]
AMPLIFIED = 8  # times the difference between two frames
MANY_STEPS = 14  # the most noise levels on the axis
PROMPT_LENGTH = 120  # the most characters of one
MOST_STRIPS = 4  # the most prompts whose clips are shown


def plot_quality(path: Path, receipt: Row, strips: Strips) -> None:
    """Draw a receipt of `ltx2 bench --quality`, and frames (F, H, W, 3) of the clips (reference, model) of some
    prompts. Raises InputError or UnsupportedError when it cannot be written."""
    maps, shown = error_maps(receipt["layers"]), strips[:MOST_STRIPS]
    heights = max(4.0, 0.15 * sum(len(kinds) + 4 for kinds in maps.values())), 2.6 * len(shown)
    with drawing(path, (12, sum(heights) + 0.4)) as figure:
        figure.suptitle(_title(receipt), x=0.01, ha="left", fontsize=10, color=INK)
        above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
        left, right = above.subfigures(1, 2, squeeze=False, width_ratios=(1.4, 1))[0]
        steps, forms = right.subplots(2, 1)
        _draw_maps(left, maps)
        _draw_steps(steps, receipt["steps"])
        _draw_forms(forms, receipt["layers"])
        _draw_strips(below, shown, receipt["clips"])


def error_maps(layers: Sequence[Row]) -> Maps:
    """Layers outside of blocks have block -1."""
    maps: dict[str, dict[str, dict[int, float]]] = {}
    for row in layers:
        kind, block = _kind(row["layer"])
        maps.setdefault(row["component"], {}).setdefault(kind, {})[block] = row["relative_error"]
    return maps


def _kind(layer: str) -> tuple[str, int]:
    """`transformer_blocks.7.attn1.to_q` -> (`attn1.to_q`, 7); a connector's kinds begin with its stream."""
    match = re.fullmatch(r"(?:(\w+)_connector\.|\w+\.)?\w+\.(\d+)\.(.+)", layer)
    if match is None:
        return layer, -1
    stream, block, rest = match.groups()
    return f"{stream}: {rest}" if stream else rest, int(block)


def _title(receipt: Row) -> str:
    model, reference, summary = receipt["model"], receipt["reference"], receipt["summary"]
    sizes = f"{model['bits_per_weight']:.2f} bits per weight instead of {reference['bits_per_weight']:.2f}"
    names = f"{Path(model['path']).name} beside {Path(reference['path']).name}"
    ratio = summary["psnr_db"]
    picture = "the same frames" if ratio is None else f"PSNR {ratio:.1f} dB"
    return f"{names}: {sizes}, {picture}"


def _draw_maps(figure: "SubFigure", maps: Maps) -> None:
    """A map per component, all on one scale."""
    if not maps:
        return
    errors = [100 * e for kinds in maps.values() for blocks in kinds.values() for e in blocks.values() if e > 0]
    scale = {"norm": "log", "vmin": min(errors), "vmax": max(errors)} if errors else {"vmin": 0, "vmax": 1}
    heights = [len(kinds) + 2 for kinds in maps.values()]
    axes = figure.subplots(len(maps), 1, squeeze=False, height_ratios=heights)[:, 0]
    for (component, kinds), axis in zip(maps.items(), axes, strict=True):
        image = _draw_map(axis, kinds, scale)
        axis.set_title(f"{component}: output error of its quantized layers, by block")
    bar = figure.colorbar(image, ax=list(axes), shrink=0.5, aspect=40)
    ticks = np.geomspace(min(errors), max(errors), 5) if errors else np.array([0.0, 1.0])
    bar.set_ticks(ticks.tolist(), labels=[f"{tick:.2g}" for tick in ticks])
    bar.minorticks_off()
    bar.set_label("relative error, %")


def _draw_map(axis: "Axes", kinds: Mapping[str, Mapping[int, float]], scale: Mapping[str, Any]) -> Any:
    """Kinds down, blocks across, layers outside of blocks first."""
    blocks = sorted({block for found in kinds.values() for block in found})
    values = 100 * np.array([[found.get(block, np.nan) for block in blocks] for found in kinds.values()])
    image = axis.imshow(values, aspect="auto", cmap="YlOrRd", interpolation="nearest", **scale)
    places = range(0, len(blocks), max(1, len(blocks) // 12))
    axis.set_xticks(places, ["none" if blocks[place] < 0 else str(blocks[place]) for place in places])
    axis.set_yticks(range(len(kinds)), list(kinds), fontsize=6)
    axis.grid(visible=False)
    return image


def _draw_steps(axis: "Axes", steps: Sequence[Row]) -> None:
    """The velocity's error on the reference's tokens, a line per stream and stage."""
    for name, colour in zip(STREAMS, COLOURS, strict=False):
        for stage in dict.fromkeys(step["stage"] for step in steps):
            places = [place for place, step in enumerate(steps) if step["stage"] == stage]
            errors = [100 * steps[place][name]["relative_error"] for place in places]
            label = name if stage == steps[0]["stage"] else None
            axis.plot(places, errors, color=colour, marker="o", markersize=3.5, linewidth=1.2, label=label)
    if any(step[name]["relative_error"] for step in steps for name in STREAMS):
        log_scale(axis)
    axis.set_title("velocity of each step, on the reference's tokens")
    axis.set_ylabel("relative error, %")
    every = max(1, len(steps) // MANY_STEPS)
    axis.set_xticks(range(0, len(steps), every), [f"{step['sigma']:.3g}" for step in steps[::every]], rotation=60)
    axis.set_xlabel("noise level, stage by stage")
    axis.legend(loc="best")


def _draw_forms(axis: "Axes", layers: Sequence[Row]) -> None:
    """A dot per layer over its form."""
    forms = sorted({(row["mode"], row["bits"]) for row in layers}, key=lambda form: (form[1], form[0]))
    for component, colour in zip(dict.fromkeys(row["component"] for row in layers), COLOURS, strict=False):
        rows = [row for row in layers if row["component"] == component]
        places = [forms.index((row["mode"], row["bits"])) for row in rows]
        spread = np.linspace(-0.3, 0.3, len(rows))  # so that dots do not hide each other
        errors = [100 * row["relative_error"] for row in rows]
        axis.plot(places + spread, errors, "o", color=colour, markersize=2.5, alpha=0.6, label=component)
    if any(row["relative_error"] for row in layers):
        log_scale(axis)
    axis.set_title("output error of every layer, by how it is stored")
    axis.set_ylabel("relative error, %")
    axis.set_xticks(range(len(forms)), [f"{mode} {bits}" for mode, bits in forms])
    if layers:
        axis.legend(loc="best")


def _draw_strips(figure: "SubFigure", strips: Strips, clips: Sequence[Row]) -> None:
    """Per prompt: the reference's frames, the model's, and their difference."""
    axes = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
    for axis, (reference, model), clip in zip(axes, strips, clips, strict=False):
        change = np.abs(model.astype(int) - reference)
        difference = (WHITE - np.minimum(AMPLIFIED * change, WHITE)).astype(np.uint8)
        draw_strips(axis, {"reference": reference, "model": model, f"difference x {AMPLIFIED}": difference})
        ratio = "the same frames" if clip["psnr_db"] is None else f"PSNR {clip['psnr_db']:.1f} dB"
        axis.set_title(f"{shorten(clip['prompt'], PROMPT_LENGTH)} ({ratio})", fontweight="normal")
