"""Pictures of a profile: norms by depth on a log axis, the rigorous bounds shaded, every line labelled where it is.

Colours are Okabe and Ito's, told apart by every common kind of colour blindness. Norms that a log axis cannot show are
not dropped: what is too small for float32 lies, faded, on the floor and inf or NaN on the ceiling, and words say so.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lcw_ops._files import write_atomically
from lcw_ops.jobs.profile import IN_WORDS

# M. Okabe, K. Ito, "Color Universal Design", 2008: blue, vermillion, and a dark grey beside them.
COLOURS = {"orthogonal-filter": "#0072B2", "residual": "#D55E00", "plain": "#4D4D4D"}
ACCURACY_COLOUR = "#009E73"
GRID_COLOUR = "#E3E3E3"
NOTE_COLOUR = "#666666"

# 1600 x 900 pixels.
REPORT_INCHES, DOTS_PER_INCH = (16, 9), 100

# Where its words begin, as a share of its width.
LEFT = 0.02

# At least so many decades are shown, so that a line that stays put looks as flat as it is.
LEAST_DECADES = 4

# Values that a log axis cannot hold are drawn this share of its height beyond its end.
OFF_SCALE = 0.05

# How much remains of a line where its values are off the scale.
FADED = 0.35

# Points between which a label may lie: a net of two layers has no others.
LABEL_POINTS = 200

# Between a line and its label, as a share of the axis.
LABEL_GAP = 0.015

# float32's smallest normal number: what is smaller is rounding, or 0.
SMALLEST = 1.1754944e-38
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
    """One curve: norms by layer. ``label`` "" for a line that needs none."""

    label: str
    values: np.ndarray
    colour: str
    style: str = "-"


def plot_profile(profile, path: str | Path) -> None:
    """Gradient norm and state rms by row, with their bounds; the file's kind follows the path's ending."""
    import matplotlib

    rows = np.arange(len(profile))
    columns, colour = profile.columns, COLOURS["orthogonal-filter"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 5), dpi=DOTS_PER_INCH)
        FigureCanvasAgg(figure)
        figure.suptitle(f"{profile.name}: {len(profile):,} rows, loss {profile.loss:.4g}", x=0.01, ha="left")
        gradient, state = figure.subplots(1, 2)
        log_lines(
            gradient,
            rows,
            [Line(profile.name, columns["gradient_norm"], colour)],
            band=(columns["gradient_lower"], columns["gradient_upper"], colour),
        )
        gradient.set_title("gradient norm of each layer's output")
        log_lines(
            state,
            rows,
            [Line(profile.name, columns["state_rms"], colour)],
            band=(np.zeros(len(profile)), columns["state_rms_bound"], colour),
        )
        state.set_title("rms of each layer's output")
        for axes in (gradient, state):
            axes.set_xlabel("row")
        save(figure, path)


def save(figure: Figure, path: str | Path) -> None:
    """Whole or not at all. ValueError for an ending that matplotlib does not know."""
    kind = Path(path).suffix.lstrip(".").lower() or "png"
    write_atomically(path, lambda file: figure.savefig(file, format=kind), binary=True)


def plot_report(report, path: str | Path) -> None:
    """report.png of the main job: what the gradient and the signal go through in the three kinds of nets."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=REPORT_INCHES, dpi=DOTS_PER_INCH)
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(
            2, 2, width_ratios=(1.75, 1), left=0.062, right=0.938, top=0.80, bottom=0.085, wspace=0.16, hspace=0.38
        )
        headline, details = findings(report)
        _line_of_text(figure, 0.942, headline, fontsize=24, fontweight="bold")
        _line_of_text(figure, 0.884, details, fontsize=15, color="#333333")
        _gradient_panel(figure.add_subplot(grid[:, 0]), report)
        _state_panel(figure.add_subplot(grid[0, 1]), report)
        _training_panel(figure.add_subplot(grid[1, 1]), report)
        save(figure, path)


def _line_of_text(figure: Figure, height: float, words: str, fontsize: float, **style) -> None:
    """Across the whole figure, smaller where the words would not fit."""
    text = figure.text(LEFT, height, words, fontsize=fontsize, va="center", **style)
    share = text.get_window_extent(figure.canvas.get_renderer()).width / figure.bbox.width
    # 3 % to spare: glyphs of another size are not quite proportional.
    text.set_fontsize(fontsize * min(1, 0.97 * (1 - 2 * LEFT) / share))


def findings(report) -> tuple[str, str]:
    """(headline, second line): the result in words, computed from what was measured. All nets as initialised."""
    settings, history = report.settings, report.history
    fates = {kind: gradient_fate(columns["gradient_norm"]) for kind, columns in report.initial.items()}
    net = f"{_article(settings.kind)} {IN_WORDS[settings.kind]} net"
    headline = f"Through {settings.depth:,} layers, the gradient of {net} {fates.pop(settings.kind)}"
    others = "; ".join(f"{IN_WORDS[kind]} {fate}" for kind, fate in fates.items())
    details = f"All at initialisation: {others}."
    if history.loss:
        trained = gradient_fate(report.profiles[settings.kind].columns["gradient_norm"][1:-1])
        steps = f"{settings.steps} step{'s' if settings.steps > 1 else ''}"
        details += f"  After {steps} (dashed): {trained}, {history.test_accuracy[-1][1]:.0%} test accuracy."
    return headline, details


def _article(kind: str) -> str:
    return "an" if IN_WORDS[kind][0] in "aeiou" else "a"


