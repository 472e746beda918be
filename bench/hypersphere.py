"""GmP layers: y = r relu(x u^T + lambda), with a radius r and a location lambda for each unit.

A row of u is a unit's direction. It has length 1 and is given by angles t: u_k = cos t_k prod_{i<k} sin t_i. The
competitors are straightforward eager torch, torch.compile of it, and the plain layer. The directions are also measured
alone.
"""

import functools
import math

import torch
from torch import Tensor, nn

from lcw_ops import functional as F
from lcw_ops.bench.registry import EAGER, Case, Competitor, Run, ours
from lcw_ops.bench.unit_layers import (
    Layer,
    count_moved,
    count_product,
    make_case,
    rows_case,
    run_compiled,
    run_on_torch,
    run_passes,
)
from lcw_ops.nn import GmPConv2d
from lcw_ops.ops.hypersphere import NAME


def cases(device_type: str) -> list[Case]:
    if device_type == "cuda":
        layers = [(rows, 4096, 4096, torch.bfloat16) for rows in (1, 8, 32, 8192)]
        layers += [(rows, 1024, 1024, torch.float32) for rows in (8, 128, 1024)]
        directions = [(4096, 4096)]
        quick = (32, 1024, 1024, torch.bfloat16)
    else:
        layers = [(rows, 1024, 1024, torch.float32) for rows in (1, 8, 32, 128, 1024)]
        layers += [(rows, size, size, torch.float32) for size in (256, 4096) for rows in (8, 128, 1024)]
        layers += [(rows, 1024, 1024, torch.bfloat16) for rows in (8, 128)]
        # The second size is that of a convolution: 3x3 filters over 128 channels.
        directions = [(4096, 4096), (1024, 1152)]
        quick = (32, 256, 256, torch.float32)
    passes = (False, True)
    found = [_gmp_linear(device_type, *layer, backward) for layer in layers for backward in passes]
    found += [_directions(device_type, *size, backward) for size in directions for backward in passes]
    found += [_directions(device_type, 256, 1152, backward=True, quick=True)]
    found += [_gmp_linear(device_type, *quick, backward, quick=True) for backward in passes]
    if device_type == "cuda":
        return found
    return [*found, _convolution(device_type, 32, 64, 128, 32), _convolution(device_type, 4, 16, 32, 16, quick=True)]


def _gmp_linear(
    device_type: str,
    rows: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    backward: bool,
    quick: bool = False,
) -> Case:
    our_layer = functools.partial(F.gmp_linear, activation="relu")
    return _gmp_layer(
        name="GmP linear",
        shape={"M": rows, "in": in_features, "out": out_features},
        x_size=(rows, in_features),
        units=out_features,
        fan_in=in_features,
        our_layers=ours(NAME, device_type, functools.partial(run_on_torch, our_layer)),
        plain=Competitor("nn.Linear + relu (plain)", _plain_gmp, checked=False),
        dtype=dtype,
        backward=backward,
        quick=quick,
    )


def _convolution(
    device_type: str, samples: int, in_channels: int, out_channels: int, side: int, quick: bool = False
) -> Case:
    return _gmp_layer(
        name="GmP 3x3 convolution",
        shape={"samples": samples, "in": in_channels, "out": out_channels, "side": side},
        x_size=(samples, in_channels, side, side),
        units=out_channels,
        fan_in=9 * in_channels,
        our_layers=ours(NAME, device_type, _convolution_module),
        plain=Competitor("nn.Conv2d + relu (plain)", _plain_gmp, checked=False),
        dtype=torch.float32,
        backward=True,
        quick=quick,
    )


