"""Rows with zero sum (LCW) as two registered ops, a linear map and its adjoint, each the derivative of the other.

centred: w = u - mean(u), self-adjoint. basis: w = B v, adjoint B^T g. T. Kutsuna, "Linearly Constrained Weights",
ECML PKDD 2019, arXiv 2403.13833. A third op is the whole linear layer, a fourth its gradients.
"""

import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from lcw_ops.ops import backends, library

NAME = "lcw_weight"
ADJOINT = "lcw_weight_backward"
LINEAR = "lcw_linear"
LINEAR_BACKWARD = "lcw_linear_backward"

# Samples up to which the GPU's kernel multiplies, reading the weight once; beyond, the vendor's matmul after the
# constraint. On a CPU the op itself chooses.
FUSED_ROWS = 64


def _out_shape(tensor: Tensor, grow: int) -> tuple:
    return (tensor.shape[0], tensor.shape[1] + grow)


def _weight_fake(weight, basis):
    return weight.new_empty(_out_shape(weight, 1) if basis else weight.shape)


def _adjoint_fake(grad_output, basis):
    return grad_output.new_empty(_out_shape(grad_output, -1) if basis else grad_output.shape)


def _linear_fake(x, weight, bias, basis, deterministic):
    # Whoever calls the op on fake tensors hears of what does not fit as the kernel's callers do.
    fits = x.dim() == 2 and weight.dim() == 2 and x.shape[1] == weight.shape[1] + basis and x.dtype == weight.dtype
    torch._check(fits and x.is_floating_point(), lambda: "lcw_linear: x (M, m) and weight do not fit each other")
    fits = bias is None or (bias.dim() == 1 and bias.shape[0] == weight.shape[0] and bias.dtype == x.dtype)
    torch._check(fits, lambda: "lcw_linear: the bias does not fit")
    return x.new_empty((x.shape[0], weight.shape[0]))


def _linear_backward_fake(grad_output, x, weight, basis, deterministic, needs_x, needs_weight, needs_bias):
    shapes = (
        x.shape if needs_x else (0,),
        weight.shape if needs_weight else (0,),
        (weight.shape[0] if needs_bias else 0,),
    )
    return tuple(x.new_empty(shape) for shape in shapes)


def _vmap(overload, info, in_dims, rows, basis):
    """Rows are independent: a batch of them is more rows."""
    batched = rows.movedim(in_dims[0], 0)
    return overload(batched.flatten(0, 1), basis).unflatten(0, batched.shape[:2]), 0


for _name, _argument, _fake in ((NAME, "weight", _weight_fake), (ADJOINT, "grad_output", _adjoint_fake)):
    library.declare(
        _name, f"(Tensor {_argument}, bool basis) -> Tensor", backends=("cpp", "triton"), fake=_fake, vmap=_vmap
    )
library.declare(
    LINEAR,
    "(Tensor x, Tensor weight, Tensor? bias, bool basis, bool deterministic) -> Tensor",
    backends=("cpp", "triton"),
    fake=_linear_fake,
)
library.declare(
    LINEAR_BACKWARD,
    "(Tensor grad_output, Tensor x, Tensor weight, bool basis, bool deterministic, bool needs_x, bool needs_weight, "
    "bool needs_bias)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    backends=("cpp",),
    fake=_linear_backward_fake,
)


def _in_triton(name: str) -> Callable:
    """The module is imported at the first use: lcw_ops must not need Triton."""
    return lambda *arguments: getattr(importlib.import_module("lcw_ops.kernels.lcw_linear"), name)(*arguments)


library.implement(NAME, "triton", _in_triton(NAME))
library.implement(ADJOINT, "triton", _in_triton(ADJOINT))
library.implement(LINEAR, "triton", lambda x, weight, bias, basis, _: _in_triton(LINEAR)(x, weight, bias, basis))
backends.IMPLEMENTED[NAME] = ("cpp", "triton")

_linear = {backend: library.get_overload(LINEAR, backend) for backend in ("cpp", "triton")}
_linear_backward = library.get_overload(LINEAR_BACKWARD, "cpp")
# Who multiplies on a CPU then follows from the sizes: whoever is measured faster may be another in the next process.
_is_deterministic = torch.are_deterministic_algorithms_enabled


