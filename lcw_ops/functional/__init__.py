"""The public functions, one file per method. They check their arguments once, choose a backend and call the op."""

from lcw_ops.functional.gradient_activation import gradient_activation_
from lcw_ops.functional.hypersphere import gmp_linear, hypersphere_angles, hypersphere_direction
from lcw_ops.functional.lcw_linear import activation_shift, lcw_linear, lcw_weight
from lcw_ops.functional.orthogonal_filter import orthogonal_filter
from lcw_ops.functional.weight_norm import normalize_scale, weight_norm_linear

__all__ = [
    "activation_shift",
    "gmp_linear",
    "gradient_activation_",
    "hypersphere_angles",
    "hypersphere_direction",
    "lcw_linear",
    "lcw_weight",
    "normalize_scale",
    "orthogonal_filter",
    "weight_norm_linear",
]

# Pickles and traced programs find a function by its module. A submodule may be hidden by a function of the same name.
for _name in __all__:
    globals()[_name].__module__ = __name__
