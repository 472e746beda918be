"""Registered torch ops: schema, fake kernel, autograd, vmap, and the choice of backend."""

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
