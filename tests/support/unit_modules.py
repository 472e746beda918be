"""Layers of GmP and weight norm with inputs, for the tests of both stems' modules."""

import copy
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from lcw_ops import nn
from support.numerics import assert_as_exact_as_eager

RANKS = (1, 2, 3)
GMP_CONVS = (nn.GmPConv1d, nn.GmPConv2d, nn.GmPConv3d)
WEIGHT_NORM_CONVS = (nn.WeightNormConv1d, nn.WeightNormConv2d, nn.WeightNormConv3d)
PLAIN_CONVS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
FUNCTIONAL_CONVS = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)
EPS = 2**-52
CONV_OPTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same"},
    {"padding": "valid", "bias": False},
    {"padding": "same", "dilation": 2, "padding_mode": "reflect"},
    {"padding": 2, "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "replicate", "stride": 2},
    {"groups": 4, "padding": "same"},
    {"groups": 2, "stride": 2, "padding": 1, "dilation": 2, "bias": False},
]


def draw_per_unit_(layer):
    """Draw radii of both signs, and locations and scales that differ from their initial values."""
    parameters = dict(layer.named_parameters())
    for name in ("radius", "location", "weight_g", "bias"):
        if name in parameters:
            torch.nn.init.normal_(parameters[name])
    return layer


def gmp_layers(**options):
    """One layer of each kind, with its input."""
    image = (2, 4, 7, 8)
    made = [
        (nn.GmPLinear(6, 5, **options), (4, 6)),
        (nn.GmPLinear(6, 5, activation="relu", **options), (4, 6)),
        (nn.GmPConv1d(4, 6, 3, activation="relu", **options), (2, 4, 9)),
        (nn.GmPConv2d(4, 6, 3, **options), image),
        (nn.GmPConv2d(4, 6, 3, activation="relu", groups=2, **options), image),
        (nn.GmPConv3d(4, 6, (1, 2, 3), **options), (2, 4, 3, 4, 5)),
    ]
    return with_inputs(made, options)


def weight_norm_layers(**options):
    """One layer of each kind, with its input."""
    made = [
        (nn.WeightNormLinear(6, 5, **options), (4, 6)),
        (nn.WeightNormConv1d(4, 6, 3, **options), (2, 4, 9)),
        (nn.WeightNormConv2d(4, 6, 3, groups=2, **options), (2, 4, 7, 8)),
        (nn.WeightNormConv3d(4, 6, (1, 2, 3), **options), (2, 4, 3, 4, 5)),
    ]
    return with_inputs(made, options)


def with_inputs(made, options):
    return [(draw_per_unit_(layer), torch.randn(shape, dtype=options.get("dtype"))) for layer, shape in made]


class Stem(NamedTuple):
    """The layers of one method."""

    # The function that a linear layer calls, which its messages name.
    op: str
    linear: type
    convs: tuple[type, ...]
    # options -> a layer of each kind, with its input
    layers: Callable


GMP = Stem("gmp_linear", nn.GmPLinear, GMP_CONVS, gmp_layers)
WEIGHT_NORM = Stem("weight_norm_linear", nn.WeightNormLinear, WEIGHT_NORM_CONVS, weight_norm_layers)


def magnitude(layer, x):
    """The scale of the roundings: for each output, the sum of the sizes of its products, in float64."""
    layer, x = copy.deepcopy(layer).double(), x.double().abs()
    is_gmp = isinstance(layer, (nn.GmPLinear, *GMP_CONVS))
    weight = layer.effective_weight().detach().abs()
    bias = (layer.radius * layer.location if is_gmp else layer.bias).detach().abs()
    if x.dim() == 2:
        return torch.nn.functional.linear(x, weight, bias)
    return FUNCTIONAL_CONVS[x.dim() - 3](x, weight, bias, groups=layer.groups)


