"""The layer whose weight rows sum to zero, linear and convolutional: forward alone, and forward with backward.

y = x (w - mean(w))^T + b, with the mean of each row of w. The competitors are eager torch with a centred weight, eager
torch with a matmul plus a rank-one term, torch.compile, and the plain layer. The plain layer costs as much as a layer
whose weight was centred in advance.
"""

import functools
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lcw_ops import functional as F
from lcw_ops.bench.registry import EAGER, Case, Competitor, Run, ours, rotated_bytes
from lcw_ops.nn import LCWConv2d
from lcw_ops.ops.lcw_linear import NAME

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(device_type: str) -> list[Case]:
    if device_type == "cuda":
        layers = [(rows, 4096, 4096, torch.bfloat16) for rows in (1, 8, 32, 8192)]
        layers += [(rows, 1024, 1024, torch.float32) for rows in (8, 128, 1024)]
        quick = (32, 1024, 1024, torch.bfloat16)
    else:
        sizes = [(256, 256), (1024, 1024), (4096, 4096), (1000, 517)]
        layers = [(rows, *size, torch.float32) for size in sizes for rows in (1, 8, 32, 128, 1024)]
        layers += [(rows, 1024, 1024, torch.bfloat16) for rows in (8, 128, 1024)]
        quick = (32, 256, 256, torch.float32)
    passes = (False, True)
    linear = [_linear(device_type, *layer, backward) for layer in layers for backward in passes]
    linear += [_linear(device_type, *quick, backward, quick=True) for backward in passes]
    if device_type == "cuda":
        return linear
    return [*linear, _convolution(device_type, 32, 64, 128, 32), _convolution(device_type, 4, 16, 32, 16, quick=True)]


def _linear(
    device_type: str,
    rows: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    backward: bool,
    quick: bool = False,
) -> Case:
    return _case(
        name="linear, forward + backward" if backward else "linear, forward",
        shape={"M": rows, "in": in_features, "out": out_features},
        dtype=dtype,
        sizes={
            "x": (rows, in_features),
            "weight": (out_features, in_features),
            "bias": (out_features,),
            "cotangent": (rows, out_features),
        },
        exact=_centred_linear,
        competitors=(
            *ours(NAME, device_type, functools.partial(_torch, F.lcw_linear)),
            Competitor(EAGER, functools.partial(_torch, _centred_linear)),
            Competitor("matmul + rank-one, eager", functools.partial(_torch, _rank_one_linear)),
            Competitor("torch.compile of eager", _compiled_linear, slow_start=True),
            Competitor("nn.Linear (unconstrained)", functools.partial(_torch, nn.functional.linear), checked=False),
        ),
        backward=backward,
        quick=quick,
    )


def _convolution(
    device_type: str, samples: int, in_channels: int, out_channels: int, side: int, quick: bool = False
) -> Case:
    return _case(
        name="3x3 convolution, forward + backward",
        shape={"samples": samples, "in": in_channels, "out": out_channels, "side": side},
        dtype=torch.float32,
        sizes={
            "x": (samples, in_channels, side, side),
            "weight": (out_channels, in_channels, 3, 3),
            "bias": (out_channels,),
            "cotangent": (samples, out_channels, side, side),
        },
        exact=_centred_convolution,
        competitors=(
            *ours(NAME, device_type, functools.partial(_convolution_module, LCWConv2d, "weight_u")),
            Competitor(EAGER, functools.partial(_torch, _centred_convolution)),
            Competitor(
                "nn.Conv2d (unconstrained)", functools.partial(_convolution_module, nn.Conv2d, "weight"), checked=False
            ),
        ),
        backward=True,
        quick=quick,
    )


