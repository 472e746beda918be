"""Weights on the hypersphere as registered ops: directions of angles, normalised rows, and the two linear layers.

GmP: y = r act(x u^T + lambda), u_k = cos t_k prod_{i<k} sin t_i. W. Chen, H. Ge, NeurIPS 2024, arXiv 2305.15912.
Weight normalization: y = x (s v / ||v||)^T + b. T. Salimans, D. P. Kingma, 2016. Every op has its gradients in another
one; second derivatives are those of the reference, in plain torch.
"""

import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from lcw_ops import reference
from lcw_ops.ops import backends, library

DIRECTION = "hypersphere_direction"
# By which the backend of all of them is chosen.
NAME = DIRECTION
DIRECTION_BACKWARD = "hypersphere_direction_backward"
NORMALIZE = "normalize_scale"
NORMALIZE_BACKWARD = "normalize_scale_backward"
GMP_LINEAR = "gmp_linear"
GMP_LINEAR_BACKWARD = "gmp_linear_backward"
WEIGHT_NORM_LINEAR = "weight_norm_linear"
WEIGHT_NORM_LINEAR_BACKWARD = "weight_norm_linear_backward"

# Samples up to which directions are made inside the product, in backward once more, and never kept. From there on
# making them twice costs more than keeping them, as large as the weight, from forward to backward.
FUSED_ROWS = {"cpp": 32, "triton": 64}


def _are_alike(tensor, other) -> bool:
    return tensor.dtype == other.dtype and tensor.is_floating_point()


def _is_per_unit(values, rows) -> bool:
    return values.dim() == 1 and values.shape[0] == rows.shape[0] and _are_alike(values, rows)


def _direction_fake(angles):
    return angles.new_empty((angles.shape[0], angles.shape[1] + 1))


def _direction_backward_fake(grad_direction, angles):
    return angles.new_empty(angles.shape)


def _normalize_fake(weight, scale):
    return weight.new_empty(weight.shape)


def _normalize_backward_fake(grad_output, weight, scale):
    return weight.new_empty(weight.shape), scale.new_empty(scale.shape)


def _gmp_linear_fake(x, angles, radius, location, relu, deterministic, keep_activated, keep_direction):
    # Whoever calls the op on fake tensors hears of what does not fit as the kernel's callers do.
    fits = x.dim() == angles.dim() == 2 and x.shape[1] == angles.shape[1] + 1
    torch._check(fits and _are_alike(x, angles), lambda: "gmp_linear: x (M, m) and angles do not fit each other")
    units, fan_in = angles.shape[0], x.shape[1]
    fits = _is_per_unit(radius, angles) and _is_per_unit(location, angles)
    torch._check(fits, lambda: "gmp_linear: radius or location do not fit the angles")
    output = x.new_empty((x.shape[0], units))
    activated = x.new_empty(output.shape if keep_activated else (0,))
    return output, activated, x.new_empty((units, fan_in) if keep_direction else (0,))


def _gmp_linear_backward_fake(
    grad_output,
    x,
    angles,
    radius,
    activated,
    direction,
    relu,
    deterministic,
    needs_x,
    needs_angles,
    needs_radius,
    needs_location,
):
    units = angles.shape[0]
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        x.new_empty(angles.shape if needs_angles else (0,)),
        x.new_empty((units if needs_radius else 0,)),
        x.new_empty((units if needs_location else 0,)),
    )


def _weight_norm_linear_fake(x, weight, scale, bias, deterministic):
    fits = x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[1] and weight.shape[1] >= 1
    torch._check(fits and _are_alike(x, weight), lambda: "weight_norm_linear: x (M, m) and weight do not fit")
    fits = _is_per_unit(scale, weight) and (bias is None or _is_per_unit(bias, weight))
    torch._check(fits, lambda: "weight_norm_linear: scale or bias do not fit the weight")
    return x.new_empty((x.shape[0], weight.shape[0]))


