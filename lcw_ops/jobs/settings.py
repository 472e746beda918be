"""The settings of the commands that train, with the checks that do not need torch; their messages name the flag.

The command line's help is generated from these classes and their defaults.
"""

import math
import os
from dataclasses import dataclass

from lcw_ops.jobs.schedule import SCHEDULES

# More threads than this per processor only wait for each other. torch would start millions on request.
THREADS_PER_CPU = 4

# The nets that `lcw-ops profile` can train.
PROFILE_KINDS = ("orthogonal-filter", "residual", "plain")

# The defaults of `lcw-ops train` by kind, for settings that are None. They are the best of a grid. Every run with them
# reached a test accuracy of 95 % on the digits. "mlp" ran at 300 layers, on 4 splits of the data with 4 seeds each:
# 95.8 % at worst, 96.8 % on average. "rnn" ran over the 64 time steps of an image, on 2 splits with 3 seeds each:
# 96.4 % at worst, 97.3 % on average.
DEFAULTS = {
    "mlp": {"depth": 50_000, "width": 32, "steps": 50, "lr": 0.04, "c": 1.0, "filter": "permutation"},
    # Depth None: one time step per feature of a sample.
    "rnn": {"depth": None, "width": 64, "steps": 150, "lr": 0.06, "c": 2.0, "filter": "haar"},
}
TRAIN_KINDS = tuple(DEFAULTS)


def expect(holds: bool, name: str, value, expected: str) -> None:
    """Raise a ValueError that names the flag, unless ``holds``."""
    if not holds:
        raise ValueError(_describe(f"--{name}", f"is {value}", expected))


def _describe(argument: str, came: str, expected: str) -> str:
    # This module imports torch, which the help of the command must not need.
    from lcw_ops._checks import describe_argument

    return describe_argument(argument, came, expected)


def expect_at_least(least: int, name: str, value: int | None) -> None:
    expect(value is None or value >= least, name, value, f"at least {least}")


@dataclass
class TrainingSettings:
    """The settings that all training commands share; each command has its own defaults.

    depth, width: the network's size. batch: samples per step. steps: training steps. lr: Adam's rate for the first half
    of the steps; it then falls linearly to 0. filter: the fixed matrix of an orthogonal-filter net. threads: torch's
    number of threads; None leaves it as it is.
    """

    depth: int | None = 50_000
    width: int = 64
    batch: int = 64
    steps: int | None = 30
    data: str = "digits"
    filter: str | None = "haar"
    activation: str = "tanh"
    seed: int = 0
    device: str = "cpu"
    lr: float | None = 0.02
    threads: int | None = None

    def check(self) -> None:
        """Raise ValueError for a value that no run can have. Filter and activation are checked where they are used.

        None passes, because it stands for a default that is not known yet.
        """
        for name in ("depth", "width", "batch"):
            expect_at_least(1, name, getattr(self, name))
        expect_at_least(0, "steps", self.steps)
        expect(
            bool(self.data.strip()),
            "data",
            repr(self.data),
            "digits, mnist5k, or the path of an .npz file or of a folder",
        )
        expect(self.lr is None or (math.isfinite(self.lr) and self.lr > 0), "lr", self.lr, "a finite number above 0")
        most = THREADS_PER_CPU * (os.cpu_count() or 1)
        expect(self.threads is None or 1 <= self.threads <= most, "threads", self.threads, f"from 1 to {most}")
        expect(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2^63 - 1")


@dataclass
class ProfileSettings(TrainingSettings):
    """The settings of ``lcw-ops profile``; the defaults are the command's.

    kind: the net that is trained, one of ``PROFILE_KINDS``. out: folder of the report. lr: its default is the best of a
    grid at 30 steps, measured at 300 layers. solver, tolerance, window: options of the orthogonal-filter net's
    recurrence. The other nets do not take them: their layers change the state so much that the parallel solver would
    not converge.
    """

    kind: str = "orthogonal-filter"
    out: str = "lcw-profile"
    solver: str = "sequential"
    tolerance: float | None = None
    window: int | None = None

    def check(self) -> None:
        # This module imports torch, which the help of the command must not need.
        from lcw_ops._checks import check_solver

        super().check()
        expect(self.kind in PROFILE_KINDS, "kind", self.kind, f"one of {', '.join(PROFILE_KINDS)}")
        check_solver("--solver", self.solver, self.tolerance, self.window)


@dataclass
class ModelSettings:
    """The settings of ``lcw-ops profile --model``; each name is "package.module:attribute".

    model: a module, or a function that makes one. inputs: the inputs of ``profile``, or a function that makes them.
    targets: the same for the targets. loss: a function of (output, targets) or of (output). optimizer: a function that
    makes an optimizer of the model's parameters, such as torch.optim:AdamW. The model and the tensors move to device.
    """

    model: str | None = None
    inputs: str | None = None
    targets: str | None = None
    loss: str | None = None
    optimizer: str | None = None
    out: str = "lcw-profile"
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None

    def check(self) -> None:
        for name in ("model", "inputs"):
            if getattr(self, name) is None:
                raise ValueError(_describe(f"--{name}", "is not given", "package.module:attribute"))
        for name in ("model", "inputs", "targets", "loss", "optimizer"):
            value = getattr(self, name)
            module, _, attribute = (value or "a:b").partition(":")
            expect(bool(module and attribute), name, repr(value), "package.module:attribute")
        expect(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2^63 - 1")
        most = THREADS_PER_CPU * (os.cpu_count() or 1)
        expect(self.threads is None or 1 <= self.threads <= most, "threads", self.threads, f"from 1 to {most}")


@dataclass
class TrainSettings(TrainingSettings):
    """The settings of ``lcw-ops train``, with the command's defaults. None stands for the kind's value in ``DEFAULTS``.

    depth: number of layers, or of time steps. epochs: passes over the data, instead of steps. schedule: name of the
    rate's schedule. c: beta = c / depth. checkpoint: folder for a checkpoint after every ``every`` steps; with resume
    the run continues from the newest one. out: folder for metrics.csv and model.pt.
    """

    kind: str = "mlp"
    depth: int | None = None
    width: int | None = None
    steps: int | None = None
    epochs: int | None = None
    lr: float | None = None
    schedule: str = "falling"
    c: float | None = None
    filter: str | None = None
    checkpoint: str | None = None
    every: int = 10
    resume: bool = False
    out: str | None = None

    def check(self) -> None:
        super().check()
        expect(self.kind in TRAIN_KINDS, "kind", self.kind, f"one of {', '.join(TRAIN_KINDS)}")
        expect(self.schedule in SCHEDULES, "schedule", self.schedule, f"one of {', '.join(SCHEDULES)}")
        for name in ("steps", "epochs", "every"):
            expect_at_least(1, name, getattr(self, name))
        expect(self.c is None or (math.isfinite(self.c) and self.c > 0), "c", self.c, "a finite number above 0")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(_describe("--steps and --epochs", "are both given", "one of them"))
        for name in ("checkpoint", "out"):
            expect(getattr(self, name) != "", name, "empty", "a folder")
        if self.resume and self.checkpoint is None:
            raise ValueError(_describe("--checkpoint", "is not given", "the folder that --resume continues from"))
