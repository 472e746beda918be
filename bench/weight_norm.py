"""Weight normalization: y = x (s v / ||v||)^T + b, with a row v of the weight and a scale s for each unit.

The competitors are straightforward eager torch, torch.compile of it, torch's own weight norm, and the plain layer. The
normalised rows are also measured alone.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lcw_ops import functional as F
from lcw_ops.bench.registry import EAGER, Case, Competitor, Run, ours
from lcw_ops.bench.unit_layers import (
    count_moved,
    count_product,
    make_case,
    rows_case,
    run_compiled,
    run_on_torch,
    run_passes,
)
from lcw_ops.nn import WeightNormConv2d
from lcw_ops.ops.weight_norm import NAME

# The tensors that torch's parametrization trains: the scale, and the weight that is normalised.
TORCH_NAMES = ("parametrizations.weight.original0", "parametrizations.weight.original1")


def cases(device_type: str) -> list[Case]:
    if device_type == "cuda":
        layers = [(rows, 4096, 4096, torch.bfloat16) for rows in (1, 8, 32, 8192)]
        layers += [(rows, 1024, 1024, torch.float32) for rows in (8, 128, 1024)]
        sizes = [(4096, 4096)]
        quick = (32, 1024, 1024, torch.bfloat16)
    else:
        layers = [(rows, 1024, 1024, torch.float32) for rows in (1, 8, 32, 128, 1024)]
        layers += [(rows, size, size, torch.float32) for size in (256, 4096) for rows in (8, 128)]
        # The second size is that of a convolution: 3x3 filters over 128 channels.
        sizes = [(4096, 4096), (1024, 1152)]
        quick = (32, 256, 256, torch.float32)
    passes = (False, True)
    found = [_weight_norm_linear(device_type, *layer, backward) for layer in layers for backward in passes]
    found += [_normalized_rows(device_type, *size, backward) for size in sizes for backward in passes]
    found += [_normalized_rows(device_type, 256, 1152, backward=True, quick=True)]
    if device_type == "cpu":
        found += [_convolution(32, 64, 128, 32), _convolution(4, 16, 32, 16, quick=True)]
    return found + [_weight_norm_linear(device_type, *quick, backward, quick=True) for backward in passes]


def _weight_norm_linear(
    device_type: str,
    rows: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    backward: bool,
    quick: bool = False,
) -> Case:
    def draw(device: torch.device) -> list[Tensor]:
        x, weight = torch.randn(rows, in_features, device=device), torch.randn(out_features, in_features, device=device)
        return [x, weight, *torch.randn(2, out_features, device=device).unbind()]

    return make_case(
        stem="weight_norm",
        name="weight norm linear",
        shape={"M": rows, "in": in_features, "out": out_features},
        dtype=dtype,
        draw=draw,
        draw_cotangent=lambda x, weight, scale, bias: torch.randn(rows, out_features, device=x.device),
        exact=_exact_weight_norm_linear,
        competitors=(
            *ours(NAME, device_type, functools.partial(run_on_torch, F.weight_norm_linear)),
            Competitor(EAGER, functools.partial(run_on_torch, _eager_weight_norm_linear)),
            Competitor("torch's weight_norm", functools.partial(_module, _linear_module, *TORCH_NAMES)),
            Competitor(
                "torch.compile of eager", functools.partial(run_compiled, _eager_weight_norm_linear), slow_start=True
            ),
            Competitor("nn.Linear (plain)", _plain_linear, checked=False),
        ),
        elements=count_moved(rows * in_features + out_features * in_features, rows * out_features, backward),
        product=count_product(rows * out_features, in_features, backward),
        sincos=0,
        backward=backward,
        quick=quick,
    )


def _convolution(samples: int, in_channels: int, out_channels: int, side: int, quick: bool = False) -> Case:
    image, weight_shape = (samples, in_channels, side, side), (out_channels, in_channels, 3, 3)
    fan_in, result = 9 * in_channels, samples * out_channels * side**2

    def draw(device: torch.device) -> list[Tensor]:
        x, weight = torch.randn(image, device=device), torch.randn(weight_shape, device=device)
        return [x, weight, *torch.randn(2, out_channels, device=device).unbind()]

    return make_case(
        stem="weight_norm",
        name="weight norm 3x3 convolution",
        shape={"samples": samples, "in": in_channels, "out": out_channels, "side": side},
        dtype=torch.float32,
        draw=draw,
        draw_cotangent=lambda x, *_: torch.randn(samples, out_channels, side, side, device=x.device),
        exact=_exact_convolution,
        competitors=(
            *ours(NAME, "cpu", functools.partial(_module, _our_convolution_module, "weight_g", "weight_v")),
            Competitor(EAGER, functools.partial(run_on_torch, _eager_convolution)),
            Competitor("torch's weight_norm", functools.partial(_module, _convolution_module, *TORCH_NAMES)),
            Competitor("nn.Conv2d (plain)", _plain_convolution, checked=False),
        ),
        elements=count_moved(samples * in_channels * side**2 + out_channels * fan_in, result, backward=True),
        product=count_product(result, fan_in, backward=True),
        sincos=0,
        backward=True,
        quick=quick,
    )


def _normalized_rows(device_type: str, units: int, fan_in: int, backward: bool, quick: bool = False) -> Case:
    return rows_case(
        stem="weight_norm",
        name="normalised and scaled rows",
        units=units,
        fan_in=fan_in,
        draw=lambda device: [torch.randn(units, fan_in, device=device), torch.randn(units, device=device)],
        exact=_exact_normalized,
        competitors=(
            *ours(NAME, device_type, functools.partial(run_on_torch, F.normalize_scale)),
            Competitor(EAGER, functools.partial(run_on_torch, _eager_normalized)),
            Competitor("torch._weight_norm", functools.partial(run_on_torch, _torch_normalized)),
            Competitor("torch.compile of eager", functools.partial(run_compiled, _eager_normalized), slow_start=True),
        ),
        sincos=0,
        backward=backward,
        quick=quick,
    )


def _eager_normalized(weight: Tensor, scale: Tensor) -> Tensor:
    return scale[:, None] * weight / weight.norm(dim=1, keepdim=True)


def _torch_normalized(weight: Tensor, scale: Tensor) -> Tensor:
    return torch._weight_norm(weight, scale.view(-1, 1), 0)


def _exact_normalized(weight: Tensor, scale: Tensor) -> Tensor:
    return weight * (scale * weight.square().sum(1).rsqrt())[:, None]


def _eager_weight_norm_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.linear(x, _eager_normalized(weight, scale), bias)


def _exact_weight_norm_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.linear(x, _exact_normalized(weight, scale), bias)


def _plain_linear(inputs: dict) -> Run:
    calls = [[x, weight, bias] for x, weight, _, bias in inputs["calls"]]
    return run_on_torch(nn.functional.linear, inputs | {"calls": calls})


def _eager_convolution(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.conv2d(x, _eager_normalized(weight.flatten(1), scale).view_as(weight), bias, padding=1)


def _exact_convolution(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.conv2d(x, _exact_normalized(weight.flatten(1), scale).view_as(weight), bias, padding=1)


def _plain_convolution(inputs: dict) -> Run:
    calls = [[x, weight, bias] for x, weight, _, bias in inputs["calls"]]
    return run_on_torch(functools.partial(nn.functional.conv2d, padding=1), inputs | {"calls": calls})


def _linear_module(weight: Tensor) -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(*weight.T.shape))


def _convolution_module(weight: Tensor) -> nn.Module:
    return parametrizations.weight_norm(nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1))


def _our_convolution_module(weight: Tensor) -> nn.Module:
    return WeightNormConv2d(weight.shape[1], weight.shape[0], 3, padding=1)


def _module(make: Callable[[Tensor], nn.Module], scale_name: str, weight_name: str, inputs: dict) -> Run:
    """The module that ``make`` builds for a weight. The names are those of the tensors that it trains."""
    calls = []
    for x, weight, scale, bias in inputs["calls"]:
        module = make(weight).to(x)
        trained = [module.get_parameter(name) for name in (weight_name, scale_name, "bias")]
        for parameter, values in zip(trained, (weight, scale, bias), strict=True):
            parameter.data.copy_(values.detach().view_as(parameter))
        calls.append((functools.partial(module, x), [x, *trained]))
    run = run_passes(calls, inputs)

    def run_in_our_shapes() -> list[Tensor]:
        result, *gradients = run()
        # A module's scale has as many dimensions as its weight.
        return [result, *map(Tensor.view_as, gradients, inputs["calls"][0])]

    return run_in_our_shapes
