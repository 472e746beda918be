"""Rows with zero sum (LCW) as two registered ops, a linear map and its adjoint, each the derivative of the other.

centred: w = u - mean(u), self-adjoint. basis: w = B v, adjoint B^T g. T. Kutsuna, "Linearly Constrained Weights",
ECML PKDD 2019, arXiv 2403.13833. A third op, on GPUs, is the whole linear layer for few samples.
"""

import importlib

import torch
from torch import Tensor
from torch.autograd import Function

from lcw_ops.ops import _backends, _library

NAME = "lcw_weight"
ADJOINT = "lcw_weight_backward"
LINEAR = "lcw_linear"

# Samples up to which the layer's one kernel reads the weight once; beyond, the vendor's matmul.
FUSED_ROWS = 64


def _out_shape(tensor: Tensor, grow: int) -> tuple:
    return (tensor.shape[0], tensor.shape[1] + grow)


def _weight_fake(weight, basis):
    return weight.new_empty(_out_shape(weight, 1) if basis else weight.shape)


def _adjoint_fake(grad_output, basis):
    return grad_output.new_empty(_out_shape(grad_output, -1) if basis else grad_output.shape)


def _vmap(overload, info, in_dims, rows, basis):
    """Rows are independent: a batch of them is more rows."""
    batched = rows.movedim(in_dims[0], 0)
    return overload(batched.flatten(0, 1), basis).unflatten(0, batched.shape[:2]), 0


for _name, _argument, _fake in ((NAME, "weight", _weight_fake), (ADJOINT, "grad_output", _adjoint_fake)):
    _library.declare(
        _name, f"(Tensor {_argument}, bool basis) -> Tensor", backends=("cpp", "triton"), fake=_fake, vmap=_vmap
    )
_library.declare(
    LINEAR,
    "(Tensor x, Tensor weight, Tensor? bias, bool basis) -> Tensor",
    backends=("triton",),
    fake=lambda x, weight, bias, basis: x.new_empty((x.shape[0], weight.shape[0])),
)


def _implement_in_triton(name: str) -> None:
    """The module is imported at the first use: lcw_ops must not need Triton."""

    def run(*arguments):
        return getattr(importlib.import_module("lcw_ops.kernels.lcw_linear"), name)(*arguments)

    _library.implement(name, "triton", run)


for _name in (NAME, ADJOINT, LINEAR):
    _implement_in_triton(_name)
_backends.IMPLEMENTED[NAME] = ("cpp", "triton")


class ConstrainedWeight(Function):
    """(rows, basis, backend): u -> u - mean(u), or v -> B v."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows, basis, backend):
        return _library.get_overload(NAME, backend)(rows, basis)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.basis, ctx.backend = inputs

    @staticmethod
    def backward(ctx, grad_output):
        return apply(ConstrainedWeightAdjoint, grad_output, ctx.basis, ctx.backend), None, None


class ConstrainedWeightAdjoint(ConstrainedWeight):
    """(rows, basis, backend): g -> g - mean(g), or g -> B^T g."""

    @staticmethod
    def forward(rows, basis, backend):
        return _library.get_overload(ADJOINT, backend)(rows, basis)

    @staticmethod
    def backward(ctx, grad_output):
        return apply(ConstrainedWeight, grad_output, ctx.basis, ctx.backend), None, None


class ConstrainedWeightForwardMode(ConstrainedWeight):
    """The same with forward-mode derivatives, which torch.compile does not trace."""

    @staticmethod
    def jvp(ctx, tangent, *_):
        return apply(ConstrainedWeight, tangent, ctx.basis, ctx.backend)


class ConstrainedWeightAdjointForwardMode(ConstrainedWeightAdjoint):
    """The same with forward-mode derivatives."""

    @staticmethod
    def jvp(ctx, tangent, *_):
        return apply(ConstrainedWeightAdjoint, tangent, ctx.basis, ctx.backend)


_FORWARD_MODE = {
    ConstrainedWeight: ConstrainedWeightForwardMode,
    ConstrainedWeightAdjoint: ConstrainedWeightAdjointForwardMode,
}


def apply(function: type[Function], rows: Tensor, basis: bool, backend: str) -> Tensor:
    return _library.traceable(function, _FORWARD_MODE[function]).apply(rows, basis, backend)


def constrained_weight(weight: Tensor, basis: bool, backend: str) -> Tensor:
    """(n, m, *k) -> the same shape; basis: (n, m - 1) -> (n, m). Keeps a channels-last layout."""
    for memory_format in () if weight.is_contiguous() else _MEMORY_FORMATS.get(weight.dim(), ()):
        if weight.is_contiguous(memory_format=memory_format):
            return apply(ConstrainedWeight, weight.movedim(1, -1), basis, backend).movedim(-1, 1)
    return apply(ConstrainedWeight, weight, basis, backend)


_MEMORY_FORMATS = {4: (torch.channels_last,), 5: (torch.channels_last_3d,)}


def project(x: Tensor, basis: bool, backend: str) -> Tensor:
    """(..., m) -> x - mean(x), or B^T x (..., m - 1): what the unconstrained parameter is multiplied with.

    <w, x> = <B v, x> = <v, B^T x>: the constraint can be laid on the weight or on the input.
    """
    rows = x.reshape(-1, x.shape[-1])
    projected = apply(ConstrainedWeightAdjoint, rows, basis, backend)
    return projected.view(*x.shape[:-1], projected.shape[1])


class FusedLinear(Function):
    """(x (M, m), weight, bias, basis, backend): one kernel forward; backward is the vendor's matmuls."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, basis, backend):
        return _library.get_overload(LINEAR, backend)(x, weight, bias, basis)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, ctx.basis, ctx.backend = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = apply(ConstrainedWeight, grad_output @ weight, ctx.basis, ctx.backend) if needs_x else None
        grad_weight = grad_output.mT @ project(x, ctx.basis, ctx.backend) if needs_weight else None
        return grad_x, grad_weight, grad_output.sum(0) if needs_bias else None, None, None


class FusedLinearForwardMode(FusedLinear):
    """The same with forward-mode derivatives."""

    @staticmethod
    def jvp(ctx, x_tangent, weight_tangent, bias_tangent, *_):
        x, weight = ctx.saved_tensors
        tangent = project(x, ctx.basis, ctx.backend) @ weight_tangent.mT
        tangent = tangent + project(x_tangent, ctx.basis, ctx.backend) @ weight.mT
        return tangent if bias_tangent is None else tangent + bias_tangent


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, basis: bool, backend: str) -> Tensor:
    """(..., m) -> (..., n) for few samples."""
    function = _library.traceable(FusedLinear, FusedLinearForwardMode)
    rows = x.reshape(-1, x.shape[-1])
    return function.apply(rows, weight, bias, basis, backend).view(*x.shape[:-1], weight.shape[0])


def has_fused_linear(backend: str) -> bool:
    return backend == "triton"
