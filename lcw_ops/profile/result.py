"""The result of a profile, and its forms: a table for the terminal, a plot, one CSV row per layer, JSON.

NaN in a column means that the figure is missing in that row, for a reason that the profile gives, or that NaN was
measured. JSON has neither infinities nor NaN: they become the strings "inf", "-inf" and "nan".
"""

import csv
import dataclasses
import json
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from lcw_ops._files import write_atomically
from lcw_ops.ops.parallel_depth.solver import Solve
from lcw_ops.profile.headline import elided
from lcw_ops.profile.jacobian import JacobianSpectrum
from lcw_ops.profile.remedies import judge
from lcw_ops.profile.verdict import Verdict

# The version of the JSON files' layout. It grows when a key or a column is removed or changes its meaning; new ones
# leave it as it is.
SCHEMA_VERSION = 1

COLUMNS = {
    "name": "module, with #2, #3, ... for further calls; layer[l] is layer (or time step) l of a recurrence",
    "parameters": "parameters of the module itself; each is counted once, in the first row that has it",
    "state_rms": "rms of the output over samples and units",
    "state_mean": "mean of the output over samples and units",
    "gradient_norm": "norm of dE/d(output) over all samples and all tensors of the output",
    "activation_shift": "rms over units of the mean pre-activation (of other modules: output) over samples",
    "shift_angle": "degrees by which the angle of a weight vector to the mean input differs from 90, rms over units",
    "weight_gradient_norm": "norm of dE/d(weight) over all calls; of all parameters of a module without a matrix; of a "
    "weight shared over time, this step's share",
    "gradient_condition": "rms by geometric mean of the sizes of the units' rows of dE/d(weight), or of the inputs' "
    "columns if that is larger",
    "underflow": "share of the 1-norm of a float16 dE/d(output) in entries whose rounding error may reach 6 %",
    "dead": "share of units whose activation function is flat (derivative at most 5 % of the largest) in all samples",
    "saturated": "share of the entries at which an activation function that is flat on both sides is flat",
    "dead_error": "standard error of dead over the samples: sqrt(p (1 - p) / samples)",
    "saturated_error": "standard error of saturated over the samples, at most: sqrt(p (1 - p) / samples)",
    "update_ratio": "norm of the optimizer's next update of the weight, divided by the norm of the weight",
    "weight_norm_bound": "rigorous upper bound of ||W_l||_2",
    "gain_lower": "lower bound of the singular values of this layer's Jacobian",
    "gain_upper": "upper bound of the singular values of this layer's Jacobian",
    "gradient_lower": "lower bound of gradient_norm, given the gradient at the end",
    "gradient_upper": "upper bound of gradient_norm, given the gradient at the end",
    "state_rms_bound": "upper bound of state_rms, for |act| <= 1",
}

# The columns that the table shows if a row has them, with their headings.
TABLE_COLUMNS = {
    "state_rms": "state rms",
    "gradient_norm": "gradient",
    "gradient_lower": "at least",
    "gradient_upper": "at most",
    "activation_shift": "shift",
    "weight_gradient_norm": "dE/dW",
    "dead": "dead",
    "saturated": "saturated",
    "update_ratio": "update",
}

# The number of rows that the table shows.
TABLE_ROWS = 12

# The share of the table's rows that is spread evenly, however little happens there.
EVEN_SHARE = 0.25


