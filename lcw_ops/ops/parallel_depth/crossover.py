"""Where the parallel solver of the recurrence is the faster one: regions that were measured, for ``solver="auto"``.

``lcw-ops bench parallel_depth`` measures forward + backward of both solvers; its rows lie under bench/results/.
"""

from typing import NamedTuple

import torch


class Call(NamedTuple):
    """What the times depend on, beside c = beta times the number of layers."""

    device: str
    permutes: bool
    shares_weight: bool
    layers: int
    rows: int
    width: int


class Region(NamedTuple):
    """Calls between the smallest and the largest measured size at which the parallel solver won, ends included."""

    device: str
    permutes: bool
    shares_weight: bool
    layers: tuple[int, int]
    rows: tuple[int, int]
    width: tuple[int, int]
    largest_c: float

    def holds(self, call: Call) -> bool:
        sizes = ((self.layers, call.layers), (self.rows, call.rows), (self.width, call.width))
        return call[:3] == self[:3] and all(least <= size <= most for (least, most), size in sizes)


MEASURED: tuple[Region, ...] = ()


def device_key(device: torch.device) -> str:
    """A kind of machine: "sm_90", or "cpu AVX2, 2 threads"."""
    if device.type == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


# While torch.compile traces, a constant: what torch.compiler.assume_constant_result does, which imports the compiler.
device_key._dynamo_marked_constant = True


def largest_c_faster(call: Call) -> float | None:
    """Up to which c the parallel solver was found faster; None where it was not."""
    found = [region.largest_c for region in MEASURED if region.holds(call)]
    return max(found) if found else None
