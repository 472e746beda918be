"""AdamW with activated gradients, drop-in for torch.optim.AdamW.

M. Liu, L. Chen, X. Du, L. Jin, M. Shang, "Activated Gradients for Deep Neural Networks", TNNLS 2021, arXiv 2107.04228;
the activation of the raw gradient, before decay and moments, is the authors' code's.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lcw_ops.ops import _backends
from lcw_ops.ops import gradient_activation as ops
from lcw_ops.optim._activated import ActivatedOptimizer, split


class AdamW(ActivatedOptimizer, torch.optim.AdamW):
    """``torch.optim.AdamW`` on f(gradient), inside its step: each tensor is read once.

    f(g) = alpha atan(beta g), alpha tanh(beta g) or alpha sign(g) log1p(beta |g|). alpha cancels against the second
    moment except for eps: a larger alpha is a smaller eps. 16-bit parameters are stepped in float32 and rounded once.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize: torch's.
        foreach, fused: torch's, for groups without activation; groups with it take our op whatever they say.
        capturable: torch's: the step counts lie beside the parameters, so that a CUDA graph can count them up. lr and
            betas are numbers in the graph.
        differentiable: torch's; True needs gradient_activation=None.
        gradient_activation: "arctan", "tanh", "log", or None: torch's step, bit for bit.
        alpha, beta: numbers > 0 that are normal in float32.

    All options may differ from group to group. What :class:`lcw_ops.optim.SGD` says of state_dicts, parameters given
    twice, DTensors, GradScaler and a tensor lr holds here too; the state_dict of a torch.optim.Adam is refused, for its
    decay is part of the gradient.

    Raises:
        ValueError: options out of range. TypeError: alpha or beta is no number. Otherwise torch's.
    """

    _torch_optimizer = torch.optim.AdamW
    _takes_sparse = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        gradient_activation: str | None = "arctan",
        alpha: float = 0.1,
        beta: float = 15.0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._add_options(gradient_activation=gradient_activation, alpha=alpha, beta=beta)

    def _check_options(self, group: dict) -> None:
        super()._check_options(group)
        # torch's AdamW, given this, would be Adam: its decay is part of the gradient.
        if group["gradient_activation"] is not None and not group.get("decoupled_weight_decay", True):
            raise ValueError(
                f"{self._name()}: decoupled_weight_decay is False; expected True with an activated gradient. Use "
                "torch.optim.Adam with lcw_ops.activate_gradients."
            )

    def _gather(self, index: int, group: dict) -> list[Callable[[], None]]:
        group = self._checked_group(index, group)
        params, grads, steps = [], [], []
        exp_avgs, exp_avg_sqs, max_exp_avg_sqs = [], [], []
        self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
        states = [exp_avgs, exp_avg_sqs, *([max_exp_avg_sqs] if max_exp_avg_sqs else [])]
        self._localize(index, params, grads, states)
        beta1, beta2 = group["betas"]
        calls = []
        # torch counts on the CPU by default, beside the parameters when capturable; loading can mix the two.
        devices = [param.device for param in params], [step.device for step in steps]
        for (device, _), take in split(*devices).items():
            calls.append(
                functools.partial(
                    _step,
                    _backends.choose(ops.ADAMW_STEP, device),
                    take(params),
                    take(grads),
                    take(exp_avgs),
                    take(exp_avg_sqs),
                    take(max_exp_avg_sqs),
                    take(steps),
                    lr=float(group["lr"]),
                    beta1=float(beta1),
                    beta2=float(beta2),
                    weight_decay=float(group["weight_decay"]),
                    eps=float(group["eps"]),
                    amsgrad=bool(group["amsgrad"]),
                    maximize=bool(group["maximize"]),
                    kind=group["gradient_activation"],
                    alpha=float(group["alpha"]),
                    beta=float(group["beta"]),
                )
            )
        return calls


def _step(backend: str, *lists: list[Tensor], **options) -> None:
    *tensors, steps = lists
    _count(steps, 1.0)
    try:
        # Under a float64 default dtype torch counts in that.
        counts = steps if all(step.dtype is torch.float32 for step in steps) else [step.float() for step in steps]
        ops.adamw_step_(backend, *tensors, counts, **options)
    except BaseException:
        # The op wants them counted up, and no step has been made.
        _count(steps, -1.0)
        raise


def _count(steps: list[Tensor], by: float) -> None:
    # On the CPU torch adds in a loop, where a number would become a tensor anew each time.
    if steps[0].is_cpu:
        torch._foreach_add_(steps, torch.tensor(1.0, device="cpu"), alpha=by)
    else:
        torch._foreach_add_(steps, by)