def _case(
    name: str,
    shape: dict[str, int],
    dtype: torch.dtype,
    sizes: dict[str, tuple],
    exact: Layer,
    competitors: tuple[Competitor, ...],
    backward: bool,
    quick: bool,
) -> Case:
    """``sizes`` are those of x, weight, bias and cotangent. The cotangent has the shape of the result."""
    elements = {tensor: math.prod(size) for tensor, size in sizes.items()}
    fan_in = elements["weight"] // elements["bias"]

    def make_inputs(device: torch.device) -> dict:
        def draw(tensor: str) -> Tensor:
            return torch.randn(sizes[tensor], device=device)

        # Draw inputs whose mean is not 0: otherwise a layer without the constraint would give nearly the same result.
        x = torch.sigmoid(draw("x")).to(dtype).requires_grad_()
        weight = (fan_in**-0.5 * draw("weight")).to(dtype)
        # The calls take the copies of the weight in turns.
        copies = rotated_bytes(device) // weight.nbytes + 1
        return {
            "copies": copies,
            "x": x,
            "weights": [nn.Parameter(weight.clone()) for _ in range(copies)],
            "turns": itertools.cycle(range(copies)),
            "bias": nn.Parameter(draw("bias").to(dtype)),
            "cotangent": draw("cotangent").to(dtype),
            "backward": backward,
        }

    # Forward reads x, weight and bias and writes the result. Backward reads x, weight and the result's gradient and
    # writes the gradients of x, weight and bias. The constraint needs no other data, so it adds no traffic.
    x, weight, bias, result = (elements[tensor] for tensor in ("x", "weight", "bias", "cotangent"))
    moved = 3 * x + 3 * weight + 2 * bias + 2 * result if backward else x + weight + bias + result
    # Two operations per multiplication. Forward multiplies x by the weight. Backward makes one product of that size for
    # the gradient of each. The operations of the constraint, a few per element of x or weight, are left out.
    operations = 2 * result * fan_in * (3 if backward else 1)
    return Case(
        stem="lcw_linear",
        name=name,
        shape=shape,
        dtype=dtype,
        make_inputs=make_inputs,
        expected=functools.partial(_expected, exact),
        competitors=competitors,
        bytes=dtype.itemsize * moved,
        # registry.py measures float32's matmul rate. 16-bit products are faster, so only their bytes count.
        operations=operations if dtype == torch.float32 else 0,
        quick=quick,
    )


def _torch(layer: Layer, inputs: dict) -> Run:
    x, weights, turns, bias, cotangent = (inputs[name] for name in ("x", "weights", "turns", "bias", "cotangent"))

    def forward() -> list[Tensor]:
        return [layer(x, weights[next(turns)], bias)]

    def forward_backward() -> list[Tensor]:
        weight = weights[next(turns)]
        result = layer(x, weight, bias)
        return [result, *torch.autograd.grad(result, (x, weight, bias), cotangent)]

    return forward_backward if inputs["backward"] else torch.no_grad()(forward)


def _expected(layer: Layer, inputs: dict) -> list[Tensor]:
    x, weight, bias = (
        tensor.detach().double().requires_grad_() for tensor in (inputs["x"], inputs["weights"][0], inputs["bias"])
    )
    exact = {"x": x, "weights": [weight], "turns": itertools.repeat(0), "bias": bias}
    results = _torch(layer, inputs | exact | {"cotangent": inputs["cotangent"].double()})()
    return [result.detach() for result in results]


def _centred_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.linear(x, weight - weight.mean(1, keepdim=True), bias)


def _rank_one_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.T - x.mean(1)[:, None] * weight.sum(1) + bias


def _compiled_linear(inputs: dict) -> Run:
    # torch compiles a function for eight shapes. From the ninth on, the uncompiled function would run and be timed.
    torch.compiler.reset()
    return _torch(torch.compile(_centred_linear, dynamic=False, fullgraph=True), inputs)


def _centred_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    return nn.functional.conv2d(x, centred, bias, padding=1)


def _convolution_module(module_class: type[nn.Module], trained: str, inputs: dict) -> Run:
    """``trained`` is the name of the tensor that the module trains."""
    module = module_class(inputs["x"].shape[1], len(inputs["bias"]), 3, padding=1)
    module.bias = inputs["bias"]

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        setattr(module, trained, weight)
        return module(x)

    return _torch(layer, inputs)
