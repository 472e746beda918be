"""Layers with weight normalization: a row or filter of the weight is s v / ||v||, with trained s and v.

T. Salimans, D. P. Kingma, "Weight Normalization", NeurIPS 2016, arXiv 1602.07868.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lcw_ops import _torch
from lcw_ops import functional as F
from lcw_ops._checks import describe
from lcw_ops.nn._derived import DerivedWeight
from lcw_ops.nn._layers import (
    ConstrainedLayer,
    Convolution,
    applied_parameters,
    are_per_unit,
    check_fan_in,
    in_format_of,
    make_empty,
    rename_parameters,
)
from lcw_ops.reference import normalize_scale


class _WeightNorm(ConstrainedLayer):
    """The code shared by all weight-norm layers."""

    _FOREIGN = ("weight", "scale", "parametrizations.weight.original0", "parametrizations.weight.original1")

    weight_v: nn.Parameter
    weight_g: nn.Parameter
    bias: nn.Parameter | None
    _derived: DerivedWeight

    def _make_parameters(self, shape: tuple[int, ...], bias: bool, device, dtype) -> None:
        check_fan_in(self, math.prod(shape[1:]))
        ones = (1,) * (len(shape) - 1)
        self.weight_v = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.weight_g = nn.Parameter(torch.empty(shape[0], *ones, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype)) if bias else None
        )
        self._derived = DerivedWeight()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        # As torch's layers do: weights and bias from U(+-1 / sqrt(fan-in)).
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(math.prod(self.weight_v.shape[1:]))
            nn.init.uniform_(self.bias, -bound, bound)
        self.weight_g.copy_(_lengths(self.weight_v))

    def _weight(self) -> Tensor:
        kept = self._derived.kept(self._normalise, self.training, self.weight_v, self.weight_g)
        return self._normalise(self.weight_v, self.weight_g) if kept is None else kept.clone()

    @staticmethod
    def _normalise(weight_v: Tensor, weight_g: Tensor) -> Tensor:
        return F.normalize_scale(weight_v, weight_g)

    @torch.no_grad()
    def _set_weight(self, weight: Tensor) -> None:
        weight = self._check_assigned("weight", weight, tuple(self.weight_v.shape))
        self._store(weight_v=weight, weight_g=_finite_lengths(f"{type(self).__name__}.weight", weight))

    def _translate(self, foreign: dict[str, Any], missing: list[str]) -> dict[str, Tensor]:
        for g, v in (("parametrizations.weight.original0", "parametrizations.weight.original1"), ("scale", "weight")):
            if g in foreign and v in foreign:
                weight_g, weight_v = foreign.pop(g), foreign.pop(v)
                if g == "scale" and isinstance(weight_g, Tensor):
                    # Version 0.1.0: the scale was a vector.
                    weight_g = weight_g.reshape(-1, *(1,) * (self.weight_v.dim() - 1))
                return {"weight_g": weight_g, "weight_v": weight_v}
        if "weight" not in foreign:
            return {}
        weight = self._check_assigned("weight", foreign.pop("weight"), tuple(self.weight_v.shape))
        lengths = _finite_lengths(f"{type(self).__name__}.load_state_dict", weight)
        return {"weight_g": lengths, "weight_v": weight}

    def __setstate__(self, state: dict) -> None:
        rename_parameters(state, {"weight": "weight_v", "scale": "weight_g"})
        weight_v, weight_g = (state["_parameters"].get(name) for name in ("weight_v", "weight_g"))
        if weight_v is not None and weight_g is not None and weight_g.dim() == 1:
            # The object stays, because an optimizer may hold it.
            weight_g.data = weight_g.detach().view(-1, *(1,) * (weight_v.dim() - 1))
        super().__setstate__(state)


class WeightNormLinear(_WeightNorm):
    """``nn.Linear`` with weight ``g v / ||v||``; see :func:`lcw_ops.functional.weight_norm_linear`.

    The layer starts with the initial weights of ``nn.Linear``, and with g = ||v||. A zero row is a unit of weight zero,
    and its v and g get zero gradients.

    Input (..., m = in_features) and output (..., n = out_features) have the parameters' dtype, or autocast's.

    Args:
        in_features: at least 1.
        out_features, bias, device, dtype: as in ``nn.Linear``.

    The parameters are weight_v (n, m), weight_g (n, 1), of any sign, and bias (n,) or None, as with
    ``torch.nn.utils.weight_norm``. ``weight`` (n, m) is computed at every reading, and gradients flow through it.
    ``layer.weight = tensor`` sets v to the tensor and g to its lengths; an edit of ``weight`` in place changes nothing.
    In eval mode without gradients, on a CPU, the normalised weight is cached until v or g changes.

    State dicts of ``nn.Linear``, of torch's weight norm in both forms, and of version 0.1.0 load.

    Raises:
        ValueError: in_features below 1; in a forward pass, an input of the wrong shape.
        TypeError: in a forward pass, dtypes or devices that differ.

    Source: T. Salimans, D. P. Kingma, NeurIPS 2016, arXiv 1602.07868.
    """

    _plain = nn.Linear

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
        self._make_parameters((out_features, in_features), bias, device, dtype)

    @classmethod
    def from_linear(cls, layer: nn.Module) -> "WeightNormLinear":
        """A layer with the outputs of a trained layer, up to rounding: v is its weight, and g = ||v||.

        Args:
            layer: a linear layer, plain, with torch's weight norm, or ours. Its device, dtype and training mode are
                kept, and its frozen parameters stay frozen.

        Raises:
            TypeError: not a linear layer.
            ValueError: the layer applies an activation, which would be lost; or its output does not follow from its
                weight and bias alone, because of a ``forward`` of its own, another constraint, or pruning.
        """
        weight, bias = applied_parameters(f"{cls.__name__}.from_linear", layer, nn.Linear)
        units, fan_in = weight.shape
        made = make_empty(cls, fan_in, units, bias is not None, device=weight.device, dtype=weight.dtype)
        return _fill_weight_norm(made.train(layer.training), weight, bias)

    def forward(self, input: Tensor) -> Tensor:
        # nn.Module finds a parameter in microseconds, and a parametrization computes it, so read each of them once.
        weight_v, weight_g, bias = self.weight_v, self.weight_g, self.bias
        weight = self._derived.kept(self._normalise, self.training, weight_v, weight_g)
        if weight is not None and (bias is None or are_per_unit(weight, bias)):
            try:
                return nn.functional.linear(input, weight, bias)
            except (RuntimeError, TypeError):
                # F.weight_norm_linear below raises the error for the argument that does not fit.
                pass
        return F.weight_norm_linear(input, weight_v, weight_g, bias)

    def extra_repr(self) -> str:
        return nn.Linear.extra_repr(self)  # type: ignore[arg-type]


class _WeightNormConv(_WeightNorm, Convolution):
    """The code shared by the 1d, 2d and 3d layers."""

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
        self._make_parameters((out_channels, *self._filter_shape), bias, device, dtype)

    @classmethod
    def from_conv(cls, layer: nn.Module) -> "_WeightNormConv":
        """A layer with the outputs of a trained convolution, as in :meth:`WeightNormLinear.from_linear`."""
        weight, bias = applied_parameters(f"{cls.__name__}.from_conv", layer, cls._plain)
        made = make_empty(
            cls, **cls._arguments_of(layer), bias=bias is not None, device=weight.device, dtype=weight.dtype
        )
        return _fill_weight_norm(made.train(layer.training), weight, bias)

    @staticmethod
    def _normalise(weight_v: Tensor, weight_g: Tensor) -> Tensor:
        filters = F.normalize_scale(weight_v.flatten(1), weight_g).view(weight_v.shape)
        return in_format_of(filters, weight_v)

    def forward(self, input: Tensor) -> Tensor:
        filters = self._derived.kept(self._normalise, self.training, self.weight_v, self.weight_g)
        if filters is None:
            filters = self._normalise(self.weight_v, self.weight_g)
        return self._conv_forward(input, filters, self.bias)


class WeightNormConv1d(_WeightNormConv):
    """``nn.Conv1d`` with weight normalization of each filter; see :class:`WeightNormConv2d`."""

    _plain = nn.Conv1d
    _conv_forward = nn.Conv1d._conv_forward


class WeightNormConv2d(_WeightNormConv):
    """``nn.Conv2d`` whose filters are ``g v / ||v||``, with the norm of each whole filter.

    Input (N, C_in, H, W) or (C_in, H, W), output as ``nn.Conv2d``'s. The notes of :class:`WeightNormLinear` on
    initialisation, on zero rows, on ``weight``, on state dicts and on inference hold here too.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as in ``nn.Conv2d``.

    The parameters are weight_v and bias, in the shapes of ``nn.Conv2d``'s, and weight_g (C_out, 1, 1, 1).

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