@dataclass
class Timing:
    """Seconds (median of ``repeats``) and arithmetic of one forward and one backward pass over ``layers`` rows.

    flops count multiplications and additions of matrix products and convolutions; matmul_rate is FLOP/s. uncounted are
    the ops that compute products, but for which there is no formula.
    """

    forward_seconds: float
    backward_seconds: float
    repeats: int
    layers: int
    forward_flops: float
    backward_flops: float
    matmul_rate: float = math.nan
    uncounted: tuple[str, ...] = ()

    @property
    def microseconds_per_layer(self) -> float:
        return 1e6 * (self.forward_seconds + self.backward_seconds) / self.layers

    @property
    def forward_rate(self) -> float:
        """FLOP/s"""
        return self.forward_flops / self.forward_seconds

    @property
    def backward_rate(self) -> float:
        """FLOP/s"""
        return self.backward_flops / self.backward_seconds

    def summary(self) -> dict:
        figures = dataclasses.asdict(self)
        if not self.uncounted:
            del figures["uncounted"]
        return {
            **figures,
            "microseconds_per_layer": self.microseconds_per_layer,
            "forward_gflops_per_second": self.forward_rate / 1e9,
            "backward_gflops_per_second": self.backward_rate / 1e9,
            "forward_share_of_matmul_rate": self.forward_rate / self.matmul_rate,
            "backward_share_of_matmul_rate": self.backward_rate / self.matmul_rate,
        }


@dataclass
class Solves:
    """The convergence of the parallel solver over the windows of one pass, forward or backward.

    Attributes:
        windows: the number of windows that converged. largest_window: layers of the largest of these.
        largest_sweeps, mean_sweeps: of the windows that converged, as are contraction, residual and error.
        largest_contraction: change in the last sweep divided by the change in the sweep before; NaN if no window took
            two sweeps.
        largest_residual: relative change of a state in a window's last sweep.
        largest_error: estimate of a window's relative error.
        given_up: windows that did not converge, and were solved again with half the layers.
        sequential_layers: layers that the sequential kernel solved in the end.
    """

    windows: int
    largest_window: int
    largest_sweeps: int
    mean_sweeps: float
    largest_contraction: float
    largest_residual: float
    largest_error: float
    given_up: int
    sequential_layers: int

    @classmethod
    def of(cls, solves: Iterable[Solve]) -> "Solves | None":
        """The summary, or None if nothing was solved in parallel."""
        solves = list(solves)
        converged = [solve for solve in solves if solve.converged and solve.sweeps]
        contractions = [solve.contraction for solve in converged if not math.isnan(solve.contraction)]
        if not solves:
            return None
        return cls(
            windows=len(converged),
            largest_window=max((solve.layers for solve in converged), default=0),
            largest_sweeps=max((solve.sweeps for solve in converged), default=0),
            mean_sweeps=sum(solve.sweeps for solve in converged) / len(converged) if converged else math.nan,
            largest_contraction=max(contractions, default=math.nan),
            largest_residual=max((solve.residual for solve in converged), default=math.nan),
            largest_error=max((solve.error for solve in converged), default=math.nan),
            given_up=sum(not solve.converged for solve in solves),
            sequential_layers=sum(solve.layers for solve in solves if solve.sweeps == 0),
        )


