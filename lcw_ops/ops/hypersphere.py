"""Hyperspherical weights (GmP) as registered ops: the directions of given angles, and the linear layer.

y = r act(x u^T + lambda): each unit has a radius r, a location lambda, and angles t that give its unit row u, with
u_k = cos t_k prod_{i<k} sin t_i for k < m and u_m = prod_{i<m} sin t_i. W. Chen, H. Ge, NeurIPS 2024, arXiv 2305.15912.
The gradients of an op are another op. Second derivatives are those of the reference, in plain torch.

In shapes, M is the number of samples, n of units and m of inputs.
"""

import functools
import importlib
import math

import torch
from torch import Tensor
from torch.autograd import Function

from lcw_ops import _checks, _old_names, _torch, reference
from lcw_ops.ops import backends, library

DIRECTION = "hypersphere_direction"
# The backend of the layer is chosen by this name too.
NAME = DIRECTION
DIRECTION_BACKWARD = "hypersphere_direction_backward"
GMP_LINEAR = "gmp_linear"
GMP_LINEAR_BACKWARD = "gmp_linear_backward"
FEW_SAMPLES = "gmp_linear_few_samples"


def _direction_fake(angles):
    # Refuse on fake tensors what the kernel would refuse.
    fits = angles.dim() == 2 and angles.dtype in _checks.FLOATING
    torch._check(fits, lambda: "hypersphere_direction: angles must be (n, m-1)")
    return angles.new_empty((angles.shape[0], angles.shape[1] + 1))


def _direction_backward_fake(grad_direction, angles):
    return angles.new_empty(angles.shape)


def _gmp_linear_fake(x, angles, radius, location, relu, deterministic, keep_activated, keep_direction):
    # Refuse on fake tensors what the kernel would refuse.
    fits = x.dim() == angles.dim() == 2 and x.shape[1] == angles.shape[1] + 1
    torch._check(fits and library.are_alike(x, angles), lambda: "gmp_linear: x (M, m) and angles do not fit each other")
    units, fan_in = angles.shape[0], x.shape[1]
    fits = library.is_per_unit(radius, angles) and library.is_per_unit(location, angles)
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


