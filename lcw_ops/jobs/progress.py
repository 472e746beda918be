"""Progress of a run: rich's bar on a terminal, else a plain line now and then.

A log file, a pipe or a machine without rich gets plain lines: complete, and few enough to read.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

# The most lines that a run prints without a terminal, including the first and the last step.
PLAIN_LINES = 10


class PlainProgress:
    """``advance(text)`` once per step; about every tenth is printed."""

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