def _weight_norm_linear_backward_fake(
    grad_output, x, weight, scale, deterministic, needs_x, needs_weight, needs_scale, needs_bias
):
    units = weight.shape[0]
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        x.new_empty(weight.shape if needs_weight else (0,)),
        x.new_empty((units if needs_scale else 0,)),
        x.new_empty((units if needs_bias else 0,)),
    )


def _vmap(overload, info, in_dims, *tensors):
    """Rows are independent: a batch of them is more rows."""
    batched = [
        tensor.movedim(dim, 0) if dim is not None else tensor.expand(info.batch_size, *tensor.shape)
        for tensor, dim in zip(tensors, in_dims, strict=True)
    ]
    results = overload(*(tensor.flatten(0, 1) for tensor in batched))
    rows = batched[0].shape[:2]
    if isinstance(results, Tensor):
        return results.unflatten(0, rows), 0
    return tuple(result.unflatten(0, rows) for result in results), (0,) * len(results)


for _name, _schema, _fake in (
    (DIRECTION, "(Tensor angles) -> Tensor", _direction_fake),
    (DIRECTION_BACKWARD, "(Tensor grad_direction, Tensor angles) -> Tensor", _direction_backward_fake),
    (NORMALIZE, "(Tensor weight, Tensor scale) -> Tensor", _normalize_fake),
    (
        NORMALIZE_BACKWARD,
        "(Tensor grad_output, Tensor weight, Tensor scale) -> (Tensor grad_weight, Tensor grad_scale)",
        _normalize_backward_fake,
    ),
):
    library.declare(_name, _schema, backends=("cpp", "triton"), fake=_fake, vmap=_vmap)
library.declare(
    GMP_LINEAR,
    # `activated` is act(x u^T + location), `direction` is u; without elements if they are not kept.
    "(Tensor x, Tensor angles, Tensor radius, Tensor location, bool relu, bool deterministic, bool keep_activated, "
    "bool keep_direction) -> (Tensor output, Tensor activated, Tensor direction)",
    backends=("cpp", "triton"),
    fake=_gmp_linear_fake,
)
library.declare(
    GMP_LINEAR_BACKWARD,
    "(Tensor grad_output, Tensor x, Tensor angles, Tensor radius, Tensor activated, Tensor direction, bool relu, "
    "bool deterministic, bool needs_x, bool needs_angles, bool needs_radius, bool needs_location)"
    " -> (Tensor grad_x, Tensor grad_angles, Tensor grad_radius, Tensor grad_location)",
    backends=("cpp", "triton"),
    fake=_gmp_linear_backward_fake,
)
library.declare(
    WEIGHT_NORM_LINEAR,
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias, bool deterministic) -> Tensor",
    backends=("cpp", "triton"),
    fake=_weight_norm_linear_fake,
)
library.declare(
    WEIGHT_NORM_LINEAR_BACKWARD,
    "(Tensor grad_output, Tensor x, Tensor weight, Tensor scale, bool deterministic, bool needs_x, bool needs_weight, "
    "bool needs_scale, bool needs_bias)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_scale, Tensor grad_bias)",
    backends=("cpp", "triton"),
    fake=_weight_norm_linear_backward_fake,
)


_OF_WEIGHT_NORM = (NORMALIZE, NORMALIZE_BACKWARD, WEIGHT_NORM_LINEAR, WEIGHT_NORM_LINEAR_BACKWARD)


def _in_triton(name: str) -> Callable:
    """The module is imported at the first use: lcw_ops must not need Triton."""
    stem = "weight_norm" if name in _OF_WEIGHT_NORM else "hypersphere"
    return lambda *arguments: getattr(importlib.import_module(f"lcw_ops.kernels.{stem}"), name)(*arguments)


for _name in (
    DIRECTION,
    DIRECTION_BACKWARD,
    NORMALIZE,
    NORMALIZE_BACKWARD,
    GMP_LINEAR,
    GMP_LINEAR_BACKWARD,
    WEIGHT_NORM_LINEAR,
    WEIGHT_NORM_LINEAR_BACKWARD,
):
    library.implement(_name, "triton", _in_triton(_name))
