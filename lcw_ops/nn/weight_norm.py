"""Layers with weight normalization: a row or filter of the weight is s v / ||v||, with trained s and v.

T. Salimans, D. P. Kingma, "Weight Normalization", NeurIPS 2016, arXiv 1602.07868.
"""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from lcw_ops import functional as F
from lcw_ops.nn._derived import DerivedWeight
from lcw_ops.nn._layers import Convolution, applied_parameters, are_per_unit, check_fan_in, make_empty
from lcw_ops.reference import normalize_scale


class WeightNormLinear(nn.Module):
    """``nn.Linear`` with weight ``scale * weight / ||weight||``; see :func:`lcw_ops.functional.weight_norm_linear`.

    The layer starts with the initial weights of ``nn.Linear``, and with scale = ||weight||. A zero row is a unit of
    weight zero, and its weight and scale get zero gradients.

    Input (..., m = in_features) and output (..., n = out_features) have the parameters' dtype, or autocast's.

    Args:
        in_features: at least 1.
        out_features, bias, device, dtype: as in ``nn.Linear``.

    The parameters are weight (n, m), scale (n,), of any sign, and bias (n,) or None. In eval mode without gradients, on
    a CPU, the normalised weight is cached until weight or scale changes.

    Raises:
        ValueError: in_features below 1; in a forward pass, an input of the wrong shape.
        TypeError: in a forward pass, dtypes or devices that differ.

    Source: T. Salimans, D. P. Kingma, NeurIPS 2016, arXiv 1602.07868.
    """

    weight: nn.Parameter
    scale: nn.Parameter
    bias: nn.Parameter | None
    _derived: DerivedWeight

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        _make_weight_norm(self, (out_features, in_features), bias, device, dtype)

    @classmethod
    def from_linear(cls, layer: nn.Linear) -> "WeightNormLinear":
        """A layer with the outputs of a trained plain layer, up to rounding: its weight, and scale = ||weight||.

        Args:
            layer: its device, dtype and training mode are kept, and its frozen parameters stay frozen. The weight that
                it applies is converted, so it may be an :class:`~lcw_ops.nn.LCWLinear` or a parametrized layer.

        Raises:
            TypeError: not an ``nn.Linear``.
        """
        weight, bias = applied_parameters(f"{cls.__name__}.from_linear", layer, nn.Linear)
        made = make_empty(
            cls, layer.in_features, layer.out_features, bias is not None, device=weight.device, dtype=weight.dtype
        )
        return _fill_weight_norm(made.train(layer.training), weight, bias)

    def reset_parameters(self) -> None:
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]
        _reset_scale(self)

    def effective_weight(self) -> Tensor:
        """(out_features, in_features), rows of length |scale|."""
        return F.normalize_scale(self.weight, self.scale)

    def forward(self, input: Tensor) -> Tensor:
        weight = self._derived.kept(F.normalize_scale, self.training, self.weight, self.scale)
        if weight is not None and (self.bias is None or are_per_unit(weight, self.bias)):
            try:
                return nn.functional.linear(input, weight, self.bias)
            except (RuntimeError, TypeError):
                # F.weight_norm_linear below raises the error for the argument that does not fit.
                pass
        return F.weight_norm_linear(input, self.weight, self.scale, self.bias)

    def extra_repr(self) -> str:
        return nn.Linear.extra_repr(self)  # type: ignore[arg-type]


class _WeightNormConv(Convolution):
    """The code shared by the 1d, 2d and 3d layers."""

    weight: nn.Parameter
    scale: nn.Parameter
    bias: nn.Parameter | None
    _derived: DerivedWeight

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        arguments = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        super().__init__(self._plain(*arguments, device="meta", dtype=dtype))
        _make_weight_norm(self, (out_channels, *self._filter_shape), bias, device, dtype)

    @classmethod
    def from_conv(cls, layer: nn.Module) -> "_WeightNormConv":
        """A layer with the outputs of a trained plain layer, as in :meth:`WeightNormLinear.from_linear`."""
        weight, bias = applied_parameters(f"{cls.__name__}.from_conv", layer, cls._plain)
        made = make_empty(
            cls, **cls._arguments_of(layer), bias=bias is not None, device=weight.device, dtype=weight.dtype
        )
        return _fill_weight_norm(made.train(layer.training), weight, bias)

    def reset_parameters(self) -> None:
        self._plain.reset_parameters(self)
        _reset_scale(self)

    def effective_weight(self) -> Tensor:
        """(out_channels, in_channels / groups, *kernel_size), filters of length |scale|."""
        return self._filters(self.weight, self.scale)

    @staticmethod
    def _filters(weight: Tensor, scale: Tensor) -> Tensor:
        return F.normalize_scale(weight.flatten(1), scale).view(weight.shape)

    def forward(self, input: Tensor) -> Tensor:
        filters = self._derived.kept(self._filters, self.training, self.weight, self.scale)
        return self._conv_forward(input, self.effective_weight() if filters is None else filters, self.bias)


class WeightNormConv1d(_WeightNormConv):
    """``nn.Conv1d`` with weight normalization of each filter; see :class:`WeightNormConv2d`."""

    _plain = nn.Conv1d
    _conv_forward = nn.Conv1d._conv_forward


class WeightNormConv2d(_WeightNormConv):
    """``nn.Conv2d`` whose filters are ``scale * weight / ||weight||``, with the norm of each whole filter.

    Input (N, C_in, H, W) or (C_in, H, W), output as ``nn.Conv2d``'s. The notes of :class:`WeightNormLinear` on
    initialisation, on zero rows and on inference hold here too.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as in ``nn.Conv2d``.

    The parameters are weight and bias, in the shapes of ``nn.Conv2d``'s, and scale (C_out,).

    Raises:
        ValueError: empty filters, and the errors of ``nn.Conv2d``.

    Source: as :class:`WeightNormLinear`.
    """

    _plain = nn.Conv2d
    _conv_forward = nn.Conv2d._conv_forward


class WeightNormConv3d(_WeightNormConv):
    """``nn.Conv3d`` with weight normalization of each filter; see :class:`WeightNormConv2d`."""

    _plain = nn.Conv3d
    _conv_forward = nn.Conv3d._conv_forward


def _make_weight_norm(
    module: WeightNormLinear | _WeightNormConv, shape: tuple[int, ...], bias: bool, device, dtype
) -> None:
    check_fan_in(module, math.prod(shape[1:]))
    module.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
    module.scale = nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype))
    module.register_parameter("bias", nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype)) if bias else None)
    module._derived = DerivedWeight()
    module.reset_parameters()


@torch.no_grad()
def _reset_scale(module: WeightNormLinear | _WeightNormConv) -> None:
    rows = module.weight.flatten(1).to(torch.promote_types(module.weight.dtype, torch.float32))
    # The length as <w, w / ||w||>: no entry is squared, so no length overflows or underflows.
    module.scale.copy_((rows * normalize_scale(rows, rows.new_ones(len(rows)))).sum(1))


WeightNormLayer = TypeVar("WeightNormLayer", WeightNormLinear, _WeightNormConv)


@torch.no_grad()
def _fill_weight_norm(module: WeightNormLayer, weight: Tensor, bias: Tensor | None) -> WeightNormLayer:
    module.weight.copy_(weight)
    _reset_scale(module)
    for parameter in (module.weight, module.scale):
        parameter.requires_grad_(weight.requires_grad)
    if bias is not None and module.bias is not None:
        module.bias.copy_(bias).requires_grad_(bias.requires_grad)
    return module