def _gmp_layer(
    name: str,
    shape: dict[str, int],
    x_size: tuple[int, ...],
    units: int,
    fan_in: int,
    our_layers: tuple[Competitor, ...],
    plain: Competitor,
    dtype: torch.dtype,
    backward: bool,
    quick: bool,
) -> Case:
    """A linear layer if ``x_size`` is (samples, inputs), a 3x3 convolution for (samples, channels, height, width)."""
    result = math.prod(x_size) // x_size[1] * units

    def draw(device: torch.device) -> list[Tensor]:
        # Take the angles of random directions: with angles drawn one by one, most of every row would vanish.
        angles = F.hypersphere_angles(torch.randn(units, fan_in, device=device))
        radius, location = torch.randn(units, device=device), 0.5 * torch.randn(units, device=device)
        return [torch.randn(x_size, device=device), angles, radius, location]

    def draw_cotangent(x: Tensor, angles: Tensor, radius: Tensor, location: Tensor) -> Tensor:
        # Near the relu's kink, rounding decides whether a gradient passes. So the cotangent is small where the
        # pre-activation is small.
        pre_activation = _pre_activation(x, _eager_direction(angles), location)
        return torch.randn_like(pre_activation) * pre_activation

    return make_case(
        stem="hypersphere",
        name=name,
        shape=shape,
        dtype=dtype,
        draw=draw,
        draw_cotangent=draw_cotangent,
        exact=functools.partial(_gmp, _exact_direction),
        competitors=(
            *our_layers,
            Competitor(EAGER, functools.partial(run_on_torch, _eager_gmp)),
            Competitor("torch.compile of eager", functools.partial(run_compiled, _eager_gmp), slow_start=True),
            plain,
        ),
        elements=count_moved(math.prod(x_size) + units * fan_in, result, backward),
        product=count_product(result, fan_in, backward),
        sincos=units * (fan_in - 1),
        backward=backward,
        quick=quick,
    )


def _directions(device_type: str, units: int, fan_in: int, backward: bool, quick: bool = False) -> Case:
    return rows_case(
        stem="hypersphere",
        name="direction of angles",
        units=units,
        fan_in=fan_in,
        draw=lambda device: [F.hypersphere_angles(torch.randn(units, fan_in, device=device))],
        exact=_exact_direction,
        competitors=(
            *ours(NAME, device_type, functools.partial(run_on_torch, F.hypersphere_direction)),
            Competitor(EAGER, functools.partial(run_on_torch, _eager_direction)),
            Competitor("torch.compile of eager", functools.partial(run_compiled, _eager_direction), slow_start=True),
        ),
        sincos=units * (fan_in - 1),
        backward=backward,
        quick=quick,
    )


def _eager_direction(angles: Tensor) -> Tensor:
    sine, cosine = angles.sin(), angles.cos()
    products = sine.cumprod(1)
    return torch.cat([cosine[:, :1], cosine[:, 1:] * products[:, :-1], products[:, -1:]], 1)


def _exact_direction(angles: Tensor) -> Tensor:
    """The float64 truth by a formula that no competitor uses: products as exponentials of sums of logarithms."""
    sine = angles.sin()
    products = sine.sign().cumprod(1) * sine.abs().log().cumsum(1).exp()
    ones = torch.ones_like(angles[:, :1])
    return torch.cat([ones, products], 1) * torch.cat([angles.cos(), ones], 1)


def _eager_gmp(x: Tensor, angles: Tensor, radius: Tensor, location: Tensor) -> Tensor:
    return _gmp(_eager_direction, x, angles, radius, location)


def _gmp(direction: Layer, x: Tensor, angles: Tensor, radius: Tensor, location: Tensor) -> Tensor:
    activated = _pre_activation(x, direction(angles), location).relu()
    return radius.view(-1, *[1] * (x.dim() - 2)) * activated


def _pre_activation(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer for rows of x, a 3x3 convolution for images; ``weight`` has one row per unit."""
    if x.dim() == 2:
        return nn.functional.linear(x, weight, bias)
    return nn.functional.conv2d(x, weight.view(-1, x.shape[1], 3, 3), bias, padding=1)


def _plain_gmp(inputs: dict) -> Run:
    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _pre_activation(x, weight, bias).relu()

    calls = [
        [x, _eager_direction(angles).detach().requires_grad_(), location] for x, angles, _, location in inputs["calls"]
    ]
    return run_on_torch(layer, inputs | {"calls": calls})


def _convolution_module(inputs: dict) -> Run:
    calls = []
    for x, *parameters in inputs["calls"]:
        module = GmPConv2d(x.shape[1], len(parameters[0]), 3, padding=1, activation="relu", device=x.device)
        parameters = [nn.Parameter(parameter.detach()) for parameter in parameters]
        module.angles, module.radius, module.location = parameters
        calls.append((functools.partial(module, x), [x, *parameters]))
    return run_passes(calls, inputs)
