"""Layers with linearly constrained weights (LCW): every unit's weights sum to zero.

A unit z = <w, a> + b whose weights w sum to zero has no activation shift: a constant added to all its inputs a changes
nothing. T. Kutsuna, "Linearly Constrained Weights: Reducing Activation Shift for Faster Training of Neural Networks",
ECML PKDD 2019, arXiv 2403.13833. The layers train an unconstrained parameter and compute w from it. In a convolution,
each filter is a unit.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lcw_ops import functional as F
from lcw_ops import init
from lcw_ops._checks import describe
from lcw_ops.nn._derived import DerivedWeight


class LCWLinear(nn.Linear):
    """``nn.Linear`` whose effective weight has rows that sum to zero; see :func:`lcw_ops.functional.lcw_linear`.

    Input (..., in_features), output (..., out_features). ``effective_weight()`` is the weight that is applied.
    A unit's weights are w = P v, with a fixed matrix P and a row v of the parameter, and <w, x> = <v, P^T x>. So each
    call can project the weight or the input, and projects the smaller one. Nothing is cached, so nothing can be stale.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        basis: whether to use the paper's parametrization, w = B v, where the columns of B are an orthonormal basis of
            the vectors that sum to zero, and ``weight`` is (out_features, in_features - 1). False is the centred form,
            w = v - mean(v). Its state_dict has the keys and shapes of ``nn.Linear``'s. Under SGD with momentum and
            weight decay, w takes the same steps in both forms.

    :func:`lcw_ops.init.lcw_` draws the initial weights from N(0, 1 / in_features), which suits standardised inputs. In
    a deep net, call it again and name the previous layer's activation function. The bias starts at 0.

    Raises:
        ValueError: in a forward pass, an input of the wrong shape.
        TypeError: in a forward pass, dtypes or devices that differ.

    Source: T. Kutsuna, ECML PKDD 2019, arXiv 2403.13833; the centred form is ours.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        basis: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.basis = basis
        super().__init__(in_features, out_features, bias, device, dtype)
        _make_parameters(self)

    def reset_parameters(self) -> None:
        _reset_parameters(self)

    def effective_weight(self) -> Tensor:
        """(out_features, in_features), rows that sum to zero."""
        return F.lcw_weight(self.weight, self.basis)

    def forward(self, input: Tensor) -> Tensor:
        return F.lcw_linear(input, self.weight, self.bias, self.basis)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, basis={self.basis}"


def _takes_arguments_of(plain: type[nn.Module]) -> Callable[[Callable], Callable]:
    """Give ``__init__`` the signature of ``plain.__init__`` plus ``basis``, for help() and torch.nn.utils.skip_init."""

    def decorate(init: Callable) -> Callable:
        arguments = inspect.signature(plain.__init__)
        basis = inspect.signature(init).parameters["basis"]
        together = arguments.replace(parameters=[*arguments.parameters.values(), basis])
        init.__signature__ = together  # type: ignore[attr-defined]
        return init

    return decorate


class _LCWConv(nn.modules.conv._ConvNd):
    """The code shared by the 1d, 2d and 3d layers. torch's classes do the rest."""

    def __init__(self, *args, basis: bool = False, **kwargs) -> None:
        self.basis = basis
        super().__init__(*args, **kwargs)
        self._filter_shape = tuple(self.weight.shape[1:])
        self._derived = DerivedWeight()
        _make_parameters(self)

    def reset_parameters(self) -> None:
        _reset_parameters(self)

    def effective_weight(self) -> Tensor:
        """(out_channels, in_channels / groups, *kernel_size); every filter sums to zero."""
        return self._constrain(self.weight)

    def _constrain(self, weight: Tensor) -> Tensor:
        constrained = F.lcw_weight(weight, self.basis)
        return constrained.view(-1, *self._filter_shape) if self.basis else constrained

    def forward(self, input: Tensor) -> Tensor:
        weight = self._derived.get(self.weight, self._constrain, self.training)
        return self._conv_forward(input, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, basis={self.basis}"


class LCWConv1d(_LCWConv, nn.Conv1d):
    """``nn.Conv1d`` whose filters sum to zero. It takes ``basis`` as well; see :class:`LCWConv2d`."""

    @_takes_arguments_of(nn.Conv1d)
    def __init__(self, *args, basis: bool = False, **kwargs) -> None:
        super().__init__(*args, basis=basis, **kwargs)


class LCWConv2d(_LCWConv, nn.Conv2d):
    """``nn.Conv2d`` whose filters sum to zero, each over the kernel and the input channels of its group.

    Input (N, C_in, H, W) or (C_in, H, W), output as ``nn.Conv2d``'s. Zero padding differs from the inputs' mean, so an
    activation shift remains at the border. In eval mode without gradients, on a CPU, the constrained weight is cached
    until the parameter changes.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as in ``nn.Conv2d``.
        basis: whether to use the paper's parametrization, ``weight`` (C_out, m - 1) with m = C_in / groups * kH * kW.
            False is the centred form, whose state_dict has the keys and shapes of ``nn.Conv2d``'s.

    Weights and bias start as in :class:`LCWLinear`.

    Raises:
        ValueError: ``basis=True`` with empty filters, and the errors of ``nn.Conv2d``.

    Source: as :class:`LCWLinear`; taking a filter as the unit is ours.
    """

    @_takes_arguments_of(nn.Conv2d)
    def __init__(self, *args, basis: bool = False, **kwargs) -> None:
        super().__init__(*args, basis=basis, **kwargs)


class LCWConv3d(_LCWConv, nn.Conv3d):
    """``nn.Conv3d`` whose filters sum to zero. It takes ``basis`` as well; see :class:`LCWConv2d`."""

    @_takes_arguments_of(nn.Conv3d)
    def __init__(self, *args, basis: bool = False, **kwargs) -> None:
        super().__init__(*args, basis=basis, **kwargs)


def _make_parameters(module: Any) -> None:
    """In the basis form, make ``weight`` (units, m - 1), where m is the number of a unit's (flattened) inputs."""
    if module.basis:
        weight = module.weight
        if math.prod(weight.shape[1:]) == 0:
            raise ValueError(describe(type(module).__name__, "a unit", "has no inputs", "at least one for basis=True"))
        module.weight = nn.Parameter(weight.new_empty(weight.shape[0], math.prod(weight.shape[1:]) - 1))
        module.reset_parameters()


def _reset_parameters(module: Any) -> None:
    # torch's constructor calls this too, before the parameter of the basis form exists.
    init.lcw_(module.weight, activation=None, basis=module.basis and module.weight.dim() == 2)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
