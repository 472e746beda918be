"""AdamW with activated gradients, drop-in for torch.optim.AdamW.

M. Liu, L. Chen, X. Du, L. Jin, M. Shang, "Activated Gradients for Deep Neural Networks", TNNLS 2021, arXiv 2107.04228;
the activation of the raw gradient, before decay and moments, is the authors' code's.
"""

import functools
import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lcw_ops import _checks as checks
from lcw_ops.ops import backends
from lcw_ops.ops import gradient_activation as ops
from lcw_ops.optim._activated import ActivatedOptimizer, are_mixed, memory_of, split

_CPU = torch.device("cpu")

# The dtypes of counts to which torch can add 1.
_COUNTING = (*checks.FLOATING, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class AdamW(ActivatedOptimizer, torch.optim.AdamW):
    """``torch.optim.AdamW`` on f(gradient), inside its step: each tensor is read once.

    f(g) = alpha atan(beta g), alpha tanh(beta g) or alpha sign(g) log1p(beta |g|). alpha cancels against the second
    moment except for eps: a larger alpha is a smaller eps. 16-bit parameters are stepped in float32 and rounded once.
    A gradient is activated in its own dtype; where it and the parameter differ in dtype, the step is made on copies, in
    float64 if one of them is float64, otherwise in float32. States have the parameter's dtype, as torch's, or the
    gradient's; ``step`` counts in any dtype of real numbers.

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
        ValueError: options out of range. TypeError: alpha or beta is not a number. Otherwise torch's. Errors of a step:
            see ``step``.
    """

    _torch_optimizer = torch.optim.AdamW
    _takes_sparse = False
    _watched = operator.itemgetter(*ActivatedOptimizer._options, "differentiable", "decoupled_weight_decay")

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

    def _forget_checks(self) -> None:
        super()._forget_checks()
        self._counts_are_plain: dict[int, bool] = {}

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
        try:
            self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
        except KeyError as error:
            if not self.defaults.keys() <= group.keys():
                raise self._missing_option(index) from error
            raise ValueError(
                f"{self._name()}: {error} is missing in the state of a parameter in param_groups[{index}]. Put it into "
                "optimizer.state, or delete the parameter's entry there to start with a new state."
            ) from error
        states = {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs, "max_exp_avg_sq": max_exp_avg_sqs}
        states = {name: tensors for name, tensors in states.items() if tensors}
        memory = memory_of(params, *states.values(), steps)
        if memory is None or memory != self._checked_memory.get(index):
            self._check_tensors(index, params, grads, states)
            self._counts_are_plain[index] = _are_plain_counts(steps)
            self._checked_memory[index] = memory
        are_plain = self._counts_are_plain[index]
        if not are_plain or any(step.is_meta for step in steps) or _has_negative(steps):
            self._check_steps(index, params, steps)
        mixed = are_mixed(params, grads, *states.values())
        if any(mixed):
            self._check_gradients(index, grads)
            self._check_dtypes(index, params, grads, states)
        self._localize(params, grads, *states.values())
        beta1, beta2 = group["betas"]
        calls = []
        # torch counts on the CPU by default, beside the parameters when capturable; loading can mix the two.
        devices = [param.device for param in params], [step.device for step in steps]
        keys = *devices, *([mixed] if any(mixed) else [])
        for (device, counted_on, *_), take in split(*keys).items():
            calls.append(
                functools.partial(
                    _step if are_plain and counted_on in (device, _CPU) else _step_with_own_counts,
                    backends.choose(ops.ADAMW_STEP, device),
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

    def _check_dtypes(
        self, index: int, params: list[Tensor], grads: list[Tensor], states: dict[str, list[Tensor]]
    ) -> None:
        """Refuses a state in fewer digits than its parameter: it would go unnoticed here, where torch's step raises."""
        dtypes = [param.dtype for param in params]
        for name, tensors in states.items():
            if [tensor.dtype for tensor in tensors] == dtypes:
                continue
            for param, grad, tensor in zip(params, grads, tensors, strict=True):
                if tensor.dtype not in (param.dtype, grad.dtype) or tensor.dtype not in checks.FLOATING:
                    raise TypeError(
                        f"{self._where(index, param, name)} is {tensor.dtype}, and the parameter {param.dtype}: they "
                        "differ in dtype. Convert the state too: optimizer.load_state_dict(optimizer.state_dict())."
                    )

    def _check_steps(self, index: int, params: list[Tensor], steps: list[Tensor]) -> None:
        for param, step in zip(params, steps, strict=True):
            if _is_count(step, param):
                continue
            where = self._where(index, param, "step")
            if not isinstance(step, Tensor):
                is_number = isinstance(step, (int, float)) and not isinstance(step, bool)
                remedy = ", or load the state by load_state_dict, which makes it one" if is_number else ""
                raise TypeError(
                    f"{where} is a {type(step).__name__}; expected a tensor of one number. Put torch.tensor("
                    f"{step if is_number else 'count'}, dtype=torch.float32) into optimizer.state{remedy}."
                )
            if step.numel() != 1 or step.dtype not in _COUNTING or step.is_meta or step._is_zerotensor():
                raise TypeError(
                    f"{where} is {step.dtype} of shape {tuple(step.shape)} on {step.device}; expected one real number "
                    "with memory. Put torch.tensor(count, dtype=torch.float32) into optimizer.state."
                )
            raise ValueError(
                f"{where} is {step.item()} in {step.dtype}; expected the count of steps made, from 0 to one less than "
                "the largest number of its dtype: the bias correction would divide by 0. Put the right count into "
                "optimizer.state, as torch.float32."
            )


def _is_count(step: object, param: Tensor) -> bool:
    if not isinstance(step, Tensor) or step.numel() != 1 or step.dtype not in _COUNTING or step._is_zerotensor():
        return False
    if not step.is_cpu:
        # Reading a count on a GPU would wait for the GPU.
        return not step.is_meta or param.is_meta
    count = step.item()
    return count >= 0 and (step.is_floating_point() or count < torch.iinfo(step.dtype).max)


def _are_plain_counts(steps: list[Tensor]) -> bool:
    """Whether the ops take them as they are. Others are checked one by one: integer counts can overflow."""
    return (
        all(isinstance(step, Tensor) for step in steps)
        and {step.dtype for step in steps} <= {torch.float32}
        and not any(map(Tensor.dim, steps))
        and not any(map(Tensor.is_neg, steps))
        and not any(map(Tensor._is_zerotensor, steps))
    )


def _has_negative(steps: list[Tensor]) -> bool:
    """Or a NaN; counts on a GPU, for which this would wait, are not looked at."""
    on_cpu = [step for step in steps if step.is_cpu]
    return bool(on_cpu) and not torch.stack(on_cpu).min().item() >= 0


def _step(backend: str, *lists: list[Tensor], **options) -> None:
    """With plain counts, on the CPU or beside the parameters."""
    *_, steps = lists
    _count(steps, 1.0)
    try:
        ops.adamw_step_(backend, *lists, **options)
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


def _step_with_own_counts(backend: str, *lists: list[Tensor], **options) -> None:
    """With counts in any dtype, shape and place: loaded, or made by torch under a float64 default dtype."""
    *tensors, steps = lists
    counts = [(step + 1).to(tensors[0][0].device, torch.float32).reshape(()) for step in steps]
    ops.adamw_step_(backend, *tensors, counts, **options)
    for step in steps:
        step += 1
