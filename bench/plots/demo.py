"""A plot of the demo model's receipt: errors by bits, ours beside mx.quantize, and frames of the clips."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ltx2.bench.plots.plot import COLOURS, INK, draw_strips, drawing, log_scale
from ltx2.runtime.files.tensors import Array

if TYPE_CHECKING:
    from ltx2.bench.plots.plot import Axes

Row = Mapping[str, Any]
MARKERS = ("o", "^", "s", "D", "v")
PANELS: tuple[tuple[str, str, Callable[[Row], float | None]], ...] = (
    ("velocity of the video, on the reference's tokens", "relative error, %", lambda m: 100 * m["velocity"]["video"]),
    ("output of the transformer's quantized layers", "relative error, %", lambda m: 100 * m["layers"]),
    ("frames beside the reference's", "PSNR, dB", lambda m: m["psnr_db"]),
    ("prompts followed (dotted: by the reference)", "prompts", lambda m: m["followed"]),
)


def plot_demo(path: Path, receipt: Row, strips: Mapping[str, Sequence[Array]]) -> None:
    """Draw the receipt of demo_quality; `strips` are frames (F, H, W, 3) of every model's clips of some prompts. Raises
    InputError or UnsupportedError when it cannot be written."""
    reference, *models = receipt["models"]
    heights = 6.5, 0.51 * len(strips) + 0.2
    with drawing(path, (12, sum(heights))) as figure:
        above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
        above.suptitle(_title(receipt), x=0.01, ha="left", fontsize=10, color=INK)
        panels = above.subplots(2, 2).flatten()
        for panel, (title, unit, value) in zip(panels, PANELS, strict=True):
            _draw_series(panel, models, value)
            panel.set(title=title, ylabel=unit, xlabel="bits per weight of the transformer's quantized layers")
            if "%" in unit:
                log_scale(panel)
        panels[-1].axhline(reference["followed"], color=INK, linewidth=0.8, linestyle=":")
        panels[0].legend()
        draw_strips(below.subplots(), {name: np.concatenate(clips) for name, clips in strips.items()})


def _title(receipt: Row) -> str:
    size, machine = receipt["size"], receipt["machine"]
    clips = f"{receipt['prompts']} prompts, {receipt['compared']} of them compared with the reference"
    clips += f", {size['frames']} frames of {size['width']}x{size['height']}"
    return f"the embedded demo model: {clips}, computed in {receipt['dtype']} on {machine['chip']}"


def _draw_series(axis: "Axes", models: Sequence[Row], value: Callable[[Row], float | None]) -> None:
    """A line per series, from few bits to many."""
    for index, name in enumerate(dict.fromkeys(model["series"] for model in models)):
        points = [(packed_bits(m), found) for m in models if m["series"] == name and (found := value(m)) is not None]
        places, values = zip(*sorted(points), strict=True) if points else ((), ())
        look: dict[str, Any] = {"color": COLOURS[index], "marker": MARKERS[index], "markersize": 4, "linewidth": 1.2}
        axis.plot(places, values, label=name, **look)


def packed_bits(model: Row) -> float:
    """Bits per weight of the transformer's packed layers."""
    return float(model["components"]["transformer"]["packed"]["bits_per_weight"])
