"""The recurrence as an op.

``op`` holds the schemas, the autograd functions and the choice of the kernel; ``graph`` holds torch's matmuls in a CUDA
graph; ``crossover`` holds the measurements of which kernel is the fastest.
"""

from lcw_ops import _old_names
from lcw_ops.ops.orthogonal_filter import crossover, op
from lcw_ops.ops.orthogonal_filter.op import (
    BACKWARD,
    DEFAULT_SEGMENT,
    GRAPH,
    NAME,
    Needs,
    Options,
    OrthogonalFilter,
    OrthogonalFilterBackward,
    OrthogonalFilterBackwardForwardMode,
    OrthogonalFilterForwardMode,
    check_arguments,
    choose_kernel,
    forward_vmap,
    keeps_all_states,
    slices,
    state_gradients,
)

__all__ = [
    "BACKWARD",
    "DEFAULT_SEGMENT",
    "GRAPH",
    "NAME",
    "Needs",
    "Options",
    "OrthogonalFilter",
    "OrthogonalFilterBackward",
    "OrthogonalFilterBackwardForwardMode",
    "OrthogonalFilterForwardMode",
    "check_arguments",
    "choose_kernel",
    "crossover",
    "forward_vmap",
    "keeps_all_states",
    "op",
    "slices",
    "state_gradients",
]

# This package was once one module, which had these names too.
_old_names.keep(
    globals(),
    {
        "ACTIVATIONS": "lcw_ops.reference.orthogonal_filter",
        "count_steps": "lcw_ops.reference.orthogonal_filter",
        "fastest_kernel": "lcw_ops.ops.orthogonal_filter.crossover",
        "orthogonal_filter_backward": "lcw_ops.reference.orthogonal_filter",
        "orthogonal_filter_jvp": "lcw_ops.reference.orthogonal_filter",
    },
)
