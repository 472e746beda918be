"""The next update of every parameter by an optimizer, without a step: SGD, Adam, AdamW, RMSprop in closed form.

The formulas are those of torch.optim and of lcw_ops.optim, in float64, from the gradients of the watched pass and the
optimizer's present state. Any other optimizer, and one with step hooks, makes a step that is taken back: parameters,
state, options, attributes and random states are as before, bit for bit.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lcw_ops import optim
from lcw_ops._checks import describe
from lcw_ops.profile.figures import Figure, failed, whole
from lcw_ops.reference.gradient_activation import gradient_activation

NOT_OPTIMIZED = "the optimizer does not have this parameter"

# (norm of the update, norm of the weight), of a parameter or of each of its parts along dimension 0; or a reason.
Ratio = tuple[Tensor, Tensor] | str


def check(optimizer: Any) -> None:
    """Raise TypeError for an object that is not an optimizer."""
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        came = f"is a {type(optimizer).__name__}"
        raise TypeError(describe("profile", "optimizer", came, "a torch.optim.Optimizer with the model's parameters"))


@torch.no_grad()
def update_norms(
    optimizer: torch.optim.Optimizer, parameters: list[Tensor], gradients: list[Tensor | None], by_layer: set[int]
) -> dict[int, Ratio]:
    """By the parameter's id: the norms of its next update and of its values, in float64.

    Parameters whose ids are in ``by_layer`` have one norm for each entry of their first dimension.
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    known = [
        (parameter, gradient)
        for parameter, gradient in zip(parameters, gradients, strict=True)
        if gradient is not None and id(parameter) in groups
    ]
    result: dict[int, Ratio] = dict.fromkeys(map(id, parameters), NOT_OPTIMIZED)
    formula = _formula(optimizer)
    if formula is None:
        try:
            updates = _stepped(optimizer, known)
        except Exception as error:
            reason = f"not known: the optimizer's step failed ({failed(error)})"
            return result | {id(parameter): reason for parameter, _ in known}
    else:
        updates = (
            formula(groups[id(parameter)], optimizer.state.get(parameter, {}), _wide(parameter), _wide(gradient))
            for parameter, gradient in known
        )
    for (parameter, _), update in zip(known, updates, strict=True):
        weight = _wide(parameter)
        if id(parameter) in by_layer:
            update, weight = update.flatten(1), weight.flatten(1)
        else:
            update, weight = update.reshape(1, -1), weight.reshape(1, -1)
        result[id(parameter)] = torch.linalg.vector_norm(update, dim=1), torch.linalg.vector_norm(weight, dim=1)
    return result


def ratio(updates: list[Ratio]) -> Figure:
    """The update-to-weight ratio over some parameters."""
    reasons = [update for update in updates if isinstance(update, str)]
    if reasons:
        return reasons[0]
    update, weight = (math.hypot(*(norms.norm().item() for norms in pair)) for pair in zip(*updates, strict=True))
    return update / weight if weight != 0 else ZERO_WEIGHT


ZERO_WEIGHT = "its weight is zero"


def _wide(tensor: Tensor) -> Tensor:
    tensor = whole(tensor)
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.double()


def _state(state: dict, name: str, like: Tensor) -> Tensor | float:
    """A tensor of the state in float64; 0 before the first step."""
    return _wide(state[name]) if isinstance(state.get(name), Tensor) else 0.0


def _formula(optimizer: torch.optim.Optimizer) -> Callable[[dict, dict, Tensor, Tensor], Tensor] | None:
    """The update that (group, state, parameter, gradient) give, if it is known for exactly this class."""
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return None
    step = vars(optimizer).get("step")
    # torch's schedulers wrap the step of an optimizer to see whether it is called.
    if step is not None and not getattr(step, "_wrapped_by_lr_sched", False):
        return None
    return {
        torch.optim.SGD: _sgd,
        optim.SGD: _sgd,
        torch.optim.Adam: _adam,
        torch.optim.AdamW: _adam,
        optim.AdamW: _adam,
        torch.optim.RMSprop: _rmsprop,
    }.get(type(optimizer))


def _prepared(group: dict, gradient: Tensor) -> Tensor:
    """The gradient as the step sees it: negated to maximize, clipped, activated."""
    gradient = -gradient if group.get("maximize") else gradient
    if group.get("max_grad_value") is not None:
        gradient = gradient.clamp(-group["max_grad_value"], group["max_grad_value"])
    return gradient if group.get("activate", "gradient") == "momentum" else _activated(group, gradient)


def _activated(group: dict, values: Tensor) -> Tensor:
    kind = group.get("gradient_activation")
    return values if kind is None else gradient_activation(values, kind, float(group["alpha"]), float(group["beta"]))