class ConstrainedWeight(Function):
    """(rows, basis, backend): u -> u - mean(u), or v -> B v."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows, basis, backend):
        return library.get_overload(NAME, backend)(rows, basis)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.basis, ctx.backend = inputs

    @staticmethod
    def backward(ctx, grad_output):
        return embed_adjoint(grad_output, ctx.basis, ctx.backend), None, None


class ConstrainedWeightAdjoint(ConstrainedWeight):
    """(rows, basis, backend): g -> g - mean(g), or g -> B^T g."""

    @staticmethod
    def forward(rows, basis, backend):
        return library.get_overload(ADJOINT, backend)(rows, basis)

    @staticmethod
    def backward(ctx, grad_output):
        return embed(grad_output, ctx.basis, ctx.backend), None, None


class ConstrainedWeightForwardMode(ConstrainedWeight):
    """The same with forward-mode derivatives, which torch.compile does not trace."""

    @staticmethod
    def jvp(ctx, tangent, *_):
        return embed(tangent, ctx.basis, ctx.backend)


class ConstrainedWeightAdjointForwardMode(ConstrainedWeightAdjoint):
    """The same with forward-mode derivatives."""

    @staticmethod
    def jvp(ctx, tangent, *_):
        return embed_adjoint(tangent, ctx.basis, ctx.backend)


def embed(rows: Tensor, basis: bool, backend: str) -> Tensor:
    return library.apply(ConstrainedWeight, ConstrainedWeightForwardMode, rows, basis, backend)


def embed_adjoint(rows: Tensor, basis: bool, backend: str) -> Tensor:
    functions = ConstrainedWeightAdjoint, ConstrainedWeightAdjointForwardMode
    return library.apply(*functions, rows, basis, backend)


def constrained_weight(weight: Tensor, basis: bool, backend: str) -> Tensor:
    """(n, m, *k) -> the same shape; basis: (n, m - 1) -> (n, m). Keeps a channels-last layout."""
    if weight.dim() >= 4 and not weight.is_contiguous() and weight.movedim(1, -1).is_contiguous():
        return embed(weight.movedim(1, -1), basis, backend).movedim(-1, 1)
    return embed(weight, basis, backend)


def project(x: Tensor, basis: bool, backend: str) -> Tensor:
    """(..., m) -> x - mean(x), or B^T x (..., m - 1): what the unconstrained parameter is multiplied with.

    <w, x> = <B v, x> = <v, B^T x>: the constraint can be laid on the weight or on the input.
    """
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    projected = embed_adjoint(rows, basis, backend)
    return projected if x.dim() == 2 else projected.view(*x.shape[:-1], projected.shape[1])


class FusedLinear(Function):
    """(x (M, m), weight, bias, basis, backend): the layer in one op, its gradients in another or in matmuls.

    ``forward`` takes the context itself: a ``setup_context``, which only torch.func needs, costs tens of microseconds.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, basis, backend):
        ctx.save_for_backward(x, weight)
        ctx.basis, ctx.backend = basis, backend
        return _linear[backend](x, weight, bias, basis, _is_deterministic())

    @staticmethod
    def backward(ctx, grad_output):
        device_type = grad_output.device.type
        if torch.is_autocast_enabled(device_type):
            # The forward pass ran without: in its own digits.
            with torch.autocast(device_type, enabled=False):
                return FusedLinear.backward(ctx, grad_output)
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = needs = ctx.needs_input_grad[:3]
        # With a graph, or under forward mode, the gradients are made of what can be differentiated again.
        if ctx.backend == "cpp" and not torch.is_grad_enabled() and forward_ad._current_level < 0:
            grad_x, grad_weight, grad_bias = _linear_backward(
                grad_output, x, weight, ctx.basis, _is_deterministic(), *needs
            )
        else:
            grad_x = embed(grad_output @ weight, ctx.basis, ctx.backend) if needs_x else None
            grad_weight = grad_output.mT @ project(x, ctx.basis, ctx.backend) if needs_weight else None
            grad_bias = grad_output.sum(0) if needs_bias else None
        return (
            grad_x if needs_x else None,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            None,
            None,
        )


class FusedLinearForwardMode(FusedLinear):
    """The same with forward-mode derivatives, which torch.compile does not trace."""

    @staticmethod
    def forward(ctx, x, weight, bias, basis, backend):
        ctx.save_for_forward(x, weight)
        return FusedLinear.forward(ctx, x, weight, bias, basis, backend)

    @staticmethod
    def jvp(ctx, x_tangent, weight_tangent, bias_tangent, *_):
        x, weight = ctx.saved_tensors
        tangent = project(x, ctx.basis, ctx.backend) @ weight_tangent.mT
        tangent = tangent + project(x_tangent, ctx.basis, ctx.backend) @ weight.mT
        return tangent if bias_tangent is None else tangent + bias_tangent


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, basis: bool, backend: str) -> Tensor:
    """(..., m) -> (..., n)."""
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    # Forward-mode derivatives are made under no_grad too.
    if forward_ad._current_level >= 0:
        result = FusedLinearForwardMode.apply(rows, weight, bias, basis, backend)
    elif torch.is_grad_enabled():
        # Not needed under torch.func, whose transforms never come here.
        result = library.apply(FusedLinear, FusedLinear, rows, weight, bias, basis, backend)
    else:
        result = _linear[backend](rows, weight, bias, basis, _is_deterministic())
    return result if x.dim() == 2 else result.view(*x.shape[:-1], weight.shape[0])


def is_fused(x: Tensor, backend: str) -> bool:
    """Whether one op runs the layer. Not under torch.func, whose transforms matmuls have rules for."""
    if torch._C._are_functorch_transforms_active():
        return False
    return backend == "cpp" or x.numel() <= FUSED_ROWS * x.shape[-1]
