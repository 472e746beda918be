"""The arithmetic of a pass, counted op by op: multiplications and additions of matrix products and convolutions.

torch's FlopCounterMode follows the modules too, and its hooks fail where autograd.grad meets a parameter that was given
to a submodule as its input. It also lacks the formulas below. An op that computes products but has no formula is named,
so that a count without it is never taken for the whole.

The formulas count the products of the mathematical definition, whatever a kernel does: attention costs the same on
every kernel, and a gradient that nothing requires costs nothing.
"""

import math
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from lcw_ops import _torch

aten = torch.ops.aten

# Words in the names of torch's ops that compute products. Such an op is reported as not counted if it has no formula.
_PRODUCTS = re.compile(
    r"linalg|fft|cdist|euclidean_dist|rnn|lstm|gru|attention|attn|conv(?!ert)|gemm|matmul|linear|trilinear|sparse_mm|scaled_mm"
    r"|int_mm|addmm|householder|cholesky|geqrf|ormqr|orgqr|triangular_solve|lu_solve|matrix_exp|svd|sspaddmm"
    r"|_mm_|_mv"
)

# Ops whose names contain such a word, but which multiply no matrices.
_NO_PRODUCTS = re.compile(r"_thnn_fused|_fused_sdp_choice|upsample|linalg_vector_norm|linalg_cross|linalg_diagonal")


@dataclass
class Count:
    """FLOPs of the forward and the backward pass, and the names of the ops that are not in them."""

    forward: float = math.nan
    backward: float = math.nan
    uncounted: tuple[str, ...] = ()


@dataclass
class Counter(_torch.DispatchMode):
    """Counts the ops inside the ``with`` block, in ``flops``; ``uncounted`` holds the names of ops without formula."""

    flops: int = 0
    uncounted: dict[str, None] = field(default_factory=dict)
    supports_higher_order_operators = True

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and isinstance(func, _torch.OpOverload):
            # In this mode, ops such as linear and matmul come here before torch has split them into products.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        # A higher-order op is its own entry; of an ordinary op, all overloads share one.
        op = getattr(func, "overloadpacket", func)
        formula = FORMULAS.get(op)
        if formula is not None:
            self.flops += formula(*args, **kwargs) * _complex_factor(result)
        elif op in flop_registry:
            self.flops += flop_registry[op](*args, **kwargs, out_val=result) * _complex_factor(result)
        elif _may_multiply(func):
            self.uncounted[_name(func)] = None
        return result


def _complex_factor(result) -> int:
    """A product of complex numbers takes four real ones."""
    tensor = result[0] if isinstance(result, (tuple, list)) and result else result
    return 4 if isinstance(tensor, Tensor) and tensor.is_complex() else 1


def _name(func) -> str:
    return str(func).removesuffix(".default")


def _may_multiply(func) -> bool:
    """Whether an op without a formula may compute products: by its name, or because it is not one of torch's own."""
    namespace = getattr(func, "namespace", None)
    if namespace is None:
        return True
    if namespace not in ("aten", "prim", "prims", "c10d", "_c10d_functional", "fsdp", "profiler", "lcw_ops"):
        return True
    return bool(_PRODUCTS.search(_name(func))) and not _NO_PRODUCTS.search(_name(func))


def _convolution(x, weight, bias, stride, padding, dilation, transposed, *_, **__) -> int:
    """Every entry of the filter meets every sample at every position: of the output, or of a transposed one's input."""
    spatial = weight.dim() - 2
    sizes = x.shape[2:] if transposed else _output_sizes(x, weight, stride, padding, dilation, spatial)
    return 2 * x.shape[0] * math.prod(sizes) * weight.numel()


def _output_sizes(x, weight, stride, padding, dilation, spatial: int) -> list[int]:
    stride, padding, dilation = (
        list(value) * spatial if len(value) == 1 else value for value in (stride, padding, dilation)
    )
    return [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(spatial)
    ]


def _convolution_backward(
    grad, x, weight, bias, stride, padding, dilation, transposed, out_padding, groups, mask
) -> int:
    # Each of the two gradients takes as many products as the output.
    positions = math.prod(x.shape[2:] if transposed else grad.shape[2:])
    return 2 * x.shape[0] * positions * weight.numel() * (mask[0] + mask[1])


