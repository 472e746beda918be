"""AdamW with activated gradients, drop-in for torch.optim.AdamW.

M. Liu, L. Chen, X. Du, L. Jin, M. Shang, "Activated Gradients for Deep Neural Networks", TNNLS 2021, arXiv 2107.04228;
the authors' code activates the raw gradient, before decay and moments.
"""

import functools
import operator
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lcw_ops import _checks as checks
from lcw_ops import _torch
from lcw_ops.ops import gradient_activation as ops
from lcw_ops.optim._activated import ActivatedOptimizer, Gathered

_CPU = torch.device("cpu")
_IS_CPU, _IS_META = operator.attrgetter("is_cpu"), operator.attrgetter("is_meta")

# The dtypes of counts to which torch can add 1.
_COUNTING = (*checks.FLOATING, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class AdamW(ActivatedOptimizer, torch.optim.AdamW):
    """``torch.optim.AdamW`` that activates the gradient inside its step: each tensor is read once. With
    ``in_backward=True`` it steps every parameter during the backward pass, before the other gradients are known: no
    norm can clip them, and a GradScaler is refused at its ``step``, when the scaled gradients have been used.
    ``max_grad_value`` clips each element.

    A gradient g becomes f(g) = alpha atan(beta g), alpha tanh(beta g) or alpha sign(g) log1p(beta |g|). alpha cancels
    against the second moment except for eps: a larger alpha acts as a smaller eps. 16-bit parameters are stepped in
    float32 and rounded once. A gradient is activated in its own dtype. If it and the parameter differ in dtype, the
    step works on copies, in float64 if one of them is float64, otherwise in float32. States have the parameter's dtype,
    as in torch, or the gradient's; ``step`` may have any real dtype.

    All options but ``in_backward`` and ``max_grad_value`` may differ from group to group. The notes of
    :class:`lcw_ops.optim.SGD` on state_dicts, parameters given twice, DTensors, GradScaler, a tensor lr and steps in
    backward hold here too. The state_dict of a torch.optim.Adam is refused, because its decay is part of the gradient.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize: as in torch.
        foreach, fused: as in torch, for groups without activation. Groups with activation always use our op.
        capturable: as in torch. The step counts are on the parameters' device, so that a CUDA graph can increment them.
            The graph keeps lr and betas as constants.
        differentiable: as in torch. True needs gradient_activation=None.
        gradient_activation: "arctan", "tanh" or "log". None takes torch's step, bit for bit.
        alpha, beta: numbers > 0 that are normal in float32.
        in_backward: step each parameter during ``loss.backward()``, as soon as its gradient is there, and free the
            gradient: ``.grad`` stays None. See :class:`lcw_ops.optim.SGD`.
        max_grad_value: for in_backward: clip each element of a gradient to +-max_grad_value before it is activated, as
            torch.nn.utils.clip_grad_value_ does. None does not clip.

    Raises:
        ValueError: options out of range; max_grad_value without in_backward; with in_backward, what SGD refuses.
        TypeError: alpha, beta or max_grad_value is not a number.

    Other errors are torch's. The docstring of ``step`` lists the errors of a step.

    Source: M. Liu, L. Chen, X. Du, L. Jin, M. Shang, "Activated Gradients for Deep Neural Networks", TNNLS 2021, arXiv
    2107.04228.
    """

    _torch_optimizer = torch.optim.AdamW
    _op = ops.ADAMW_STEP
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
        in_backward: bool = False,
        max_grad_value: float | None = None,
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
        self._add_options(in_backward, max_grad_value, gradient_activation=gradient_activation, alpha=alpha, beta=beta)

    def _forget_checks(self) -> None:
        super()._forget_checks()
        self._counts_are_plain: dict[int, bool] = {}

    def _check_options(self, group: dict) -> None:
        super()._check_options(group)
        # With this option torch's AdamW is Adam, whose decay is part of the gradient.
        if group["gradient_activation"] is not None and not group.get("decoupled_weight_decay", True):
            raise ValueError(
                f"{self._name()}: decoupled_weight_decay is False; expected True with an activated gradient. Use "
                "torch.optim.Adam with lcw_ops.activate_gradients."
            )

    def _gather(self, index: int, group: dict, params: list[Tensor], grads: list[Tensor]) -> Gathered:
        try:
            method = getattr(self._init_group, "__func__", None)
            if id(method) not in _torch.torchs_init_groups and not _torch.has_torchs_init_group(self):
                lists: tuple[list[Tensor], ...] = [], [], [], []
                group = self._call_init_group(group, params, grads, *lists)
            else:
                lists = self._states(group, params)
        except KeyError as error:
            if not self.defaults.keys() <= group.keys():
                raise self._missing_option(index) from error
            raise ValueError(
                f"{self._name()}: {error} is missing in the state of a parameter in param_groups[{index}]. Put it into "
                "optimizer.state, or delete the parameter's entry there to start with a new state."
            ) from error
        exp_avgs, exp_avg_sqs, max_exp_avg_sqs, counts = lists
        states = {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs, "max_exp_avg_sq": max_exp_avg_sqs}
        beta1, beta2 = group["betas"]
        step = functools.partial(
            _step,
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
        return Gathered(states, (counts,), [step] * len(params))

    def _states(self, group: dict, params: list[Tensor]) -> tuple[list[Tensor], ...]:
        """exp_avg, exp_avg_sq, max_exp_avg_sq ([] without amsgrad) and step per parameter; KeyError if one is missing.

        torch's code makes the states of parameters that have none, and refuses an lr that it cannot use.
        """
        own = [self.state[param] for param in params]
        if not params:
            return [], [], [], []
        takes_lr = not group["foreach"] or not isinstance(group["lr"], Tensor) or group["capturable"]
        if not (takes_lr and all(own)):
            self._init_group({**group, "params": params}, [], [], [], [], [], [])
        amsgrad = group["amsgrad"]
        read = operator.itemgetter("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else []), "step")
        columns = list(map(list, zip(*map(read, own), strict=True)))
        return tuple(columns) if amsgrad else (*columns[:2], [], columns[2])

    def _check_tensors(self, index: int, params: list[Tensor], grads: list[Tensor], gathered: Gathered) -> None:
        super()._check_tensors(index, params, grads, gathered)
        self._counts_are_plain[index] = _are_plain_counts(*gathered.counts)

    def _checked_steps(self, index: int, params: list[Tensor], gathered: Gathered) -> Sequence[functools.partial[None]]:
        (counts,), steps = gathered.counts, gathered.steps
        are_plain = self._counts_are_plain[index]
        if not are_plain or any(map(_IS_META, counts)) or _has_negative(counts):
            self._check_counts(index, params, counts)
        if are_plain and all(map(_IS_CPU, counts)):
            return steps
        # torch counts on the CPU by default, and on the parameters' device if capturable. Loading can mix the two.
        on_cpu = steps[0]
        beside = functools.partial(_step, **on_cpu.keywords)
        elsewhere = functools.partial(_step_with_own_counts, **on_cpu.keywords)
        return [
            elsewhere
            if not are_plain or count.device not in (param.device, _CPU)
            else (on_cpu if count.is_cpu else beside)
            for param, count in zip(params, counts, strict=True)
        ]

    def _check_dtypes(
        self, index: int, params: list[Tensor], grads: list[Tensor], states: dict[str, list[Tensor]]
    ) -> None:
        """Refuse a state of another dtype. torch's step raises for it, too; here, lost digits would go unnoticed."""
        super()._check_dtypes(index, params, grads, states)
        dtypes = [param.dtype for param in params]
        for name, tensors in states.items():
            if not tensors or [tensor.dtype for tensor in tensors] == dtypes:
                continue
            for param, grad, tensor in zip(params, grads, tensors, strict=True):
                if tensor.dtype not in (param.dtype, grad.dtype) or tensor.dtype not in checks.FLOATING:
                    raise TypeError(
                        f"{self._where(index, param, name)} is {tensor.dtype}, and the parameter {param.dtype}: they "
                        "differ in dtype. Convert the state too: optimizer.load_state_dict(optimizer.state_dict())."
                    )

    def _check_counts(self, index: int, params: list[Tensor], steps: list[Tensor]) -> None:
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
            if step.numel() != 1 or step.dtype not in _COUNTING or step.is_meta or _torch.is_zeros_without_memory(step):
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
    if not isinstance(step, Tensor) or step.numel() != 1 or step.dtype not in _COUNTING:
        return False
    if _torch.is_zeros_without_memory(step):
        return False
    if not step.is_cpu:
        # Reading a count on a GPU would wait for the GPU.
        return not step.is_meta or param.is_meta
    count = step.item()
    return count >= 0 and (step.is_floating_point() or count < torch.iinfo(step.dtype).max)


def _are_plain_counts(steps: list[Tensor]) -> bool:
    """Whether the ops can take the counts as they are. Others are checked one by one: integer counts can overflow."""
    return (
        all(isinstance(step, Tensor) for step in steps)
        and {step.dtype for step in steps} <= {torch.float32}
        and not any(map(Tensor.dim, steps))
        and not any(map(Tensor.is_neg, steps))
        and not any(map(_torch.is_zeros_without_memory, steps))
    )


def _has_negative(steps: list[Tensor]) -> bool:
    """Whether a count is negative or NaN. Skips counts on a GPU: reading them would wait for the GPU."""
    on_cpu = list(filter(_IS_CPU, steps))
    return not all(map(operator.le, repeat(0.0), map(Tensor.item, on_cpu)))


def _step(backend: str, *lists: Any, **options: Any) -> None:
    """Step parameters with plain counts, all on the CPU or all on the parameters' device."""
    *_, steps = lists
    _count(steps, 1.0)
    try:
        ops.adamw_step_(backend, *lists, **options)
    except BaseException:
        # The op takes counts that include its own step, but the step has failed.
        _count(steps, -1.0)
        raise


def _count(steps: list[Tensor], by: float) -> None:
    # On the CPU torch adds in a loop, and would convert a Python number to a tensor for each count.
    if steps[0].is_cpu:
        torch._foreach_add_(steps, torch.tensor(1.0, device="cpu"), alpha=by)
    else:
        torch._foreach_add_(steps, by)


def _step_with_own_counts(backend: str, *lists: Any, **options: Any) -> None:
    """Step with counts of any dtype, shape and device: loaded, or made by torch under a float64 default dtype."""
    *tensors, steps = lists
    ops.check_recorded_counts(tensors[0], steps)
    counts = [(step + 1).to(tensors[0][0].device, torch.float32).reshape(()) for step in steps]
    with_counts = *tensors, counts
    ops.adamw_step_(backend, *with_counts, **options)
    for step in steps:
        step += 1
