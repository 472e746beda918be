"""Activated gradients over the parameters of a model: in place over a list, and inside a step of SGD and AdamW.

An activated gradient is f(g) for the gradient g, f(g) = alpha atan(beta g) or a similar function. The cost is memory
traffic. In place, every gradient is read and written once; a step reads parameter, gradient and state once and writes
parameter and state once. The competitors are a loop over the parameters, foreach calls, torch.compile of these, a copy
of the same bytes, and torch's own optimizers, with the gradients activated before the step or not at all.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lcw_ops import functional as F
from lcw_ops import optim, reference
from lcw_ops.bench.registry import EAGER, Case, Competitor, Run, ours
from lcw_ops.ops.gradient_activation import ADAMW_STEP, NAME, SGD_STEP
from lcw_ops.reference.gradient_activation import KINDS, PLACES

ALPHA, BETA = 0.1, 20.0
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}

# The number of steps before the one that is checked. The first step would not do: the momentum is still 0 there, so an
# error in its decay would not show.
STEPS_BEFORE = 9

# The most tensors for which torch.compile competes. It takes two minutes for the three foreach calls over 1000 tensors,
# or for a step over 100, and each case compiles twice: to check and to time.
MOST_COMPILED, MOST_COMPILED_STEPS = 200, 100

Shapes = list[tuple[int, ...]]


def cases(device_type: str) -> list[Case]:
    if device_type == "cuda":
        # The first list has 100 million elements, 400 MB in float32 and 200 MB in bfloat16. No second-level cache holds
        # as much.
        lists = [("1000 of 100,000", [(100_000,)] * 1000), ("ResNet-50", resnet50()), ("transformer", transformer())]
    else:
        lists = [("1000 of 10,000", [(10_000,)] * 1000), ("ResNet-50", resnet50()), ("transformer", transformer())]
    dtypes = (torch.float32, torch.bfloat16)
    # One list is enough to show the cost of each kind, and one kind for the cost of each list.
    in_place = [(*lists[0], kind, dtype) for kind in KINDS for dtype in dtypes]
    in_place += [(*one, "arctan", dtype) for one in lists[1:] for dtype in dtypes]
    # The weights of 50,000 layers of width 64, in one tensor as in nn.OrthogonalFilterMLP.
    in_place += [("one of 204.8 M", [(50_000, 64, 64)], "arctan", torch.float32)]
    small, smaller = [(10_000,)] * 200, [(10_000,)] * 50
    return [
        _in_place(device_type, "200 of 10,000", small, "arctan", torch.float32, quick=True),
        *(_in_place(device_type, *one) for one in in_place),
        *(_sgd(device_type, "50 of 10,000", smaller, place, quick=True) for place in PLACES),
        *(_sgd(device_type, *one, place) for place in PLACES for one in lists),
        _adamw(device_type, "50 of 10,000", smaller, quick=True),
        *(_adamw(device_type, *one) for one in lists),
    ]


# ---- Parameters of models -------------------------------------------------------------------------------------------


def resnet50() -> Shapes:
    """Convolutions without bias, batch norms, and the classifier of 1000 classes: 161 tensors, 25,557,032 elements."""

    def convolution(out_channels: int, in_channels: int, side: int) -> Shapes:
        return [(out_channels, in_channels, side, side), (out_channels,), (out_channels,)]

    channels = 64
    shapes = convolution(channels, 3, 7)
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            shapes += convolution(width, channels, 1) + convolution(width, width, 3) + convolution(4 * width, width, 1)
            if block == 0:
                shapes += convolution(4 * width, channels, 1)
            channels = 4 * width
    return [*shapes, (1000, channels), (1000,)]


def transformer(layers: int = 6, width: int = 512, hidden: int = 2048, vocabulary: int = 32_000) -> Shapes:
    """Encoder layers like torch.nn's, a final norm and one embedding table: 75 tensors, 35.3 million elements."""
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    feed_forward = [(hidden, width), (hidden,), (width, hidden), (width,)]
    norm = [(width,), (width,)]
    return [(vocabulary, width), *(attention + feed_forward + 2 * norm) * layers, *norm]


def _count(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes))


def _sizes(shapes: Shapes) -> dict[str, int]:
    return {"tensors": len(shapes), "total": _count(shapes)}


def _draw(shapes: Shapes, device: torch.device) -> list[Tensor]:
    return [torch.randn(shape, device=device) for shape in shapes]