@dataclass
class Profile:
    """The result of :func:`lcw_ops.profile.profile`.

    Attributes:
        name: the model's. loss: its value. samples: samples in the batch. backend: the backend that ran our ops.
        columns: one array per entry of ``COLUMNS``, with one element per layer, in the order of the calls.
        jacobians: description of the map -> :class:`JacobianSpectrum`.
        timing: :class:`Timing`.
        peak_memory_bytes: the most that was held in the timed passes, by the process (CPU) or by torch on the GPU; None
            if it is not known.
        machine: hardware and versions.
        solves: "forward" and "backward" -> :class:`Solves` of the parts that the parallel solver ran; {} without any.
        missing: for every column but "name" one uint16 array: 0 where there is a figure, else the number of its reason
            in ``reasons``, counted from 1. See :meth:`reason`.
        absent: figures of the whole model that are missing ("time", "input -> output", ...) -> the reason.
        failure: the model's error and the module in which it was raised, if its forward pass failed.
        not_finite: the layer at which NaN or infinity begins; None if there is none.
        modules: for every row the path of its module in the model and the name of its class.
        tried: the verdict with the outcomes of its changes, if ``profile`` was called with ``try_remedies=True``.
    """

    name: str
    loss: float
    samples: int
    columns: dict[str, np.ndarray]
    jacobians: dict[str, JacobianSpectrum]
    timing: Timing
    peak_memory_bytes: int | None
    backend: str
    machine: dict
    solves: dict[str, Solves] = field(default_factory=dict)
    missing: dict[str, np.ndarray] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    failure: str | None = None
    not_finite: str | None = None
    modules: list[tuple[str, str]] = field(default_factory=list)
    tried: Verdict | None = None

    def __setstate__(self, state: dict) -> None:
        # Profiles that were pickled before there were reasons, or verdicts, lack these.
        added = {"missing": {}, "reasons": [], "absent": {}, "failure": None, "not_finite": None}
        self.__dict__.update({**added, "modules": [], "tried": None, **state})
        vars(self.timing).setdefault("uncounted", ())

    def reason(self, column: str, row: int) -> str | None:
        """Why a row has no figure in this column; None if it has one."""
        number = int(self.missing[column][row]) if column in self.missing else 0
        return self.reasons[number - 1] if number else None

    def reasons_of(self, column: str) -> dict[str, np.ndarray]:
        """{reason: the rows without a figure in this column for that reason}."""
        numbers = self.missing.get(column, np.zeros(0, np.uint16))
        return {
            self.reasons[number - 1]: np.flatnonzero(numbers == number) for number in np.unique(numbers[numbers > 0])
        }

    def is_missing(self, column: str) -> np.ndarray:
        """Which rows have no figure in this column."""
        return self.missing[column] > 0 if column in self.missing else np.isnan(self.columns[column])

    def __len__(self) -> int:
        return len(self.columns["name"])

    def verdict(self) -> Verdict:
        """The findings: the rows that each rests on and the change that addresses it. There may be none.

        The outcomes of the changes are there if the profile was made with ``try_remedies=True``. Kinds that could not
        be judged are listed with the reason.
        """
        return judge(self) if self.tried is None else self.tried

    def summary(self) -> dict:
        """Everything but the columns, ready for JSON; "solves" only if there are any."""
        solves = {direction: dataclasses.asdict(solves) for direction, solves in self.solves.items()}
        return {
            "name": self.name,
            "loss": self.loss,
            "samples": self.samples,
            "rows": len(self),
            "backend": self.backend,
            "peak_memory_bytes": self.peak_memory_bytes,
            "timing": self.timing.summary(),
            "jacobians": {what: dataclasses.asdict(spectrum) for what, spectrum in self.jacobians.items()},
            "machine": self.machine,
            **({"solves": solves} if solves else {}),
            **{name: value for name in ("absent", "failure", "not_finite") if (value := getattr(self, name))},
            "verdict": self.verdict().summary(),
        }

    def table(self) -> str:
        """The verdict, the rows where most happens and a summary, for a terminal: with rich if installed, else text.

        ``notable_rows`` selects the rows. Long names lose words in their middle.
        """
        shown = notable_rows(self, TABLE_ROWS)
        missing = {name: self.is_missing(name) for name in TABLE_COLUMNS if name in self.columns}
        columns = ["name", *(name for name in missing if not missing[name].all())]
        rows = [[_cell(self.columns[name][i], name in missing and missing[name][i]) for name in columns] for i in shown]
        header = ["layer", *(TABLE_COLUMNS[name] for name in columns[1:])]
        widths = [max(map(len, cells)) + 2 for cells in zip(header, *rows, strict=True)]
        room = max(shutil.get_terminal_size().columns - 4 - sum(widths[1:]), LEAST_NAME)
        rows = [[elided(name, room), *cells] for name, *cells in rows]
        title = f"{self.name}: {len(shown)} of {len(self)} rows"
        return "\n\n".join([str(self.verdict()), format_table(header, rows, title), self._figures()])

    def _figures(self) -> str:
        return format_table(["figure", "value"], self._figure_rows() + missing_rows(self))

    def _figure_rows(self) -> list[list[str]]:
        return failure_rows(self) + timing_rows(self) + solves_rows(self) + jacobian_rows(self)

    def plot(self, path: str | Path) -> None:
        """Draw norms by depth on a log axis, with shaded bounds, as PNG, SVG or PDF by the path's ending.

        Raises ImportError without matplotlib, and OSError if the file cannot be written.
        """
        from lcw_ops.profile.plot import plot_profile

        plot_profile(self, path)

    def to_html(self, path: str | Path) -> None:
        """Write one HTML file that loads nothing from any network: headline, plots with zoom, a table of all rows.

        50,000 rows with 25 columns of figures take less than 5 MB. Figures are rounded, by at most 0.013 %; counts are
        exact. Raises OSError if the file cannot be written.
        """
        from lcw_ops.profile.html import write_html

        write_html(self, path, self._figure_rows(), COLUMNS)

    def to_csv(self, path: str | Path) -> None:
        """Write one row per layer under a header; a cell is empty if its figure is missing.

        Raises OSError if the file cannot be written.
        """
        write_atomically(path, lambda file: write_rows(file, list(COLUMNS), [self.csv_rows()]))

    def csv_rows(self) -> Iterable[Sequence[str]]:
        """The rows of :meth:`to_csv`, as text."""
        return csv_rows(self.columns, {name: self.is_missing(name) for name in self.columns if name != "name"})

    def to_json(self, path: str | Path) -> None:
        """Write the summary, all columns, "modules" and "missing".

        "missing" has column -> reason -> ranges of rows [first, last], from 0. "modules" has the lists "path" and
        "class", with one element per row: the verdict's changes depend on them.
        See the top of this file for infinities and NaN.
        """
        missing = {
            column: {reason: _ranges(rows) for reason, rows in self.reasons_of(column).items()}
            for column, numbers in self.missing.items()
            if numbers.any()
        }
        paths, classes = ([module[part] for module in self.modules] for part in (0, 1))
        content = {
            "schema_version": SCHEMA_VERSION,
            **self.summary(),
            "columns": {name: column.tolist() for name, column in self.columns.items()},
            **({"modules": {"path": paths, "class": classes}} if self.modules else {}),
            **({"missing": missing} if missing else {}),
        }
        write_atomically(path, lambda file: write_json(file, content))


