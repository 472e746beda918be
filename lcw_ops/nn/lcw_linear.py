"""Layers with linearly constrained weights (LCW): every unit's weights sum to zero.

A unit z = <w, a> + b whose weights w sum to zero has no activation shift: a constant added to all its inputs a changes
nothing. T. Kutsuna, "Linearly Constrained Weights: Reducing Activation Shift for Faster Training of Neural Networks",
ECML PKDD 2019, arXiv 2403.13833. The layers train an unconstrained parameter and compute w from it. In a convolution,
each filter is a unit.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lcw_ops import _torch, init
from lcw_ops import functional as F
from lcw_ops._checks import describe
from lcw_ops.nn._derived import DerivedWeight
from lcw_ops.nn._layers import (
    ConstrainedLayer,
    Convolution,
    applied_parameters,
    empty_to_buffer,
    in_format_of,
    make_empty,
    rename_parameters,
    sums_to_zero,
    warn_caller,
)
from lcw_ops.reference import lcw_coordinates, lcw_weight


class _LCW(ConstrainedLayer):
    """The code shared by all LCW layers: two parametrizations of rows that sum to zero."""

    _warned = False

    basis: bool
    bias: nn.Parameter | None
    weight_u: nn.Parameter
    weight_v: nn.Parameter

    @property
    def _trained_name(self) -> str:
        return "weight_v" if self.basis else "weight_u"

    @property
    def _parameter(self) -> Tensor:
        return self.weight_v if self.basis else self.weight_u

    def _weight_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _make_parameters(self, bias: bool, device, dtype) -> None:
        shape = self._weight_shape()
        fan_in = math.prod(shape[1:])
        if self.basis and fan_in == 0:
            raise ValueError(describe(type(self).__name__, "a unit", "has no inputs", "at least one for basis=True"))
        trained = (shape[0], fan_in - 1) if self.basis else shape
        tensor = torch.empty(trained, device=device, dtype=dtype)
        if self.basis and fan_in == 1:
            # Nothing is trained. FSDP2 and some optimizers fail on an empty parameter.
            self.register_buffer("weight_v", tensor)
        else:
            self.register_parameter(self._trained_name, nn.Parameter(tensor))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.lcw_(self._parameter, activation=None, basis=self.basis)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def _set_weight(self, weight: Tensor) -> None:
        weight = self._check_assigned("weight", weight, self._weight_shape())
        self._warn_of_projection(weight, "weight is set to")
        self._store(**{self._trained_name: self._coordinates(weight)})

    def _coordinates(self, weight: Tensor) -> Tensor:
        """The trained tensor from which the layer computes this weight, or its projection."""
        rows = weight.flatten(1).double()
        if self.basis:
            return lcw_coordinates(rows).to(weight.dtype)
        return lcw_weight(rows).view(weight.shape).to(weight.dtype)

    def _translate(self, foreign: dict[str, Any], missing: list[str]) -> dict[str, Tensor]:
        weight = foreign.pop("weight")
        of_old_basis = (self._weight_shape()[0], math.prod(self._weight_shape()[1:]) - 1)
        if self.basis and isinstance(weight, Tensor) and tuple(weight.shape) == of_old_basis:
            came = "the state dict's weight is taken for the parameter of lcw_ops 0.1.0, because it has its shape"
            self._warn_once(f"{came} {of_old_basis}. A plain weight has the shape {self._weight_shape()}.")
            return {"weight_v": weight}
        plain = self._check_assigned("weight", weight, self._weight_shape())
        if self.basis:
            self._warn_of_projection(plain, "the state dict's weight has", ". That is another function")
            return {"weight_v": self._coordinates(plain)}
        # Version 0.1.0 called the trained tensor "weight". A plain weight goes to the same place: it is projected.
        exception = ". That is another function, unless an LCW layer of lcw_ops 0.1.0 wrote the state dict"
        self._warn_of_projection(plain, "the state dict's weight has", exception)
        return {"weight_u": weight}

    def _warn_of_projection(self, weight: Tensor, came: str, exception: str = "") -> None:
        if self._warned or not _torch.has_values(weight) or weight.dim() < 2 or not weight.is_floating_point():
            return
        if not sums_to_zero(weight.detach().flatten(1).double(), weight.dtype):
            self._warn_once(
                f"{came} rows that do not sum to zero. The layer applies the projection, the rows minus their "
                f"means{exception}."
            )

    def _warn_once(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warn_caller(f"{type(self).__name__}: {message}")

    def __setstate__(self, state: dict) -> None:
        rename_parameters(state, {"weight": "weight_v" if state["basis"] else "weight_u"})
        empty_to_buffer(state, "weight_v")
        super().__setstate__(state)


class LCWLinear(_LCW):
    """``nn.Linear`` whose weight has rows that sum to zero; see :func:`lcw_ops.functional.lcw_linear`.

    Input (..., in_features), output (..., out_features). A unit's weights are w = P v, with a fixed matrix P and a row
    v of the trained parameter, and <w, x> = <v, P^T x>. So each call can project the weight or the input, and projects
    the smaller one. Nothing is cached, so nothing can be stale.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        basis: whether to use the paper's parametrization, w = B v, where the columns of B are an orthonormal basis of
            the vectors that sum to zero. False is the centred form, w = u - mean(u). Under SGD with momentum and weight
            decay, w takes the same steps in both forms.

    ``weight`` (out_features, in_features) is computed at every reading, and gradients flow through it. ``layer.weight =
    tensor`` sets the trained parameter, which is ``weight_u`` (out_features, in_features) in the centred form and
    ``weight_v`` (out_features, in_features - 1) with ``basis``. A tensor whose rows do not sum to zero is projected,
    with one warning per layer. An edit of ``weight`` in place changes nothing.

    :func:`lcw_ops.init.lcw_` draws the initial weights from N(0, 1 / in_features), which suits standardised inputs. In
    a deep net, call it again on the trained parameter and name the previous layer's activation function. The bias
    starts at 0.

    State dicts of ``nn.Linear`` and of version 0.1.0 load.

    Raises:
        ValueError: in a forward pass, an input of the wrong shape.
        TypeError: in a forward pass, dtypes or devices that differ.

    Source: T. Kutsuna, ECML PKDD 2019, arXiv 2403.13833; the centred form is ours.
    """

    _plain = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        basis: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.basis = basis
        self._make_parameters(bias, device, dtype)

    @classmethod
    def from_linear(cls, layer: nn.Module, basis: bool = False) -> "LCWLinear":
        """A layer with the weight of a trained layer, projected: minus its row means. Its outputs are others.

        For inputs x, the outputs change by -mean(w) * sum(x) per unit. :func:`lcw_ops.convert` can let the bias take up
        the mean of that.

        Args:
            layer: a linear layer, plain, with torch's weight norm, or ours. Its device, dtype and training mode are
                kept, its frozen parameters stay frozen, and if it has no bias, the new layer has none.
            basis: as in the constructor.

        Raises:
            TypeError: not a linear layer.
            ValueError: the layer applies an activation, which would be lost; or its output does not follow from its
                weight and bias alone, because of a ``forward`` of its own, another constraint, or pruning.
        """
        weight, bias = applied_parameters(f"{cls.__name__}.from_linear", layer, nn.Linear)
        made = make_empty(
            cls,
            weight.shape[1],
            weight.shape[0],
            bias is not None,
            basis,
            device=weight.device,
            dtype=weight.dtype,
        )
        return _fill_lcw(made.train(layer.training), weight, bias)

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def _weight(self) -> Tensor:
        return F.lcw_weight(self._parameter, self.basis)

    def forward(self, input: Tensor) -> Tensor:
        return F.lcw_linear(input, self._parameter, self.bias, self.basis)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, basis={self.basis}"


class _LCWConv(_LCW, Convolution):
    """The code shared by the 1d, 2d and 3d layers."""

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
        *,
        basis: bool = False,
    ) -> None:
        arguments = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        super().__init__(self._plain(*arguments, device="meta", dtype=dtype))
        self.basis = basis
        self._derived = DerivedWeight()
        self._make_parameters(bias, device, dtype)

    @classmethod
    def from_conv(cls, layer: nn.Module, basis: bool = False) -> "_LCWConv":
        """A layer with the filters of a trained convolution, projected, as in :meth:`LCWLinear.from_linear`."""
        weight, bias = applied_parameters(f"{cls.__name__}.from_conv", layer, cls._plain)
        options = cls._arguments_of(layer)
        made = make_empty(cls, **options, bias=bias is not None, basis=basis, device=weight.device, dtype=weight.dtype)
        return _fill_lcw(made.train(layer.training), weight, bias)

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, *self._filter_shape)

    def _weight(self) -> Tensor:
        kept = self._derived.kept(self._constrain, self.training, self._parameter)
        return self._constrain(self._parameter) if kept is None else kept.clone()

    def _constrain(self, trained: Tensor) -> Tensor:
        constrained = F.lcw_weight(trained, self.basis)
        return constrained.view(-1, *self._filter_shape) if self.basis else in_format_of(constrained, trained)

    def forward(self, input: Tensor) -> Tensor:
        weight = self._derived.get(self._parameter, self._constrain, self.training)
        return self._conv_forward(input, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, basis={self.basis}"


class LCWConv1d(_LCWConv):
    """``nn.Conv1d`` whose filters sum to zero. It takes ``basis`` as well; see :class:`LCWConv2d`."""

    _plain = nn.Conv1d
    _conv_forward = nn.Conv1d._conv_forward


class LCWConv2d(_LCWConv):
    """``nn.Conv2d`` whose filters sum to zero, each over the kernel and the input channels of its group.

    Input (N, C_in, H, W) or (C_in, H, W), output as ``nn.Conv2d``'s. Zero padding differs from the inputs' mean, so an
    activation shift remains at the border. In eval mode without gradients, on a CPU, the constrained weight is cached
    until the parameter changes.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as in ``nn.Conv2d``.
        basis: whether to use the paper's parametrization, which trains ``weight_v`` (C_out, m - 1) with m = C_in /
            groups * kH * kW. False is the centred form, which trains ``weight_u`` in the shape of ``nn.Conv2d``'s
            weight.

    The notes of :class:`LCWLinear` on initial values, on ``weight`` and on state dicts hold here too.

    Raises:
        ValueError: ``basis=True`` with empty filters, and the errors of ``nn.Conv2d``.

    Source: as :class:`LCWLinear`; taking a filter as the unit is ours.
    """

    _plain = nn.Conv2d
    _conv_forward = nn.Conv2d._conv_forward


class LCWConv3d(_LCWConv):
    """``nn.Conv3d`` whose filters sum to zero. It takes ``basis`` as well; see :class:`LCWConv2d`."""

    _plain = nn.Conv3d
    _conv_forward = nn.Conv3d._conv_forward


@torch.no_grad()
def _fill_lcw(module: Any, weight: Tensor, bias: Tensor | None) -> Any:
    module._parameter.copy_(module._coordinates(weight))
    if module._trained_name in module._parameters:
        module._parameter.requires_grad_(weight.requires_grad)
    if bias is not None:
        module.bias.copy_(bias).requires_grad_(bias.requires_grad)
    return module
