"""Rows that sum to zero (linearly constrained weights, LCW) as registered ops.

One op maps the rows of a parameter to rows w that sum to zero, and a second op is its adjoint. Each is the other's
derivative. In the centred form, w = u - mean(u) for a row u, and the map is its own adjoint. In the basis form,
w = B v for a row v, where the columns of B are an orthonormal basis of the zero-sum vectors, and the adjoint maps a
gradient g to B^T g. A third op is the whole linear layer, and a fourth computes the layer's gradients. T. Kutsuna,
"Linearly Constrained Weights", ECML PKDD 2019, arXiv 2403.13833.

In shapes, M is the number of samples, n of units and m of inputs; k is the size of a convolution's kernel.
"""

import math

import torch
from torch import Tensor
from torch.autograd import Function

from lcw_ops import _checks, _torch
from lcw_ops.ops import backends, library

NAME = "lcw_weight"
ADJOINT = "lcw_weight_backward"
LINEAR = "lcw_linear"
LINEAR_BACKWARD = "lcw_linear_backward"

# Up to this many samples, the GPU kernel also multiplies by x, and reads the weight only once. With more samples the
# constraint is applied first, and the vendor's matmul follows. On a CPU the op itself chooses.
MOST_FUSED_SAMPLES = 64


def _out_shape(tensor: Tensor, grow: int) -> tuple:
    return (tensor.shape[0], tensor.shape[1] + grow)


def _weight_fake(weight, basis):
    # Refuse on fake tensors what the kernel would refuse.
    fits = (weight.dim() == 2 or (weight.dim() > 2 and not basis)) and weight.dtype in _checks.FLOATING
    torch._check(fits, lambda: "lcw_weight: the weight must have rows")
    return weight.new_empty(_out_shape(weight, 1) if basis else weight.shape)


def _adjoint_fake(grad_output, basis):
    return grad_output.new_empty(_out_shape(grad_output, -1) if basis else grad_output.shape)


def _linear_fake(x, weight, bias, basis, deterministic):
    # Refuse on fake tensors what the kernel would refuse. Torch 2.10 cannot add a bool to a symbolic size.
    fits = x.dim() == 2 and weight.dim() == 2 and x.shape[1] == weight.shape[1] + int(basis) and x.dtype == weight.dtype
    torch._check(fits and x.is_floating_point(), lambda: "lcw_linear: x (M, m) and weight do not fit each other")
    fits = bias is None or (bias.dim() == 1 and bias.shape[0] == weight.shape[0] and bias.dtype == x.dtype)
    torch._check(fits, lambda: "lcw_linear: the bias does not fit x and weight")
    return x.new_empty((x.shape[0], weight.shape[0]))


def _linear_backward_fake(grad_output, x, weight, basis, deterministic, needs_x, needs_weight, needs_bias):
    shapes = (
        x.shape if needs_x else (0,),
        weight.shape if needs_weight else (0,),
        (weight.shape[0] if needs_bias else 0,),
    )
    return tuple(x.new_empty(shape) for shape in shapes)


def _vmap(overload, info, in_dims, rows, basis):
    """Rows are independent, so a batch of rows is a longer list of rows."""
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


def _launch_linear(x, weight, bias, basis, deterministic):
    return library.launch("lcw_linear", LINEAR, x, weight, bias, basis)


library.implement_in_triton("lcw_linear", NAME, ADJOINT)
library.implement(LINEAR, "triton", _launch_linear)
backends.IMPLEMENTED[NAME] = ("cpp", "triton")

_linear = library.get_overloads(LINEAR)
_linear_backward = library.get_overload(LINEAR_BACKWARD, "cpp")
# In deterministic mode the sizes decide which matmul runs on a CPU: a timing could decide otherwise in a later process.
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


ConstrainedWeightForwardMode = library.forward_mode_twin(
    ConstrainedWeight, lambda ctx, tangent, *_: embed(tangent, ctx.basis, ctx.backend)
)
ConstrainedWeightAdjointForwardMode = library.forward_mode_twin(
    ConstrainedWeightAdjoint, lambda ctx, tangent, *_: embed_adjoint(tangent, ctx.basis, ctx.backend)
)


def embed(rows: Tensor, basis: bool, backend: str) -> Tensor:
    """u -> u - mean(u), or v -> B v, by rows."""
    return library.apply(ConstrainedWeight, ConstrainedWeightForwardMode, rows, basis, backend)


def embed_adjoint(rows: Tensor, basis: bool, backend: str) -> Tensor:
    """g -> g - mean(g), or g -> B^T g, by rows."""
    functions = ConstrainedWeightAdjoint, ConstrainedWeightAdjointForwardMode
    return library.apply(*functions, rows, basis, backend)


def constrained_weight(weight: Tensor, basis: bool, backend: str) -> Tensor:
    """(n, m, *k) -> (n, m, *k), or with ``basis`` (n, m - 1) -> (n, m). Keeps a channels-last layout."""
    if weight.dim() >= 4 and not weight.is_contiguous() and weight.movedim(1, -1).is_contiguous():
        return embed(weight.movedim(1, -1), basis, backend).movedim(-1, 1)
    return embed(weight, basis, backend)


def project(x: Tensor, basis: bool, backend: str) -> Tensor:
    """Map x (..., m) to x - mean(x), or to B^T x (..., m - 1), which the unconstrained parameter then multiplies.

    The constraint can be applied to the weight or to the input: <w, x> = <B v, x> = <v, B^T x>.
    """
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    projected = embed_adjoint(rows, basis, backend)
    return projected if x.dim() == 2 else projected.view(*x.shape[:-1], projected.shape[1])


class FusedLinear(Function):
    """(x (M, m), weight, bias, basis, backend): the layer in one op, its gradients in another op or in matmuls.

    ``forward`` takes the context itself, because ``setup_context`` costs tens of microseconds. Only torch.func needs
    ``setup_context``, and :func:`is_fused` keeps this function away from torch.func.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, basis, backend):
        ctx.save_for_backward(x, weight)
        ctx.basis, ctx.backend = basis, backend
        return _linear[backend](x, weight, bias, basis, _is_deterministic())

    @staticmethod
    def backward(ctx, grad_output):
        if _torch.is_autocast_enabled(grad_output):
            # The forward pass ran without autocast.
            with torch.autocast(grad_output.device.type, enabled=False):
                return FusedLinear.backward(ctx, grad_output)
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = needs = ctx.needs_input_grad[:3]
        # The op's gradients cannot be differentiated again; those from matmuls can.
        if ctx.backend == "cpp" and not torch.is_grad_enabled() and not _torch.in_forward_mode():
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
    """FusedLinear with forward-mode derivatives."""

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
    # Forward-mode derivatives are taken under no_grad too.
    if _torch.in_forward_mode():
        result = FusedLinearForwardMode.apply(rows, weight, bias, basis, backend)
    elif torch.is_grad_enabled():
        # torch.func never gets here, so this needs no twin.
        result = library.apply(FusedLinear, FusedLinear, rows, weight, bias, basis, backend)
    else:
        result = _linear[backend](rows, weight, bias, basis, _is_deterministic())
    return result if x.dim() == 2 else result.view(*x.shape[:-1], weight.shape[0])


def is_fused(x: Tensor, backend: str) -> bool:
    """Whether one op runs the whole layer. Under torch.func it does not: the transforms have rules for matmuls only."""
    return not _torch.in_functorch() and (backend == "cpp" or x.numel() <= MOST_FUSED_SAMPLES * x.shape[-1])