def notable_rows(profile: Profile, count: int) -> np.ndarray:
    """At most ``count`` rows where something happens, in their order: the first and the last row are among them.

    So are the row at which NaN or infinity begins, the two rows around the largest step of the gradient norm, and the
    slowest row. The others are spread by the change of the gradient norm and of the state rms along the depth, and a
    quarter of them evenly.
    """
    rows = len(profile)
    if rows <= count:
        return np.arange(rows)
    chosen, activity = {0, rows - 1}, np.full(rows - 1, EVEN_SHARE / (rows - 1))
    for name, first_lost in (("gradient_norm", -1), ("state_rms", 0)):
        values, missing = profile.columns[name], profile.is_missing(name)
        lost = np.flatnonzero(~missing & ~np.isfinite(values))
        if len(lost):
            chosen.add(int(lost[first_lost]))
        known = np.flatnonzero(~missing & np.isfinite(values) & (values > 0))
        steps = np.abs(np.diff(np.log(values[known])))
        if len(steps) == 0 or not steps.any():
            continue
        if name == "gradient_norm":
            largest = int(steps.argmax())
            chosen |= {int(known[largest]), int(known[largest + 1])}
        activity[known[1:] - 1] += (1 - EVEN_SHARE) / 2 * steps / steps.sum()
    for name in profile.columns:
        if name.endswith("seconds") and not np.isnan(profile.columns[name]).all():
            chosen.add(int(np.nanargmax(profile.columns[name])))
    chosen = set(sorted(chosen, key=lambda row: row in (0, rows - 1), reverse=True)[:count])
    passed = np.concatenate([[0.0], np.cumsum(activity)])
    # More and more places along the way, until enough of them are different rows.
    for places in range(count, 8 * count):
        spread = np.searchsorted(passed, np.linspace(0, passed[-1], places), side="left").clip(0, rows - 1)
        more = [int(row) for row in spread if int(row) not in chosen]
        if len(set(more)) >= count - len(chosen):
            break
    more = sorted(set(more))
    keep = np.linspace(0, len(more) - 1, min(count - len(chosen), len(more))).round().astype(int) if more else []
    return np.array(sorted(chosen | {more[k] for k in keep}))