backends.IMPLEMENTED[NAME] = ("cpp", "triton")

_is_deterministic = torch.are_deterministic_algorithms_enabled


def _overloads(name: str) -> dict:
    return {backend: library.get_overload(name, backend) for backend in ("cpp", "triton")}


_direction, _direction_backward = _overloads(DIRECTION), _overloads(DIRECTION_BACKWARD)
_normalize, _normalize_backward = _overloads(NORMALIZE), _overloads(NORMALIZE_BACKWARD)
_gmp_linear, _gmp_linear_backward = _overloads(GMP_LINEAR), _overloads(GMP_LINEAR_BACKWARD)
_weight_norm_linear = _overloads(WEIGHT_NORM_LINEAR)
_weight_norm_linear_backward = _overloads(WEIGHT_NORM_LINEAR_BACKWARD)


def _is_differentiated_again() -> bool:
    """Whether gradients must be made of what has derivatives: a graph of them is built, or tangents pass through."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def _reference_gradients(function: Callable, arguments: tuple, needs: tuple, grad_output: Tensor) -> tuple:
    """The gradients of the arguments that need one, by the derivatives of plain torch."""
    is_again = torch.is_grad_enabled()
    with torch.enable_grad():
        # By names of their own: one argument may have been made of another, and that way is not this function's.
        arguments = [argument.view_as(argument) for argument in arguments]
        needed = [argument for argument, need in zip(arguments, needs, strict=True) if need]
        gradients = iter(torch.autograd.grad(function(*arguments), needed, grad_output, create_graph=is_again))
    return tuple(next(gradients) if need else None for need in needs)


class Direction(Function):
    """(angles (n, m-1), backend) -> unit rows (n, m)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(angles, backend):
        return _direction[backend](angles)

    @staticmethod
    def setup_context(ctx, inputs, output):
        angles, ctx.backend = inputs
        ctx.save_for_backward(angles)

    @staticmethod
    def backward(ctx, grad_direction):
        (angles,) = ctx.saved_tensors
        if _is_differentiated_again():
            return reference.hypersphere_direction_backward(grad_direction, angles), None
        return _direction_backward[ctx.backend](grad_direction, angles), None


