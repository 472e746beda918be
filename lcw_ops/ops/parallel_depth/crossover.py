"""The measured regions in which the recurrence's parallel solver is the faster one, for ``solver="auto"``.

``lcw-ops bench parallel_depth`` measures forward + backward of both solvers. Its rows are under bench/results/.
"""

from typing import NamedTuple

import torch

from lcw_ops._torch import constant_when_traced


class Call(NamedTuple):
    """The properties on which the two solvers' times depend, besides c = beta times the number of layers."""

    device: str
    permutes: bool
    shares_weight: bool
    layers: int
    rows: int
    width: int


class Region(NamedTuple):
    """Calls for which the parallel solver was measured to be faster. Sizes are (smallest, largest), both included."""

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


@constant_when_traced
def device_key(device: torch.device) -> str:
    """The kind of machine: "sm_90", or "cpu AVX2, 2 threads"."""
    if device.type == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def largest_c_faster(call: Call) -> float | None:
    """The largest c at which the parallel solver was faster in measurements. None if it was never faster."""
    found = [region.largest_c for region in MEASURED if region.holds(call)]
    return max(found) if found else None
