"""Registered torch ops: schema, fake kernel, autograd, vmap, and the choice of backend."""

from lcw_ops import _old_names
from lcw_ops.ops import (
    gradient_activation,
    hypersphere,
    lcw_linear,
    memory_pool,
    orthogonal_filter,
    parallel_depth,
    weight_norm,
)
from lcw_ops.ops.backends import BackendError, load_extensions, use_backend
from lcw_ops.ops.memory_pool import empty_memory_pool, set_memory_pool_limit

load_extensions()
memory_pool.start()

__all__ = [
    "BackendError",
    "empty_memory_pool",
    "gradient_activation",
    "hypersphere",
    "lcw_linear",
    "memory_pool",
    "orthogonal_filter",
    "parallel_depth",
    "set_memory_pool_limit",
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