def _attention(query, key, value, *_, **__) -> int:
    """Q K^T, and the product of its softmax with V."""
    return _scores(query, key) + _mixture(query, value)


def _attention_backward(grad, query, key, value, *_, **__) -> int:
    """The gradients of V and of the softmax, and of Q and K. The scores that a kernel recomputes count once."""
    of_inputs = query.requires_grad or key.requires_grad
    return (value.requires_grad + of_inputs) * _mixture(query, value) + (
        query.requires_grad + key.requires_grad
    ) * _scores(query, key)


def _scores(query: Tensor, key: Tensor) -> int:
    return 2 * query.numel() * key.shape[-2]


def _mixture(query: Tensor, value: Tensor) -> int:
    return 2 * math.prod(query.shape[:-1]) * value.shape[-2] * value.shape[-1]


def _recurrent(input, weight_ih, weight_hh, *_, **__) -> int:
    return 2 * _steps(input) * (weight_ih.numel() + weight_hh.numel())


def _recurrent_backward(input, weight_ih, weight_hh, *_, **__) -> int:
    """The gradient goes back through every step; those of input and weights are computed where they are required."""
    of_states = weight_hh.numel() + input.requires_grad * weight_ih.numel()
    of_weights = weight_ih.requires_grad * weight_ih.numel() + weight_hh.requires_grad * weight_hh.numel()
    return 2 * _steps(input) * (of_states + of_weights)


def _steps(input: Tensor) -> int:
    """Time steps times samples."""
    return input.numel() // max(input.shape[-1], 1)


def _recurrent_layers(input, weights, *_, **__) -> int:
    return 2 * _steps(input) * sum(weight.numel() for weight in weights if weight.dim() > 1)


def _recurrent_layers_backward(input, weights, *rest, **__) -> int:
    return (1 + bool(rest[-1][-1])) * _recurrent_layers(input, weights)


def _product(left, right, *_, **__) -> int:
    """Every entry of ``left`` meets a row of ``right``; of a sparse matrix, every entry that is stored."""
    if left.layout is torch.strided and right.layout is not torch.strided:
        return 2 * left.shape[0] * _entries(right)
    return 2 * _entries(left) * right.shape[-1]


def _entries(matrix: Tensor) -> int:
    if matrix.is_sparse:
        return matrix._nnz()
    return matrix.numel() if matrix.layout is torch.strided else matrix.values().numel()


def _matrix_vector(matrix, *_, **__) -> int:
    return 2 * matrix.numel()


def _added_matrix_vector(_added, matrix, *_, **__) -> int:
    return 2 * matrix.numel()


def _added_product(_added, left, right, *_, **__) -> int:
    return _product(left, right)


def _outer(_added, left, right, *_, **__) -> int:
    return 2 * left.numel() * right.numel()


FORMULAS = {
    **dict.fromkeys((aten.mm, aten.bmm), _product),
    **dict.fromkeys((aten.addmm, aten.baddbmm, aten.addbmm, aten._sparse_addmm), _added_product),
    **dict.fromkeys(
        (aten.convolution, aten._convolution, aten.cudnn_convolution, aten.convolution_overrideable), _convolution
    ),
    aten.convolution_backward: _convolution_backward,
    **dict.fromkeys(
        (
            aten._scaled_dot_product_flash_attention_for_cpu,
            aten._scaled_dot_product_flash_attention,
            aten._scaled_dot_product_efficient_attention,
            aten._scaled_dot_product_cudnn_attention,
            aten._scaled_dot_product_fused_attention_overrideable,
        ),
        _attention,
    ),
    **dict.fromkeys(
        (
            aten._scaled_dot_product_flash_attention_for_cpu_backward,
            aten._scaled_dot_product_flash_attention_backward,
            aten._scaled_dot_product_efficient_attention_backward,
            aten._scaled_dot_product_cudnn_attention_backward,
        ),
        _attention_backward,
    ),
    aten.mkldnn_rnn_layer: _recurrent,
    aten.mkldnn_rnn_layer_backward: _recurrent_backward,
    aten._cudnn_rnn: _recurrent_layers,
    aten._cudnn_rnn_backward: _recurrent_layers_backward,
    aten.mv: _matrix_vector,
    aten.dot: _matrix_vector,
    aten.vdot: _matrix_vector,
    aten.addmv: _added_matrix_vector,
    aten.addr: _outer,
}
