"""``Profile.verdict()``: what is wrong with a network, in which layers, and which change addresses it.

A verdict reads the columns of a profile and nothing else. Every kind of finding has a figure and a threshold, in
``KINDS``. A kind whose columns are missing is not judged, and the verdict says why. The thresholds were fixed on one
half of the models and seeds of ``bench/verdicts.py``; docs/profiler.md has the confusion table of the other half.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from lcw_ops.profile.figures import FROZEN, UNREACHED

# Gradients and states below this count as zero: float32's smallest subnormal number.
_ZERO = 1e-45

# A deviation over n samples has a relative error of about 1 / sqrt(2 (n - 1)): 27 % for 8.
LEAST_SAMPLES = 8

# The most findings of one kind: more runs of rows than that are one finding, from the first to the last row.
MOST_RANGES = 3


class Measured(Protocol):
    """The part of a :class:`~lcw_ops.profile.Profile` that a verdict reads."""

    loss: float
    samples: int
    columns: dict[str, np.ndarray]
    absent: dict[str, str]
    failure: str | None
    modules: list[tuple[str, str]]

    def __len__(self) -> int: ...

    def is_missing(self, column: str) -> np.ndarray: ...

    def reasons_of(self, column: str) -> dict[str, np.ndarray]: ...


class Range(NamedTuple):
    """Rows first to last, counted from 0, and the figure that they have together."""

    first: int
    last: int
    figure: float


class NotJudged(Exception):
    """A kind cannot be judged; the text is the reason."""


@dataclass(frozen=True)
class Outcome:
    """The result of a proposed change on a copy of the model, with the same batch.

    Attributes:
        figure: the finding's figure after the change; NaN if it has none there.
        loss_before, loss_after: the loss of the batch without and with the change, both before any training.
        remaining: the number of the finding's rows in which the kind is still found. rows: the number of its rows.
        error: why the change could not be tried, or None.
    """

    figure: float = math.nan
    loss_before: float = math.nan
    loss_after: float = math.nan
    remaining: int = 0
    rows: int = 0
    error: str | None = None

    @property
    def remains(self) -> bool:
        """Whether the kind is still found in one of the rows, or could not be looked for."""
        return self.error is not None or self.remaining > 0

    def __str__(self) -> str:
        if self.error is not None:
            return f"no outcome: {self.error}"
        state = f"it remains in {self.remaining} of {self.rows} rows" if self.remains else "the finding is gone"
        return (
            f"the figure becomes {self.figure:.2g}, the loss {self.loss_before:.4g} -> {self.loss_after:.4g}; {state}"
        )


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: a key of ``KINDS``.
        title: the kind in words.
        first, last: the rows that it rests on, counted from 0. first_name, last_name: their names.
        figure, threshold: the measured figure and the limit that it passes.
        words: one sentence with both.
        method: the method that addresses it.
        change: the change as a line of Python. The line uses the names model, inputs, optimizer and lcw_ops. It is ""
            if no change of one line helps.
        outcome: the result of the change, if it was tried.
    """

    kind: str
    title: str
    first: int
    last: int
    first_name: str
    last_name: str
    figure: float
    threshold: float
    words: str
    method: str = ""
    change: str = ""
    outcome: Outcome | None = None

    @property
    def place(self) -> str:
        """The rows in words, counted from 1."""
        if self.first == self.last:
            return f"{self.first_name} (row {self.first + 1})"
        return f"{self.first_name} to {self.last_name} (rows {self.first + 1} to {self.last + 1})"

    def __str__(self) -> str:
        return f"{self.title}, {self.place}: {self.words}"


