"""``compare(a, b)``: the rows in which two profiles differ, the row where most begins first.

Rows are matched by their names. Between two rows that match, rows of other names are matched by their relative depth.

A figure has changed if it differs by more than ``tolerance``, relative to the larger of the two. Two columns can be
zero up to rounding (state_mean, activation_shift); they are also compared with 1e-4 of the row's state rms. Shares
(dead, saturated) are compared by their difference. A changed weight changes all states after it and all gradients
before it, so rows are ranked by the step of the change from a neighbouring row, and only then by the change itself.

Times are noisy, and are judged apart from the other figures. The ratio of two times of a row is compared with the
median of all ratios, which is the machine's. A row is slower or faster if its ratio differs from that by a factor of 2,
by 6 standard deviations of the ratios (from their median absolute deviation), and by twice the largest difference in
the other direction, and if the row takes at least 1 % of all rows' time in one of the profiles. The times of whole
passes are shown and not judged.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lcw_ops._checks import describe
from lcw_ops._files import write_atomically
from lcw_ops.profile.headline import SMALLEST, elided
from lcw_ops.profile.result import Profile, format_table, write_rows

# Columns that may be zero up to rounding: they are compared with this share of the row's state rms.
_NEAR_ZERO = ("state_mean", "activation_shift")
_ZERO_SHARE = 1e-4
# Columns that are shares: their difference counts, not their ratio.
_SHARES = ("dead", "saturated")

_TIME_FACTOR = 2.0
_TIME_DEVIATIONS = 6.0
_TIME_OPPOSITE = 2.0
_TIME_SHARE = 0.01
# The standard deviation of a normal distribution by its median absolute deviation.
_NORMAL = 1.4826


class Change(NamedTuple):
    """One figure of a row that differs. Rows are counted from 0; ``change`` is after / before - 1."""

    name: str
    other_name: str
    row: int
    other_row: int
    column: str
    before: float
    after: float
    change: float
    step: float


@dataclass
class Comparison:
    """The result of :func:`compare`.

    Attributes:
        first, second: the two profiles.
        matched: pairs of rows (n, 2), counted from 0.
        changes: for every changed row the figure that changed most, the row where most begins first.
        others: changed figures of a row beside the one in ``changes``, by the row of the first profile.
        times: rows that became slower or faster beyond the noise.
        only_first, only_second: names of rows without a partner.
        availability: column -> (figures that only the first has, that only the second has), in matched rows.
    """

    first: Profile
    second: Profile
    matched: np.ndarray
    changes: list[Change] = field(default_factory=list)
    others: dict[int, list[Change]] = field(default_factory=dict)
    times: list[Change] = field(default_factory=list)
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    availability: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def is_equal(self) -> bool:
        """Whether no figure and no row differs. Times do not count."""
        return not (self.changes or self.only_first or self.only_second or self.availability)

    def table(self, rows: int = 20) -> str:
        """The most important changes, as text for a terminal."""
        title = f"{self.first.name} -> {self.second.name}: "
        changed = f"{len(self.changes):,} of {len(self.matched):,} matched rows differ"
        parts = []
        if self.changes:
            cells = [
                [*_cells(change), f"+{len(self.others[change.row])}" if change.row in self.others else ""]
                for change in self.changes[:rows]
            ]
            header = ["layer", "column", "before", "after", "change", "more"]
            parts.append(format_table(header, cells, title + changed))
        else:
            parts.append(title + ("no difference" if self.is_equal else changed))
        if self.times:
            cells = [
                [
                    _both(change),
                    change.column,
                    f"{change.before:.3g}",
                    f"{change.after:.3g}",
                    f"x{change.change + 1:.2g}",
                ]
                for change in self.times[:rows]
            ]
            parts.append(format_table(["layer", "time", "before", "after", "change"], cells, "Slower or faster"))
        parts.append(format_table(["figure", "value"], self._whole()))
        return "\n\n".join(parts)

    def _whole(self) -> list[list[str]]:
        rows = [["loss", f"{self.first.loss:.6g} -> {self.second.loss:.6g}"]]
        for direction in ("forward", "backward"):
            before, after = (getattr(one.timing, f"{direction}_seconds") for one in (self.first, self.second))
            if math.isfinite(before) and math.isfinite(after):
                rows.append([f"{direction} (not judged)", f"{1e3 * before:.4g} -> {1e3 * after:.4g} ms"])
        peaks = [one.peak_memory_bytes for one in (self.first, self.second)]
        if None not in peaks:
            rows.append(["peak memory", f"{peaks[0] / 1e9:.3f} -> {peaks[1] / 1e9:.3f} GB"])
        for what, profile in (("before", self.first), ("after", self.second)):
            for finding in (profile.failure, profile.not_finite):
                if finding is not None:
                    rows.append([what, finding])
        for names, what in ((self.only_first, "before"), (self.only_second, "after")):
            if names:
                shown = ", ".join(elided(name, 24) for name in names[:3]) + (", ..." if len(names) > 3 else "")
                rows.append([f"rows only {what}", f"{len(names):,}: {shown}"])
        for column, (before, after) in self.availability.items():
            rows.append([column, f"missing in {after:,} rows before, in {before:,} rows after, and not in the other"])
        return rows

    def to_csv(self, path: str | Path) -> None:
        """Write all changes, one figure a line, in the order of ``changes``. Raises OSError if that fails."""
        lines = (
            [each.name, each.other_name, each.row, each.other_row, each.column]
            + [f"{value:.9g}" for value in (each.before, each.after, each.change)]
            for change in self.changes
            for each in (change, *self.others.get(change.row, ()))
        )
        header = ["name", "other_name", "row", "other_row", "column", "before", "after", "change"]
        write_atomically(path, lambda file: write_rows(file, header, [lines]))


def compare(a: Profile, b: Profile, tolerance: float = 0.01) -> Comparison:
    """The rows in which two profiles differ; see the top of this file for what counts and for the order.

    Args:
        a, b: profiles, or :func:`lcw_ops.profile.read` of their files.
        tolerance: relative differences up to this are none.

    Raises:
        TypeError: a or b is not a Profile.
        ValueError: tolerance is not a number of at least 0.
    """
    for name, given in (("a", a), ("b", b)):
        if not isinstance(given, Profile):
            remedy = "Read a file with lcw_ops.profile.read."
            raise TypeError(describe("compare", name, f"is a {type(given).__name__}", "a Profile", remedy))
    if not tolerance >= 0:
        raise ValueError(describe("compare", "tolerance", f"is {tolerance}", "at least 0"))
    matched = match(a.columns["name"], b.columns["name"])
    left, right = matched.T
    result = Comparison(a, b, matched)
    result.only_first = [str(name) for name in np.delete(a.columns["name"], left)]
    result.only_second = [str(name) for name in np.delete(b.columns["name"], right)]
    found: dict[int, list[Change]] = {}
    for column in a.columns:
        if column == "name" or column not in b.columns:
            continue
        before, after = a.columns[column][left], b.columns[column][right]
        gone = a.is_missing(column)[left], b.is_missing(column)[right]
        counts = int((~gone[0] & gone[1]).sum()), int((gone[0] & ~gone[1]).sum())
        if _is_of_time(column):
            result.times += _changes(a, b, matched, column, *_slower(before, after, ~(gone[0] | gone[1])))
            continue
        if any(counts):
            result.availability[column] = counts
        if column.endswith("_error"):
            continue
        known = ~(gone[0] | gone[1])
        difference = _difference(column, before, after, _scale(a, b, left, right))
        difference[~known] = 0
        for change in _changes(
            a, b, matched, column, _steps(column, difference, known), np.abs(difference) > tolerance
        ):
            found.setdefault(change.row, []).append(change)
    _rank(result, found)
    return result


def _rank(result: Comparison, found: dict[int, list[Change]]) -> None:
    def key(change: Change) -> tuple:
        # Two digits: equal steps differ by rounding. The state of a changed row changes, and the gradient of the row
        # before. NaN spreads forward in the states and backward in the gradients.
        is_backward = _is_backward(change.column)
        return -float(f"{change.step:.2g}"), is_backward, -change.row if is_backward else change.row

    for row, changes in found.items():
        changes.sort(key=key)
        result.changes.append(changes[0])
        if changes[1:]:
            result.others[row] = changes[1:]
    result.changes.sort(key=key)
    result.times.sort(key=lambda change: -abs(math.log(change.change + 1)))


def match(names: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Pairs (row, other row), (n, 2), in the order of the rows: see the top of this file."""
    places = {str(name): row for row, name in enumerate(others)}
    pairs = [(row, places[str(name)]) for row, name in enumerate(names) if str(name) in places]
    # Rows of other names lie in the gap after so many matched rows.
    gaps: tuple[dict[int, list[int]], dict[int, list[int]]] = ({}, {})
    for side, length in enumerate((len(names), len(others))):
        taken = {pair[side] for pair in pairs}
        passed = 0
        for row in range(length):
            if row in taken:
                passed += 1
            else:
                gaps[side].setdefault(passed, []).append(row)
    for gap in gaps[0].keys() & gaps[1].keys():
        left, right = gaps[0][gap], gaps[1][gap]
        count = min(len(left), len(right))
        chosen = [[rows[int((k + 0.5) * len(rows) / count)] for k in range(count)] for rows in (left, right)]
        pairs += zip(*chosen, strict=True)
    return np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)


