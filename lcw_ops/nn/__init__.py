"""Drop-in modules with the constructor arguments of their ``torch.nn`` namesakes."""

from lcw_ops.nn import utils
from lcw_ops.nn.hypersphere import GmPConv1d, GmPConv2d, GmPConv3d, GmPLinear, gmp_parameter_groups
from lcw_ops.nn.input_mean_norm import InputMeanNorm, update_means
from lcw_ops.nn.lcw_linear import LCWConv1d, LCWConv2d, LCWConv3d, LCWLinear
from lcw_ops.nn.orthogonal_filter import OrthogonalFilterMLP, OrthogonalFilterRNN
from lcw_ops.nn.weight_norm import WeightNormConv1d, WeightNormConv2d, WeightNormConv3d, WeightNormLinear

__all__ = [
    "GmPConv1d",
    "GmPConv2d",
    "GmPConv3d",
    "GmPLinear",
    "InputMeanNorm",
    "LCWConv1d",
    "LCWConv2d",
    "LCWConv3d",
    "LCWLinear",
    "OrthogonalFilterMLP",
    "OrthogonalFilterRNN",
    "WeightNormConv1d",
    "WeightNormConv2d",
    "WeightNormConv3d",
    "WeightNormLinear",
    "gmp_parameter_groups",
    "update_means",
    "utils",
]