def gradient_fate(norms: np.ndarray) -> str:
    """What becomes of the gradient on its way from the last layer (``norms[-1]``) to the first, in words."""
    if not np.isfinite(norms).all():
        return f"overflows at layer {np.flatnonzero(~np.isfinite(norms))[-1] + 1:,}"
    if (norms < SMALLEST).any():
        return f"underflows at layer {np.flatnonzero(norms < SMALLEST)[-1] + 1:,}"
    ratio = norms[0] / norms[-1]
    if 0.1 <= ratio <= 1:
        return f"keeps {ratio:.0%} of its size"
    if 1 < ratio <= 10:
        return f"grows by {ratio - 1:.0%}"
    exponent = abs(math.log10(ratio))
    return f"{'grows' if ratio > 1 else 'shrinks'} by a factor of 10^{exponent:.1f}"


def _gradient_panel(axes: Axes, report) -> None:
    settings = report.settings
    lines = [
        Line(f"{IN_WORDS[kind]}:\n{gradient_fate(columns['gradient_norm'])}", columns["gradient_norm"], COLOURS[kind])
        for kind, columns in report.initial.items()
    ]
    chosen = report.profiles[settings.kind].columns
    if report.history.loss:
        norms = chosen["gradient_norm"][1:-1]
        label = f"{IN_WORDS[settings.kind]}, after {settings.steps} steps:\n{gradient_fate(norms)}"
        lines.append(Line(label, norms, COLOURS[settings.kind], "--"))
    band = (chosen["gradient_lower"][1:-1], chosen["gradient_upper"][1:-1], COLOURS[settings.kind])
    log_lines(axes, np.arange(1, settings.depth + 1), lines, band)
    axes.set_title(r"gradient norm  $\|dE/dh_l\|$;  shaded: proved bounds" + _bounded_line(report))
    _layer_axis(axes, settings.depth, "layer $l$   (backpropagation runs from right to left)")


def _state_panel(axes: Axes, report) -> None:
    kind, depth = report.settings.kind, report.settings.depth
    lines = [Line(IN_WORDS[kind], columns["state_rms"], COLOURS[kind]) for kind, columns in report.initial.items()]
    chosen = report.profiles[kind].columns
    if report.history.loss:
        lines.append(Line("", chosen["state_rms"][1:-1], COLOURS[kind], "--"))
    band = (np.zeros(depth), chosen["state_rms_bound"][1:-1], COLOURS[kind])
    log_lines(axes, np.arange(1, depth + 1), lines, band)
    axes.set_title("state rms;  shaded: bound" + _bounded_line(report))
    _layer_axis(axes, depth, "layer")


def _bounded_line(report) -> str:
    """Which of the chosen kind's two lines the bounds are for: they follow from its weights as they are at the end."""
    return " of the dashed line" if report.history.loss else ""


def _training_panel(axes: Axes, report) -> None:
    history, settings = report.history, report.settings
    axes.set_title(f"training the {settings.kind} net on {report.dataset.name}")
    accuracy_axes = axes.twinx()
    accuracy_axes.set_ylim(0, 1.04)
    accuracy_axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    accuracy_axes.grid(False)
    steps, shares = zip(*history.test_accuracy, strict=True)
    accuracy_axes.plot(steps, shares, "o-", color=ACCURACY_COLOUR, linewidth=2, clip_on=False)
    accuracy_axes.tick_params(axis="y", colors=ACCURACY_COLOUR)
    accuracy_axes.set_ylabel("test accuracy", color=ACCURACY_COLOUR)
    accuracy_axes.annotate(
        f"{shares[-1]:.1%}",
        (steps[-1], shares[-1]),
        xytext=(0, -20),
        textcoords="offset points",
        ha="right",
        color=ACCURACY_COLOUR,
        fontweight="bold",
    )
    colour = COLOURS[settings.kind]
    axes.plot(range(1, len(history.loss) + 1), history.loss, color=colour, linewidth=2)
    axes.set_ylabel("training loss", color=colour)
    axes.tick_params(axis="y", colors=colour)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, max(settings.steps, 1))
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
    pace = f", {history.median_milliseconds / 1e3:.2f} s each" if history.loss else ""
    axes.set_xlabel(f"steps of Adam{pace}")


def _layer_axis(axes: Axes, depth: int, label: str) -> None:
    axes.set_xlabel(label)
    axes.set_xlim(1, max(depth, 2))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda layer, _: f"{layer:,.0f}"))


def log_lines(
    axes: Axes,
    x: np.ndarray,
    lines: list[Line],
    band: tuple[np.ndarray, np.ndarray, str] | None = None,
) -> None:
    """Every line against x on a log axis, with a shaded band (lower, upper, colour).

    It is log10 of the values that is drawn, because bounds leave the range of a float. Where a value is 0 or rounding
    (below ``SMALLEST``) its line goes on, faded, in a band at the floor of the picture; where it is not finite, at the
    ceiling.
    """
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), MOST_POINTS)).astype(int))
    x = x[keep]
    smallest = math.log10(SMALLEST)
    heights = [_log10(line.values)[keep] for line in lines]
    # Subnormal numbers are noise, whatever they look like.
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
        # A single layer is a point, which no line shows.
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
    """(lowest, highest) power of ten: of what was measured, and of bounds as far as they stay near it."""
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
    """Whole powers of ten, and a word for what is above the scale, where the axis reaches it."""
    step = max(1, round((high - low) / 8))
    ticks = {decade: f"$10^{{{decade}}}$" if decade else "1" for decade in range(low, high + 1) if decade % step == 0}
    if axes.get_ylim()[1] == ceiling:
        ticks[ceiling] = "overflow"
    axes.set_yticks(list(ticks), list(ticks.values()))


def _label_lines(axes: Axes, x: np.ndarray, lines: list[tuple[str, np.ndarray, str]]) -> None:
    """Every (label, heights, colour): beside its line, where it covers no line and comes near none but its own."""
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
                # Its own line counts a little: a label under a steep line would float far from most of it.
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
