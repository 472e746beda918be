"""The picture of a watch: one heat map of depth by step for every column that has figures, on a log scale.

The colour map is viridis, which is even in lightness and readable with every common kind of colour blindness. NaN and
infinity are red, and cells without a figure are grey.
"""

import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from lcw_ops.profile.headline import SMALLEST, elided
from lcw_ops.profile.plot import DOTS_PER_INCH, INCHES, NAME_SIZE, STYLE, line_of_text, save

TITLES = {
    "state_rms": "rms of the output",
    "gradient_norm": "gradient norm of the output",
    "weight_gradient_norm": "gradient norm of the weights",
    "update_ratio": "update / weight",
}

NOT_FINITE, UNKNOWN = (0.83, 0.18, 0.12, 1.0), (0.9, 0.9, 0.9, 1.0)

# More rows than pixels: every cell of the picture is the largest figure of its rows.
MOST_CELLS = 600
# The decades of a scale at most, below its largest figure.
MOST_DECADES = 12
MOST_OF_NAME = 22


def plot_watch(watch, path: str | Path) -> None:
    """Draw all columns of a :class:`~lcw_ops.profile.watch.Watch` with figures."""
    shown = [column for column in TITLES if watch.known[column].any()]
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH)
        FigureCanvasAgg(figure)
        headline, details = _words(watch)
        line_of_text(figure, 0.942, headline, fontsize=24, fontweight="bold")
        line_of_text(figure, 0.884, details, fontsize=15, color="#333333")
        # The names stand to the left of the panels: 0.62 of the font's size a letter.
        longest = min(max(map(len, watch.names)), MOST_OF_NAME)
        margin = (0.62 * longest + 2) * NAME_SIZE / 72 / INCHES[0]
        lines, across = math.ceil(len(shown) / 2) or 1, min(len(shown), 2) or 1
        for place, column in enumerate(shown):
            left, top = place % across / across, 0.82 - place // across * 0.8 / lines
            box = (left + margin + 0.01, top - 0.8 / lines + 0.085, 1 / across - margin - 0.068, 0.8 / lines - 0.125)
            _panel(figure, figure.add_axes(box), watch, column)
        save(figure, path)


def _words(watch) -> tuple[str, str]:
    """(headline, details): the first NaN or infinity, or else the change of the gradient's spread over the depth."""
    steps = f"steps {watch.steps[0]:,} to {watch.steps[-1]:,}, every {watch.every:,}, {len(watch.names):,} rows"
    # The earliest step; in it the states come first, and then the gradients, from the last row on.
    found = []
    for order, column in enumerate(("state_rms", "gradient_norm", "weight_gradient_norm")):
        lost = watch.known[column] & ~np.isfinite(watch.columns[column])
        if lost.any():
            observation = int(lost.any(1).argmax())
            found.append((observation, order, column, np.flatnonzero(lost[observation])[0 if order == 0 else -1]))
    if found:
        observation, _, column, row = min(found)
        return f"Not finite at step {watch.steps[observation]:,}: {TITLES[column]}, {watch.names[row]}", steps
    for column in ("gradient_norm", "weight_gradient_norm"):
        spreads = [_spread(watch, column, observation) for observation in (0, -1)]
        if all(spreads):
            first, last = (f"10^{math.log10(spread):.1f}" for spread in spreads)
            return f"Largest / smallest {TITLES[column]}: {first} at first, {last} at last", steps
    return f"{len(watch.steps):,} watched steps", steps


def _spread(watch, column: str, observation: int) -> float | None:
    values = watch.columns[column][observation][watch.known[column][observation]]
    values = values[np.isfinite(values) & (values > SMALLEST)]
    return float(values.max()) / float(values.min()) if len(values) else None


def _panel(figure: Figure, axes, watch, column: str) -> None:
    # Rows that never have the figure, such as activations in a panel of weights, are left out.
    rows = np.flatnonzero(watch.known[column].any(0))
    values, known = watch.columns[column].T[rows].astype(float), watch.known[column].T[rows]
    names = [watch.names[row] for row in rows]
    group = math.ceil(len(values) / MOST_CELLS)
    lost = known & ~np.isfinite(values)
    finite = np.where(known & ~lost, values, -math.inf)
    if group > 1:
        edges = np.arange(0, len(values), group)
        finite, lost, known = (np.maximum.reduceat(part, edges) for part in (finite, lost, known))
    positive = finite[np.isfinite(finite) & (finite > 0)]
    high = float(positive.max()) if len(positive) else 1.0
    low = max(float(positive.min()) if len(positive) else high / 10, high / 10**MOST_DECADES)
    scale = LogNorm(low, max(high, low * 10))
    colours = matplotlib.colormaps["viridis"](scale(np.clip(finite, low, high)))
    colours[~known], colours[lost] = UNKNOWN, NOT_FINITE
    span = (watch.steps[-1] - watch.steps[0]) / max(len(watch.steps) - 1, 1) or 1
    edges = (watch.steps[0] - span / 2, watch.steps[-1] + span / 2, len(names) - 0.5, -0.5)
    axes.imshow(colours, aspect="auto", interpolation="nearest", extent=edges)
    axes.set_title(TITLES[column])
    axes.set_xlabel("step")
    ticks = np.arange(0, len(names), math.ceil(len(names) / 8))
    axes.set_yticks(ticks, [elided(names[tick], MOST_OF_NAME) for tick in ticks], fontsize=NAME_SIZE)
    box = axes.get_position()
    bar = figure.add_axes((box.x1 + 0.006, box.y0, 0.008, box.height))
    figure.colorbar(matplotlib.cm.ScalarMappable(scale, "viridis"), cax=bar)
    bar.yaxis.set_minor_formatter(NullFormatter())
    if not any(low <= tick <= scale.vmax for tick in bar.get_yticks()):
        bar.set_yticks([scale.vmin, scale.vmax], [f"{scale.vmin:.2g}", f"{scale.vmax:.2g}"])
    bar.tick_params(labelsize=NAME_SIZE)