library.declare(
    DIRECTION,
    "(Tensor angles) -> Tensor",
    backends=("cpp", "triton"),
    fake=_direction_fake,
    vmap=library.vmap_rows,
)
library.declare(
    DIRECTION_BACKWARD,
    "(Tensor grad_direction, Tensor angles) -> Tensor",
    backends=("cpp", "triton"),
    fake=_direction_backward_fake,
    vmap=library.vmap_rows,
)
library.declare(
    GMP_LINEAR,
    # `activated` is act(x u^T + location) and `direction` is u. Either is empty unless it is kept.
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
# Up to this many samples, a backend computes the directions inside the product, in backward once more, and never stores
# them. With more samples, it is cheaper to keep the directions, which are as large as the weight, for backward.
library.declare(FEW_SAMPLES, "() -> int", backends=("cpp", "triton"))
library.implement_in_triton("hypersphere", DIRECTION, DIRECTION_BACKWARD, GMP_LINEAR, GMP_LINEAR_BACKWARD)
library.implement(FEW_SAMPLES, "triton", lambda: importlib.import_module("lcw_ops.kernels.hypersphere").FUSED_ROWS)
backends.IMPLEMENTED[NAME] = ("cpp", "triton")

_is_deterministic = torch.are_deterministic_algorithms_enabled

_direction, _direction_backward = library.get_overloads(DIRECTION), library.get_overloads(DIRECTION_BACKWARD)
_gmp_linear, _gmp_linear_backward = library.get_overloads(GMP_LINEAR), library.get_overloads(GMP_LINEAR_BACKWARD)


@_torch.constant_when_traced
def few_samples(backend: str) -> int:
    """The number of samples up to which ``backend`` computes the directions inside the product."""
    return _ask_few_samples(backend)


@functools.cache
def _ask_few_samples(backend: str) -> int:
    return library.get_overload(FEW_SAMPLES, backend)()


class Direction(Function):
    """(angles (n, m - 1), backend) -> unit rows (n, m)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(angles, backend):
        return _direction[backend](angles)

    @staticmethod
    def setup_context(ctx, inputs, output):
        angles, ctx.backend = inputs
        ctx.save_for_backward(angles)
        ctx.save_for_forward(angles)

    @staticmethod
    def backward(ctx, grad_direction):
        (angles,) = ctx.saved_tensors
        # The op's gradients cannot be differentiated again; the reference's can.
        if torch.is_grad_enabled() or _torch.in_forward_mode():
            return reference.hypersphere_direction_backward(grad_direction, angles), None
        return _direction_backward[ctx.backend](grad_direction, angles), None


def _direction_jvp(ctx, tangent, *_):
    (angles,) = ctx.saved_tensors
    return reference.hypersphere_direction_jvp(tangent, angles)


DirectionForwardMode = library.forward_mode_twin(Direction, _direction_jvp)


def direction(angles: Tensor, backend: str) -> Tensor:
    """(n, m - 1) -> (n, m)."""
    return library.apply(Direction, DirectionForwardMode, angles, backend)


class GmPLinear(Function):
    """(x (M, m), angles, radius, location, relu, backend): the layer in one op, its gradients in another op.

    ``forward`` takes the context itself, because ``setup_context`` costs tens of microseconds. Only torch.func needs
    ``setup_context``, and :func:`is_fused` keeps this function away from torch.func.
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
            needs_x and x.shape[0] > few_samples(backend),
        )
        ctx.save_for_backward(x, angles, radius, location, activated, direction)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        if _torch.is_autocast_enabled(grad_output):
            # The forward pass ran without autocast.
            with torch.autocast(grad_output.device.type, enabled=False):
                return GmPLinear.backward(ctx, grad_output)
        *arguments, activated, direction = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        # The op's gradients cannot be differentiated again; the reference's can.
        if torch.is_grad_enabled() or _torch.in_forward_mode():

            def layer(*arguments):
                return reference.gmp_linear(*arguments, "relu" if ctx.relu else None)

            return *library.reference_gradients(layer, tuple(arguments), needs, grad_output), None, None
        x, angles, radius, _ = arguments
        gradients = _gmp_linear_backward[ctx.backend](
            grad_output, x, angles, radius, activated, direction, ctx.relu, _is_deterministic(), *needs
        )
        if needs[1] and not torch.compiler.is_compiling() and _torch.is_view(gradients[1]):
            # User code may change a gradient in place, which a view would not allow.
            gradients = (gradients[0], gradients[1].detach(), *gradients[2:])
        grad_x, grad_angles, grad_radius, grad_location = gradients
        return (
            grad_x if needs[0] else None,
            grad_angles if needs[1] else None,
            grad_radius if needs[2] else None,
            grad_location if needs[3] else None,
            None,
            None,
        )


def gmp_linear(
    x: Tensor, angles: Tensor, radius: Tensor, location: Tensor, activation: str | None, backend: str
) -> Tensor:
    """(..., m) -> (..., n). Not under torch.func or in forward mode; see :func:`is_fused`."""
    relu = activation == "relu"
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if torch.is_grad_enabled():
        result = library.apply(GmPLinear, GmPLinear, rows, angles, radius, location, relu, backend)
    else:
        result, _, _ = _gmp_linear[backend](rows, angles, radius, location, relu, _is_deterministic(), False, False)
    return result if x.dim() == 2 else result.view(*x.shape[:-1], angles.shape[0])


def is_fused() -> bool:
    """Whether one op runs the layer. torch.func and forward mode have rules only for the layer's parts."""
    return not _torch.in_functorch() and not _torch.in_forward_mode()


# Weight normalization has moved from this file to one of its own; its names can still be imported from here.
_old_names.keep(
    globals(),
    dict.fromkeys(
        (
            "NORMALIZE",
            "NORMALIZE_BACKWARD",
            "NormalizeScale",
            "NormalizeScaleForwardMode",
            "WEIGHT_NORM_LINEAR",
            "WEIGHT_NORM_LINEAR_BACKWARD",
            "WeightNormLinear",
            "normalize_scale",
            "weight_norm_linear",
        ),
        "lcw_ops.ops.weight_norm",
    ),
)
