"""The recurrence solved for all layers at once, as an op.

``op`` holds the schemas and the autograd functions; ``solver`` holds the windows and the stopping rule; ``scan`` makes
one sweep; ``frame`` holds the basis in which the filter's powers are cheap; ``crossover`` holds the sizes at which the
sweeps were measured to be faster.
"""

from lcw_ops import _old_names
from lcw_ops.ops.parallel_depth import crossover, frame, op, scan, solver
from lcw_ops.ops.parallel_depth.op import (
    ACTIVATE,
    ADJOINT,
    BACKWARD,
    NAME,
    SWEEP,
    Kernels,
    Options,
    ParallelOrthogonalFilter,
    ParallelOrthogonalFilterForwardMode,
    choose_solver,
    get_kernels,
    sequential_backward,
    sequential_forward,
)

__all__ = [
    "ACTIVATE",
    "ADJOINT",
    "BACKWARD",
    "NAME",
    "SWEEP",
    "Kernels",
    "Options",
    "ParallelOrthogonalFilter",
    "ParallelOrthogonalFilterForwardMode",
    "choose_solver",
    "crossover",
    "frame",
    "get_kernels",
    "op",
    "scan",
    "sequential_backward",
    "sequential_forward",
    "solver",
]

# This package was once one module, which had these names too.
_old_names.keep(
    globals(),
    {
        "Call": "lcw_ops.ops.parallel_depth.crossover",
        "count_steps": "lcw_ops.reference.orthogonal_filter",
        "device_key": "lcw_ops.ops.parallel_depth.crossover",
        "largest_c_faster": "lcw_ops.ops.parallel_depth.crossover",
        "orthogonal_filter_backward": "lcw_ops.reference.orthogonal_filter",
    },
)
