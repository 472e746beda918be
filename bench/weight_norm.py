"""Weight normalization: y = x (s v / ||v||)^T + b, with a row v of the weight and a scale s for each unit.

The competitors are straightforward eager torch, torch.compile of it, torch's own weight norm, and the plain layer. The
normalised rows are also measured alone.
"""

import functools

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
from lcw_ops.ops.weight_norm import NAME


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
            Competitor("torch's weight_norm", _weight_norm_module),
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


def _weight_norm_module(inputs: dict) -> Run:
    calls = []
    for x, weight, scale, bias in inputs["calls"]:
        units, fan_in = weight.shape
        module = parametrizations.weight_norm(nn.Linear(fan_in, units, device=x.device, dtype=x.dtype))
        originals = module.parametrizations.weight
        # torch's scale is a column.
        originals.original0, originals.original1 = nn.Parameter(scale.detach()[:, None]), nn.Parameter(weight.detach())
        module.bias = nn.Parameter(bias.detach())
        calls.append((functools.partial(module, x), [x, originals.original1, originals.original0, module.bias]))
    run = run_passes(calls, inputs)

    def run_in_our_shapes() -> list[Tensor]:
        result, *gradients = run()
        return [result, *(gradient.squeeze(1) if gradient.dim() == 2 else gradient for gradient in gradients)]

    return run_in_our_shapes