def assert_within(layer, x, actual, expected, roundings, unit):
    """Allow this number of roundings of relative size ``unit`` in every product of an output."""
    allowed = roundings * unit * magnitude(layer, x)
    assert actual.shape == expected.shape
    assert ((actual.double() - expected.double()).abs() <= allowed).all()


def weight_norm(x, weight, scale, bias, multiply):
    rows = weight.flatten(1)
    unit = rows / rows.norm(dim=1, keepdim=True)
    return multiply(x, (scale.view(-1, 1) * unit).view(weight.shape), bias)


def assert_exact(draw, formula, parameters, dtype=torch.float32, eager_formula=None):
    """Output and gradients in float64 agree with the formula; the output in ``dtype`` obeys docs/numerics.md.

    draw(dtype) gives a layer and its input. eager_formula replaces the formula if plain torch would compute something
    else. The ops' own tests judge the gradients by the rule: with a few numbers the largest error is a matter of luck.
    """

    def arguments(layer, x, dtype):
        given = (x, *(getattr(layer, name) for name in parameters))
        return [tensor if tensor is None else tensor.detach().to(dtype).requires_grad_() for tensor in given]

    layer, x = draw(torch.float64)
    copies = arguments(layer, x, torch.float64)
    expected = formula(*copies)
    grad_output = torch.randn_like(expected)
    expected.backward(grad_output)
    output = layer(x.requires_grad_())
    output.backward(grad_output)
    # Sums of at most 2 x 9 x 8 x 7 products, each below 5 x 5 x 4, in two orders.
    tolerance = 2 * 1008 * 100 * EPS
    torch.testing.assert_close(output, expected, rtol=0, atol=tolerance)
    for name, actual, copied in zip(
        ("x", *parameters), (x, *map(partial(getattr, layer), parameters)), copies, strict=True
    ):
        if actual is not None and actual.requires_grad:
            torch.testing.assert_close(actual.grad, copied.grad, rtol=0, atol=tolerance, msg=name)
    results = []
    # Several draws, because the largest error of one is a matter of luck.
    for layer, x in (draw(dtype) for _ in range(4)):
        output = layer(x).detach()
        assert output.dtype == dtype
        eager = (eager_formula or formula)(*arguments(layer, x, dtype)).detach()
        results.append((output, eager, formula(*arguments(layer, x, torch.float64)).detach()))
    assert_as_exact_as_eager("output", *(torch.stack(kind) for kind in zip(*results, strict=True)))


def torchs_product(rank, options):
    """A function of x, filters and bias that is torch's own convolution, and the torch layer that computes it."""
    plain = PLAIN_CONVS[rank - 1](4, 8, 3, device="meta", **options)

    def multiply(x, filters, bias):
        return plain._conv_forward(x, filters.reshape(plain.weight.shape), bias)

    return multiply, plain


def trained_linear(in_features, out_features=40, bias=True):
    """A linear layer whose weights have every sign pattern in the last two components, and lengths 1e-200 to 1e200."""
    layer = torch.nn.Linear(in_features, out_features, bias, dtype=torch.float64)
    with torch.no_grad():
        torch.nn.init.normal_(layer.weight)
        layer.weight.mul_(10.0 ** torch.linspace(-200, 200, out_features, dtype=torch.float64)[:, None])
        if bias:
            layer.bias.normal_().mul_(layer.weight.norm(dim=1).clamp(1e-150, 1e150))
        signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=min(2, in_features))), dtype=torch.float64)
        layer.weight[: len(signs), -signs.shape[1] :] = layer.weight[: len(signs), -signs.shape[1] :].abs() * signs
    return layer


def assert_rows_close(actual, expected, fan_in, bias=None):
    """Each angle is off by a few ulp of pi. A row is off by at most sqrt(fan_in) times that, relative to its length."""
    length = expected.abs().amax(-1, keepdim=True)
    assert ((actual - expected).abs() <= 32 * math.sqrt(fan_in) * EPS * length).all()