@dataclass(frozen=True)
class Verdict:
    """All findings of a profile, causes before their consequences.

    Attributes:
        findings: a list of :class:`Finding`; empty if nothing is wrong.
        judged: the kinds that could be judged.
        not_judged: kind -> the reason.
        rows: the number of rows of the profile.
        failure: the model's error and its place, if the model failed and only the rows before could be judged.
    """

    findings: list[Finding] = field(default_factory=list)
    judged: list[str] = field(default_factory=list)
    not_judged: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    failure: str | None = None

    @property
    def is_healthy(self) -> bool:
        """Whether the model ran and nothing was found. Kinds that were not judged may still be present."""
        return not self.findings and self.failure is None

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __bool__(self) -> bool:
        # A verdict without findings is a verdict too.
        return True

    @property
    def headline(self) -> str:
        """One line: the model's failure, or the first finding and the number of others, or that nothing is wrong."""
        if self.failure is not None:
            return f"the model failed: {self.failure}"
        if not self.findings:
            rows = f"{self.rows:,} row{'' if self.rows == 1 else 's'}"
            return f"nothing is wrong in {rows}, by {len(self.judged)} of {len(KINDS)} checks"
        more = f", and {len(self.findings) - 1} more" if len(self.findings) > 1 else ""
        return f"{self.findings[0]}{more}"

    def lines(self) -> list[str]:
        """The verdict in words, for a terminal."""
        number_found = f"{len(self.findings)} finding{'' if len(self.findings) == 1 else 's'}"
        if self.failure is not None:
            found = [f"Verdict: {self.headline}. In the rows before: {number_found}."]
        elif not self.findings:
            found = [f"Verdict: {self.headline}."]
        else:
            found = [f"Verdict: {number_found}."]
        for number, finding in enumerate(self.findings, 1):
            found.append(f"{number}. {finding}")
            if finding.method:
                found.append(f"   Method: {finding.method}")
            if finding.change:
                found.append(f"   Change: {finding.change}")
            if finding.outcome is not None:
                found.append(f"   Tried: {finding.outcome}")
        by_reason: dict[str, list[str]] = {}
        for kind, reason in self.not_judged.items():
            by_reason.setdefault(reason, []).append(KINDS[kind].title)
        found += [f"Not judged: {', '.join(titles)} ({reason})." for reason, titles in by_reason.items()]
        return found

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def summary(self) -> dict:
        """The verdict as plain dictionaries, for JSON."""
        return {
            "healthy": self.is_healthy,
            "findings": [asdict(finding) for finding in self.findings],
            "judged": self.judged,
            "not_judged": self.not_judged,
            **({} if self.failure is None else {"failure": self.failure}),
        }


# ---- Reading columns ------------------------------------------------------------------------------------------------


def _figures(profile: Measured, column: str) -> tuple[np.ndarray, np.ndarray]:
    """(rows, values) of the finite figures of a column. Raises NotJudged if there are none."""
    if column not in profile.columns:
        raise NotJudged(f"this profile has no column {column}")
    values = profile.columns[column]
    rows = np.flatnonzero(~profile.is_missing(column) & np.isfinite(values))
    if not len(rows):
        reasons = profile.reasons_of(column)
        # If reasons are equally frequent, the first row's counts: their order differs in a profile from a file.
        most = max(
            reasons,
            key=lambda reason: (len(reasons[reason]), -reasons[reason][0]),
            default="no row has a finite figure",
        )
        raise NotJudged(f"no row has the figure {column}: {most}")
    return rows, values[rows]


def _weighted(profile: Measured) -> np.ndarray:
    """Whether a row has parameters of its own. Raises NotJudged if the profile does not say so."""
    if "parameters" not in profile.columns or profile.is_missing("parameters").all():
        raise NotJudged("this profile has no column parameters")
    return profile.columns["parameters"] > 0


def _runs(places: np.ndarray) -> list[tuple[int, int]]:
    """(first, last) of the runs of neighbours among sorted numbers; of all of them together if there are many runs."""
    parts = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    runs = [(int(part[0]), int(part[-1])) for part in parts]
    return runs if len(runs) <= MOST_RANGES else [(runs[0][0], runs[-1][1])]


def _steepest(steps: np.ndarray) -> tuple[int, int]:
    """The range [first, last] of steps that holds the rise: the one with the greatest sum of (step - allowance).

    The allowance is half of the mean step, so that a slow and even rise is one range, but at most 0.1 (a factor of
    1.26 a row), so that a short and steep rise has no flat rows around it.
    """
    gains = steps - min(0.1, steps.sum() / (2 * len(steps)))
    total, begin = 0.0, 0
    best, best_range = -math.inf, (0, 0)
    for index, gain in enumerate(gains):
        if total <= 0:
            total, begin = 0.0, index
        total += gain
        if total > best:
            best, best_range = total, (begin, index)
    return best_range


# ---- The kinds ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of finding: its name in words, its threshold, and the sentence about its figure."""

    title: str
    threshold: float
    words: str

    def find(self, profile: Measured) -> list[Range]:
        """The ranges of rows where it is found, the worst first. Raises NotJudged."""
        raise NotImplementedError

    def at(self, profile: Measured, names: set[str]) -> float:
        """The figure in the rows of these names, whether or not it passes the threshold. Raises NotJudged."""
        raise NotImplementedError


@dataclass(frozen=True)
class _ByRow(Kind):
    """Rows whose own figure is above the threshold, or with ``is_below`` below it."""

    figures: Callable[[Measured], tuple[np.ndarray, np.ndarray]]
    is_below: bool = False

    def find(self, profile: Measured) -> list[Range]:
        rows, values = self.figures(profile)
        marked = values < self.threshold if self.is_below else values > self.threshold
        places = np.flatnonzero(marked)
        if not len(places):
            return []
        ranges = [
            Range(int(rows[a]), int(rows[b]), self._worst(values[places][(places >= a) & (places <= b)]))
            for a, b in _runs(places)
        ]
        return sorted(ranges, key=lambda one: one.figure, reverse=not self.is_below)

    def at(self, profile: Measured, names: set[str]) -> float:
        rows, values = self.figures(profile)
        inside = [name in names for name in profile.columns["name"][rows]]
        return self._worst(values[inside]) if any(inside) else math.nan

    def _worst(self, values: np.ndarray) -> float:
        return float(values.min() if self.is_below else values.max())


