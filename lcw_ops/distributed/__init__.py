"""The deep recurrence over the ranks of a process group: each rank owns a contiguous range of layers.

``module`` holds the module and its state dict; ``group`` the collectives and the agreement between ranks;
``recurrence`` the sweeps over all ranks.
"""

from lcw_ops.distributed.module import DepthParallel

__all__ = ["DepthParallel"]

# Error reports and recorded programs name the class by its public path.
DepthParallel.__module__ = __name__
