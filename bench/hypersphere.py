"""Weights on the hypersphere: layers whose units are directions by angles (GmP) or normalised rows (weight norm).

y = r relu(x u^T + lambda) with u_k = cos t_k prod_{i<k} sin t_i, and y = x (s v / ||v||)^T + b; the rows alone, too.
Beside ours: eager torch as one would write it, torch.compile of that, torch's own weight norm, and the plain layer.
"""

import functools
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lcw_ops import functional as F
from lcw_ops.bench.lcw_linear import ROTATED_BYTES
from lcw_ops.bench.registry import EAGER, Case, Competitor, Run, ours
from lcw_ops.nn import GmPConv2d
from lcw_ops.ops.hypersphere import NAME

# A sine and a cosine of one angle in float32: four multiply-adds take the nearest multiple of pi/2 off, and two
# polynomials of three coefficients take four each.
SINCOS_OPERATIONS = 2 * (4 + 4 + 4)

Layer = Callable[..., Tensor]


def cases(device_type: str) -> list[Case]:
    if device_type == "cuda":
        gmp = [(rows, 4096, 4096, torch.bfloat16) for rows in (1, 8, 32, 8192)]
        gmp += [(rows, 1024, 1024, torch.float32) for rows in (8, 128, 1024)]
        weight_norm = gmp
        directions = [(4096, 4096)]
        quick = (32, 1024, 1024, torch.bfloat16)
    else:
        gmp = [(rows, 1024, 1024, torch.float32) for rows in (1, 8, 32, 128, 1024)]
        weight_norm = [*gmp, *((rows, size, size, torch.float32) for size in (256, 4096) for rows in (8, 128))]
        gmp += [(rows, size, size, torch.float32) for size in (256, 4096) for rows in (8, 128, 1024)]
        gmp += [(rows, 1024, 1024, torch.bfloat16) for rows in (8, 128)]
        # The second is a convolution's: 3x3 filters over 128 channels.
        directions = [(4096, 4096), (1024, 1152)]
        quick = (32, 256, 256, torch.float32)
    passes = (False, True)
    found = [_gmp_linear(device_type, *layer, backward) for layer in gmp for backward in passes]
    found += [_weight_norm_linear(device_type, *layer, backward) for layer in weight_norm for backward in passes]
    for of_rows in (_directions, _normalized_rows):
        found += [of_rows(device_type, *size, backward) for size in directions for backward in passes]
        found += [of_rows(device_type, 256, 1152, backward=True, quick=True)]
    for layer in (_gmp_linear, _weight_norm_linear):
        found += [layer(device_type, *quick, backward, quick=True) for backward in passes]
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
        our_layers=ours(NAME, device_type, functools.partial(_torch, our_layer)),
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
    """Linear for an ``x_size`` (M, m), a 3x3 convolution for (samples, channels, height, width)."""
    result = math.prod(x_size) // x_size[1] * units

    def draw(device: torch.device) -> list[Tensor]:
        # Of random directions: angles drawn one by one would make most of every row vanish.
        angles = F.hypersphere_angles(torch.randn(units, fan_in, device=device))
        radius, location = torch.randn(units, device=device), 0.5 * torch.randn(units, device=device)
        return [torch.randn(x_size, device=device), angles, radius, location]

    def draw_cotangent(x: Tensor, angles: Tensor, radius: Tensor, location: Tensor) -> Tensor:
        # Small where the pre-activation is: on which side of 0 rounding puts it must not decide about an error.
        pre_activation = _pre_activation(x, _eager_direction(angles), location)
        return torch.randn_like(pre_activation) * pre_activation

    return _case(
        name=name,
        shape=shape,
        dtype=dtype,
        draw=draw,
        draw_cotangent=draw_cotangent,
        exact=functools.partial(_gmp, _exact_direction),
        competitors=(
            *our_layers,
            Competitor(EAGER, functools.partial(_torch, _eager_gmp)),
            Competitor("torch.compile of eager", functools.partial(_compiled, _eager_gmp), slow_start=True),
            plain,
        ),
        elements=_moved(math.prod(x_size) + units * fan_in, result, backward),
        product=_product(result, fan_in, backward),
        sincos=units * (fan_in - 1),
        backward=backward,
        quick=quick,
    )


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

    return _case(
        name="weight norm linear",
        shape={"M": rows, "in": in_features, "out": out_features},
        dtype=dtype,
        draw=draw,
        draw_cotangent=lambda x, weight, scale, bias: torch.randn(rows, out_features, device=x.device),
        exact=_exact_weight_norm_linear,
        competitors=(
            *ours(NAME, device_type, functools.partial(_torch, F.weight_norm_linear)),
            Competitor(EAGER, functools.partial(_torch, _eager_weight_norm_linear)),
            Competitor("torch's weight_norm", _weight_norm_module),
            Competitor(
                "torch.compile of eager", functools.partial(_compiled, _eager_weight_norm_linear), slow_start=True
            ),
            Competitor("nn.Linear (plain)", _plain_linear, checked=False),
        ),
        elements=_moved(rows * in_features + out_features * in_features, rows * out_features, backward),
        product=_product(rows * out_features, in_features, backward),
        sincos=0,
        backward=backward,
        quick=quick,
    )


