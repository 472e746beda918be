"""Which backend runs each op, and why the others do not, for ``lcw_ops.info()`` and ``lcw-ops info``."""

import importlib.metadata
import platform

import torch

from lcw_ops import _files
from lcw_ops.ops import backends, memory_pool, verdicts
from lcw_ops.ops.orthogonal_filter import graph
from lcw_ops.ops.orthogonal_filter import op as orthogonal_filter
from lcw_ops.ops.orthogonal_filter.crossover import get_table


def info() -> str:
    """Return, for every op and device of this machine, the backend that runs and why each other one does not.

    The text includes versions, the processor's vector instructions and the GPU. A reason that holds for every op of a
    device, or an error that several ops share, is given once. The call takes no argument and has no side effect.
    ``lcw-ops info --json`` prints the same facts for programs.
    """
    facts = report()
    cpu, gpus = facts["cpu"], facts["gpus"]
    versions = {name: version or "not installed" for name, version in facts["versions"].items() if name != "cuda"}
    cuda = [f"CUDA {facts['versions']['cuda']}"] if facts["versions"]["cuda"] else []
    lines = [
        ", ".join([*(f"{name} {version}" for name, version in versions.items()), *cuda]),
        f"CPU: {cpu['name']}, {cpu['instructions']}, {cpu['threads']} threads",
        *(f"GPU {index}: {gpu['name']}, {gpu['generation']}" for index, gpu in enumerate(gpus)),
    ]
    if not gpus:
        lines.append("GPU: none; the backends cuda and triton need one")
    lines.append(_memory_pool_line(facts["memory_pool"]))
    if facts["graph_buffers"]["blocks"] > 0:
        lines.append(_graph_buffers_line(facts["graph_buffers"]))
    lines.append(_verification_line())
    if facts["requested_backend"] is not None:
        lines.append(f"Requested for every op: {facts['requested_backend']}")
    devices = _devices()
    common = {device: _common_reasons(device) for device in devices}
    for device, reasons in common.items():
        if reasons:
            lines += [f"Every op on {device} that has such a kernel:", *_reason_lines(reasons)]
    shared = {device: _shared_errors(device) for device in devices}
    for device, errors in shared.items():
        lines += [f"{', '.join(ops)} on {device}: none. {error}" for error, ops in errors.items()]
    for op in backends.IMPLEMENTED:
        for device in devices:
            if not any(op in ops for ops in shared[device].values()):
                lines += _op_lines(op, device, common[device])
    return "\n".join(lines)


def report() -> dict:
    """The facts of :func:`info` as numbers, strings and None, for ``lcw-ops info --json``; its help lists the keys."""
    return {
        "versions": _versions(),
        "platform": platform.platform(),
        "cpu": {
            "name": verdicts.cpu_name(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "gpus": [_gpu(device) for device in _devices() if device.type == "cuda"],
        "memory_pool": _memory_pool(),
        "graph_buffers": dict(zip(("blocks", "bytes"), graph.count_cached(), strict=True)),
        "requested_backend": backends.requested(),
        "ops": {op: {str(device): _op_report(op, device) for device in _devices()} for op in backends.IMPLEMENTED},
    }


def _memory_pool() -> dict:
    idle, lent = memory_pool.pool.count_bytes()
    limit, error = memory_pool.pool.limit, memory_pool.missing_reason()
    return {"limit": limit if error is None else 0, "idle": idle, "lent": lent, "error": error}


def _memory_pool_line(facts: dict) -> str:
    if facts["limit"] == 0:
        return f"Memory pool for large results on the CPU: off, {facts['error'] or 'because its limit is 0'}"
    idle, lent, limit = (f"{facts[key] / 1e6:.0f} MB" for key in ("idle", "lent", "limit"))
    return f"Memory pool for large results on the CPU: {lent} in use, {idle} idle, of which at most {limit} are kept"


def _graph_buffers_line(facts: dict) -> str:
    return (
        f"Buffers kept by the CUDA graphs of {orthogonal_filter.NAME}: {facts['bytes'] / 1e6:.0f} MB in "
        f"{facts['blocks']} blocks; lcw_ops.ops.orthogonal_filter.graph.clear() gives them back"
    )


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def _gpu(device: torch.device) -> dict:
    major, minor = torch.cuda.get_device_capability(device)
    return {"device": str(device), "name": torch.cuda.get_device_name(device), "generation": f"sm_{major}{minor}"}


def _op_report(op: str, device: torch.device) -> dict:
    try:
        chosen, error = _choose(op, device, 1), None
    except backends.BackendError as refused:
        chosen, error = None, str(refused)
    return {
        "backend": chosen,
        "error": error,
        "wider": _wider(op, chosen, device),
        "not_chosen": {} if chosen is None else _reasons(op, device, chosen),
        "verdicts": [
            {"backend": backend, **kind._asdict(), **verdict._asdict()}
            for backend in backends.IMPLEMENTED[op]
            if backends.missing_reason(op, backend, device.type) is None
            for kind, verdict in verdicts.find_all(op, backend, device)
        ],
    }


def _reasons(op: str, device: torch.device, chosen: str) -> dict[str, str]:
    """Why each other backend does not run."""
    first = chosen if backends.requested() is None else f"{chosen}, as requested,"
    others = [backend for backend in backends.BACKENDS if backend not in (chosen, "reference")]
    return {backend: backends.not_chosen_reason(op, backend, device, first) for backend in others}


def _common_reasons(device: torch.device) -> dict[str, str]:
    """Backend -> the reason that all ops with a kernel of that backend share."""
    by_op = {op: _op_report(op, device)["not_chosen"] for op in backends.IMPLEMENTED}
    common = {}
    for backend in backends.BACKENDS:
        reasons = {by_op[op].get(backend) for op, backends in backends.IMPLEMENTED.items() if backend in backends}
        if len(reasons) == 1 and None not in reasons:
            common[backend] = reasons.pop()
    return common


def _shared_errors(device: torch.device) -> dict[str, list[str]]:
    """Error -> the ops that cannot run because of it, for errors that two or more ops share."""
    ops: dict[str, list[str]] = {}
    for op in backends.IMPLEMENTED:
        error = _op_report(op, device)["error"]
        if error is not None:
            # Most errors begin with the op's name.
            ops.setdefault(error.removeprefix(f"{op}: "), []).append(op)
    return {error: names for error, names in ops.items() if len(names) > 1}


def _op_lines(op: str, device: torch.device, common: dict[str, str] | None = None) -> list[str]:
    """The lines of :func:`info` about the op, without the reasons in ``common``, which are printed for all ops."""
    facts = _op_report(op, device)
    line = f"{op} on {device}: {facts['backend'] or 'none'}"
    for wider in facts["wider"]:
        line += (
            f"; above width {wider['above_width_float32']} in float32 and {wider['above_width_float64']} in float64: "
            f"{wider['backend'] or 'none'}"
        )
    if facts["error"] is not None:
        return [f"{line}. {facts['error']}"]
    said = (common or {}).items()
    return [
        line,
        *_reason_lines({key: reason for key, reason in facts["not_chosen"].items() if (key, reason) not in said}),
        *(
            f"  verified {one['backend']}, {one['dtype']}, {one['size']}, on {one['date']}: {one['reason']}"
            for one in facts["verdicts"]
        ),
    ]


def _verification_line() -> str:
    """Where the verdicts of ``lcw-ops verify`` come from, and the command that makes them."""
    source = verdicts.shipped_file() or _files.cache_folder() or f"nowhere, because {_files.no_folder_reason()}"
    reason = verdicts.unreadable_reason()
    if reason is not None:
        return (
            f"Verdicts about kernels: none, because LCW_OPS_VERDICTS is {source}, which cannot be read: {reason}; "
            f"lcw-ops verify --device {_devices()[-1]} --write FILE makes such a file"
        )
    return f"Verdicts about kernels are read from {source}; lcw-ops verify --device {_devices()[-1]} makes them"


def _reason_lines(reasons: dict[str, str]) -> list[str]:
    return [f"  not {backend}: {reason}" for backend, reason in reasons.items()]


def _choose(op: str, device: torch.device, width: int) -> str:
    """The backend that the public function of the op chooses in float32."""
    itemsize = torch.float32.itemsize
    first = orthogonal_filter.fastest_on(device, width, itemsize) if op == orthogonal_filter.NAME else None
    return backends.choose(op, device, width, itemsize, first, warns=False)


def _wider(op: str, narrowest: str | None, device: torch.device) -> list[dict]:
    """The backends of wider rows, one entry for each width at which the backend changes; ``narrowest`` is width 1's."""
    changes, before = [], narrowest
    for widest, widest_float64 in _last_widths(op, device):
        try:
            wider = _choose(op, device, widest + 1)
        except backends.BackendError:
            wider = None
        if wider != before:
            widths = {"above_width_float32": widest, "above_width_float64": widest_float64}
            changes.append({**widths, "backend": wider})
        before = wider
    return changes


def _last_widths(op: str, device: torch.device) -> list[tuple[int, int]]:
    """The largest widths, in float32 and float64, that a backend or an entry of the crossover table serves."""
    # A float64 row takes as much memory as a float32 row twice as wide.
    limits = {limit // torch.float32.itemsize for (name, _), limit in backends.MAX_ROW_BYTES.items() if name == op}
    widths = {limit: limit // 2 for limit in limits}
    capability = backends.compute_capability(device)
    if op == orthogonal_filter.NAME and capability is not None:
        tables = (get_table(capability, dtype.itemsize) for dtype in (torch.float32, torch.float64))
        widths |= {one: other // 2 for (_, one), (_, other) in zip(*tables, strict=True) if one is not None}
    return sorted(widths.items())


def _versions() -> dict[str, str | None]:
    """Package -> its version, or None where it is not installed or torch has no CUDA."""
    from lcw_ops import __version__

    versions = {"lcw_ops": __version__, "python": platform.python_version()}
    for package in ("torch", "triton", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {**versions, "cuda": torch.version.cuda}