def _is_backward(column: str) -> bool:
    return "grad" in column


def _is_of_time(column: str) -> bool:
    return column.endswith("seconds") or "roofline" in column


def _scale(a: Profile, b: Profile, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The larger state rms of every matched pair."""
    return np.fmax(a.columns["state_rms"][left], b.columns["state_rms"][right])


def _difference(column: str, before: np.ndarray, after: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The signed difference relative to the larger of the two; infinite if only one of them is finite, or NaN."""
    with np.errstate(invalid="ignore", over="ignore"):
        if column in _SHARES:
            difference = after - before
        else:
            largest = np.fmax(np.fmax(np.abs(before), np.abs(after)), SMALLEST)
            if column in _NEAR_ZERO:
                largest = np.fmax(largest, _ZERO_SHARE * scale)
            # A figure of either sign that grows in size has a positive change.
            sign = np.sign(np.where(before == 0, after, before))
            difference = sign * (after - before) / largest
    same = (before == after) | (np.isnan(before) & np.isnan(after))
    lost = ~(np.isfinite(before) & np.isfinite(after))
    return np.where(same, 0.0, np.where(lost, math.inf, difference))


def _steps(column: str, difference: np.ndarray, known: np.ndarray) -> np.ndarray:
    """By how much the change differs from that of a neighbouring row with this figure, at most.

    Nothing has changed before the first row of the forward pass, nor before the first row of the backward pass.
    """
    rows, steps = np.flatnonzero(known), np.zeros(len(difference))
    beside = np.where(np.isinf(difference[rows]), 0, difference[rows])
    padded = np.append(beside, 0) if _is_backward(column) else np.insert(beside, 0, 0)
    jumps = np.abs(np.diff(padded))
    steps[rows] = jumps
    steps[rows[1:]] = np.fmax(steps[rows[1:]], np.abs(np.diff(beside)))
    steps[rows[:-1]] = np.fmax(steps[rows[:-1]], np.abs(np.diff(beside)))
    steps[np.isinf(difference)] = math.inf
    return steps


def _slower(before: np.ndarray, after: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(size of the change, whether it is beyond the noise) of the times of matched rows."""
    usable = known & (before > 0) & (after > 0)
    size = np.zeros(len(before))
    if not usable.any():
        return size, usable
    ratios = np.log(after[usable] / before[usable])
    beyond = ratios - np.median(ratios)
    deviation = _NORMAL * np.median(np.abs(beyond))
    size[usable] = np.abs(beyond)
    share = np.fmax(before / before[usable].sum(), after / after[usable].sum())
    least = max(math.log(_TIME_FACTOR), _TIME_DEVIATIONS * deviation)
    # Noise goes both ways: the largest ratio in one direction is a measure of it in the other.
    judged = share[usable] > _TIME_SHARE
    opposite = np.array([(sign * beyond[judged]).max(initial=0) for sign in (-1, 1)])
    limits = np.fmax(least, _TIME_OPPOSITE * np.where(beyond > 0, opposite[0], opposite[1]))
    found = np.zeros(len(before), bool)
    found[usable] = judged & (np.abs(beyond) > limits)
    return size, found


def _changes(
    a: Profile, b: Profile, matched: np.ndarray, column: str, steps: np.ndarray, where: np.ndarray
) -> list[Change]:
    made = []
    for pair in np.flatnonzero(where):
        row, other = map(int, matched[pair])
        before, after = float(a.columns[column][row]), float(b.columns[column][other])
        relative = after / before - 1 if before else math.inf if after else 0.0
        names = str(a.columns["name"][row]), str(b.columns["name"][other])
        made.append(Change(*names, row, other, column, before, after, relative, float(steps[pair])))
    return made


def _cells(change: Change) -> list[str]:
    return [_both(change), change.column, f"{change.before:.4g}", f"{change.after:.4g}", _in_words(change)]


def _both(change: Change) -> str:
    name = elided(change.name, 26)
    return name if change.name == change.other_name else f"{name} -> {elided(change.other_name, 26)}"


def _in_words(change: Change) -> str:
    if not math.isfinite(change.change):
        return "from 0" if change.before == 0 else "not finite"
    return f"{change.change:+.1%}" if abs(change.change) < 10 else f"x{change.change + 1:.3g}"
