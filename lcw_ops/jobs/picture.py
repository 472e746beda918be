"""report.png of ``lcw-ops profile``: gradient and signal by depth for three kinds of nets, and the training curve."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lcw_ops.jobs.report import IN_WORDS, Report
from lcw_ops.profile.headline import gradient_fate
from lcw_ops.profile.plot import COLOURS, DOTS_PER_INCH, INCHES, STYLE, Line, line_of_text, log_lines, save

ACCURACY_COLOUR = "#009E73"


def plot_report(report: Report, path: str | Path) -> None:
    """Draw report.png. Raises OSError when the file cannot be written."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH)
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(
            2, 2, width_ratios=(1.75, 1), left=0.062, right=0.938, top=0.80, bottom=0.085, wspace=0.16, hspace=0.38
        )
        headline, details = findings(report)
        line_of_text(figure, 0.942, headline, fontsize=24, fontweight="bold")
        line_of_text(figure, 0.884, details, fontsize=15, color="#333333")
        _gradient_panel(figure.add_subplot(grid[:, 0]), report)
        _state_panel(figure.add_subplot(grid[0, 1]), report)
        _training_panel(figure.add_subplot(grid[1, 1]), report)
        save(figure, path)


def findings(report: Report) -> tuple[str, str]:
    """(headline, second line): the result in words, computed from the measurements of all nets at initialisation."""
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


def _gradient_panel(axes: Axes, report: Report) -> None:
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


def _state_panel(axes: Axes, report: Report) -> None:
    kind, depth = report.settings.kind, report.settings.depth
    lines = [Line(IN_WORDS[kind], columns["state_rms"], COLOURS[kind]) for kind, columns in report.initial.items()]
    chosen = report.profiles[kind].columns
    if report.history.loss:
        lines.append(Line("", chosen["state_rms"][1:-1], COLOURS[kind], "--"))
    band = (np.zeros(depth), chosen["state_rms_bound"][1:-1], COLOURS[kind])
    log_lines(axes, np.arange(1, depth + 1), lines, band)
    axes.set_title("state rms;  shaded: bound" + _bounded_line(report))
    _layer_axis(axes, depth, "layer")


def _bounded_line(report: Report) -> str:
    """Says which line of the chosen kind the bounds belong to: they follow from its weights after training."""
    return " of the dashed line" if report.history.loss else ""


def _training_panel(axes: Axes, report: Report) -> None:
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
