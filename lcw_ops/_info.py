"""What runs where, and why not elsewhere: the text of ``lcw_ops.info()`` and ``lcw-ops info``."""

import importlib.metadata
import platform

import torch

from lcw_ops.ops import _backends


def info() -> str:
    """For every op and device of this machine: the backend that runs, and for each other one why it does not.

    Includes versions, the processor's vector instructions and the GPU. No argument, no side effect.
    """
    lines = [
        _versions(),
        f"CPU: {_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
    ]
    devices = [torch.device("cpu")]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        lines.append(f"GPU {index}: {torch.cuda.get_device_name(index)}, sm_{major}{minor}")
        devices.append(torch.device("cuda", index))
    if len(devices) == 1:
        lines.append("GPU: none")
    if _backends.requested() is not None:
        lines.append(f"Requested for every op: {_backends.requested()}")
    for op in _backends.IMPLEMENTED:
        for device in devices:
            lines.extend(_op_lines(op, device))
    return "\n".join(lines)


def _op_lines(op: str, device: torch.device) -> list[str]:
    try:
        chosen = _backends.choose(op, device)
    except _backends.BackendError as error:
        return [f"{op} on {device}: none. {error}"]
    lines = [f"{op} on {device}: {chosen}{_wider(op, chosen, device)}"]
    for backend in _backends.BACKENDS:
        if backend not in (chosen, "reference"):
            reason = _backends.not_chosen_reason(op, backend, device)
            lines.append(f"  not {backend}: {reason}")
    return lines


def _wider(op: str, chosen: str, device: torch.device) -> str:
    """What runs beyond the width that the chosen backend ends at, if it ends anywhere."""
    limit = _backends.MAX_ROW_BYTES.get((op, chosen))
    if limit is None:
        return ""
    float32, float64 = (limit // dtype.itemsize for dtype in (torch.float32, torch.float64))
    try:
        wider = _backends.choose(op, device, float32 + 1)
    except _backends.BackendError:
        wider = "none"
    return f"; above width {float32} in float32 and {float64} in float64: {wider}"


def _versions() -> str:
    from lcw_ops import __version__

    versions = {"lcw_ops": __version__, "python": platform.python_version()}
    for package in ("torch", "triton", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    return ", ".join(f"{name} {version}" for name, version in versions.items()) + cuda


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
