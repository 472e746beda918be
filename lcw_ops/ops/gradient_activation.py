"""Activated gradients (GAF) in place over a list of tensors, as a registered op.

f(g) = alpha atan(beta g), alpha tanh(beta g) or alpha sign(g) ln(1 + beta |g|), by element. M. Liu, L. Chen, X. Du,
L. Jin, M. Shang, "Activated Gradients for Deep Neural Networks", TNNLS 2021, arXiv 2107.04228.
"""

import torch
from torch import Tensor

from lcw_ops import reference
from lcw_ops.ops import _backends, _library

NAME = "gradient_activation_"


def is_dense(tensor: Tensor) -> bool:
    """No gaps and no overlap, in any order of dimensions: element by element, the memory is one flat array."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def may_overlap(tensor: Tensor) -> bool:
    """Whether two elements may share memory; exact for everything torch's views make, cautious for odd as_strided."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _fake(tensors, kind, alpha, beta):
    return None


def _vmap(overload, info, in_dims, tensors, kind, alpha, beta):
    """By element: a batch dimension is a dimension like any other."""
    overload(tensors, kind, alpha, beta)
    return None, None


def _triton(tensors: list[Tensor], kind: str, alpha: float, beta: float) -> None:
    # Here and not above: importing lcw_ops must not need Triton.
    from lcw_ops.kernels.gradient_activation import gradient_activation

    for tensor in tensors:
        if is_dense(tensor):
            gradient_activation(tensor, kind, alpha, beta)
            if not tensor.is_inference():
                # The kernel writes through a pointer: nothing else tells autograd, which may have saved the tensor.
                torch.autograd.graph.increment_version(tensor)
        else:
            dense = tensor.contiguous()
            gradient_activation(dense, kind, alpha, beta)
            tensor.copy_(dense)


def activate_(backend: str, tensors: list[Tensor], kind: str, alpha: float, beta: float) -> None:
    """The op on ``backend``; the tensors are on one device, and everything has been checked."""
    if backend != "reference":
        _library.get_overload(NAME, backend)(tensors, kind, alpha, beta)
        return
    for tensor in tensors:
        tensor.copy_(reference.gradient_activation(tensor, kind, alpha, beta))


_library.declare(
    NAME,
    "(Tensor(a!)[] tensors, str kind, float alpha, float beta) -> ()",
    backends=("triton",),
    fake=_fake,
    vmap=_vmap,
)
_library.implement(NAME, "triton", _triton)
_backends.IMPLEMENTED[NAME] = ("triton",)
