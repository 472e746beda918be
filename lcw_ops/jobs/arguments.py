"""Checks of device and memory before a network is trained. They need torch, and their messages name the flag."""

import torch

from lcw_ops._checks import describe_argument
from lcw_ops.jobs.settings import TrainingSettings
from lcw_ops.profile import machine


def usable_device(name: str) -> torch.device:
    """The device of that name; ValueError if it cannot compute."""
    try:
        device = torch.device(name)
        # Copy a value there and back: a meta tensor has no values to train with.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        came = f"is {name}, which cannot be used ({str(error).splitlines()[0]})"
        raise ValueError(describe_argument("--device", came, "a device that torch computes on")) from error
    return device


def filter_bytes(filter: str, width: int) -> int:
    """The bytes needed to make a filter: random numbers, two QR factors and a matrix in float64; or int64 indices."""
    return 4 * 8 * width**2 if filter == "haar" else 8 * width


def check_memory(settings: TrainingSettings, network: int, filter: int, device: torch.device) -> None:
    """Raise ValueError for a network that cannot fit, before the machine swaps or kills the process.

    network: bytes of weights, gradients and Adam's two moments, on ``device``. filter: bytes needed to make the filter.
    """
    # The network is made on the CPU, where it has only its weights (a quarter of the bytes), then moved to the device.
    on_cpu = max(filter, network if device.type == "cpu" else network // 4)
    for place, needed in (("cpu", on_cpu), (device, network)):
        available = machine.available_memory_bytes(place)
        if available is not None and needed > available:
            need = f"need at least {needed / 1e9:,.1f} GB of memory on {place}"
            came = f"are {settings.depth} and {settings.width}, which {need}"
            expected = f"at most the {available / 1e9:,.1f} GB that are available"
            remedy = "Make the network smaller."
            raise ValueError(describe_argument("--depth and --width", came, expected, remedy))