def _compiled_competitor(name: str, prepare: Callable[[dict], Run], shapes: Shapes, most: int) -> Competitor:
    reason = f"to compile for {len(shapes)} tensors takes minutes" if len(shapes) > most else None
    return Competitor(name, prepare, slow_start=True, missing=lambda: reason)


def _compiled(function: Callable, *arguments) -> Run:
    # torch compiles a function for eight lists. From the ninth on, the uncompiled function would run and be timed.
    torch.compiler.reset()
    compiled = torch.compile(function, dynamic=False)
    return lambda: compiled(*arguments)


# ---- In place -------------------------------------------------------------------------------------------------------


def _in_place(device_type: str, name: str, shapes: Shapes, kind: str, dtype: torch.dtype, quick: bool = False) -> Case:
    def make_inputs(device: torch.device) -> dict:
        return {"gradients": [gradient.to(dtype) for gradient in _draw(shapes, device)], "kind": kind}

    return Case(
        stem="gradient_activation",
        name=f"{kind} in place, {name}",
        shape=_sizes(shapes),
        dtype=dtype,
        make_inputs=make_inputs,
        expected=_activated,
        competitors=(
            *ours(NAME, device_type, _ours),
            Competitor(EAGER, _loop),
            Competitor("six foreach calls" if kind == "log" else "three foreach calls", _foreach),
            _compiled_competitor("torch.compile of these", _compiled_list, shapes, MOST_COMPILED),
            Competitor("copy", _copy, checked=False),
        ),
        bytes=2 * _count(shapes) * dtype.itemsize,
        operations=0,
        quick=quick,
        shorten=_shorten,
    )


def _shorten(inputs: dict) -> dict:
    """Take the first tenth of the tensor of 205 million elements: float64 copies of all of it would need 5 GB."""
    gradients = inputs["gradients"]
    return inputs | {"gradients": [gradients[0][:5000]] if len(gradients) == 1 else gradients}


def _own_copy(inputs: dict) -> list[Tensor]:
    # Repeated calls in place do not shrink the values to 0: they converge to the g with alpha atan(beta g) = g, 0.117.
    return [gradient.clone() for gradient in inputs["gradients"]]


def _activated(inputs: dict) -> list[Tensor]:
    kind = inputs["kind"]
    return [reference.gradient_activation(gradient.double(), kind, ALPHA, BETA) for gradient in inputs["gradients"]]


def _ours(inputs: dict) -> Run:
    gradients, kind = _own_copy(inputs), inputs["kind"]

    def run() -> list[Tensor]:
        F.gradient_activation_(gradients, kind, ALPHA, BETA)
        return gradients

    return run


def _loop(inputs: dict) -> Run:
    gradients, activate = _own_copy(inputs), LOOPS[inputs["kind"]]
    return lambda: [activate(gradient) for gradient in gradients]


def _arctan_(gradient: Tensor) -> Tensor:
    return gradient.mul_(BETA).atan_().mul_(ALPHA)


def _tanh_(gradient: Tensor) -> Tensor:
    return gradient.mul_(BETA).tanh_().mul_(ALPHA)


def _log_(gradient: Tensor) -> Tensor:
    sign = gradient.sign()
    return gradient.abs_().mul_(BETA).log1p_().mul_(sign).mul_(ALPHA)


LOOPS = {"arctan": _arctan_, "tanh": _tanh_, "log": _log_}


def _foreach(inputs: dict) -> Run:
    gradients, kind = _own_copy(inputs), inputs["kind"]
    return lambda: _foreach_activate_(gradients, kind)


def _foreach_activate_(gradients: list[Tensor], kind: str) -> list[Tensor]:
    if kind == "log":
        signs = torch._foreach_sign(gradients)
        torch._foreach_abs_(gradients)
    torch._foreach_mul_(gradients, BETA)
    {"arctan": torch._foreach_atan_, "tanh": torch._foreach_tanh_, "log": torch._foreach_log1p_}[kind](gradients)
    if kind == "log":
        torch._foreach_mul_(gradients, signs)
    torch._foreach_mul_(gradients, ALPHA)
    return gradients


def _compiled_list(inputs: dict) -> Run:
    return _compiled(_foreach_activate_, _own_copy(inputs), inputs["kind"])


