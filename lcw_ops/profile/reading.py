"""Profiles from the files that ``Profile.to_json`` and ``Profile.to_csv`` wrote.

Keys and columns that this version does not know are left out or kept as columns. A file of a newer schema is refused.
"""

import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from lcw_ops._checks import describe
from lcw_ops.profile.jacobian import JacobianSpectrum
from lcw_ops.profile.result import COLUMNS, SCHEMA_VERSION, Profile, Solves, Timing
from lcw_ops.profile.verdict import KINDS, Finding, Outcome, Verdict

_NO_COLUMN = "the file does not have this column"
_EMPTY_CELL = "the cell is empty in the file"


def read(path: str | Path) -> Profile:
    """The profile in a file of ``Profile.to_json`` or, if its name ends in .csv, of ``Profile.to_csv``.

    CSV has the columns only: the loss and the times are NaN, and the reasons are unknown.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a profile, or has a newer schema.
    """
    path = Path(path)
    return _read_csv(path) if path.suffix.lower() == ".csv" else _read_json(path)


def _read_json(path: Path) -> Profile:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _refused(path, f"is not JSON ({error})") from error
    if not isinstance(content, dict) or "name" not in content.get("columns", ()):
        raise _refused(path, "has no columns with names of rows")
    if "name" not in content or not isinstance(content["columns"]["name"], list):
        # The file report.json of lcw-ops profile describes its columns under the same key.
        raise _refused(path, "is a report of several networks, without their rows", "Read its layers.csv.")
    if (version := content.get("schema_version", 0)) > SCHEMA_VERSION:
        raise _refused(path, f"has schema {version}", f"Read it with a newer lcw_ops: this one knows {SCHEMA_VERSION}.")
    columns = {
        name: np.array(values, object if name == "name" else np.float64) if name == "name" else _numbers(values)
        for name, values in content["columns"].items()
    }
    columns["name"] = np.array([str(name) for name in columns["name"]])
    rows = len(columns["name"])
    for name in COLUMNS:
        # An older version did not have it yet. Everything else reads these columns without asking.
        columns.setdefault(name, np.full(rows, math.nan))
    missing, reasons = _missing(content, columns)
    timing = {"matmul_rate": math.nan, **_fields(Timing, content.get("timing", {}))}
    return Profile(
        name=str(content["name"]),
        loss=float(content.get("loss", math.nan)),
        samples=content.get("samples", 0),
        columns=columns,
        jacobians=_of_kind(JacobianSpectrum, content.get("jacobians", {})),
        timing=Timing(**{**_no_times(rows), **timing}),
        peak_memory_bytes=content.get("peak_memory_bytes"),
        backend=content.get("backend", ""),
        machine=content.get("machine", {}),
        solves=_of_kind(Solves, content.get("solves", {})),
        missing=missing,
        reasons=reasons,
        absent=content.get("absent", {}),
        failure=content.get("failure"),
        not_finite=content.get("not_finite"),
        modules=_modules(content.get("modules", {}), rows),
        tried=_tried(content.get("verdict", {}), rows),
    )


def _modules(lists: dict[str, list], rows: int) -> list[tuple[str, str]]:
    """Path and class of every row's module; [] if the file is older than this key."""
    modules = list(zip(lists.get("path", []), lists.get("class", []), strict=False))
    return modules if len(modules) == rows else []


def _tried(verdict: dict, rows: int) -> Verdict | None:
    """The verdict with its outcomes, which no column tells; None if no change was tried."""
    found = [one for one in verdict.get("findings", []) if one.get("kind") in KINDS]
    if not any(one.get("outcome") for one in found):
        return None
    findings = [
        Finding(**{**_fields(Finding, one), "outcome": Outcome(**_fields(Outcome, outcome)) if outcome else None})
        for one in found
        for outcome in [one.get("outcome")]
    ]
    judged = [kind for kind in verdict.get("judged", []) if kind in KINDS]
    not_judged = {kind: reason for kind, reason in verdict.get("not_judged", {}).items() if kind in KINDS}
    return Verdict(findings, judged, not_judged, rows, verdict.get("failure"))


def _numbers(values: list) -> np.ndarray:
    # float() reads the strings "inf", "-inf" and "nan".
    return np.array([float(value) for value in values], np.float64)


def _missing(content: dict, columns: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    if "missing" not in content and "schema_version" not in content:
        # An older file has no reasons: every NaN is a missing figure.
        return {}, []
    rows, reasons = len(columns["name"]), list[str]()
    missing = {name: np.zeros(rows, np.uint16) for name in columns if name != "name"}
    every_row = {_NO_COLUMN: [[0, rows - 1]]}
    absent = {name: every_row for name in columns if name not in content["columns"]}
    for column, by_reason in {**content.get("missing", {}), **absent}.items():
        for reason, ranges in by_reason.items():
            if column not in missing:
                continue
            if reason not in reasons:
                reasons.append(reason)
            for first, last in ranges:
                missing[column][first : last + 1] = reasons.index(reason) + 1
    return missing, reasons


def _fields(kind: type, figures: dict) -> dict:
    """The entries that the dataclass has; strings of numbers as numbers, lists as tuples."""
    return {
        field.name: _value(figures[field.name], field.type)
        for field in dataclasses.fields(kind)
        if field.name in figures
    }


def _value(value, kind):
    if isinstance(value, list):
        return tuple(value)
    if kind is str:
        # A module may be called "nan".
        return value
    return float(value) if value in ("inf", "-inf", "nan") else value


def _of_kind(kind: type, by_name: dict) -> dict:
    return {name: kind(**_fields(kind, figures)) for name, figures in by_name.items()}


def _no_times(rows: int) -> dict:
    figures = ("forward_seconds", "backward_seconds", "forward_flops", "backward_flops")
    return {"repeats": 0, "layers": rows, **dict.fromkeys(figures, math.nan)}


def _read_csv(path: Path) -> Profile:
    with open(path, newline="", encoding="utf-8") as file:
        header, *lines = [*csv.reader(line for line in file if not line.startswith("#"))] or [[]]
    if "name" not in header:
        raise _refused(path, "has no column name")
    if any(len(line) != len(header) for line in lines):
        raise _refused(path, "has lines with more or fewer cells than the header")
    cells = dict(zip(header, zip(*lines, strict=True), strict=True)) if lines else dict.fromkeys(header, ())
    names = [*cells.pop("name")]
    if "kind" in cells:
        # layers.csv of lcw-ops profile has the rows of several networks.
        names = [f"{kind}: {name}" for kind, name in zip(cells.pop("kind"), names, strict=True)]
    columns = {"name": np.array(names, dtype=str)}
    for name, column in cells.items():
        try:
            columns[name] = np.array([float(cell or "nan") for cell in column], np.float64)
        except ValueError as error:
            raise _refused(path, f"has a cell that is not a number in the column {name} ({error})") from error
    for name in COLUMNS:
        columns.setdefault(name, np.full(len(names), math.nan))
    missing = {
        name: np.array([not cell for cell in cells.get(name, [""] * len(names))], np.uint16)
        for name in columns
        if name != "name"
    }
    return Profile(
        name=path.stem,
        loss=math.nan,
        samples=0,
        columns=columns,
        jacobians={},
        timing=Timing(**_no_times(len(names))),
        peak_memory_bytes=None,
        backend="",
        machine={},
        missing=missing,
        reasons=[_EMPTY_CELL],
    )


def _refused(path: Path, came: str, remedy: str = "") -> ValueError:
    return ValueError(describe("read", f"the file {str(path)!r}", came, "a profile by to_json or to_csv", remedy))
