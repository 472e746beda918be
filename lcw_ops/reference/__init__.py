"""The methods in plain PyTorch, in any floating dtype and twice differentiable: every kernel's oracle and fallback."""

# Import torch first: it loads the ops, which import the modules below. None of those may be half imported by then.
import torch  # noqa: F401

from lcw_ops import _old_names
from lcw_ops.reference.gradient_activation import adamw_step, gradient_activation, sgd_step
from lcw_ops.reference.hypersphere import (
    gmp_linear,
    hypersphere_angles,
    hypersphere_direction,
    hypersphere_direction_backward,
    hypersphere_direction_jvp,
)
from lcw_ops.reference.lcw_linear import activation_shift, lcw_basis, lcw_coordinates, lcw_linear, lcw_weight
from lcw_ops.reference.lps import (
    activation_variance,
    anchored,
    gaussian_expectation,
    heavy_tail,
    hermite_coefficients,
    hermite_roots,
    hermite_second_moment,
    hermite_variance,
    joint,
)
from lcw_ops.reference.orthogonal_filter import (
    orthogonal_filter,
    orthogonal_filter_backward,
    orthogonal_filter_jvp,
    orthogonal_filter_scan,
)
from lcw_ops.reference.weight_norm import normalize_scale, normalize_scale_backward, normalize_scale_jvp

__all__ = [
    "activation_shift",
    "activation_variance",
    "adamw_step",
    "anchored",
    "gaussian_expectation",
    "gmp_linear",
    "gradient_activation",
    "heavy_tail",
    "hermite_coefficients",
    "hermite_roots",
    "hermite_second_moment",
    "hermite_variance",
    "hypersphere_angles",
    "hypersphere_direction",
    "hypersphere_direction_backward",
    "hypersphere_direction_jvp",
    "joint",
    "lcw_basis",
    "lcw_coordinates",
    "lcw_linear",
    "lcw_weight",
    "normalize_scale",
    "normalize_scale_backward",
    "normalize_scale_jvp",
    "orthogonal_filter",
    "orthogonal_filter_backward",
    "orthogonal_filter_jvp",
    "orthogonal_filter_scan",
    "sgd_step",
]

_old_names.keep(globals(), {}, submodules=("checks",))
