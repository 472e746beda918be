"""Layers over the ranks of a process group: a recurrence split by depth, linear layers split by units or by inputs.

``module`` holds :class:`DepthParallel` and its state dict; ``group`` the collectives and the agreement between ranks;
``recurrence`` the sweeps over all ranks; ``tensor_parallel`` the styles for ``parallelize_module``.
"""

from typing import TYPE_CHECKING, Any

from lcw_ops.distributed.module import DepthParallel

if TYPE_CHECKING:
    from lcw_ops.distributed.tensor_parallel import ColwiseParallel, RowwiseParallel

__all__ = ["ColwiseParallel", "DepthParallel", "RowwiseParallel"]

# Error reports and recorded programs name the class by its public path.
DepthParallel.__module__ = __name__


def __getattr__(name: str) -> Any:
    # torch's module of DTensors takes half as long to import as all of torch.
    if name in ("ColwiseParallel", "RowwiseParallel"):
        from lcw_ops.distributed import tensor_parallel

        return getattr(tensor_parallel, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