def _directions(device_type: str, units: int, fan_in: int, backward: bool, quick: bool = False) -> Case:
    return _rows(
        name="direction of angles",
        units=units,
        fan_in=fan_in,
        draw=lambda device: [F.hypersphere_angles(torch.randn(units, fan_in, device=device))],
        exact=_exact_direction,
        competitors=(
            *ours(NAME, device_type, functools.partial(_torch, F.hypersphere_direction)),
            Competitor(EAGER, functools.partial(_torch, _eager_direction)),
            Competitor("torch.compile of eager", functools.partial(_compiled, _eager_direction), slow_start=True),
        ),
        sincos=units * (fan_in - 1),
        backward=backward,
        quick=quick,
    )


def _normalized_rows(device_type: str, units: int, fan_in: int, backward: bool, quick: bool = False) -> Case:
    return _rows(
        name="normalised and scaled rows",
        units=units,
        fan_in=fan_in,
        draw=lambda device: [torch.randn(units, fan_in, device=device), torch.randn(units, device=device)],
        exact=_exact_normalized,
        competitors=(
            *ours(NAME, device_type, functools.partial(_torch, F.normalize_scale)),
            Competitor(EAGER, functools.partial(_torch, _eager_normalized)),
            Competitor("torch._weight_norm", functools.partial(_torch, _torch_normalized)),
            Competitor("torch.compile of eager", functools.partial(_compiled, _eager_normalized), slow_start=True),
        ),
        sincos=0,
        backward=backward,
        quick=quick,
    )


def _rows(units: int, fan_in: int, backward: bool, **rest) -> Case:
    return _case(
        shape={"units": units, "fan_in": fan_in},
        dtype=torch.float32,
        draw_cotangent=lambda rows, *_: torch.randn(units, fan_in, device=rows.device),
        elements=_moved(units * fan_in, units * fan_in, backward),
        product=0,
        backward=backward,
        **rest,
    )


def _moved(arguments: int, result: int, backward: bool) -> int:
    """Elements. Forward reads the arguments and writes the result. Backward reads the arguments and the result's
    gradient and writes the arguments' gradients.

    Values of which a unit has one, and the record of which units fired, are left out.
    """
    return 3 * arguments + 2 * result if backward else arguments + result


def _product(result: int, fan_in: int, backward: bool) -> int:
    """Two per multiplication: a product of x and weight, and in backward one as large for each one's gradient."""
    return 2 * result * fan_in * (3 if backward else 1)


