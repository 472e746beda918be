"""The recurrence as an op.

``op`` holds the schemas, the autograd functions and the choice of the kernel; ``graph`` holds torch's matmuls in a CUDA
graph; ``crossover`` holds the measurements of which kernel is the fastest.
"""

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
