"""Which tensors of a module hold their values, and which hold uninitialised memory after ``to_empty``.

A mark on the tensor records its state when the values were lost. Any write that autograd sees changes that state.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lcw_ops import _torch


def values_of(**scales: float | Tensor | None) -> dict[str, Tensor]:
    """Copies, on the CPU, of the scales that are tensors with values."""
    return {
        name: scale.detach().to("cpu", copy=True)
        for name, scale in scales.items()
        if isinstance(scale, Tensor) and _torch.has_values(scale)
    }


def allocates(fn: Callable[[Tensor], Tensor]) -> bool:
    """Whether a function given to ``Module._apply`` returns new, uninitialised memory, as ``to_empty`` does.

    Only such a function turns a meta tensor into one with memory. Any other raises or stays on meta.
    """
    try:
        return not fn(torch.empty(1, device="meta")).is_meta
    except Exception:
        return False


# The attribute that marks a tensor whose values are uninitialised memory. It holds the tensor's state at that time.
_LOST_AT = "_lcw_ops_lost_at"


def mark_lost(tensor: Tensor) -> None:
    """Count the tensor as lost until autograd sees a write to it, its memory is replaced, or it is loaded."""
    setattr(tensor, _LOST_AT, _state_of(tensor))


def clear_mark(tensor: Tensor) -> None:
    vars(tensor).pop(_LOST_AT, None)


def is_lost(tensor: Tensor) -> bool:
    mark = getattr(tensor, _LOST_AT, None)
    return mark is not None and mark == _state_of(tensor)


def holds(tensor: Tensor, values: Tensor | None) -> bool:
    """Whether the tensor holds a state dict's values. Shapes may differ: torch loads a value (1,) into a tensor ()."""
    if not isinstance(values, Tensor) or is_distributed(values) != is_distributed(tensor):
        return False
    if is_distributed(tensor):
        values, tensor = values.to_local(), tensor.to_local()  # type: ignore[attr-defined]
    return (
        _torch.has_values(values)
        and _torch.has_values(tensor)
        and values.numel() == tensor.numel()
        and torch.equal(values.to(tensor).reshape(tensor.shape), tensor)
    )


def _state_of(tensor: Tensor) -> tuple[int, int]:
    """The version, which an in-place write increments, and the memory, which ``tensor.data = other`` replaces."""
    # An inference tensor has no version counter.
    return 0 if tensor.is_inference() else tensor._version, tensor.data_ptr() if _torch.has_values(tensor) else 0


def is_distributed(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor."""
    return _torch.has_dtensor(tensor)


def fill(tensor: Tensor, values: Tensor, mesh) -> None:
    """``tensor.copy_(values)``. With a device mesh, all of its ranks get the values of its first rank."""
    if mesh is None or not _torch.has_values(tensor):
        tensor.copy_(values)
        return
    from torch.distributed.tensor import Replicate, distribute_tensor

    if is_distributed(tensor):
        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        tensor.copy_(distribute_tensor(values.to(tensor.dtype), mesh, placements))
    else:
        tensor.copy_(distribute_tensor(values, mesh, [Replicate()] * mesh.ndim).to_local())