# The table shows at least so many letters of a name.
LEAST_NAME = 12


def failure_rows(profile: Profile) -> list[list[str]]:
    """(figure, value) pairs of a failed pass and of the first NaN or infinity; [] if all is well."""
    rows = [["failed", profile.failure], ["not finite first", profile.not_finite]]
    return [[figure, value] for figure, value in rows if value is not None]


def missing_rows(profile: Profile) -> list[list[str]]:
    """(figure, value) pairs of what is missing and why: for the whole model, and for state and gradient of rows."""
    rows = [[figure, f"missing: {reason}"] for figure, reason in profile.absent.items()]
    for column in ("state_rms", "gradient_norm"):
        for reason, places in profile.reasons_of(column).items():
            names = profile.columns["name"][places[:3]]
            more = ", ..." if len(places) > len(names) else ""
            words = f"missing in {len(places):,} row{'s' if len(places) > 1 else ''} ({', '.join(names)}{more})"
            rows.append([TABLE_COLUMNS[column], f"{words}: {reason}"])
    return rows


def timing_rows(profile: Profile) -> list[list[str]]:
    """(figure, value) pairs of time, rate and memory."""
    timing = profile.timing
    repeats = f"median of {timing.repeats}" if timing.repeats > 1 else "1 run"
    rows = []
    if timing.repeats:
        rows += [
            ["forward", f"{timing.forward_seconds * 1e3:.4g} ms ({repeats})"],
            ["backward", f"{timing.backward_seconds * 1e3:.4g} ms ({repeats})"],
            ["forward + backward per layer", f"{timing.microseconds_per_layer:.4g} µs"],
            ["forward rate", _rate(timing, timing.forward_flops, timing.forward_rate)],
            ["backward rate", _rate(timing, timing.backward_flops, timing.backward_rate)],
        ]
    if timing.uncounted:
        rows.append(["not counted", ", ".join(timing.uncounted)])
    if not math.isnan(timing.matmul_rate):
        rows.append(["matmul rate (float32)", f"{timing.matmul_rate / 1e9:.4g} GFLOP/s"])
    if profile.peak_memory_bytes is not None:
        rows.append(["peak memory", f"{profile.peak_memory_bytes / 1e9:.2f} GB"])
    if "threads" in profile.machine:
        # CSV has no machine.
        rows.append(["backend", f"{profile.backend}, {profile.machine['threads']} threads"])
    return rows


def _rate(timing: Timing, flops: float, rate: float) -> str:
    if not flops > 0:
        return "not counted" if timing.uncounted or math.isnan(flops) else "no matrix products"
    least = "at least " if timing.uncounted else ""
    return f"{least}{rate / 1e9:.4g} GFLOP/s, {rate / timing.matmul_rate:.1%} of this machine's matmul rate"


def solves_rows(profile: Profile) -> list[list[str]]:
    """(figure, value) pairs of the parallel solver's convergence; [] for a profile without it."""
    return [[f"{direction} in parallel", _solves_in_words(solves)] for direction, solves in profile.solves.items()]


