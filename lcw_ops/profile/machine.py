"""What the machine is and what it can do: its measured matmul rate, clocks that wait for the GPU, peak memory.

A share of a data sheet's peak says little about a shared or throttled machine, so the rate of a plain float32 matmul,
measured here and now with the threads in use, is what the recurrence is compared with.
"""

import os
import platform
import sys
import time
from pathlib import Path

import torch

# Large enough to be bound by arithmetic everywhere (48 MiB of operands), small enough to take a quarter of a second
# on two CPU cores.
MATMUL_SIZE = 2048


def synchronise(device: torch.device) -> None:
    """Wait until everything that was launched on ``device`` is done; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device) -> float:
    """Seconds on a monotonic clock, once the device is idle."""
    synchronise(device)
    return time.perf_counter()


@torch.no_grad()
def matmul_rate(device: torch.device | str = "cpu", size: int = MATMUL_SIZE, repeats: int = 4) -> float:
    """FLOP/s of a float32 matmul of size^3 on this machine, with torch's own threads: the best of ``repeats``."""
    device = torch.device(device)
    left, right = torch.randn(2, size, size, device=device).unbind()
    result = left @ right
    seconds = []
    for _ in range(repeats):
        start = now(device)
        torch.mm(left, right, out=result)
        seconds.append(now(device) - start)
    return 2 * size**3 / min(seconds)


def peak_memory_bytes(device: torch.device | str = "cpu") -> int | None:
    """The most memory held so far: by torch on a GPU, by the whole process elsewhere. None where it is not known."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    # Kibibytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """The hardware and versions that figures depend on."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
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


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
