"""Drop-in modules: the constructor arguments of their ``torch.nn`` namesakes."""

from lcw_ops.nn.lcw_linear import LCWConv1d, LCWConv2d, LCWConv3d, LCWLinear
from lcw_ops.nn.orthogonal_filter import OrthogonalFilterMLP, OrthogonalFilterRNN

__all__ = ["LCWConv1d", "LCWConv2d", "LCWConv3d", "LCWLinear", "OrthogonalFilterMLP", "OrthogonalFilterRNN"]