class DirectionForwardMode(Direction):
    """The same with forward-mode derivatives, which torch.compile does not trace."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        Direction.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx, tangent, *_):
        (angles,) = ctx.saved_tensors
        return reference.hypersphere_direction_jvp(tangent, angles)


def direction(angles: Tensor, backend: str) -> Tensor:
    """(n, m-1) -> (n, m)."""
    return library.apply(Direction, DirectionForwardMode, angles, backend)


class NormalizeScale(Function):
    """(weight (n, m), scale (n,), backend) -> scale * weight / ||weight||."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight, scale, backend):
        return _normalize[backend](weight, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, scale, ctx.backend = inputs
        ctx.save_for_backward(weight, scale)

    @staticmethod
    def backward(ctx, grad_output):
        weight, scale = ctx.saved_tensors
        if _is_differentiated_again():
            return *reference.normalize_scale_backward(grad_output, weight, scale), None
        return *_normalize_backward[ctx.backend](grad_output, weight, scale), None


class NormalizeScaleForwardMode(NormalizeScale):
    """The same with forward-mode derivatives, which torch.compile does not trace."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        NormalizeScale.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def jvp(ctx, weight_tangent, scale_tangent, *_):
        weight, scale = ctx.saved_tensors
        return reference.normalize_scale_jvp(weight_tangent, scale_tangent, weight, scale)


def normalize_scale(weight: Tensor, scale: Tensor, backend: str) -> Tensor:
    """(n, m), (n,) -> (n, m)."""
    return library.apply(NormalizeScale, NormalizeScaleForwardMode, weight, scale, backend)


class GmPLinear(Function):
    """(x (M, m), angles, radius, location, relu, backend): the layer in one op, its gradients in another.

    ``forward`` takes the context itself: a ``setup_context``, which only torch.func needs, costs tens of microseconds.
    """

    @staticmethod
    def forward(ctx, x, angles, radius, location, relu, backend):
        ctx.relu, ctx.backend = relu, backend
        needs_x, _, needs_radius, _ = needs = ctx.needs_input_grad[:4]
        output, activated, direction = _gmp_linear[backend](
            x,
            angles,
            radius,
            location,
            relu,
            _is_deterministic(),
            needs_radius or (relu and any(needs)),
            needs_x and x.shape[0] > FUSED_ROWS[backend],
        )
        ctx.save_for_backward(x, angles, radius, location, activated, direction)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        device_type = grad_output.device.type
        if torch.is_autocast_enabled(device_type):
            # The forward pass ran without: in its own digits.
            with torch.autocast(device_type, enabled=False):
                return GmPLinear.backward(ctx, grad_output)
        *arguments, activated, direction = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        if _is_differentiated_again():

            def layer(*arguments):
                return reference.gmp_linear(*arguments, "relu" if ctx.relu else None)

            return *_reference_gradients(layer, tuple(arguments), needs, grad_output), None, None
        x, angles, radius, _ = arguments
        gradients = _gmp_linear_backward[ctx.backend](
            grad_output, x, angles, radius, activated, direction, ctx.relu, _is_deterministic(), *needs
        )
        if needs[1] and not torch.compiler.is_compiling() and gradients[1]._is_view():
            # User code could not change it as it can other gradients.
            gradients = (gradients[0], gradients[1].detach(), *gradients[2:])
        return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), None, None


def gmp_linear(x: Tensor, angles: Tensor, radius: Tensor, location: Tensor, relu: bool, backend: str) -> Tensor:
    """(..., m) -> (..., n). Not under torch.func or forward mode: see `is_fused`."""
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if torch.is_grad_enabled():
        result = library.apply(GmPLinear, GmPLinear, rows, angles, radius, location, relu, backend)
    else:
        result, _, _ = _gmp_linear[backend](rows, angles, radius, location, relu, _is_deterministic(), False, False)
    return result if x.dim() == 2 else result.view(*x.shape[:-1], angles.shape[0])


class WeightNormLinear(Function):
    """(x (M, m), weight, scale, bias, backend): the layer in one op, its gradients in another."""

    @staticmethod
    def forward(ctx, x, weight, scale, bias, backend):
        ctx.backend = backend
        ctx.save_for_backward(x, weight, scale)
        return _weight_norm_linear[backend](x, weight, scale, bias, _is_deterministic())

    @staticmethod
    def backward(ctx, grad_output):
        device_type = grad_output.device.type
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return WeightNormLinear.backward(ctx, grad_output)
        x, weight, scale = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        if _is_differentiated_again():

            def layer(x, weight, scale):
                return torch.nn.functional.linear(x, reference.normalize_scale(weight, scale))

            grad_bias = grad_output.sum(0) if needs[3] else None
            if not any(needs[:3]):
                return None, None, None, grad_bias, None
            return *_reference_gradients(layer, (x, weight, scale), needs[:3], grad_output), grad_bias, None
        gradients = _weight_norm_linear_backward[ctx.backend](
            grad_output, x, weight, scale, _is_deterministic(), *needs
        )
        return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), None


def weight_norm_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """(..., m) -> (..., n). Not under torch.func or forward mode: see `is_fused`."""
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if torch.is_grad_enabled():
        result = library.apply(WeightNormLinear, WeightNormLinear, rows, weight, scale, bias, backend)
    else:
        result = _weight_norm_linear[backend](rows, weight, scale, bias, _is_deterministic())
    return result if x.dim() == 2 else result.view(*x.shape[:-1], weight.shape[0])


def is_fused() -> bool:
    """Whether one op runs a layer. Not under torch.func and forward mode, which its parts have rules for."""
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0
