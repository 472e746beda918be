"""What runs where, and why not elsewhere: the text of ``lcw_ops.info()`` and ``lcw-ops info``."""

import importlib.metadata
import platform

import torch

from lcw_ops.ops import _backends, orthogonal_filter
from lcw_ops.ops.orthogonal_filter_crossover import get_table


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
        chosen = _choose(op, device, 1)
    except _backends.BackendError as error:
        return [f"{op} on {device}: none{_wider(op, 'none', device)}. {error}"]
    lines = [f"{op} on {device}: {chosen}{_wider(op, chosen, device)}"]
    for backend in _backends.BACKENDS:
        if backend not in (chosen, "reference"):
            reason = _backends.not_chosen_reason(op, backend, device, chosen)
            lines.append(f"  not {backend}: {reason}")
    return lines


def _choose(op: str, device: torch.device, width: int) -> str:
    """As the public function of the op chooses, in float32."""
    if op == orthogonal_filter.NAME:
        return orthogonal_filter.choose_kernel(device, width, torch.float32.itemsize)
    return _backends.choose(op, device, width, torch.float32.itemsize)


def _wider(op: str, narrowest: str, device: torch.device) -> str:
    """What runs instead of the kernel for the narrowest rows, beyond each width at which that changes."""
    text, before = "", narrowest
    for widest in _last_widths(op, device):
        try:
            wider = _choose(op, device, widest + 1)
        except _backends.BackendError:
            wider = "none"
        if wider != before:
            # A row in float64 takes the room of one twice as wide.
            text += f"; above width {widest} in float32 and {widest // 2} in float64: {wider}"
        before = wider
    return text


def _last_widths(op: str, device: torch.device) -> list[int]:
    """In float32, the widths at which a backend or an entry of the crossover table ends."""
    widths = {limit // torch.float32.itemsize for (name, _), limit in _backends.MAX_ROW_BYTES.items() if name == op}
    capability = _backends.compute_capability(device)
    if op == orthogonal_filter.NAME and capability is not None:
        widths |= {widest for _, widest in get_table(capability) if widest is not None}
    return sorted(widths)


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
