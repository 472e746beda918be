"""The rows of experiments that train several methods from several seeds: collected, printed and written as CSV."""

import argparse
import csv
import datetime
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from lcw_ops.bench import runner
from lcw_ops.jobs.progress import progress


@dataclass(frozen=True)
class Row:
    """One line of the CSV. A rate of 0 stands for a net that is not trained."""

    date: str
    commit: str
    torch: str
    experiment: str
    setting: str
    method: str
    learning_rate: float
    seed: int
    measure: str
    figure: float


# The cells of a row from "experiment" on.
Figure = tuple[str, str, str, float, int, str, float]


def collect(title: str, count: int, figures: Iterable[Figure]) -> list[Row]:
    """The rows of ``count`` figures, with a progress bar."""
    # Read it now: it is the commit of the running code, and HEAD may move during the run.
    commit = runner._commit()
    rows = []
    with progress(title, count) as bar:
        for figure in figures:
            date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            rows.append(Row(date, commit, torch.__version__, *figure))
            bar.advance(f"{rows[-1].setting}, {rows[-1].method}, {rows[-1].measure} {rows[-1].figure:.3g}")
    return rows


def table(rows: list[Row]) -> str:
    """The median and the range over the seeds for every setting, measure and method, without the search."""
    of_kind: dict[tuple[str, str, str, float], list[float]] = {}
    for row in rows:
        if not row.measure.startswith("search"):
            of_kind.setdefault((row.setting, row.measure, row.method, row.learning_rate), []).append(row.figure)
    lines = [f"{'setting':<45}{'measure':<33}{'method':<26}{'rate':>7}{'median':>10}  range"]
    for (setting, measure, method, rate), figures in of_kind.items():
        span = f"{min(figures):.3g} to {max(figures):.3g}"
        lines.append(f"{setting:<45}{measure:<33}{method:<26}{rate:>7g}{statistics.median(figures):>10.3g}  {span}")
    return "\n".join(lines)


def write(rows: list[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def positive(text: str) -> int:
    """The type of a command's argument that is a count."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value
