"""The gradients that the hooks activate: which ones a hook may write to, and what happens to them before it does."""

import operator
from collections.abc import Iterable

import torch
from torch import Tensor

from lcw_ops import _checks, _torch
from lcw_ops.ops import gradient_activation as ops
from lcw_ops.optim._activated import is_distributed
from lcw_ops.reference.gradient_activation import KINDS

_GRAD = operator.attrgetter("grad")


def check_function(name: str, kind: str, alpha: float, beta: float) -> None:
    """Raise ValueError or TypeError, on behalf of the function ``name``, unless the three describe an activation."""
    _checks.check_choice(name, "kind", kind, KINDS)
    _checks.check_positive_float32(name, "alpha", alpha)
    _checks.check_positive_float32(name, "beta", beta)


def with_gradient(where: str, params: Iterable[Tensor]) -> list[Tensor]:
    """The parameters that have a gradient, each once. Checks the gradients; messages begin with ``where``."""
    found, inference = [], torch.is_inference_mode_enabled()
    for param in {id(param): param for param in params}.values():
        gradient = param.grad
        if gradient is None:
            continue
        if gradient.layout is not torch.strided:
            raise TypeError(
                f"{where}: the gradient of a parameter of shape {tuple(param.shape)} has layout {gradient.layout}; "
                "expected a dense tensor. Make the layer give one (nn.Embedding's sparse=False), or leave this "
                "parameter out."
            )
        if gradient.dtype not in _checks.FLOATING:
            raise TypeError(
                f"{where}: the gradient of a parameter of shape {tuple(param.shape)} is {gradient.dtype}; expected "
                "float32, float64, bfloat16 or float16. Leave this parameter out."
            )
        if gradient.requires_grad:
            raise ValueError(
                f"{where}: the gradient of a parameter of shape {tuple(param.shape)} requires a gradient itself, as "
                "after backward(create_graph=True); the activation in place is not recorded. Use "
                "torch.autograd.grad and lcw_ops.reference.gradient_activation, which is differentiable, or detach "
                "the gradient."
            )
        if not inference and gradient.is_inference():
            raise ValueError(
                f"{where}: the gradient of a parameter of shape {tuple(param.shape)} is an inference tensor, which "
                "cannot be changed outside of torch.inference_mode. Give a clone made outside of it."
            )
        if (
            type(gradient) is not Tensor
            and is_distributed(gradient)
            and any(placement.is_partial() for placement in gradient.placements)
        ):
            raise TypeError(
                f"{where}: the gradient of a parameter of shape {tuple(param.shape)} is a DTensor that is still to be "
                f"summed, {gradient.placements}; expected shards or replicas. Call redistribute on it first."
            )
        found.append(param)
    return found


def gradients_of(params: list[Tensor]) -> list[Tensor]:
    """``.grad`` of each parameter, for parameters that have one."""
    return list(map(_GRAD, params))


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this process holds; any other tensor as it is."""
    return tensor.to_local() if type(tensor) is not Tensor and is_distributed(tensor) else tensor


def unshare(params: list[Tensor]) -> None:
    """Give the gradients memory of their own: an element that two gradients share would be activated twice."""
    params = [param for param in params if param.grad is not None and param.grad.layout is torch.strided]
    for param, grad in zip(params, gradients_of(params), strict=True):
        # torch negates this view only when it reads it, so the kernels cannot write through it.
        if grad.is_neg():
            param.grad = grad.resolve_neg()
    grads = [local(grad) for grad in gradients_of(params)]
    if any(map(ops.may_overlap, grads)) or ops.find_shared(grads) is not None:
        for param, grad in zip(params, gradients_of(params), strict=True):
            param.grad = grad.clone()


def unscale(optimizer: torch.optim.Optimizer) -> None:
    """Divide all gradients by ``grad_scale``, which GradScaler leaves to a fused optimizer's step."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    grads = {
        id(p.grad): local(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    }
    by_kind: dict[tuple, list[Tensor]] = {}
    for grad in grads.values():
        by_kind.setdefault((grad.device, grad.dtype), []).append(grad)
    # GradScaler computes the inverse in the same way. It has looked for overflow, so optimizer.found_inf stays valid.
    inverse = scale.double().reciprocal().float()
    for (device, _), same in by_kind.items():
        _torch.divide_by_scale_(same, inverse.to(device))
    optimizer.grad_scale = None  # type: ignore[attr-defined]
