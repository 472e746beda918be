"""Pictures of a profile: norms by depth on a log axis, the rigorous bounds shaded, every line labelled where it is.

Colours are Okabe and Ito's, told apart by every common kind of colour blindness. Norms that a log axis cannot show are
not dropped: 0 lies on the floor and inf or NaN on the ceiling, and a label says so.
"""

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lcw_ops.profile.files import write_atomically

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
            {profile.name: (columns["gradient_norm"], colour)},
            band=(columns["gradient_lower"], columns["gradient_upper"], colour),
        )
        gradient.set_title("gradient norm of each layer's output")
        log_lines(
            state,
            rows,
            {profile.name: (columns["state_rms"], colour)},
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
    """(headline, second line): the result in words, computed from what was measured."""
    settings, history = report.settings, report.history
    fates = {kind: gradient_fate(profile.columns["gradient_norm"][1:-1]) for kind, profile in report.profiles.items()}
    chosen = fates.pop(settings.kind)
    headline = (
        f"Through {settings.depth:,} layers, the gradient of {_article(settings.kind)} {settings.kind} net {chosen}"
    )
    details = "; ".join(f"that of {_article(kind)} {kind} net {fate}" for kind, fate in fates.items())
    details = details[0].upper() + details[1:] + "."
    if history.loss:
        share = history.test_accuracy[-1][1]
        details += f"  {settings.steps} training steps: {share:.0%} test accuracy on {report.dataset.name}."
    return headline, details


def _article(kind: str) -> str:
    return "an" if kind[0] in "aeiou" else "a"


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
    lines = {}
    for kind, label in report.labels().items():
        norms = report.profiles[kind].columns["gradient_norm"][1:-1]
        lines[f"{label}:\n{gradient_fate(norms)}"] = (norms, COLOURS[kind])
    chosen = report.profiles[settings.kind].columns
    band = (chosen["gradient_lower"][1:-1], chosen["gradient_upper"][1:-1], COLOURS[settings.kind])
    log_lines(axes, np.arange(1, settings.depth + 1), lines, band)
    axes.set_title(r"gradient norm  $\|dE/dh_l\|$  at every layer; shaded: proved bounds")
    _layer_axis(axes, settings.depth, "layer $l$   (backpropagation runs from right to left)")


def _state_panel(axes: Axes, report) -> None:
    lines = {kind: (profile.columns["state_rms"][1:-1], COLOURS[kind]) for kind, profile in report.profiles.items()}
    layers = np.arange(1, report.settings.depth + 1)
    log_lines(axes, layers, lines)
    axes.set_title("rms of the state after every layer")
    _layer_axis(axes, report.settings.depth, "layer")


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
    lines: dict[str, tuple[np.ndarray, str]],
    band: tuple[np.ndarray, np.ndarray, str] | None = None,
) -> None:
    """label -> (values, colour) against x on a log axis, with a shaded band (lower, upper, colour).

    It is log10 of the values that is drawn, because bounds leave the range of a float. A value of 0 lies on the floor
    of the picture, one that is not finite on its ceiling, both off the scale.
    """
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), MOST_POINTS)).astype(int))
    x = x[keep]
    heights = {label: _log10(values)[keep] for label, (values, _) in lines.items()}
    edges = [] if band is None else [_log10(edge)[keep] for edge in band[:2]]
    low, high = _decades_shown(heights.values(), edges)
    margin = OFF_SCALE * (high - low)
    floor, ceiling = low - margin, high + margin
    for label, logs in heights.items():
        logs[logs == -math.inf] = floor
        logs[~np.isfinite(logs)] = ceiling
        axes.plot(x, logs, color=lines[label][1], linewidth=2.4, clip_on=False)
    if band is not None:
        lower, upper = (np.clip(edge, floor, ceiling) for edge in edges)
        axes.fill_between(x, np.nan_to_num(lower, nan=floor), upper, color=band[2], alpha=0.18, linewidth=0)
    reached = np.concatenate(list(heights.values()))
    axes.set_ylim(
        floor if (reached == floor).any() else low, ceiling if (reached == ceiling).any() else high + 2 * margin
    )
    _decade_ticks(axes, low, high, floor, ceiling)
    colours = {label: colour for label, (_, colour) in lines.items()}
    smallest = math.log10(SMALLEST)
    if axes.get_ylim()[0] < smallest:
        # What lies below float32's normal numbers is rounding, however a line may look there.
        axes.axhspan(axes.get_ylim()[0], smallest, color="#000000", alpha=0.07, linewidth=0)
        heights[UNDERFLOW_NOTE], colours[UNDERFLOW_NOTE] = np.full(len(x), smallest), NOTE_COLOUR
    _label_lines(axes, x, heights, colours)


def _decades_shown(heights, edges) -> tuple[int, int]:
    """(lowest, highest) power of ten: of what was measured, and of bounds as far as they stay near it."""
    measured = np.concatenate([logs[np.isfinite(logs)] for logs in heights] or [np.zeros(1)])
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


def _decade_ticks(axes: Axes, low: int, high: int, floor: float, ceiling: float) -> None:
    """Whole powers of ten, and words for what is off the scale, where the axis reaches it."""
    step = max(1, round((high - low) / 8))
    ticks = {decade: f"$10^{{{decade}}}$" if decade else "1" for decade in range(low, high + 1) if decade % step == 0}
    bottom, top = axes.get_ylim()
    if bottom == floor:
        ticks[floor] = "0"
    if top == ceiling:
        ticks[ceiling] = "inf"
    axes.set_yticks(list(ticks), list(ticks.values()))


def _label_lines(axes: Axes, x: np.ndarray, heights: dict[str, np.ndarray], colours: dict[str, str]) -> None:
    """Every label beside its line, where it covers no line and comes near none but its own."""
    figure = axes.figure
    renderer = figure.canvas.get_renderer()
    (left, right), (bottom, top) = (x[0], x[-1]), axes.get_ylim()
    taken: list[tuple[float, float, float, float]] = []
    box_of_axes = axes.get_window_extent(renderer)
    for label, own in heights.items():
        text = axes.text(left, bottom, label, color=colours[label], fontweight="bold", ha="center", va="center")
        extent = text.get_window_extent(renderer)
        half_width = extent.width / box_of_axes.width * (right - left) / 2
        half_height = extent.height / box_of_axes.height * (top - bottom) / 2
        gap = LABEL_GAP * (top - bottom)
        best, best_score = None, -math.inf
        for centre in np.linspace(left + 1.1 * half_width, right - 1.1 * half_width, 25):
            window = np.abs(x - centre) <= half_width
            for middle in (own[window].max() + half_height + gap, own[window].min() - half_height - gap):
                box = (centre - half_width, centre + half_width, middle - half_height, middle + half_height)
                if box[2] < bottom or box[3] > top or any(_overlap(box, other) for other in taken):
                    continue
                others = [logs[window] for other, logs in heights.items() if other != label]
                clearance = min((np.abs(logs - middle).min() for logs in others), default=top - bottom)
                # Its own line counts a little: a label under a steep line would float far from most of it.
                score = min(clearance, (top - bottom) / 4) - 0.5 * np.ptp(own[window])
                if clearance > half_height + gap and score > best_score:
                    best, best_score = (centre, middle, box), score
        if best is None:
            text.remove()
            axes.plot([], [], color=colours[label], label=label)
            axes.legend(frameon=False)
            continue
        text.set_position(best[:2])
        taken.append(best[2])


def _overlap(one: tuple, other: tuple) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]


def _log10(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log10(values)
