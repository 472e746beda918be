"""The machine and its limits: measured matmul rate, clocks that wait for the GPU, peak memory.

A share of a data sheet's peak says little about a shared or throttled machine. The yardstick for the rates of profiler
and benchmarks is therefore a float32 matmul, measured on this machine with the threads in use.
"""

import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from lcw_ops.ops.verdicts import cpu_name

# Large enough to be bound by arithmetic (48 MiB of operands on a CPU, 768 MiB on a GPU), and small enough to take only
# a quarter of a second on two CPU cores.
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}


def synchronise(device: torch.device) -> None:
    """Wait until everything that was launched on ``device`` is done. Returns at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device) -> float:
    """Seconds on a monotonic clock, once the device is idle."""
    synchronise(device)
    return time.perf_counter()


@torch.no_grad()
def matmul_rate(device: torch.device | str = "cpu", size: int | None = None, repeats: int = 5) -> float:
    """FLOP/s of the fastest float32 product of two size x size matrices, with torch's own threads: best of ``repeats``.

    On a CPU both torch.mm and oneDNN are tried: on some processors one is several times as fast as the other. ``size``
    defaults to ``MATMUL_SIZE``.
    """
    device = torch.device(device)
    size = size or MATMUL_SIZE.get(device.type, 2048)
    left, right = torch.randn(2, size, size, device=device).unbind()

    def seconds(product: Callable[[Tensor, Tensor], Tensor]) -> float:
        start = now(device)
        product(left, right)
        return now(device) - start

    products = _products(device)
    for product in products:
        product(left, right)
    fastest = min(products, key=seconds)
    return 2 * size**3 / min(seconds(fastest) for _ in range(repeats))


def _products(device: torch.device) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """The matrix products that torch has on this device: left @ right, or left @ right.T, which is as much work."""
    products = [torch.mm]
    # torch.mm calls MKL if torch has it, and MKL is slow on AVX-512 processors that are not Intel's.
    if device.type == "cpu" and torch.backends.mkldnn.is_available():

        def through_onednn(left: Tensor, right: Tensor) -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")

        # The op is not part of torch's public interface: it may be absent, or built for other processors.
        with suppress(AttributeError, RuntimeError, TypeError):
            through_onednn(torch.ones(8, 8), torch.ones(8, 8))
            products.append(through_onednn)
    return products


# The most memory that was held before the system's own record was reset, by the type of device.
_earlier_peaks: dict[str, int] = {}


def peak_memory_bytes(device: torch.device | str = "cpu") -> int | None:
    """The most memory held so far: by torch on a GPU, by the whole process elsewhere. None if it is not known."""
    device = torch.device(device)
    now = _recorded_peak(device)
    return None if now is None else max(now, _earlier_peaks.get(device.type, 0))


def _recorded_peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    # Kibibytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak_memory(device: torch.device | str = "cpu") -> bool:
    """Let the record of the peak begin now. False if the system cannot do that, as on macOS.

    It is the process's only record: ``getrusage`` and ``torch.cuda.max_memory_allocated`` begin again as well.
    :func:`peak_memory_bytes` remembers what they said.
    """
    device = torch.device(device)
    _earlier_peaks[device.type] = peak_memory_bytes(device) or 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        # Linux's proc_pid_clear_refs(5): 5 sets the peak to the memory that is held now.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory_of(run: Callable[[], object], device: torch.device) -> int | str:
    """The most memory held while ``run()`` runs: by the whole process, or by torch on a GPU. Else why it is unknown."""
    is_new = forget_peak_memory(device)
    run()
    peak = _recorded_peak(device)
    if peak is None:
        return "this system keeps no record of the process's memory"
    if not is_new and peak <= _earlier_peaks[device.type]:
        return "it is below the process's earlier peak, which this system does not forget"
    return peak


def available_memory_bytes(device: torch.device | str = "cpu") -> int | None:
    """The memory that can still be allocated: on the GPU, or of the machine or container. None if it is not known."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    amounts = []
    with suppress(OSError, StopIteration, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        amounts.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    # A container's limit (cgroup v2). "max", which is not an int, means unlimited.
    with suppress(OSError, ValueError):
        folder = Path("/sys/fs/cgroup")
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        amounts.append(limit - used)
    return min(amounts, default=None)


def describe(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """The hardware and versions that measurements depend on."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": device.type,
        "device_name": name,
        "cpu_count": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }
