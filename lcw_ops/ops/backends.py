"""The choice of a backend for an op: by device, unless ``use_backend`` or ``LCW_OPS_BACKEND`` requests one.

:func:`lcw_ops.info` gives the chosen backend and the reason. On a CPU the automatic choice is the C++ kernel, unless
``lcw-ops verify`` found it wrong there. On a GPU it is a kernel that was proved: by ``lcw-ops verify`` on this card, or
by tests whose log is committed. Of several it is the fastest by the verdicts. An explicit request that cannot be met
raises.
"""

import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lcw_ops import _torch
from lcw_ops.ops import library, verdicts

CPU = torch.device("cpu")

BACKENDS = ("cpp", "cuda", "triton", "reference")

# Device type -> backends and forms in the order of preference.
PREFERENCE = {"cpu": ("cpp",), "cuda": ("triton", "cuda", "graph")}

# (op, device type) -> the order of an op that differs. Each op's module adds its entry, with the reason.
PREFERENCE_OF_OP: dict[tuple[str, str], tuple[str, ...]] = {}

# Form -> its backend. A form is a kernel within a backend that users cannot request by name. A request for the backend
# selects the form if the op passes the form as `first`.
FORM_OF = {"graph": "cuda"}

# (op, backend or form) -> the compute capabilities on which this kernel's tests have passed, with a log committed under
# bench/results/. On those GPUs the kernel is the automatic choice. Empty so far.
PROVEN: dict[tuple[str, str], frozenset[tuple[int, int]]] = {}

# Kernels that must not be the automatic choice, whatever a verdict or PROVEN says. Each entry has "op", "backend" and
# "reason", and names parts of a verdict's key that must match, such as {"triton": "3.6.0"}. Empty so far.
DENIED: list[dict[str, str]] = []

# Op -> backends for which this source tree has an implementation. Each op's module adds its entry.
IMPLEMENTED: dict[str, tuple[str, ...]] = {}

# (op, backend) -> the longest row in bytes that the backend takes. Longer rows go to the next backend in the order.
MAX_ROW_BYTES: dict[tuple[str, str], int] = {}

# Backend -> why its extension is not loaded.
_extension_missing: dict[str, str] = {}

# LCW_OPS_BACKEND is checked when an op first runs, so that importing never fails.
_requested: str | None = os.environ.get("LCW_OPS_BACKEND") or None

_has_warned_unproven = False


class BackendError(ValueError, RuntimeError):
    """A requested backend does not exist, or cannot run this op on this device."""


def load_extensions() -> None:
    """Load the compiled backends that were built. Called once, after every op is declared."""
    for backend, stem in (("cpp", "_C"), ("cuda", "_C_cuda")):
        reason = library.load_extension(stem)
        if reason is not None:
            _extension_missing[backend] = reason


def get_preference(op: str, device_type: str) -> tuple[str, ...]:
    """The backends and forms that may be the automatic choice, in the order in which they are tried."""
    return PREFERENCE_OF_OP.get((op, device_type)) or PREFERENCE.get(device_type, ())


def missing_reason(op: str, backend: str, device_type: str) -> str | None:
    """Returns why ``backend`` cannot run ``op`` on a device of this type, or None if it can."""
    if backend == "reference":
        return None
    if backend not in IMPLEMENTED[op]:
        return f"{op} has no {backend} kernel"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "triton runs on CPU tensors only in its interpreter (TRITON_INTERPRET=1, set before import)"
        return None if device_type in ("cpu", "cuda") else f"triton does not run on {device_type} tensors"
    own_device = {"cpp": "cpu", "cuda": "cuda", "graph": "cuda"}[backend]
    if device_type != own_device:
        return f"{backend} runs on {own_device} tensors only; these are on {device_type}"
    return _extension_missing.get(backend)


def _is_too_wide(op: str, backend: str, width: int, itemsize: int) -> bool:
    limit = MAX_ROW_BYTES.get((op, backend))
    return limit is not None and width * itemsize > limit


def width_reason(op: str, backend: str, width: int, itemsize: int) -> str | None:
    """Returns why ``backend`` cannot run ``op`` on rows of ``width`` elements, or None if it can."""
    if not _is_too_wide(op, backend, width, itemsize):
        return None
    limit = MAX_ROW_BYTES[op, backend] // itemsize
    return f"width {int(width)} > {limit}, the most {backend} takes in float{8 * itemsize}"


def unproven_reason(op: str, backend: str, capability: tuple[int, int] | None) -> str | None:
    """Returns why a kernel that could run is not the automatic choice, or None if its tests passed on this GPU."""
    if capability is None or capability in PROVEN.get((op, backend), ()):
        return None
    generation = f"sm_{capability[0]}{capability[1]}"
    request = f"lcw_ops.use_backend({FORM_OF.get(backend, backend)!r})"
    remedy = "lcw-ops verify can prove it on this card"
    return f"its tests have not passed on {generation} yet; {remedy}, and it runs on request: {request}"


def _automatic_reason(op: str, backend: str, device: torch.device, kind: tuple[str, str] | None) -> str | None:
    """Returns why a kernel that could run is not the automatic choice for a class of sizes and dtypes, or None."""
    denied = _denied_reason(op, backend, device, kind)
    if denied is not None:
        return denied
    if device.type == "cpu":
        # A small layer cannot wait for its class to be found, so one wrong class switches the whole kernel off.
        found = [verdict for _, verdict in verdicts.find_all(op, backend, device) if not verdict.right]
        return _wrong_reason(found[0]) if found else None
    verdict = verdicts.find(op, backend, verdicts.Kind(*kind), device) if kind is not None else None
    if verdict is None:
        return unproven_reason(op, backend, compute_capability(device))
    if not verdict.right:
        return _wrong_reason(verdict)
    return None if verdict.faster else f"not faster than plain torch here, by lcw-ops verify of {verdict.date}"


def _wrong_reason(verdict: verdicts.Verdict) -> str:
    return f"not right here, by lcw-ops verify of {verdict.date}: {verdict.reason}"


def _denied_reason(op: str, backend: str, device: torch.device, kind: tuple[str, str] | None) -> str | None:
    for entry in DENIED:
        if (entry["op"], entry["backend"]) == (op, backend):
            conditions = {name: entry[name] for name in entry.keys() - {"op", "backend", "reason"}}
            facts = verdicts.collect_facts(device, backend)
            # An entry about one class denies the whole kernel where the class is not known.
            facts = {
                **facts,
                **dict(zip(("dtype", "size"), kind or map(conditions.get, ("dtype", "size")), strict=True)),
            }
            if conditions.items() <= facts.items():
                return f"denied by this version of lcw_ops: {entry['reason']}"
    return None


def _kind(op: str, device: torch.device, width: int, itemsize: int) -> tuple[str, str] | None:
    """The class whose verdict decides. None where none does, so that torch.compile makes no guards of the width."""
    if device.type != "cuda" or not verdicts.are_kept():
        return None
    kind = verdicts.classify(op, width, itemsize)
    # torch.compile makes constants of plain tuples, but not of named ones.
    return None if kind is None else (kind.dtype, kind.size)


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """A GPU's compute capability, as in PROVEN, or None for any other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@functools.cache
def _resolve(
    op: str,
    device: torch.device,
    requested: str | None,
    too_wide: tuple[str, ...] = (),
    first: str | None = None,
    kind: tuple[str, str] | None = None,
) -> str:
    """Returns the requested kernel, or else the fastest one that can run ``op`` and may be chosen.

    Kernels in ``too_wide`` cannot, because the rows are too wide for them. Where no verdict says which kernel is
    faster, ``first`` is preferred to all others.
    """
    if requested is not None:
        _check_known(requested)
        kernel = first if first is not None and FORM_OF.get(first) == requested else requested
        reason = missing_reason(op, kernel, device.type)
        if reason is not None:
            raise _cannot_be_met(op, requested, reason)
        return kernel
    allowed = [
        backend
        for backend in sorted(get_preference(op, device.type), key=lambda name: name != first)
        if backend not in too_wide
        and missing_reason(op, backend, device.type) is None
        and _automatic_reason(op, backend, device, kind) is None
    ]
    # If several kernels are as fast, or were not measured here, max takes the most preferred one, which comes first.
    return max(allowed, key=lambda backend: _measured_times(op, backend, device, kind), default="reference")


def _measured_times(op: str, backend: str, device: torch.device, kind: tuple[str, str] | None) -> float:
    """Plain torch's time divided by the kernel's, as ``lcw-ops verify`` measured it on this card, or 0."""
    verdict = verdicts.find(op, backend, verdicts.Kind(*kind), device) if kind is not None else None
    return 0.0 if verdict is None or verdict.times is None else verdict.times


def _cannot_be_met(op: str, requested: str, reason: str) -> BackendError:
    return BackendError(f"{op}: backend {requested!r} was requested, but {reason}")


@_torch.constant_when_traced
def _resolve_at_trace_time(
    op: str,
    device: torch.device,
    requested: str | None,
    too_wide: tuple[str, ...],
    first: str | None,
    kind: tuple[str, str] | None,
) -> str:
    return _resolve(op, device, requested, too_wide, first, kind)


@_torch.constant_when_traced
def _warn_of_fallback(op: str, device: torch.device, kind: tuple[str, str] | None) -> None:
    _warn_once(op, device, kind)


@functools.cache
def _warn_once(op: str, device: torch.device, kind: tuple[str, str] | None) -> None:
    """Warn of every kernel that is switched off on a CPU, and once per process if no kernel is proved on a GPU."""
    able = [name for name in get_preference(op, device.type) if missing_reason(op, name, device.type) is None]
    reasons = {name: reason for name in able if (reason := _automatic_reason(op, name, device, kind)) is not None}
    if device.type == "cpu":
        for name, reason in reasons.items():
            warnings.warn(f"{op}: plain torch runs on the CPU. {name}: {reason}", RuntimeWarning, stacklevel=5)
    elif any(reason == unproven_reason(op, name, compute_capability(device)) for name, reason in reasons.items()):
        _warn_unproven(device)


def _warn_unproven(device: torch.device) -> None:
    global _has_warned_unproven
    if _has_warned_unproven:
        return
    _has_warned_unproven = True
    warnings.warn(
        f"lcw_ops: plain torch runs on {device}, because no kernel is proved there. Prove them once, on an idle card: "
        f"lcw-ops verify --device {device}. lcw_ops.info() has the details.",
        RuntimeWarning,
        stacklevel=6,
    )


def is_cpp_chosen(op: str) -> bool:
    """Whether the C++ kernel runs ``op`` on a CPU now. Faster than `choose`, but torch.compile cannot trace it."""
    return _resolve(op, CPU, _requested) == "cpp"


def choose(
    op: str, device: torch.device, width: int = 0, itemsize: int = 4, first: str | None = None, warns: bool = True
) -> str:
    """The backend that runs ``op`` on ``device`` now, on rows of ``width`` elements of ``itemsize`` bytes.

    Args:
        op, device: the op's name in IMPLEMENTED, and the tensors' device.
        width, itemsize: as above. The width is 0 if the op works element by element.
        first: the backend or form that was measured as the fastest. It is tried before the others. If it is a form, a
            request for its backend (``FORM_OF``) selects it.
        warns: whether to warn if plain torch runs because no kernel is proved, or because the kernel was found wrong.

    Raises:
        BackendError: an explicit request cannot be met.
    """
    kind = None if device.type == "cpu" else _kind(op, device, width, itemsize)
    # Under torch.compile the width may be a symbol. A comparison with a limit becomes a guard. Formatting the width
    # into a message would recompile for every width, so only a refused width is formatted.
    chosen = _resolve_at_trace_time(op, device, _requested, (), first, kind)
    if _is_too_wide(op, chosen, width, itemsize):
        candidates = get_preference(op, device.type) if _requested is None else (_requested,)
        too_wide = tuple(name for name in candidates if _is_too_wide(op, name, width, itemsize))
        chosen = _resolve_at_trace_time(op, device, _requested, too_wide, first, kind)
        if chosen in too_wide:
            raise _cannot_be_met(op, chosen, str(width_reason(op, chosen, width, itemsize)))
    if chosen == "reference" and _requested is None and warns:
        _warn_of_fallback(op, device, kind)
    return chosen


def requested() -> str | None:
    """The backend asked for by ``use_backend`` or ``LCW_OPS_BACKEND``, or None."""
    return _requested


def not_chosen_reason(op: str, backend: str, device: torch.device, chosen: str) -> str:
    """Returns why ``chosen``, and not ``backend``, runs ``op`` on narrow rows of float32 on ``device``."""
    missing, kind = missing_reason(op, backend, device.type), _kind(op, device, 1, torch.float32.itemsize)
    reason = missing or _automatic_reason(op, backend, device, kind)
    if reason is not None:
        return reason
    here = _measured_times(op, backend, device, kind)
    fastest = _measured_times(op, chosen, device, kind) if chosen in PREFERENCE.get(device.type, ()) else 0.0
    if fastest > here:
        measured = f"; {backend}: {here:.2f}" if here else f"; {backend} was not measured"
        return f"{chosen} is faster here: {fastest:.2f} times as fast as plain torch{measured}"
    return f"{chosen} comes first"


def _check_known(backend: str) -> None:
    if backend not in BACKENDS:
        raise BackendError(f"no backend is called {backend!r}; choose one of {', '.join(BACKENDS)}")


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Run every op of lcw_ops inside the ``with`` block on one backend: "cpp", "cuda", "triton" or "reference".

    The request holds for the whole process, like the flags of ``torch.backends``. Blocks nest. Calling an op that the
    backend cannot run raises BackendError with the reason. ``LCW_OPS_BACKEND=name`` in the environment does
    the same for the whole run. A backward pass uses the backend of its forward pass.

    A request also holds while exporting (torch.export, ONNX, torch.jit.trace). A program exported with a kernel needs
    lcw_ops to run, and has no gradients through ``orthogonal_filter``. Exporting it therefore raises a ValueError if an
    argument requires gradients. Then export without a request or, for inference only, under ``torch.no_grad()``.

    Args:
        backend: the name. An unknown name raises BackendError, which is both a ValueError and a RuntimeError.
    """
    global _requested
    _check_known(backend)
    previous, _requested = _requested, backend
    try:
        yield
    finally:
        _requested = previous
