"""Weight normalization as registered ops: normalised and scaled rows, and the linear layer.

y = x w^T + b, where a unit's weight is w = s v / ||v||, with a trained row v, scale s and bias b. T. Salimans, D. P.
Kingma, NeurIPS 2016, arXiv 1602.07868. The gradients of an op are another op. Second derivatives are those of the
reference, in plain torch.

In shapes, M is the number of samples, n of units and m of inputs.
"""

import math

import torch
from torch import Tensor
from torch.autograd import Function

from lcw_ops import _checks, _torch, reference
from lcw_ops.ops import backends, library

NORMALIZE = "normalize_scale"
# The backend of the layer is chosen by this name too.
NAME = NORMALIZE
NORMALIZE_BACKWARD = "normalize_scale_backward"
WEIGHT_NORM_LINEAR = "weight_norm_linear"
WEIGHT_NORM_LINEAR_BACKWARD = "weight_norm_linear_backward"


def _normalize_fake(weight, scale):
    # Refuse on fake tensors what the kernel would refuse.
    fits = weight.dim() == 2 and weight.shape[1] >= 1 and weight.dtype in _checks.FLOATING
    fits = fits and library.is_per_unit(scale, weight)
    torch._check(fits, lambda: "normalize_scale: weight (n, m) and scale (n,) do not fit")
    return weight.new_empty(weight.shape)


def _normalize_backward_fake(grad_output, weight, scale):
    return weight.new_empty(weight.shape), scale.new_empty(scale.shape)


def _is_scale(scale, weight):
    """Whether the C++ kernel of the layer takes the scale: (n,), or torch's shape (n, 1)."""
    vector = scale.squeeze(1) if scale.dim() == 2 else scale
    return library.is_per_unit(vector, weight)


def _weight_norm_linear_fake(x, weight, scale, bias, deterministic):
    fits = x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[1] and weight.shape[1] >= 1
    torch._check(fits and library.are_alike(x, weight), lambda: "weight_norm_linear: x (M, m) and weight do not fit")
    fits = _is_scale(scale, weight) and (bias is None or library.is_per_unit(bias, weight))
    torch._check(fits, lambda: "weight_norm_linear: scale or bias do not fit the weight")
    return x.new_empty((x.shape[0], weight.shape[0]))


def _weight_norm_linear_backward_fake(
    grad_output, x, weight, scale, deterministic, needs_x, needs_weight, needs_scale, needs_bias
):
    units = weight.shape[0]
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        x.new_empty(weight.shape if needs_weight else (0,)),
        x.new_empty(scale.shape if needs_scale else (0,)),
        x.new_empty((units if needs_bias else 0,)),
    )


library.declare(
    NORMALIZE,
    "(Tensor weight, Tensor scale) -> Tensor",
    backends=("cpp", "triton"),
    fake=_normalize_fake,
    vmap=library.vmap_rows,
)
library.declare(
    NORMALIZE_BACKWARD,
    "(Tensor grad_output, Tensor weight, Tensor scale) -> (Tensor grad_weight, Tensor grad_scale)",
    backends=("cpp", "triton"),
    fake=_normalize_backward_fake,
    vmap=library.vmap_rows,
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
library.implement_in_triton(
    "weight_norm", NORMALIZE, NORMALIZE_BACKWARD, WEIGHT_NORM_LINEAR, WEIGHT_NORM_LINEAR_BACKWARD
)
backends.IMPLEMENTED[NAME] = ("cpp", "triton")

_is_deterministic = torch.are_deterministic_algorithms_enabled

_normalize, _normalize_backward = library.get_overloads(NORMALIZE), library.get_overloads(NORMALIZE_BACKWARD)
_weight_norm_linear = library.get_overloads(WEIGHT_NORM_LINEAR)
_weight_norm_linear_backward = library.get_overloads(WEIGHT_NORM_LINEAR_BACKWARD)


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
        ctx.save_for_forward(weight, scale)

    @staticmethod
    def backward(ctx, grad_output):
        weight, scale = ctx.saved_tensors
        # The op's gradients cannot be differentiated again; the reference's can.
        if torch.is_grad_enabled() or _torch.in_forward_mode():
            return *reference.normalize_scale_backward(grad_output, weight, scale), None
        return *_normalize_backward[ctx.backend](grad_output, weight, scale), None


def _normalize_scale_jvp(ctx, weight_tangent, scale_tangent, *_):
    return reference.normalize_scale_jvp(weight_tangent, scale_tangent, *ctx.saved_tensors)


NormalizeScaleForwardMode = library.forward_mode_twin(NormalizeScale, _normalize_scale_jvp)


def normalize_scale(weight: Tensor, scale: Tensor, backend: str) -> Tensor:
    """(n, m), (n,) -> (n, m)."""
    return library.apply(NormalizeScale, NormalizeScaleForwardMode, weight, scale, backend)


class WeightNormLinear(Function):
    """(x (M, m), weight, scale, bias, backend): the layer in one op, its gradients in another op.

    The scale is (n,), or for the C++ kernel (n, 1) too.

    ``forward`` takes the context itself, because ``setup_context`` costs tens of microseconds. Only torch.func needs
    ``setup_context``, and :func:`is_fused` keeps this function away from torch.func.
    """

    @staticmethod
    def forward(ctx, x, weight, scale, bias, backend):
        ctx.backend = backend
        ctx.save_for_backward(x, weight, scale)
        return _weight_norm_linear[backend](x, weight, scale, bias, _is_deterministic())

    @staticmethod
    def backward(ctx, grad_output):
        if _torch.is_autocast_enabled(grad_output):
            with torch.autocast(grad_output.device.type, enabled=False):
                return WeightNormLinear.backward(ctx, grad_output)
        x, weight, scale = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        # The op's gradients cannot be differentiated again; the reference's can.
        if torch.is_grad_enabled() or _torch.in_forward_mode():

            def layer(x, weight, scale):
                return torch.nn.functional.linear(x, reference.normalize_scale(weight, scale.flatten()))

            grad_bias = grad_output.sum(0) if needs[3] else None
            if not any(needs[:3]):
                return None, None, None, grad_bias, None
            return *library.reference_gradients(layer, (x, weight, scale), needs[:3], grad_output), grad_bias, None
        grad_x, grad_weight, grad_scale, grad_bias = _weight_norm_linear_backward[ctx.backend](
            grad_output, x, weight, scale, _is_deterministic(), *needs
        )
        return (
            grad_x if needs[0] else None,
            grad_weight if needs[1] else None,
            grad_scale if needs[2] else None,
            grad_bias if needs[3] else None,
            None,
        )


def weight_norm_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """(..., m) -> (..., n). Not under torch.func or in forward mode; see :func:`is_fused`."""
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if torch.is_grad_enabled():
        result = library.apply(WeightNormLinear, WeightNormLinear, rows, weight, scale, bias, backend)
    else:
        result = _weight_norm_linear[backend](rows, weight, scale, bias, _is_deterministic())
    return result if x.dim() == 2 else result.view(*x.shape[:-1], weight.shape[0])


def is_fused() -> bool:
    """Whether one op runs the layer. torch.func and forward mode have rules only for the layer's parts."""
    return not _torch.in_functorch() and not _torch.in_forward_mode()
