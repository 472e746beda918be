"""Progress of a run: rich's bar on a terminal, else a plain line now and then. Both tell the time that is left.

A log file, a pipe or a machine without rich gets plain lines: complete, and few enough to read.
"""

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# About as many lines as a run prints without a terminal, the first and the last step included. A step also gets a line
# if none was printed for QUIET_SECONDS.
PLAIN_LINES = 10
QUIET_SECONDS = 30.0

# A part that begins gets a line if it is expected to take longer than this.
LONG_SECONDS = 2.0

# The last parts, from which the time left is estimated. The median of so many is not moved by a slow first step.
LAST = 9


class Estimate:
    """The time left of a run whose work is known in advance.

    ``work`` is the whole run's, in any unit: if all steps take equally long, their number. The seconds that a unit of
    work takes are the median of the last parts.
    """

    def __init__(self, work: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.left, self.clock = work, clock
        self.began = clock()
        self.seconds_per_work: deque[float] = deque(maxlen=LAST)

    def done(self, work: float = 1.0) -> None:
        """A part with so much work has just ended. It began when the one before ended."""
        now = self.clock()
        self.seconds_per_work.append((now - self.began) / work)
        self.began, self.left = now, max(0.0, self.left - work)

    def seconds(self, work: float | None = None) -> float | None:
        """The seconds that so much work takes; by default all that is left. None before the first part has ended."""
        if not self.seconds_per_work:
            return None
        return statistics.median(self.seconds_per_work) * (self.left if work is None else work)

    def __str__(self) -> str:
        seconds = self.seconds()
        # Work that is done, up to rounding.
        if seconds is None or self.left < 1e-9:
            return ""
        return f"  about {in_words(seconds)} left"


def in_words(seconds: float) -> str:
    """A length of time, short."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


class PlainProgress:
    """Call ``advance(text)`` once per step. About PLAIN_LINES of the steps are printed.

    ``estimate`` is that of the whole run, of which this task may be a part.
    """

    def __init__(self, title: str, steps: int, estimate: Estimate | None = None) -> None:
        self.title, self.steps, self.done = title, steps, 0
        self.estimate = Estimate(steps) if estimate is None else estimate
        self.printed = self.estimate.clock()

    def begin(self, text: str, work: float = 1.0) -> None:
        """The next part of a step begins."""
        seconds = self.estimate.seconds(work)
        if seconds is None or seconds > LONG_SECONDS:
            self._print(min(self.done + 1, self.steps), text)

    def part_done(self, work: float) -> None:
        """A part of a step, or some work between two steps, has ended."""
        self.estimate.done(work)

    def advance(self, text: str, work: float = 1.0) -> None:
        """A step has ended, of which ``work`` was not yet counted by ``part_done``."""
        self.done += 1
        if work:
            self.estimate.done(work)
        every = -(-self.steps // PLAIN_LINES)
        is_late = self.estimate.clock() - self.printed >= QUIET_SECONDS
        if self.done in (1, self.steps) or self.done % every == 0 or is_late:
            self._print(self.done, text)

    def _print(self, step: int, text: str) -> None:
        self.printed = self.estimate.clock()
        print(f"{self.title} {step}/{self.steps}  {text}{self.estimate}", flush=True)


class _RichProgress:
    def __init__(self, bar, title: str, steps: int, estimate: Estimate) -> None:
        self.bar, self.estimate = bar, estimate
        self.task = bar.add_task(title, total=steps, text="")

    def begin(self, text: str, work: float = 1.0) -> None:
        self.bar.update(self.task, text=f"{text}{self.estimate}")

    def part_done(self, work: float) -> None:
        self.estimate.done(work)

    def advance(self, text: str, work: float = 1.0) -> None:
        if work:
            self.estimate.done(work)
        self.bar.update(self.task, advance=1, text=f"{text}{self.estimate}")


@contextmanager
def progress(title: str, steps: int, estimate: Estimate | None = None) -> Iterator:
    """An object with the methods of :class:`PlainProgress`, for a task of ``steps`` steps."""
    if estimate is None:
        estimate = Estimate(steps)
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield PlainProgress(title, steps, estimate)
        return
    if not sys.stdout.isatty():
        yield PlainProgress(title, steps, estimate)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns) as bar:
        yield _RichProgress(bar, title, steps, estimate)
