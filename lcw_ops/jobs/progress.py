"""Progress of a run: rich's bar on a terminal, else a plain line now and then.

A log file, a pipe or a machine without rich gets plain lines: complete, and few enough to read.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

# About as many lines as a run prints without a terminal, the first and the last step included.
PLAIN_LINES = 10


class PlainProgress:
    """Call ``advance(text)`` once per step. About PLAIN_LINES of the steps are printed."""

    def __init__(self, title: str, steps: int) -> None:
        self.title, self.steps, self.done = title, steps, 0

    def advance(self, text: str) -> None:
        self.done += 1
        every = -(-self.steps // PLAIN_LINES)
        if self.done in (1, self.steps) or self.done % every == 0:
            print(f"{self.title} {self.done}/{self.steps}  {text}", flush=True)


class _RichProgress:
    def __init__(self, bar, title: str, steps: int) -> None:
        self.bar = bar
        self.task = bar.add_task(title, total=steps, text="")

    def advance(self, text: str) -> None:
        self.bar.update(self.task, advance=1, text=text)


@contextmanager
def progress(title: str, steps: int) -> Iterator:
    """An object with ``advance(text)``, for a task of ``steps`` steps."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield PlainProgress(title, steps)
        return
    if not sys.stdout.isatty():
        yield PlainProgress(title, steps)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns) as bar:
        yield _RichProgress(bar, title, steps)
