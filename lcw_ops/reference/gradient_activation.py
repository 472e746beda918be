"""Activated gradients (GAF): an odd, increasing function f(g) that enlarges tiny gradients g and restricts large ones.

arctan: alpha atan(beta g);  tanh: alpha tanh(beta g);  log: alpha sign(g) ln(1 + beta |g|).  f'(0) = alpha beta.
M. Liu, L. Chen, X. Du, L. Jin, M. Shang, "Activated Gradients for Deep Neural Networks", TNNLS 2021, arXiv 2107.04228.
"""

import torch
from torch import Tensor

from lcw_ops._checks import (
    accumulation_dtype,
    check_choice,
    check_non_negative,
    check_positive,
    check_shape,
    describe,
)

KINDS = ("arctan", "tanh", "log")
PLACES = ("gradient", "momentum")


def gradient_activation(gradient: Tensor, kind: str = "arctan", alpha: float = 0.1, beta: float = 20.0) -> Tensor:
    """f(gradient) by element, out of place. Differentiable, with slope alpha beta at 0 for every kind.

    |f| stays below its limit, alpha pi/2 for arctan and alpha for tanh; log has no limit. NaN stays NaN; +-inf becomes
    +-limit (log: +-inf), so check for overflow before the call, as GradScaler does.

    Args:
        gradient: any shape, any floating dtype; 16-bit gradients are computed in float32.
        kind: "arctan", "tanh" or "log".
        alpha, beta: finite numbers > 0.

    Returns:
        A tensor like the gradient.

    Raises:
        TypeError: a dtype that is not floating.
        ValueError: an unknown kind, or alpha or beta out of range.

    Source: the authors' code, both the functions and the constants.
    """
    dtype = accumulation_dtype("gradient_activation", gradient=gradient)
    check_choice("gradient_activation", "kind", kind, KINDS)
    check_positive("gradient_activation", "alpha", alpha)
    check_positive("gradient_activation", "beta", beta)
    g = gradient.to(dtype)
    if kind == "arctan":
        activated = torch.atan(beta * g)
    elif kind == "tanh":
        activated = torch.tanh(beta * g)
    else:
        # copysign, because sign is 0 at 0, which would make the slope there 0 instead of alpha beta.
        sign = torch.copysign(torch.ones_like(g), g)
        activated = sign * torch.log1p(beta * (sign * g))
    return (alpha * activated).to(gradient.dtype)


def sgd_step(
    param: Tensor,
    gradient: Tensor,
    momentum_buffer: Tensor | None,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    activate: str = "gradient",
    kind: str = "arctan",
    alpha: float = 0.1,
    beta: float = 20.0,
) -> tuple[Tensor, Tensor]:
    """One step of SGD with an activated gradient. Nothing is changed in place.

    activate="gradient":  d = f(g) + weight_decay w,  v = momentum v + d,  w <- w - lr v.
    activate="momentum":  d = g + weight_decay w,     v = momentum v + d,  w <- w - lr f(v)   (the authors' main runs).

    Args:
        param, gradient, momentum_buffer: w, g and v, of one shape and one floating dtype; 16-bit tensors are computed
            in float32 and rounded once. momentum_buffer is None at the first step, where v = d.
        lr, momentum, weight_decay: numbers >= 0.
        activate: "gradient" or "momentum".
        kind, alpha, beta: as in `gradient_activation`.

    Returns:
        (new param, new momentum buffer).

    Raises:
        TypeError: dtypes that are not floating or differ.
        ValueError: shapes that differ; names or numbers out of range.

    Source: the authors' code, which activates either the gradient or the momentum.
    """
    dtype = accumulation_dtype("sgd_step", param=param, gradient=gradient, momentum_buffer=momentum_buffer)
    _check_same_shape("sgd_step", param, gradient=gradient, momentum_buffer=momentum_buffer)
    check_choice("sgd_step", "activate", activate, PLACES)
    check_non_negative("sgd_step", "lr", lr)
    check_non_negative("sgd_step", "momentum", momentum)
    check_non_negative("sgd_step", "weight_decay", weight_decay)
    w, g = param.to(dtype), gradient.to(dtype)
    if activate == "gradient":
        g = gradient_activation(g, kind, alpha, beta)
    d = g + weight_decay * w
    v = d if momentum_buffer is None else momentum * momentum_buffer.to(dtype) + d
    step = gradient_activation(v, kind, alpha, beta) if activate == "momentum" else v
    return (w - lr * step).to(param.dtype), v.to(param.dtype)


def adamw_step(
    param: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    kind: str = "arctan",
    alpha: float = 0.1,
    beta: float = 15.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of AdamW with an activated gradient. Nothing is changed in place.

    The step activates the raw gradient, decays the parameter and then updates the moments::

        g' = f(g),  w <- (1 - lr weight_decay) w,  m = b1 m + (1 - b1) g',  v = b2 v + (1 - b2) g'^2,
        w <- w - lr (m / (1 - b1^step)) / (sqrt(v / (1 - b2^step)) + eps)

    alpha cancels in m / sqrt(v): its only effect is on the size of sqrt(v) relative to eps.

    Args:
        param, gradient, exp_avg, exp_avg_sq: w, g, m and v; dtypes as in `sgd_step`. The moments start at zero.
        step: the number of this step, counted from 1.
        lr, betas, eps, weight_decay: as in AdamW.
        kind, alpha, beta: as in `gradient_activation`.

    Returns:
        (new param, new exp_avg, new exp_avg_sq).

    Raises:
        TypeError, ValueError: as `sgd_step`.

    Source: the authors' code also activates the raw gradient; the cancellation of alpha is derived here.
    """
    dtype = accumulation_dtype("adamw_step", param=param, gradient=gradient, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    _check_same_shape("adamw_step", param, gradient=gradient, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    if step < 1:
        expected = "at least 1, because the bias correction at 0 would divide by 0"
        raise ValueError(describe("adamw_step", "step", f"is {step}", expected))
    check_non_negative("adamw_step", "lr", lr)
    check_non_negative("adamw_step", "eps", eps)
    check_non_negative("adamw_step", "weight_decay", weight_decay)
    beta1, beta2 = betas
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(describe("adamw_step", "betas", f"is {betas}", "two numbers in [0, 1)"))
    g = gradient_activation(gradient.to(dtype), kind, alpha, beta)
    first = beta1 * exp_avg.to(dtype) + (1 - beta1) * g
    second = beta2 * exp_avg_sq.to(dtype) + (1 - beta2) * g.square()
    denominator = (second / (1 - beta2**step)).sqrt() + eps
    decayed = (1 - lr * weight_decay) * param.to(dtype)
    new_param = decayed - lr / (1 - beta1**step) * first / denominator
    return new_param.to(param.dtype), first.to(exp_avg.dtype), second.to(exp_avg_sq.dtype)


def _check_same_shape(function: str, param: Tensor, **tensors: Tensor | None) -> None:
    for argument, tensor in tensors.items():
        if tensor is not None:
            check_shape(function, argument, tensor, tensor.shape == param.shape, f"param's {tuple(param.shape)}")
