"""One layer of every class that computes its weight: LCW, weight norm and GmP, linear and convolutions."""

from functools import partial

import torch

from lcw_ops import nn
from lcw_ops._layer_kinds import is_conv, is_linear

LINEARS = {
    "lcw": nn.LCWLinear,
    "lcw basis": partial(nn.LCWLinear, basis=True),
    "weight norm": nn.WeightNormLinear,
    "gmp": nn.GmPLinear,
}
CONVS = {
    f"{name}{rank}d": partial(getattr(nn, f"{prefix}Conv{rank}d"), **options)
    for rank in (1, 2, 3)
    for name, prefix, options in (
        ("lcw", "LCW", {}),
        ("lcw basis", "LCW", {"basis": True}),
        ("weight norm", "WeightNorm", {}),
        ("gmp", "GmP", {}),
    )
}
GMP = (nn.GmPLinear, nn.GmPConv1d, nn.GmPConv2d, nn.GmPConv3d)
WEIGHT_NORM = (nn.WeightNormLinear, nn.WeightNormConv1d, nn.WeightNormConv2d, nn.WeightNormConv3d)


def rank_of(layer):
    return len(layer.kernel_size) if is_conv(layer) else 0


def every_layer(**options):
    """One layer of each kind with parameters far from their initial values, and an input for it."""
    made = [(make(6, 5, **options), torch.randn(4, 6)) for make in LINEARS.values()]
    for make in CONVS.values():
        layer = make(4, 6, 3, groups=2, **options)
        made.append((layer, torch.randn(2, 4, *(5,) * rank_of(layer))))
    for layer, _ in made:
        drift_(layer)
    return made


def drift_(layer):
    """Parameters as after many steps of training: not those that an initialiser draws, and no row sums to zero."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter).mul_(0.5)).add_(0.2)
        if isinstance(layer, GMP):
            layer.radius.abs_()
    return layer


def apply_plain(layer, x, weight, bias):
    """The plain layer's function of this weight and bias."""
    if is_linear(layer):
        return torch.nn.functional.linear(x, weight, bias)
    return getattr(torch.nn.functional, f"conv{rank_of(layer)}d")(x, weight, bias, groups=layer.groups)
