"""Plots of receipts, drawn with matplotlib, an optional dependency. `with drawing(path, (width, height)) as figure:`
draws and writes a file."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from ltx2.runtime.errors import InputError, UnsupportedError
from ltx2.runtime.files.atomic import growing
from ltx2.runtime.files.paths import check_output
from ltx2.runtime.files.tensors import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
    from matplotlib.figure import SubFigure as SubFigure

FORMATS = (".png", ".svg")
GAP, WHITE = 4, 255  # pixels between frames
INK, FAINT = "#333333", "#dddddd"
COLOURS = ("#2a6f97", "#d1783c", "#5a8f5a", "#8a5a9e", "#8c8c8c")  # of the first, second, ... series
STYLE = {
    "font.size": 8, "axes.titlesize": 9, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "axes.edgecolor": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": FAINT, "grid.linewidth": 0.6, "legend.frameon": False, "savefig.dpi": 130,
}  # fmt: skip


def check_plot(path: Path) -> None:
    """Check before the work starts that a plot can be written. Raises InputError where the file cannot be, or where its
    name tells no format, UnsupportedError where matplotlib is not installed."""
    if path.suffix not in FORMATS:
        raise InputError(f"cannot plot into {path}", "its name ends in no known format", f"use {' or '.join(FORMATS)}")
    check_output(path)
    _matplotlib()


@contextmanager
def drawing(path: Path, inches: tuple[float, float]) -> Iterator["Figure"]:
    """An empty figure to draw on, written when the block ends. Raises as `check_plot`."""
    check_plot(path)
    from matplotlib.figure import Figure

    with _matplotlib().rc_context(STYLE):
        figure = Figure(figsize=inches, layout="constrained")
        yield figure
        with growing(path) as partial:
            figure.savefig(partial, format=path.suffix[1:])


def log_scale(axis: "Axes") -> None:
    """A logarithmic y axis, with plain numbers at 1, 2 and 5."""
    axis.set_yscale("log", subs=[2, 5])
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")


def draw_strips(axis: "Axes", strips: Mapping[str, Array]) -> None:
    """A row of frames, uint8 (F, H, W, 3), for every name; all rows have one shape."""
    padding = ((0, 0), (0, GAP), (0, GAP), (0, 0))
    rows = [np.concatenate(list(np.pad(frames, padding, constant_values=WHITE)), axis=1) for frames in strips.values()]
    axis.imshow(np.concatenate(rows))
    axis.set_yticks([len(rows[0]) * (number + 0.5) for number in range(len(rows))], list(strips))
    axis.set_xticks([])
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def _matplotlib() -> ModuleType:
    try:
        import matplotlib
    except ImportError as error:
        raise UnsupportedError(
            "plots cannot be drawn", "matplotlib is not installed", "pip install matplotlib, or leave out --plot"
        ) from error
    return matplotlib