def _sgd(group: dict, state: dict, parameter: Tensor, gradient: Tensor) -> Tensor:
    momentum, gradient = float(group["momentum"]), _prepared(group, gradient)
    step = gradient + float(group["weight_decay"]) * parameter
    if momentum:
        buffer = state.get("momentum_buffer")
        kept = 0.0 if buffer is None else momentum * _wide(buffer)
        average = kept + (1.0 if buffer is None else 1 - float(group["dampening"])) * step
        step = step + momentum * average if group["nesterov"] else average
    if group.get("activate") == "momentum":
        step = _activated(group, step)
    return float(group["lr"]) * step


def _adam(group: dict, state: dict, parameter: Tensor, gradient: Tensor) -> Tensor:
    rate, decay, (beta1, beta2) = float(group["lr"]), float(group["weight_decay"]), map(float, group["betas"])
    gradient = _prepared(group, gradient)
    if not group.get("decoupled_weight_decay", False):
        gradient, decay = gradient + decay * parameter, 0.0
    count = float(state.get("step", 0)) + 1
    mean = beta1 * _state(state, "exp_avg", gradient) + (1 - beta1) * gradient
    square = beta2 * _state(state, "exp_avg_sq", gradient) + (1 - beta2) * gradient.square()
    if group["amsgrad"]:
        square = torch.maximum(square, torch.zeros_like(square) + _state(state, "max_exp_avg_sq", gradient))
    scale = square.sqrt() / math.sqrt(1 - beta2**count) + float(group["eps"])
    return rate / (1 - beta1**count) * mean / scale + rate * decay * parameter


def _rmsprop(group: dict, state: dict, parameter: Tensor, gradient: Tensor) -> Tensor:
    keep = float(group["alpha"])
    gradient = (-gradient if group["maximize"] else gradient) + float(group["weight_decay"]) * parameter
    square = keep * _state(state, "square_avg", gradient) + (1 - keep) * gradient.square()
    if group["centered"]:
        square = square - (keep * _state(state, "grad_avg", gradient) + (1 - keep) * gradient).square()
    step = gradient / (square.sqrt() + float(group["eps"]))
    if float(group["momentum"]) > 0:
        step = float(group["momentum"]) * _state(state, "momentum_buffer", gradient) + step
    return float(group["lr"]) * step


def _stepped(optimizer: torch.optim.Optimizer, known: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The updates of a step that is taken back."""
    with _taken_back(optimizer):
        before = [_wide(parameter).clone() for parameter, _ in known]
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        for parameter, gradient in known:
            parameter.grad = gradient.detach().clone()
        with torch.enable_grad():
            optimizer.step()
        return [old - _wide(parameter) for old, (parameter, _) in zip(before, known, strict=True)]


@contextmanager
def _taken_back(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Restore parameters, gradients, state, options, attributes and torch's random state afterwards."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    values = [(parameter, parameter.detach().clone(), parameter.grad) for parameter in parameters]
    gradients = [(parameter.grad, parameter.grad.clone()) for parameter in parameters if parameter.grad is not None]
    state = {key: _kept(entry) for key, entry in optimizer.state.items()}
    groups = [_kept(group) for group in optimizer.param_groups]
    attributes = {
        name: _kept_value(value) for name, value in vars(optimizer).items() if name not in ("state", "param_groups")
    }
    devices = {parameter.device for parameter in parameters if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value, gradient in values:
                    parameter.copy_(value)
                    parameter.grad = gradient
                for tensor, value in gradients:
                    tensor.copy_(value)
                for key in [key for key in optimizer.state if key not in state]:
                    del optimizer.state[key]
                for key, entry in state.items():
                    optimizer.state[key] = _restored(entry)
                optimizer.param_groups[:] = map(_restored, groups)
                vars(optimizer).update({name: _put_back(*kept) for name, kept in attributes.items()})
                for name in set(vars(optimizer)) - {*attributes, "state", "param_groups"}:
                    del vars(optimizer)[name]


def _kept(entry: dict) -> tuple[dict, dict[Any, tuple[Any, Any]]]:
    """A dictionary, and for each of its keys the value with a copy of it."""
    return entry, {key: _kept_value(value) for key, value in entry.items()}


def _kept_value(value: Any) -> tuple[Any, Any]:
    if isinstance(value, Tensor):
        return value, value.detach().clone()
    # Lists of parameters and of state tensors: their parts are kept one by one.
    if type(value) is list:
        return value, [_kept_value(part) for part in value]
    if type(value) is dict:
        return value, {key: _kept_value(part) for key, part in value.items()}
    return value, None


def _put_back(value: Any, kept: Any) -> Any:
    """The same object with the contents that it had."""
    if isinstance(value, Tensor):
        if not torch.equal(value, kept):
            value.copy_(kept)
    elif type(value) is list:
        value[:] = [_put_back(*part) for part in kept]
    elif type(value) is dict:
        contents = {key: _put_back(*part) for key, part in kept.items()}
        value.clear()
        value.update(contents)
    return value


def _restored(entry: tuple[dict, dict[Any, tuple[Any, Any]]]) -> dict:
    original, kept = entry
    contents = {key: _put_back(*part) for key, part in kept.items()}
    original.clear()
    original.update(contents)
    return original