@torch.no_grad()
def _lengths(weight: Tensor) -> Tensor:
    """The length of every row or filter, in torch's shape (n, 1, ...)."""
    rows: Any = weight.detach().flatten(1)
    if _torch.has_dtensor(rows):
        # A rank may hold no column, and then torch raises on that rank alone, while the others wait for it.
        rows = rows.redistribute(placements=[torch.distributed.tensor.Replicate()] * rows.device_mesh.ndim)
    if weight.dtype == torch.float64:
        # <w, w / ||w||>: no entry is squared, so no length overflows or underflows.
        lengths = (rows * normalize_scale(rows, rows.new_ones(len(rows)))).sum(1)
    else:
        # In float64, no square of a number of fewer bits overflows or underflows.
        lengths = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return lengths.view(-1, *(1,) * (weight.dim() - 1)).to(weight.dtype)


def _finite_lengths(function: str, weight: Tensor) -> Tensor:
    lengths = _lengths(weight)
    if not _torch.is_traced() and _torch.has_values(lengths) and not lengths.isfinite().all():
        units = (~lengths.isfinite()).flatten().nonzero().flatten().tolist()
        raise ValueError(describe(function, f"units {units} of weight", "have no finite length", "finite weights"))
    return lengths


@torch.no_grad()
def _fill_weight_norm(module: Any, weight: Tensor, bias: Tensor | None) -> Any:
    module.weight_v.copy_(weight)
    module.weight_g.copy_(_finite_lengths(type(module).__name__, weight))
    for parameter in (module.weight_v, module.weight_g):
        parameter.requires_grad_(weight.requires_grad)
    if bias is not None:
        module.bias.copy_(bias).requires_grad_(bias.requires_grad)
    return module
