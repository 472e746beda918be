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

from lcw_ops.ops import _backends, _library

NAME = "lcw_weight"
ADJOINT = "lcw_weight_backward"
LINEAR = "lcw_linear"
LINEAR_BACKWARD = "lcw_linear_backward"

# Samples up to which our own kernel multiplies, reading the weight once; beyond, the vendor's matmul: on a CPU inside
# the op, on a GPU after the constraint.
FEW_ROWS, FUSED_ROWS = 16, 64


def _out_shape(tensor: Tensor, grow: int) -> tuple:
    return (tensor.shape[0], tensor.shape[1] + grow)


def _weight_fake(weight, basis):
    return weight.new_empty(_out_shape(weight, 1) if basis else weight.shape)


def _adjoint_fake(grad_output, basis):
    return grad_output.new_empty(_out_shape(grad_output, -1) if basis else grad_output.shape)


def _linear_backward_fake(grad_output, x, weight, basis, vendor, needs_x, needs_weight, needs_bias):
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
    _library.declare(
        _name, f"(Tensor {_argument}, bool basis) -> Tensor", backends=("cpp", "triton"), fake=_fake, vmap=_vmap
    )
_library.declare(
    LINEAR,
    "(Tensor x, Tensor weight, Tensor? bias, bool basis, bool vendor) -> Tensor",
    backends=("cpp", "triton"),
    fake=lambda x, weight, bias, basis, vendor: x.new_empty((x.shape[0], weight.shape[0])),
)
_library.declare(
    LINEAR_BACKWARD,
    "(Tensor grad_output, Tensor x, Tensor weight, bool basis, bool vendor, bool needs_x, bool needs_weight, "
    "bool needs_bias)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    backends=("cpp",),
    fake=_linear_backward_fake,
)


def _in_triton(name: str) -> Callable:
    """The module is imported at the first use: lcw_ops must not need Triton."""
    return lambda *arguments: getattr(importlib.import_module("lcw_ops.kernels.lcw_linear"), name)(*arguments)


_library.implement(NAME, "triton", _in_triton(NAME))
_library.implement(ADJOINT, "triton", _in_triton(ADJOINT))
_library.implement(LINEAR, "triton", lambda x, weight, bias, basis, _: _in_triton(LINEAR)(x, weight, bias, basis))
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
        return embed_adjoint(grad_output, ctx.basis, ctx.backend), None, None


class ConstrainedWeightAdjoint(ConstrainedWeight):
    """(rows, basis, backend): g -> g - mean(g), or g -> B^T g."""

    @staticmethod
    def forward(rows, basis, backend):
        return _library.get_overload(ADJOINT, backend)(rows, basis)

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
    return _library.apply(ConstrainedWeight, ConstrainedWeightForwardMode, rows, basis, backend)


def embed_adjoint(rows: Tensor, basis: bool, backend: str) -> Tensor:
    functions = ConstrainedWeightAdjoint, ConstrainedWeightAdjointForwardMode
    return _library.apply(*functions, rows, basis, backend)


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
    """(x (M, m), weight, bias, basis, vendor, backend): the layer in one op, its gradients in another or in matmuls."""

    @staticmethod
    def forward(x, weight, bias, basis, vendor, backend):
        return _library.get_overload(LINEAR, backend)(x, weight, bias, basis, vendor)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, ctx.basis, ctx.vendor, ctx.backend = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = needs = ctx.needs_input_grad[:3]
        # With a graph the gradients are made of what can be differentiated again.
        if ctx.backend == "cpp" and not torch.is_grad_enabled():
            backward = _library.get_overload(LINEAR_BACKWARD, "cpp")
            gradients = backward(grad_output, x, weight, ctx.basis, ctx.vendor, *needs)
            return *(one if needed else None for one, needed in zip(gradients, needs, strict=True)), None, None, None
        grad_x = embed(grad_output @ weight, ctx.basis, ctx.backend) if needs_x else None
        grad_weight = grad_output.mT @ project(x, ctx.basis, ctx.backend) if needs_weight else None
        return grad_x, grad_weight, grad_output.sum(0) if needs_bias else None, None, None, None


class FusedLinearForwardMode(FusedLinear):
    """The same with forward-mode derivatives."""

    @staticmethod
    def jvp(ctx, x_tangent, weight_tangent, bias_tangent, *_):
        x, weight = ctx.saved_tensors
        tangent = project(x, ctx.basis, ctx.backend) @ weight_tangent.mT
        tangent = tangent + project(x_tangent, ctx.basis, ctx.backend) @ weight.mT
        return tangent if bias_tangent is None else tangent + bias_tangent


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, basis: bool, backend: str) -> Tensor:
    """(..., m) -> (..., n)."""
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    vendor = backend == "cpp" and rows.shape[0] > FEW_ROWS and x.dtype not in _SLOW_MATMULS
    arguments = rows, weight, bias, basis, vendor
    # Forward-mode derivatives are made under no_grad too.
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        result = _library.apply(FusedLinear, FusedLinearForwardMode, *arguments, backend)
    else:
        result = _library.get_overload(LINEAR, backend)(*arguments)
    return result if x.dim() == 2 else result.view(*x.shape[:-1], weight.shape[0])


def is_fused(rows: int, backend: str) -> bool:
    """Whether one op runs the layer. Not under torch.func, whose transforms matmuls have rules for."""
    return (backend == "cpp" or rows <= FUSED_ROWS) and not torch._C._are_functorch_transforms_active()


def _slow_matmuls() -> frozenset[torch.dtype]:
    """16 bits on processors without instructions for them, where torch's matmul runs at a tenth of float32's rate."""
    mkldnn = torch.ops.mkldnn
    fast = {
        torch.bfloat16: hasattr(mkldnn, "_is_mkldnn_bf16_supported") and mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: hasattr(mkldnn, "_is_mkldnn_fp16_supported") and mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, supported in fast.items() if not supported)


_SLOW_MATMULS = _slow_matmuls()
