"""The picture of ``parallel_depth.py sweeps``: sweeps, contraction and errors over the course of training.

The contraction is the change that a sweep makes, divided by the change of the sweep before.
"""

import itertools
import math
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lcw_ops.profile import plot as house


def plot(rows: list, path: Path) -> None:
    """Draw sweeps and contraction with the first filter, and errors with all filters, over the training steps."""
    solved = [row for row in rows if row.window is not None]
    settings, windows = (list(dict.fromkeys(getattr(row, name) for row in solved)) for name in ("setting", "window"))
    depth = max(windows)
    blue, red, grey = house.COLOURS.values()

    def curve(axes, setting: str, window: int, measure: str, label: str, field: str = "figure", **style) -> None:
        of_curve = [row for row in solved if (row.setting, row.window, row.measure) == (setting, window, measure)]
        points = [(row.step, getattr(row, field)) for row in of_curve]
        axes.plot(*zip(*points, strict=True), marker="o", label=label, linewidth=2.2, markersize=5, **style)

    with matplotlib.rc_context(house.STYLE):
        figure = Figure(figsize=(16, 6), dpi=house.DOTS_PER_INCH)
        FigureCanvasAgg(figure)
        sweeps, contraction, error = panels = figure.subplots(1, 3)
        figure.subplots_adjust(left=0.05, right=0.985, top=0.78, bottom=0.115, wspace=0.2)
        for window, direction in itertools.product(windows, ("forward", "backward")):
            style = {"color": blue if direction == "forward" else red, "linestyle": "-" if window == depth else "--"}
            label = f"{direction}, " + (f"all {depth:,} layers" if window == depth else f"windows of {window:,}")
            curve(sweeps, settings[0], window, f"{direction} sweeps", label, **style)
            curve(contraction, settings[0], window, f"{direction} contraction", label, **style)
        for setting, style in zip(settings, ("-", "--"), strict=False):
            filter = setting.split()[-1]
            of_curve = (error, setting, depth, "error of states")
            curve(*of_curve, f"{filter}: sequential kernel", "sequential", color=grey, linestyle=style)
            curve(*of_curve, f"{filter}: in parallel", color=blue, linestyle=style)
        sweeps.set_title(f"sweeps ({settings[0].split()[-1]})")
        sweeps.set_ylim(bottom=0)
        contraction.set_title("contraction in the last sweep")
        error.set_title("error of a state, against float64")
        for axes in (contraction, error):
            axes.set_yscale("log")
            lowest, highest = (math.log10(end) for end in axes.get_ylim())
            axes.set_ylim(10 ** math.floor(lowest), 10 ** math.ceil(highest))
        for axes in panels:
            axes.set_xlabel("steps of training")
            axes.legend(frameon=False, fontsize=11)
        house.line_of_text(figure, 0.92, headline_of(solved, settings[0], depth), fontsize=22, fontweight="bold")
        house.save(figure, path)


def headline_of(rows: list, setting: str, depth: int) -> str:
    of_setting = [row for row in rows if (row.setting, row.window) == (setting, depth)]

    def counts(step: int) -> str:
        of_step = {row.measure: row.figure for row in of_setting if row.step == step}
        return f"{of_step['forward sweeps']:g} sweeps forward and {of_step['backward sweeps']:g} backward"

    first, last = of_setting[0].step, of_setting[-1].step
    words = f"{depth:,} layers at once: {counts(first)} before training"
    return f"{words}, {counts(last)} after {last} steps" if last != first else words