def _solves_in_words(solves: Solves) -> str:
    parts = []
    if solves.windows:
        windows = f"{solves.windows:,} windows of at most {solves.largest_window:,} layers"
        if solves.windows == 1:
            windows = f"one window of {solves.largest_window:,} layers"
        parts.append(f"{windows}, {solves.mean_sweeps:.3g} sweeps")
        if solves.mean_sweeps < solves.largest_sweeps:
            parts[-1] += f" in the mean, at most {solves.largest_sweeps}"
        if not math.isnan(solves.largest_contraction):
            parts.append(f"contraction {solves.largest_contraction:.2g}")
        parts += [f"residual {solves.largest_residual:.2g}", f"error estimate {solves.largest_error:.2g}"]
    if solves.given_up:
        parts.append(f"{solves.given_up} window{'s' if solves.given_up > 1 else ''} given up")
    if solves.sequential_layers:
        parts.append(f"{solves.sequential_layers:,} layers sequentially")
    return ", ".join(parts)


def jacobian_rows(profile: Profile) -> list[list[str]]:
    """(figure, value) pairs of the extreme singular values, with their bounds and their reliability."""
    rows = []
    for what, spectrum in profile.jacobians.items():
        smallest = f"{spectrum.smallest:.4g}"
        if not spectrum.smallest_resolved:
            smallest += " (below rounding)"
        value = f"{smallest} ... {spectrum.largest:.4g}" if math.isfinite(spectrum.largest) else "overflows"
        if spectrum.log_upper is not None:
            value += f", bounds {format_log(spectrum.log_lower)} ... {format_log(spectrum.log_upper)}"
        if not spectrum.converged:
            value += f" (not converged after {spectrum.iterations} steps)"
        rows.append([f"singular values {what}", value])
    return rows


def format_log(log_value: float) -> str:
    """exp(log_value) in four digits, even beyond the range of a float: 3^50000 is 10^23856."""
    if abs(log_value) < 700:
        return f"{math.exp(log_value):.4g}"
    return "0" if log_value == -math.inf else f"10^{log_value / math.log(10):.0f}"


def format_table(header: list[str], rows: list[list[str]], title: str | None = None) -> str:
    """A table as text of the terminal's width: drawn by rich if it is installed, else with spaces between columns.

    Numbers are aligned right, except in a table with the two columns figure and value, which reads like a sentence.
    """
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return _plain_table(header, rows, title)
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 or len(header) == 2 else "right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")


def _plain_table(header, rows, title) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [title] if title else []
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if i and len(header) > 2 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def csv_rows(columns: dict[str, np.ndarray], missing: dict[str, np.ndarray] | None = None) -> Iterable[Sequence[str]]:
    """The rows of a table with the columns of ``COLUMNS``, as text; the cells of a missing column are empty.

    ``missing``: which figures of a column are missing; without it, those that are NaN.
    """
    length, missing = len(columns["name"]), missing or {}
    texts = [
        [""] * length
        if name not in columns
        else columns[name].tolist()
        if name == "name"
        else [
            "" if absent else f"{value:.7g}"
            for value, absent in zip(
                columns[name].tolist(), missing.get(name, np.isnan(columns[name])).tolist(), strict=True
            )
        ]
        for name in COLUMNS
    ]
    return zip(*texts, strict=True)


def _ranges(rows: np.ndarray) -> list[list[int]]:
    """Sorted numbers as ranges [first, last]."""
    parts = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    return [[int(part[0]), int(part[-1])] for part in parts]


def write_rows(file: IO, header: list[str], parts: Iterable[Iterable[Sequence[str]]]) -> None:
    """Write CSV with a header, one part after another."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    for part in parts:
        writer.writerows(part)


def write_json(file: IO, content: dict) -> None:
    json.dump(json_ready(content), file, indent=1, allow_nan=False)
    file.write("\n")


def json_ready(value):
    """The same structure, with infinities and NaN as strings."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _cell(value, missing) -> str:
    if isinstance(value, str):
        return value
    return "-" if missing else f"{value:.3g}"
