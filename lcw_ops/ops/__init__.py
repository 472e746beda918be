"""Registered torch ops: schema, fake kernel, autograd, vmap, and the choice of backend."""

from lcw_ops import _old_names
from lcw_ops.ops import (
    gradient_activation,
    hypersphere,
    lcw_linear,
    orthogonal_filter,
    parallel_depth,
    weight_norm,
)
from lcw_ops.ops.backends import BackendError, load_extensions, use_backend

load_extensions()

__all__ = [
    "BackendError",
    "gradient_activation",
    "hypersphere",
    "lcw_linear",
    "orthogonal_filter",
    "parallel_depth",
    "use_backend",
    "weight_norm",
]

_old_names.keep(
    globals(),
    {},
    submodules=(
        "_backends",
        "_library",
        "_precision",
        "orthogonal_filter_crossover",
        "orthogonal_filter_graph",
        "parallel_depth_crossover",
        "parallel_depth_frame",
        "parallel_depth_solver",
    ),
)