def _case(
    name: str,
    shape: dict[str, int],
    dtype: torch.dtype,
    draw: Callable[[torch.device], list[Tensor]],
    draw_cotangent: Callable[..., Tensor],
    exact: Layer,
    competitors: tuple[Competitor, ...],
    elements: int,
    product: int,
    sincos: int,
    backward: bool,
    quick: bool,
) -> Case:
    """``draw`` gives the arguments of ``exact``, and ``draw_cotangent`` takes them; ``sincos`` counts angles."""

    def make_inputs(device: torch.device) -> dict:
        arguments = [argument.to(dtype) for argument in draw(device)]
        copies = ROTATED_BYTES[device.type] // max(argument.nbytes for argument in arguments) + 1
        return {
            "calls": [[argument.clone().requires_grad_() for argument in arguments] for _ in range(copies)],
            "turns": itertools.cycle(range(copies)),
            "cotangent": draw_cotangent(*(argument.float() for argument in arguments)).to(dtype),
            "backward": backward,
        }

    return Case(
        stem="hypersphere",
        name=f"{name}, forward + backward" if backward else f"{name}, forward",
        shape=shape,
        dtype=dtype,
        make_inputs=make_inputs,
        expected=functools.partial(_expected, exact),
        competitors=competitors,
        bytes=dtype.itemsize * elements,
        # The rate that is measured is float32's. Products of 16 bits are faster, so that only their bytes are a floor;
        # sines and cosines are taken in float32 all the same, once: backward may have kept them. The few other
        # operations per element of a row (products of sines, a recurrence in backward, sums of squares) are left out.
        operations=(product if dtype == torch.float32 else 0) + SINCOS_OPERATIONS * sincos,
        quick=quick,
    )


def _torch(layer: Layer, inputs: dict) -> Run:
    return _passes([(functools.partial(layer, *arguments), arguments) for arguments in inputs["calls"]], inputs)


def _passes(calls: list[tuple[Callable[[], Tensor], list[Tensor]]], inputs: dict) -> Run:
    """Functions, and what each is differentiated by."""
    turns, cotangent = inputs["turns"], inputs["cotangent"]

    def forward() -> list[Tensor]:
        layer, _ = calls[next(turns)]
        return [layer()]

    def forward_backward() -> list[Tensor]:
        layer, arguments = calls[next(turns)]
        result = layer()
        return [result, *torch.autograd.grad(result, arguments, cotangent)]

    return forward_backward if inputs["backward"] else torch.no_grad()(forward)


def _compiled(layer: Layer, inputs: dict) -> Run:
    # A function is compiled for eight shapes; from the ninth on it would run uncompiled, and be timed as that.
    torch.compiler.reset()
    return _torch(torch.compile(layer, dynamic=False, fullgraph=True), inputs)


def _expected(layer: Layer, inputs: dict) -> list[Tensor]:
    arguments = [argument.detach().double().requires_grad_() for argument in inputs["calls"][0]]
    exact = {"calls": [arguments], "turns": itertools.repeat(0), "cotangent": inputs["cotangent"].double()}
    return [result.detach() for result in _torch(layer, inputs | exact)()]


def _eager_direction(angles: Tensor) -> Tensor:
    sine, cosine = angles.sin(), angles.cos()
    products = sine.cumprod(1)
    return torch.cat([cosine[:, :1], cosine[:, 1:] * products[:, :-1], products[:, -1:]], 1)


def _exact_direction(angles: Tensor) -> Tensor:
    """Another way than everybody's, for float64: products as exponentials of sums."""
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
    """Of a linear layer, or for images of a 3x3 convolution; ``weight`` has one row per unit."""
    if x.dim() == 2:
        return nn.functional.linear(x, weight, bias)
    return nn.functional.conv2d(x, weight.view(-1, x.shape[1], 3, 3), bias, padding=1)


def _plain_gmp(inputs: dict) -> Run:
    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _pre_activation(x, weight, bias).relu()

    calls = [
        [x, _eager_direction(angles).detach().requires_grad_(), location] for x, angles, _, location in inputs["calls"]
    ]
    return _torch(layer, inputs | {"calls": calls})


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
    return _torch(nn.functional.linear, inputs | {"calls": calls})


def _convolution_module(inputs: dict) -> Run:
    calls = []
    for x, *parameters in inputs["calls"]:
        module = GmPConv2d(x.shape[1], len(parameters[0]), 3, padding=1, activation="relu", device=x.device)
        parameters = [nn.Parameter(parameter.detach()) for parameter in parameters]
        module.angles, module.radius, module.location = parameters
        calls.append((functools.partial(module, x), [x, *parameters]))
    return _passes(calls, inputs)


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
    run = _passes(calls, inputs)

    def run_in_our_shapes() -> list[Tensor]:
        result, *gradients = run()
        return [result, *(gradient.squeeze(1) if gradient.dim() == 2 else gradient for gradient in gradients)]

    return run_in_our_shapes
