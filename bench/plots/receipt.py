"""A plot of a benchmark's receipt: for every case the time of its phases, and memory over the last run."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltx2.bench.plots.plot import COLOURS, FAINT, INK, drawing

if TYPE_CHECKING:
    from ltx2.bench.plots.plot import Axes

Row = Mapping[str, Any]
GB = 1e9
LOADING, COMPUTING, MLX, PROCESS = COLOURS[4], COLOURS[0], COLOURS[0], COLOURS[1]
NARROW = 0.08  # share of the time axis that is too narrow for a phase's name


def plot_receipt(path: Path, receipt: Row) -> None:
    """Draw a receipt of `ltx2 bench`. Raises InputError or UnsupportedError when it cannot be written."""
    cases, machine = receipt["cases"], receipt["machine"]
    with drawing(path, (12, 3.4 * len(cases) + 0.4)) as figure:
        title = f"{machine['device']}, mlx {machine['mlx']}, ltx2 {machine['ltx2']}"
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
        # One scale for all cases, so that they can be compared by eye.
        axes = figure.subplots(len(cases), 2, squeeze=False, width_ratios=(1, 1.4), sharex="col")
        for case, (left, right) in zip(cases, axes, strict=True):
            _draw_times(left, case)
            _draw_memory(right, case["memory"])
        top = max(right.get_ylim()[1] for _, right in axes)
        for _, right in axes:
            right.set_ylim(0, 1.12 * top)


def _draw_times(axis: "Axes", case: Row) -> None:
    """Medians of the phases, loading first; a line from the fastest to the slowest run."""
    phases = case["phases"]
    names = [phase["name"] for phase in phases]
    loads = [phase["load_seconds"]["median"] for phase in phases]
    times = [phase["seconds"] for phase in phases]
    rest = [max(0.0, time["median"] - load) for time, load in zip(times, loads, strict=True)]
    axis.barh(names, loads, color=LOADING, label="loading")
    axis.barh(names, rest, left=loads, color=COMPUTING, label="computing")
    axis.hlines(names, [t["fastest"] for t in times], [t["slowest"] for t in times], color=INK, linewidth=1)
    for name, time in zip(names, times, strict=True):
        axis.text(time["slowest"], name, f" {time['median']:.2f} s", va="center")
    axis.margins(x=0.15)
    axis.invert_yaxis()
    axis.set_xlabel("seconds")
    axis.set_title(case["name"])
    axis.legend(loc="lower right")


def _draw_memory(axis: "Axes", memory: Row) -> None:
    """Memory of MLX and of the process over the phases."""
    for name, series, colour in (("MLX", "mlx_bytes", MLX), ("process", "process_bytes", PROCESS)):
        axis.plot(memory["seconds"], [count / GB for count in memory[series]], color=colour, label=name, linewidth=1.2)
    phases = memory["phases"]
    whole = phases[-1]["stop"] - phases[0]["start"]
    for number, phase in enumerate(phases):
        if number % 2 == 0:
            axis.axvspan(phase["start"], phase["stop"], color=FAINT, alpha=0.4, linewidth=0)
        if phase["stop"] - phase["start"] > NARROW * whole:
            middle = (phase["start"] + phase["stop"]) / 2
            axis.text(middle, 0.95, phase["name"], transform=axis.get_xaxis_transform(), ha="center", color=INK)
    axis.set_xlabel("seconds")
    axis.set_title("memory over the last run, GB")
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
