"""The initialiser of linearly constrained weights."""

import math

import torch
from torch import Tensor

from lcw_ops._checks import accumulation_dtype, check_positive, check_shape
from lcw_ops.init._fill import check_fillable, fan_in, fill_
from lcw_ops.reference import activation_variance
from lcw_ops.reference.lps import Activation, check_activation


@torch.no_grad()
def lcw_(
    weight: Tensor,
    activation: Activation | None = "sigmoid",
    std: float = 1.0,
    basis: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill an LCW parameter with N(0, sv^2), so that pre-activations keep their standard deviation s over the layers.

    m sv^2 = s^2 / Var f(s Z), with the previous layer's activation f and Z ~ N(0, 1). The bias of an LCW layer starts
    at 0.

    Args:
        weight: (n, m, *k), or (n, m-1) with basis; m is the fan-in of the constrained weight. The tensor that an LCW
            layer trains, ``weight_u`` or ``weight_v``.
        activation: the previous layer's: a name, or any elementwise function of a tensor, whose variance is computed
            numerically. None for the first layer, on standardised data: m sv^2 = s^2. For data of another variance V,
            divide the weight by sqrt(V).
        std: s, the standard deviation of this layer's and the previous layer's pre-activations.
        basis: whether the weight is the paper's parametrization.
        generator: a torch.Generator, or None for torch's default. Numbers are drawn on its device.

    Returns:
        The weight.

    Raises:
        TypeError: a dtype that is not floating; an activation that does not return a tensor.
        ValueError: an unknown activation, one that is random or has no variance, a std outside [1e-4, 100], a rank
            below 2 (basis: other than 2), or a weight that is computed from other tensors, as ``layer.weight`` is.

    Source: derived here, not in the paper. For inputs a and a pre-activation z, E z^2 = m sv^2 Var(a) holds exactly in
    both parametrizations.
    """
    accumulation_dtype("lcw_", weight=weight)
    right, expected = (weight.dim() == 2, "(n, m-1)") if basis else (weight.dim() >= 2, "(n, m, *k)")
    check_shape("lcw_", "weight", weight, right, expected)
    check_fillable("lcw_", weight=weight)
    check_activation("lcw_", activation, None)
    check_positive("lcw_", "std", std)
    input_variance = 1.0 if activation is None else activation_variance(activation, std)
    scale = std / math.sqrt(input_variance * max(fan_in(weight) + basis, 1))
    return fill_(weight, lambda tensor: tensor.normal_(0, scale, generator=generator), generator)
