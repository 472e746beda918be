"""What the commands that train ask for, and the checks of it before any work; messages name the flag."""

import math
import os
from dataclasses import dataclass

import torch

from lcw_ops.profile import machine

# More threads than this per processor only wait for each other; torch would start millions if it was asked to.
THREADS_PER_CPU = 4


@dataclass
class TrainingSettings:
    """What every command that trains asks for; the defaults are the command's.

    depth, width: of the network. batch: samples per step. steps: of training. lr: Adam's, for the first half of the
    steps, then linearly to 0. filter: of an orthogonal-filter net. threads: torch's; None leaves them as they are.
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
        """ValueError for a value that no run can have; filter and activation are checked where they are used.

        None passes: it stands for a default that is not known yet.
        """
        for name in ("depth", "width", "batch"):
            expect_at_least(1, name, getattr(self, name))
        expect_at_least(0, "steps", self.steps)
        expect(self.lr is None or (math.isfinite(self.lr) and self.lr > 0), "lr", self.lr, "a finite number above 0")
        most = THREADS_PER_CPU * (os.cpu_count() or 1)
        expect(self.threads is None or 1 <= self.threads <= most, "threads", self.threads, f"from 1 to {most}")
        expect(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2^63 - 1")


def expect(holds: bool, name: str, value, expected: str) -> None:
    """ValueError, naming the flag, unless it holds."""
    if not holds:
        raise ValueError(f"--{name} is {value}, expected {expected}")


def expect_at_least(least: int, name: str, value: int | None) -> None:
    expect(value is None or value >= least, name, value, f"at least {least}")


def usable_device(name: str) -> torch.device:
    """The device of that name; ValueError when nothing can be computed on it."""
    try:
        device = torch.device(name)
        # There and back: a meta tensor has no values to train with.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def filter_bytes(filter: str, width: int) -> int:
    """What making it holds: random numbers, their QR factors and the matrix, in float64; or a permutation."""
    return 4 * 8 * width**2 if filter == "haar" else 8 * width


def check_memory(settings: TrainingSettings, network: int, filter: int, device: torch.device) -> None:
    """ValueError for a network that cannot fit, before the machine swaps or kills the process.

    network: bytes of weights, gradients and Adam's two moments, on ``device``. filter: bytes of making it.
    """
    # The network is made on the CPU before it moves.
    on_cpu = max(filter, network if device.type == "cpu" else network // 4)
    for place, needed in (("cpu", on_cpu), (device, network)):
        available = machine.available_memory_bytes(place)
        if available is not None and needed > available:
            raise ValueError(
                f"--depth {settings.depth} and --width {settings.width} need at least {needed / 1e9:,.1f} GB of memory "
                f"on {place}, {available / 1e9:,.1f} GB are there; make the network smaller"
            )