def _copy(inputs: dict) -> Run:
    source, target = inputs["gradients"], _own_copy(inputs)

    def run() -> list[Tensor]:
        torch._foreach_copy_(target, source)
        return target

    return run


# ---- Steps ----------------------------------------------------------------------------------------------------------


def _sgd(device_type: str, name: str, shapes: Shapes, place: str, quick: bool = False) -> Case:
    our_sgd = functools.partial(optim.SGD, **SGD, gradient_activation="arctan", alpha=ALPHA, beta=BETA, activate=place)
    by_gradient = _gradient_first(torch.optim.SGD, SGD, shapes)
    by_momentum = (
        Competitor(EAGER, functools.partial(_momentum_run, _momentum_loop)),
        Competitor("six foreach calls", functools.partial(_momentum_run, _momentum_foreach)),
        _compiled_competitor("torch.compile of these", _compiled_momentum, shapes, MOST_COMPILED_STEPS),
    )
    return _step(
        name=f"SGD, arctan of the {place}, {name}",
        shapes=shapes,
        make_state=lambda device: {"momentum_buffer": _draw(shapes, device)},
        expected=functools.partial(_expected_sgd, place),
        competitors=(
            *ours(SGD_STEP, device_type, functools.partial(_optimizer, our_sgd)),
            *(by_gradient if place == "gradient" else by_momentum),
            *_without_activation(torch.optim.SGD, SGD),
        ),
        quick=quick,
    )


def _adamw(device_type: str, name: str, shapes: Shapes, quick: bool = False) -> Case:
    our_adamw = functools.partial(optim.AdamW, **ADAMW, gradient_activation="arctan", alpha=ALPHA, beta=BETA)

    def make_state(device: torch.device) -> dict[str, list[Tensor]]:
        # The squares are far from 0: dividing by a tiny number would amplify the last bit of every result.
        squares = [torch.rand(shape, device=device) + 0.1 for shape in shapes]
        return {"exp_avg": _draw(shapes, device), "exp_avg_sq": squares}

    return _step(
        name=f"AdamW, arctan, {name}",
        shapes=shapes,
        make_state=make_state,
        expected=_expected_adamw,
        competitors=(
            *ours(ADAMW_STEP, device_type, functools.partial(_optimizer, our_adamw)),
            *_gradient_first(torch.optim.AdamW, ADAMW, shapes),
            *_without_activation(torch.optim.AdamW, ADAMW),
        ),
        quick=quick,
    )


def _step(
    name: str,
    shapes: Shapes,
    make_state: Callable[[torch.device], dict[str, list[Tensor]]],
    expected: Callable[[dict], list[Tensor]],
    competitors: tuple[Competitor, ...],
    quick: bool,
) -> Case:
    def make_inputs(device: torch.device) -> dict:
        return {"params": _draw(shapes, device), "grads": _draw(shapes, device), "state": make_state(device)}

    states = len(make_state(torch.device("meta")))
    return Case(
        stem="gradient_activation",
        name=name,
        shape=_sizes(shapes),
        dtype=torch.float32,
        make_inputs=make_inputs,
        expected=expected,
        # torch's optimizers refuse to be captured, unless they are made for it.
        competitors=tuple(dataclasses.replace(one, captures=False) for one in competitors),
        # The gradient is read, parameter and states are read and written.
        bytes=(1 + 2 * (1 + states)) * _count(shapes) * torch.float32.itemsize,
        operations=0,
        quick=quick,
    )


def _gradient_first(make: Callable, options: dict, shapes: Shapes) -> tuple[Competitor, ...]:
    """torch's optimizers after an in-place activation of the gradients."""
    return (
        Competitor(EAGER, functools.partial(_activate_and_step, make, options, False)),
        Competitor("foreach calls + fused", functools.partial(_activate_and_step, make, options, True)),
        _compiled_competitor(
            "torch.compile of a step", functools.partial(_compiled_step, make, options), shapes, MOST_COMPILED_STEPS
        ),
    )


def _without_activation(make: Callable, options: dict) -> tuple[Competitor, ...]:
    """A step without activation: another function, timed for comparison."""
    return tuple(
        Competitor(f"torch {form}, none", functools.partial(_optimizer, make, **options, **{form: True}), checked=False)
        for form in ("fused", "foreach")
    )