@dataclass(frozen=True)
class _Along(Kind):
    """The change of the gradient's norm over many rows: by how many decades it vanishes or explodes on its way back."""

    vanishes: bool

    def find(self, profile: Measured) -> list[Range]:
        found = self._steepest(profile)
        is_bad = found.figure < self.threshold if self.vanishes else found.figure > self.threshold
        return [found] if is_bad else []

    def at(self, profile: Measured, names: set[str]) -> float:
        return self._steepest(profile).figure

    def _steepest(self, profile: Measured) -> Range:
        rows, norms = _figures(profile, "gradient_norm")
        if len(rows) < 2:
            raise NotJudged("fewer than two rows have a gradient")
        if self.vanishes and not norms.any():
            return Range(int(rows[0]), int(rows[-1]), 0.0)
        logs = np.log10(np.maximum(norms, _ZERO))
        # A branch with small gradients, such as one that begins with zeros, is no obstacle: the gradient takes the
        # other way. So a row counts with the largest gradient before it (vanishing) or after it (exploding).
        if self.vanishes:
            steps = np.diff(np.maximum.accumulate(logs))
        else:
            steps = -np.diff(np.maximum.accumulate(logs[::-1])[::-1])
        first, last = _steepest(steps)
        decades = min(float(steps[first : last + 1].sum()), 300.0)
        # The module of row i + 1 makes the step from row i + 1 back to row i.
        return Range(int(rows[first + 1]), int(rows[last + 1]), 10.0 ** (-decades if self.vanishes else decades))


class _NonFinite(Kind):
    def find(self, profile: Measured) -> list[Range]:
        if not len(profile):
            raise NotJudged("the profile has no rows")
        # Forward, the first row is the cause; backward, the last one is where it begins.
        for column, end in (("state_rms", 0), ("gradient_norm", -1)):
            rows = self._rows(profile, column)
            if len(rows):
                return [Range(int(rows[end]), int(rows[end]), float(len(rows)))]
        if not math.isfinite(profile.loss) and "loss" not in profile.absent:
            return [Range(len(profile) - 1, len(profile) - 1, 0.0)]
        return []

    def at(self, profile: Measured, names: set[str]) -> float:
        return float(sum(len(self._rows(profile, column)) for column in ("state_rms", "gradient_norm")))

    @staticmethod
    def _rows(profile: Measured, column: str) -> np.ndarray:
        if column not in profile.columns:
            raise NotJudged(f"this profile has no column {column}")
        return np.flatnonzero(~profile.is_missing(column) & ~np.isfinite(profile.columns[column]))


@dataclass(frozen=True)
class _Without(Kind):
    """Rows with parameters whose gradient is missing for one reason."""

    reason: str

    def find(self, profile: Measured) -> list[Range]:
        rows, marked = self._marked(profile)
        places = np.flatnonzero(marked)
        if not len(places):
            return []
        ranges = [
            Range(int(rows[a]), int(rows[b]), float(((places >= a) & (places <= b)).sum())) for a, b in _runs(places)
        ]
        return sorted(ranges, key=lambda one: -one.figure)

    def at(self, profile: Measured, names: set[str]) -> float:
        rows, marked = self._marked(profile)
        return float(sum(name in names for name in profile.columns["name"][rows[marked]]))

    def _marked(self, profile: Measured) -> tuple[np.ndarray, np.ndarray]:
        if profile.failure is not None:
            raise NotJudged("the model failed")
        rows = np.flatnonzero(_weighted(profile))
        if not len(rows):
            raise NotJudged("the model has no parameters")
        marked = np.zeros(len(profile), bool)
        marked[profile.reasons_of("weight_gradient_norm").get(self.reason, [])] = True
        return rows, marked[rows]


def _column(name: str) -> Callable:
    return lambda profile: _figures(profile, name)


def _dead(profile: Measured) -> tuple[np.ndarray, np.ndarray]:
    """The shares of dead units, apart from those of activations that saturate on both sides: they are "saturation"."""
    rows, shares = _figures(profile, "dead")
    if "saturated" not in profile.columns:
        return rows, shares
    one_sided = profile.is_missing("saturated")[rows]
    if not one_sided.any():
        raise NotJudged("no row has an activation function with one flat side")
    return rows[one_sided], shares[one_sided]


