"""The report of ``lcw-ops profile``: a run's results as one CSV of layers, one JSON of figures and a table.

``lcw_ops/jobs/picture.py`` draws it. This module needs no matplotlib.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from lcw_ops._files import write_atomically
from lcw_ops.jobs.data import Dataset
from lcw_ops.jobs.settings import ProfileSettings
from lcw_ops.profile.jacobian import JacobianSpectrum
from lcw_ops.profile.result import (
    COLUMNS,
    Profile,
    csv_rows,
    format_table,
    jacobian_rows,
    solves_rows,
    timing_rows,
    write_rows,
)

# The kinds in words. Deep residual networks usually contain normalisation layers; ours has none.
IN_WORDS = {"orthogonal-filter": "orthogonal-filter", "residual": "un-normalised residual", "plain": "plain"}

REPORT_FILES = ("layers.csv", "report.json", "report.png")


@dataclass
class History:
    """The training curve: loss and milliseconds of every step; (steps done, accuracy) of every evaluation."""

    loss: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    test_accuracy: list[tuple[int, float]] = field(default_factory=list)

    @property
    def median_milliseconds(self) -> float:
        return sorted(self.milliseconds)[len(self.milliseconds) // 2] if self.milliseconds else math.nan


@dataclass
class Report:
    """The content of the three files. The first profile is the chosen kind's, after training.

    initial: kind -> state_rms and gradient_norm of every layer, (L,), at initialisation.
    """

    settings: ProfileSettings
    dataset: Dataset
    history: History
    profiles: dict[str, Profile]
    initial: dict[str, dict[str, np.ndarray]]
    peak_memory_bytes: int | None
    seconds: float

    def labels(self) -> dict[str, str]:
        """Kind -> a description of the net that was profiled."""
        trained = f"after {self.settings.steps} steps" if self.settings.steps else "at initialisation"
        return {
            kind: f"{IN_WORDS[kind]} net, {trained if kind == self.settings.kind else 'at initialisation'}"
            for kind in self.profiles
        }


def write_layers(report: Report, path: Path) -> None:
    """Write one row per layer and kind, with a column "kind" before those of ``Profile.to_csv``.

    The last rows are the chosen kind before training, with the columns that were measured then.
    """
    kind, tables = report.settings.kind, {name: profile.csv_rows() for name, profile in report.profiles.items()}
    if report.history.loss:
        names = report.profiles[kind].columns["name"][1:-1]
        tables[f"{kind}, at initialisation"] = csv_rows({"name": names, **report.initial[kind]})
    parts = (((kind, *row) for row in rows) for kind, rows in tables.items())
    write_atomically(path, lambda file: write_rows(file, ["kind", *COLUMNS], parts))


def summary(report: Report) -> dict:
    """The content of report.json."""
    history = report.history
    return {
        "settings": asdict(report.settings),
        "data": {
            "name": report.dataset.name,
            "training_samples": len(report.dataset.x_train),
            "test_samples": len(report.dataset.x_test),
            "features": report.dataset.features,
            "classes": report.dataset.classes,
        },
        "training": {
            "loss": history.loss,
            "milliseconds": history.milliseconds,
            "median_milliseconds": history.median_milliseconds,
            "test_accuracy": [{"step": step, "accuracy": share} for step, share in history.test_accuracy],
            "final_test_accuracy": history.test_accuracy[-1][1],
        },
        "networks": {
            kind: {"measured": label, **report.profiles[kind].summary()} for kind, label in report.labels().items()
        },
        "columns": {"kind": "which network", **COLUMNS},
        "peak_memory_bytes": report.peak_memory_bytes,
        "seconds": report.seconds,
    }


def table(report: Report) -> str:
    """The chosen kind's time, rate and memory, and the signal and gradient of all three kinds."""
    settings, history = report.settings, report.history
    chosen = report.profiles[settings.kind]
    training = []
    if history.loss:
        rate = settings.depth / history.median_milliseconds * 1e3
        training = [
            [
                "training step",
                f"{history.median_milliseconds:.4g} ms (median of {settings.steps}), {rate:,.0f} layers/s",
            ],
            ["loss", f"{history.loss[0]:.3f} at step 1, {history.loss[-1]:.3f} at step {settings.steps}"],
        ]
    training.append(["test accuracy", f"{history.test_accuracy[-1][1]:.1%}"])
    # The peak of the whole run, not the one at the end of this profile.
    timing = timing_rows(replace(chosen, peak_memory_bytes=report.peak_memory_bytes))
    figures = format_table(
        ["figure", "value"], training + timing + solves_rows(chosen) + jacobian_rows(chosen), chosen.name
    )
    header = ["network", "state rms 1 -> L", "gradient L -> 1", "singular values"]
    measured = []
    if history.loss:
        measured.append((IN_WORDS[settings.kind], report.initial[settings.kind], "-"))
    for kind, network in report.profiles.items():
        layers = {name: network.columns[name][1:-1] for name in ("state_rms", "gradient_norm")}
        # This row is printed below the same net at initialisation.
        label = f"same after {settings.steps} steps" if history.loss and kind == settings.kind else IN_WORDS[kind]
        measured.append((label, layers, _extremes(network.jacobians.get("h_0 -> h_L"))))
    rows = [
        [label, ends(layers["state_rms"]), ends(layers["gradient_norm"][::-1]), extremes]
        for label, layers, extremes in measured
    ]
    footnote = (
        "Measured at initialisation unless a row names its steps. Singular values of h_0 -> h_L; ~0 is below rounding."
    )
    return f"{figures}\n\n{format_table(header, rows)}\n{footnote}"


def ends(values: np.ndarray) -> str:
    """The first value and the last one, as a word if it is not a finite number."""
    first, last = (f"{value:.2g}" if math.isfinite(value) else "overflows" for value in (values[0], values[-1]))
    return f"{first} -> {last}"


def _extremes(spectrum: JacobianSpectrum | None) -> str:
    if spectrum is None:
        return "-"
    if not math.isfinite(spectrum.largest):
        return "overflows"
    smallest = f"{spectrum.smallest:.2g}" if spectrum.smallest_resolved else "~0"
    return f"{smallest} ... {spectrum.largest:.2g}"