def _primed(make: Callable, inputs: dict, own_gradients: bool = False, **options) -> tuple[torch.optim.Optimizer, list]:
    """(an optimizer in the middle of training, with copies of the parameters; all tensors that its step writes)."""
    params = [nn.Parameter(param.clone()) for param in inputs["params"]]
    for param, gradient in zip(params, inputs["grads"], strict=True):
        param.grad = gradient.clone() if own_gradients else gradient
    optimizer = make(params, **options)
    # A step at rate 0 does not change the parameters, and creates the state in the optimizer's own form.
    (group,) = optimizer.param_groups
    rate, group["lr"] = group["lr"], 0.0
    optimizer.step()
    group["lr"] = rate
    states = [optimizer.state[param] for param in params]
    for name, values in inputs["state"].items():
        for state, value in zip(states, values, strict=True):
            state[name].copy_(value)
    for state in states:
        if "step" in state:
            state["step"].fill_(STEPS_BEFORE)
    return optimizer, [*params, *(state[name] for name in inputs["state"] for state in states)]


def _optimizer(make: Callable, inputs: dict, **options) -> Run:
    optimizer, written = _primed(make, inputs, **options)

    def run() -> list[Tensor]:
        optimizer.step()
        return written

    return run


def _activate_and_step(make: Callable, options: dict, fused: bool, inputs: dict) -> Run:
    form = {"fused": True} if fused else {"foreach": False}
    optimizer, written = _primed(make, inputs, own_gradients=True, **options, **form)
    gradients = [param.grad for group in optimizer.param_groups for param in group["params"]]

    def run() -> list[Tensor]:
        if fused:
            _foreach_activate_(gradients, "arctan")
        else:
            for gradient in gradients:
                _arctan_(gradient)
        optimizer.step()
        return written

    return run


def _compiled_step(make: Callable, options: dict, inputs: dict) -> Run:
    optimizer, written = _primed(make, inputs, own_gradients=True, **options, foreach=True)
    gradients = [param.grad for group in optimizer.param_groups for param in group["params"]]

    def step() -> None:
        _foreach_activate_(gradients, "arctan")
        optimizer.step()

    compiled = _compiled(step)

    def run() -> list[Tensor]:
        compiled()
        return written

    return run


def _momentum_run(step: Callable, inputs: dict) -> Run:
    params = [param.clone() for param in inputs["params"]]
    buffers = [buffer.clone() for buffer in inputs["state"]["momentum_buffer"]]

    def run() -> list[Tensor]:
        step(params, inputs["grads"], buffers)
        return [*params, *buffers]

    return run


def _momentum_loop(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor]) -> None:
    for param, grad, buffer in zip(params, grads, buffers, strict=True):
        buffer.mul_(SGD["momentum"]).add_(grad).add_(param, alpha=SGD["weight_decay"])
        param.sub_(buffer.mul(BETA).atan_(), alpha=SGD["lr"] * ALPHA)


def _momentum_foreach(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor]) -> None:
    torch._foreach_mul_(buffers, SGD["momentum"])
    torch._foreach_add_(buffers, grads)
    torch._foreach_add_(buffers, params, alpha=SGD["weight_decay"])
    steps = torch._foreach_mul(buffers, BETA)
    torch._foreach_atan_(steps)
    torch._foreach_sub_(params, steps, alpha=SGD["lr"] * ALPHA)


def _compiled_momentum(inputs: dict) -> Run:
    torch.compiler.reset()
    return _momentum_run(torch.compile(_momentum_foreach, dynamic=False), inputs)


def _expected_sgd(place: str, inputs: dict) -> list[Tensor]:
    step = functools.partial(reference.sgd_step, **SGD, activate=place, kind="arctan", alpha=ALPHA, beta=BETA)
    return _expected(step, inputs)


def _expected_adamw(inputs: dict) -> list[Tensor]:
    step = functools.partial(
        reference.adamw_step, **ADAMW, step=STEPS_BEFORE + 1, kind="arctan", alpha=ALPHA, beta=BETA
    )
    return _expected(step, inputs)


def _expected(step: Callable[..., tuple[Tensor, ...]], inputs: dict) -> list[Tensor]:
    """All new parameters, then all new values of the first state, and so on."""
    columns = (inputs["params"], inputs["grads"], *inputs["state"].values())
    stepped = [step(*(tensor.double() for tensor in row)) for row in zip(*columns, strict=True)]
    return [tensor for column in zip(*stepped, strict=True) for tensor in column]