def shift_ratios(profile: Measured) -> tuple[np.ndarray, np.ndarray]:
    """(rows with parameters, mean over samples by deviation of the outputs there, rms over units).

    Rows of recurrences are left out: their shift is that of the pre-activation, and their rms that of the state. So is
    the last row with parameters: no layer reads it, and the mean of the model's output is its bias's to learn.
    """
    rows, shifts = _figures(profile, "activation_shift")
    if profile.samples < LEAST_SAMPLES:
        raise NotJudged(f"a deviation over samples needs at least {LEAST_SAMPLES} of them")
    rms = profile.columns["state_rms"][rows]
    weighted = _weighted(profile)
    last = np.flatnonzero(weighted)[-1:]
    usable = weighted[rows] & np.isfinite(rms) & profile.is_missing("weight_norm_bound")[rows] & ~np.isin(rows, last)
    if not usable.any():
        raise NotJudged("no row with parameters has an activation shift and a layer after it")
    rows, shifts, rms = rows[usable], shifts[usable], rms[usable]
    # The difference of two squares has no digits left below float32's relative rounding.
    deviations = np.sqrt(np.maximum(rms**2 - shifts**2, (1e-6 * rms) ** 2))
    return rows, np.divide(shifts, deviations, out=np.zeros_like(shifts), where=deviations > 0)


# In this order findings are listed: causes come before their usual consequences. A threshold lies between the healthy
# models and the faults of the first training half of bench/verdict; the figures are those measured there.
KINDS: dict[str, Kind] = {
    # One is too many.
    "non-finite": _NonFinite(
        "NaN or infinity begins",
        0.0,
        "{figure:.0f} rows hold NaN or infinity, and this is the first of them in the order of computation",
    ),
    # Healthy: at most 0.33. Fault: 1.
    "dying": _ByRow(
        "dying units",
        0.5,
        "the activation function of {figure:.0%} of the units is flat for every sample (threshold {threshold:.0%})",
        _dead,
    ),
    # Healthy: at most 0.15. Fault: above 0.9.
    "saturation": _ByRow(
        "saturated activations",
        0.5,
        "{figure:.0%} of the activations are saturated (threshold {threshold:.0%})",
        _column("saturated"),
    ),
    # Healthy, with the loss scaled: below 0.0001. Fault: 0.09 or more.
    "underflow": _ByRow(
        "16-bit underflow",
        0.05,
        "{figure:.0%} of the gradient lies in entries that float16 rounds by up to 6 % or to zero "
        "(threshold {threshold:.0%})",
        _column("underflow"),
    ),
    # Healthy: at most 11, of ReLUs that seldom fire. Fault: 22 or more, but for one case of 8.
    "ill-conditioned": _ByRow(
        "ill-conditioned gradients",
        15.0,
        "in a weight's gradient, the rms of the units' or inputs' sizes is {figure:.2g} times their geometric mean "
        "(threshold {threshold:.2g})",
        _column("gradient_condition"),
    ),
    # Healthy: at most 11. Fault: about 10^6.
    "exploding": _Along(
        "exploding gradient",
        1e3,
        "on its way back through these rows the gradient grows by {figure:.2g} (threshold {threshold:.0e})",
        False,
    ),
    # Healthy: 0.03 or more. Fault: at most 2e-4.
    "vanishing": _Along(
        "vanishing gradient",
        1e-3,
        "on its way back through these rows the gradient shrinks to {figure:.2g} of its size "
        "(threshold {threshold:.0e})",
        True,
    ),
    # Healthy: at most 4.9. Fault: about 40.
    "activation shift": _ByRow(
        "activation shift",
        15.0,
        "the mean over samples is {figure:.2g} times the deviation from it (threshold {threshold:.2g})",
        shift_ratios,
    ),
    # Healthy: at most 0.014. Fault: 0.03 or more in the first faulty layers.
    "learning rate too large": _ByRow(
        "learning rate too large",
        0.025,
        "one step changes the weights by {figure:.2g} of their size (threshold {threshold:.2g})",
        _column("update_ratio"),
    ),
    # Healthy: 7e-6 or more. Fault: at most 2.5e-6 in the first faulty layers.
    "learning rate too small": _ByRow(
        "learning rate too small",
        4e-6,
        "one step changes the weights by {figure:.2g} of their size (threshold {threshold:.0e})",
        _column("update_ratio"),
        True,
    ),
    "frozen": _Without("frozen parameters", 0.0, "{figure:.0f} rows have parameters that require no gradient", FROZEN),
    "unused": _Without(
        "unused parameters", 0.0, "the loss does not depend on the parameters of {figure:.0f} rows", UNREACHED
    ),
}
