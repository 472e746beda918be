"""Pictures of a profile: norms by depth on a log axis, with shaded rigorous bounds and a label beside every line.

Colours are Okabe and Ito's, distinct under every common kind of colour blindness. Norms that a log axis cannot show are
drawn too, faded and labelled: those too small for float32 at the floor, inf and NaN at the ceiling.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lcw_ops import _old_names
from lcw_ops._files import write_atomically
from lcw_ops.profile.headline import SMALLEST, elided, headline

# Blue and vermillion of M. Okabe, K. Ito, "Color Universal Design", 2008, and a dark grey.
COLOURS = {"orthogonal-filter": "#0072B2", "residual": "#D55E00", "plain": "#4D4D4D"}
GRID_COLOUR = "#E3E3E3"
NOTE_COLOUR = "#666666"

DOTS_PER_INCH = 100

# 1600 x 900 pixels.
INCHES = (16, 9)

# The last panel of a profile's plot: column -> title.
THIRD = {
    "activation_shift": "rms over units of the mean activation",
    "weight_gradient_norm": "gradient norm of each row's weight",
}

# The size of names below an axis, and the most letters of one.
NAME_SIZE = 11
MOST_OF_NAME = 22

# The left margin of a line of text, as a share of the figure's width.
LEFT = 0.02

# The fewest decades shown, so that a constant line looks flat.
LEAST_DECADES = 4

# Values that a log axis cannot show are drawn beyond its end, by this share of its height.
OFF_SCALE = 0.05

# The opacity of the part of a line that is off the scale.
FADED = 0.35

# The number of points along a line where a label may lie: the points of a net of two layers would be too few.
LABEL_POINTS = 200

# The gap between a line and its label, as a share of the axis.
LABEL_GAP = 0.015

UNDERFLOW_NOTE = "underflow: too small for float32"

# More points than pixels only make a line look thick.
MOST_POINTS = 4000

STYLE = {
    "font.size": 13,
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": GRID_COLOUR,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}


@dataclass
class Line:
    """One curve: norms by layer. ``label`` is "" for a line without a label."""

    label: str
    values: np.ndarray
    colour: str
    style: str = "-"


def plot_profile(profile, path: str | Path) -> None:
    """Draw gradient norm, state rms and a third column by row, with their bounds, under a headline.

    The third column is the first of ``THIRD`` with a figure. The path's ending decides the file format.
    """
    third = next((name for name in THIRD if name in profile.columns and not profile.is_missing(name).all()), None)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH)
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(
            2, 2, width_ratios=(1.75, 1), left=0.062, right=0.975, top=0.80, bottom=0.06, wspace=0.16, hspace=0.36
        )
        finding, details = headline(profile)
        line_of_text(figure, 0.942, finding, fontsize=24, fontweight="bold")
        line_of_text(figure, 0.884, f"{profile.name}: {details}", fontsize=15, color="#333333")
        columns = profile.columns
        bounds = (columns["gradient_lower"], columns["gradient_upper"])
        _panel(figure.add_subplot(grid[:, 0]), profile, "gradient_norm", "gradient norm of each row's output", bounds)
        bounds = (np.zeros(len(profile)), columns["state_rms_bound"])
        places = grid[0, 1] if third else grid[:, 1]
        _panel(figure.add_subplot(places), profile, "state_rms", "rms of each row's output", bounds)
        if third:
            _panel(figure.add_subplot(grid[1, 1]), profile, third, THIRD[third])
        save(figure, path)


def _panel(axes: Axes, profile, column: str, title: str, bounds: tuple | None = None) -> None:
    """One column by row, with the names of some rows as ticks. Rows without a figure are left out."""
    rows = np.flatnonzero(~profile.is_missing(column))
    is_bounded = bounds is not None and bool(np.isfinite(bounds[1]).any())
    axes.set_title(title + (";  shaded: bounds" if is_bounded else ""))
    if not len(rows):
        reason = next(iter(profile.reasons_of(column)), "")
        axes.text(0.5, 0.5, f"no figures: {reason}", transform=axes.transAxes, ha="center", va="center", wrap=True)
        axes.set(xticks=[], yticks=[])
        return
    colour = COLOURS["orthogonal-filter"]
    band = (bounds[0][rows], bounds[1][rows], colour) if is_bounded else None
    log_lines(axes, rows, [Line("", profile.columns[column][rows], colour)], band)
    axes.set_xlim(0, max(len(profile) - 1, 1))
    _name_ticks(axes, profile.columns["name"])


def _name_ticks(axes: Axes, names: np.ndarray) -> None:
    """The names of some rows, evenly spaced, as many as fit beside each other."""
    width = axes.get_window_extent().width
    letter = 0.62 * NAME_SIZE * axes.figure.dpi / 72
    longest = min(max(map(len, names)), MOST_OF_NAME)
    count = max(2, min(len(names), int(width / ((longest + 2) * letter))))
    rows = np.arange(0, len(names), math.ceil(max(len(names) - 1, 1) / (count - 1)))
    axes.set_xticks(rows, [elided(str(names[row]), MOST_OF_NAME) for row in rows], fontsize=NAME_SIZE)
    # The outer names stay within the panel.
    labels = axes.get_xticklabels()
    labels[0].set_horizontalalignment("left")
    if rows[-1] > 0.95 * (len(names) - 1):
        labels[-1].set_horizontalalignment("right")


def save(figure: Figure, path: str | Path) -> None:
    """Write the whole figure or nothing. Raises ValueError for an ending that matplotlib does not know."""
    kind = Path(path).suffix.lstrip(".").lower() or "png"
    write_atomically(path, lambda file: figure.savefig(file, format=kind), binary=True)


def line_of_text(figure: Figure, height: float, words: str, fontsize: float, **style) -> None:
    """Write a line across the whole figure, in a smaller font if the words would not fit."""
    text = figure.text(LEFT, height, words, fontsize=fontsize, va="center", **style)
    share = text.get_window_extent(figure.canvas.get_renderer()).width / figure.bbox.width
    # Spare 3 %: the widths of glyphs are not quite proportional to the font size.
    text.set_fontsize(fontsize * min(1, 0.97 * (1 - 2 * LEFT) / share))


def log_lines(
    axes: Axes,
    x: np.ndarray,
    lines: list[Line],
    band: tuple[np.ndarray, np.ndarray, str] | None = None,
) -> None:
    """Draw every line against x on a log axis, with a shaded band (lower, upper, colour).

    The picture shows log10 of the values, because bounds leave the range of a float. If a value is 0 or a rounding
    error (below ``SMALLEST``), its line continues, faded, at the floor of the picture; if it is not finite, at the
    ceiling.
    """
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), MOST_POINTS)).astype(int))
    x = x[keep]
    smallest = math.log10(SMALLEST)
    heights = [_log10(line.values)[keep] for line in lines]
    # Subnormal numbers are noise.
    lost = [logs < smallest for logs in heights]
    overflown = [~np.isfinite(logs) & ~below for logs, below in zip(heights, lost, strict=True)]
    edges = [] if band is None else [_log10(edge)[keep] for edge in band[:2]]
    shown = [logs[np.isfinite(logs) & ~below] for logs, below in zip(heights, lost, strict=True)]
    underflow, overflow = np.any(lost), np.any(overflown)
    if underflow:
        shown.append(np.array([smallest]))
    low, high = _decades_shown(shown, edges)
    margin = OFF_SCALE * (high - low)
    floor, ceiling = low - margin, high + margin
    for line, logs, below, above in zip(lines, heights, lost, overflown, strict=True):
        logs[below], logs[above] = (floor + min(smallest, low)) / 2 if underflow else floor, ceiling
        style = {"color": line.colour, "linewidth": 2.4, "linestyle": line.style, "clip_on": False}
        # A single layer is a point, which a line would not show.
        style["marker"] = "o" if len(x) == 1 else None
        if (below | above).any():
            axes.plot(x, logs, alpha=FADED, **style)
        axes.plot(x, np.where(below | above, math.nan, logs), **style)
    if band is not None:
        lower, upper = (np.clip(edge, floor, ceiling) for edge in edges)
        axes.fill_between(x, np.nan_to_num(lower, nan=floor), upper, color=band[2], alpha=0.18, linewidth=0)
    axes.set_xlim(x[0], max(x[-1], x[0] + 1))
    axes.set_ylim(floor if underflow else low, ceiling if overflow else high + 2 * margin)
    _decade_ticks(axes, low, high, ceiling)
    labels = [(line.label, logs, line.colour) for line, logs in zip(lines, heights, strict=True)]
    if axes.get_ylim()[0] < smallest:
        axes.axhspan(axes.get_ylim()[0], smallest, color="#000000", alpha=0.07, linewidth=0)
        labels.append((UNDERFLOW_NOTE, np.full(len(x), smallest), NOTE_COLOUR))
    _label_lines(axes, x, labels)


def _decades_shown(heights, edges) -> tuple[int, int]:
    """(lowest, highest) power of ten of the measured values, and of the bounds near them."""
    measured = np.concatenate(heights or [np.zeros(1)])
    if not measured.size:
        measured = np.zeros(1)
    low, high = math.floor(measured.min()), math.ceil(measured.max())
    reach = max(high - low, LEAST_DECADES)
    for edge in edges:
        finite = edge[np.isfinite(edge)]
        if finite.size:
            low = min(low, max(math.floor(finite.min()), low - reach))
            high = max(high, min(math.ceil(finite.max()), high + reach))
    spare = max(LEAST_DECADES - (high - low), 0)
    return low - (spare + 1) // 2, high + spare // 2


def _decade_ticks(axes: Axes, low: int, high: int, ceiling: float) -> None:
    """Put ticks at whole powers of ten, and the word "overflow" if the axis extends beyond the scale."""
    step = max(1, round((high - low) / 8))
    ticks = {decade: f"$10^{{{decade}}}$" if decade else "1" for decade in range(low, high + 1) if decade % step == 0}
    if axes.get_ylim()[1] == ceiling:
        ticks[ceiling] = "overflow"
    axes.set_yticks(list(ticks), list(ticks.values()))


def _label_lines(axes: Axes, x: np.ndarray, lines: list[tuple[str, np.ndarray, str]]) -> None:
    """Place every label of (label, heights, colour) beside its line, away from other lines and labels."""
    figure = axes.figure
    renderer = figure.canvas.get_renderer()
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    points = np.union1d(x, np.linspace(left, right, LABEL_POINTS))
    lines = [(label, np.interp(points, x, logs), colour) for label, logs, colour in lines]
    taken: list[tuple[float, float, float, float]] = []
    box_of_axes = axes.get_window_extent(renderer)
    for i, (label, own, colour) in enumerate(lines):
        if not label:
            continue
        text = axes.text(left, bottom, label, color=colour, fontweight="bold", ha="center", va="center")
        extent = text.get_window_extent(renderer)
        half_width = extent.width / box_of_axes.width * (right - left) / 2
        half_height = extent.height / box_of_axes.height * (top - bottom) / 2
        gap = LABEL_GAP * (top - bottom)
        best, best_score = None, -math.inf
        for centre in np.linspace(left + 1.1 * half_width, right - 1.1 * half_width, 25):
            window = np.abs(points - centre) <= half_width
            for middle in (own[window].max() + half_height + gap, own[window].min() - half_height - gap):
                box = (centre - half_width, centre + half_width, middle - half_height, middle + half_height)
                if box[2] < bottom or box[3] > top or any(_overlap(box, other) for other in taken):
                    continue
                others = [logs[window] for j, (_, logs, _) in enumerate(lines) if j != i]
                clearance = min((np.abs(logs - middle).min() for logs in others), default=top - bottom)
                # Prefer flat parts of the label's own line a little: a label is far from most of a steep line.
                score = min(clearance, (top - bottom) / 4) - 0.5 * np.ptp(own[window])
                if clearance > half_height + gap and score > best_score:
                    best, best_score = (centre, middle, box), score
        if best is None:
            text.remove()
            if label == UNDERFLOW_NOTE:
                continue
            axes.plot([], [], color=colour, label=label)
            axes.legend(frameon=False)
            continue
        text.set_position(best[:2])
        taken.append(best[2])


def _overlap(one: tuple, other: tuple) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]


def _log10(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log10(values)


# Names of the picture of a report, which moved from this file to lcw_ops/jobs/picture.py.
_old_names.keep(
    globals(),
    dict.fromkeys(("ACCURACY_COLOUR", "findings", "gradient_fate", "plot_report"), "lcw_ops.jobs.picture"),
)
