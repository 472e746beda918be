"""The orthogonal-filter recurrence over depth and over time: forward, forward with backward, and a training step.

h <- alpha O h + beta tanh(W h + b + u). The filter O is a fixed dense matrix, and u is the input of a time step. The
competitors are eager torch, JAX's jitted lax.scan, torch.compile of one step and, on a GPU, a CUDA graph of eager
torch. Over time torch.nn.RNN competes too. It has no filter, and so half the arithmetic forward, and 3/5 with backward.

A training step is forward, backward and torch's fused Adam. It drops the gradients before the next step, as training
does. Our own step also runs beside a process that keeps one of every two cores busy, and with torch's fused AdamW in
the backward pass (``in_backward=True``), which leaves no gradients that could be checked.
"""

import dataclasses
import functools
import importlib.util
import os

import torch
from torch import Tensor, nn

from lcw_ops import functional as F
from lcw_ops import optim
from lcw_ops.bench.registry import EAGER, Case, Competitor, Run, beside_busy_processes, ours
from lcw_ops.nn.orthogonal_filter import make_filter
from lcw_ops.ops.orthogonal_filter.op import NAME
from lcw_ops.reference.orthogonal_filter import orthogonal_filter as reference

# A backward pass is checked against float64 over this many steps. They cover many segments between kept states, and
# take a second; all steps would take half a minute.
CHECKED_STEPS = 1000

# The nodes of a CUDA graph are captured one by one. With more steps the capture takes longer than the benchmark.
GRAPH_STEPS = 10_000

# The inputs that get a gradient, in this order; a case may lack some.
LEARNED = ("h0", "weight", "bias", "inputs")


def cases(device_type: str) -> list[Case]:
    if device_type == "cuda":
        depth = [(2_000, 128, 64, True), (50_000, 128, 64, False), (10_000, 128, 128, False)]
        time = [(2_000, 64, 128, True), (10_000, 64, 128, False), (10_000, 64, 256, False), (10_000, 1, 128, False)]
    else:
        depth = [(500, 32, 64, True), (50_000, 32, 64, False), (10_000, 128, 128, False)]
        time = [(500, 32, 128, True), (10_000, 32, 128, False), (784, 128, 256, False), (10_000, 1, 128, False)]
    single = [
        _case(device_type, over_time, *shape, backward)
        for over_time, shapes in ((False, depth), (True, time))
        for shape in shapes
        for backward in (False, True)
    ]
    return [*single, *(_training_step(device_type, *shape) for shape in depth[:2])]


def _case(device_type: str, over_time: bool, steps: int, rows: int, width: int, quick: bool, backward: bool) -> Case:
    tensors = {"h0": (rows, width), "weight": (width, width), "bias": (width,)}
    if over_time:
        tensors["inputs"] = (steps, rows, width)
    else:
        tensors |= {name: (steps, *tensors[name]) for name in ("weight", "bias")}

    def make_inputs(device: torch.device) -> dict:
        inputs = {name: torch.randn(shape, device=device) for name, shape in tensors.items()}
        inputs["weight"] *= width**-0.5
        # alpha and beta must be exact in float32: otherwise alpha's rounding would be the whole error against float64.
        alpha = torch.tensor(1 - 1 / steps)
        return inputs | {
            "filter": make_filter("haar", width, device=device),
            "alpha": alpha.item(),
            "beta": (1 - alpha).item(),
            "backward": backward,
            "return_states": over_time,
            "cotangent": torch.randn((steps + 1, rows, width) if over_time else (rows, width), device=device),
        }

    def shorten(inputs: dict) -> dict:
        if not backward:
            return inputs
        short = inputs | {
            name: inputs[name][:CHECKED_STEPS] for name in (["inputs"] if over_time else ["weight", "bias"])
        }
        return short | {"cotangent": inputs["cotangent"][: CHECKED_STEPS + 1]} if over_time else short

    elements = sum(torch.Size(shape).numel() for shape in tensors.values()) + (steps * rows * width if over_time else 0)
    competitors = [
        *ours(NAME, device_type, functools.partial(_torch, F.orthogonal_filter), width),
        Competitor(EAGER, functools.partial(_torch, reference)),
        Competitor("jax lax.scan, jit", _jax, captures=False, missing=_jax_missing),
        Competitor("torch.compile, one step", _compiled_step, slow_start=True),
    ]
    if not backward and device_type == "cuda" and steps <= GRAPH_STEPS:
        competitors.append(Competitor("CUDA graph of eager", _cuda_graph, captures=False))
    if over_time:
        competitors.append(Competitor("nn.RNN (no filter)", _rnn, checked=False))
    return Case(
        stem="orthogonal_filter",
        name=("over time" if over_time else "over depth") + (", forward + backward" if backward else ", forward"),
        shape={"T" if over_time else "L": steps, "M": rows, "N": width},
        dtype=torch.float32,
        make_inputs=make_inputs,
        expected=_expected,
        competitors=tuple(competitors),
        # Forward reads every tensor, and over time writes all states. Backward reads everything again and writes every
        # gradient.
        bytes=4 * elements * (3 if backward else 1),
        # The products O h and W h forward, and G O, P W and P^T h backward: G and P are the gradients of a state h and
        # of its pre-activation.
        operations=2 * rows * width**2 * steps * (5 if backward else 2),
        quick=quick,
        shorten=shorten,
    )


def _training_step(device_type: str, steps: int, rows: int, width: int, quick: bool) -> Case:
    passes = _case(device_type, False, steps, rows, width, quick, backward=True)
    ours_alone = ours(NAME, device_type, functools.partial(_step, F.orthogonal_filter), width)
    beside = [
        Competitor(f"{one.name}, busy", beside_busy_processes(one.prepare), checked=False, missing=_busy_missing)
        for one in ours_alone[:1]
        if device_type == "cpu"
    ]
    in_backward = [
        dataclasses.replace(one, name=f"{one.name}, in backward", checked=False)
        for one in ours(NAME, device_type, functools.partial(_step_in_backward, F.orthogonal_filter), width)
    ]
    parameters = steps * width * (width + 1)
    return dataclasses.replace(
        passes,
        name="over depth, training step",
        competitors=tuple(
            # torch's Adam refuses to be captured, unless it is made for it.
            dataclasses.replace(one, captures=False)
            for one in (*ours_alone, *in_backward, *beside, Competitor(EAGER, functools.partial(_step, reference)))
        ),
        # Adam reads the gradient, and reads and writes the parameter and its two moments.
        bytes=passes.bytes + 4 * 7 * parameters,
    )


def _busy_missing() -> str | None:
    return None if hasattr(os, "sched_setaffinity") else "this system cannot pin a process to a core"


def _call(function, inputs: dict) -> Tensor:
    return function(
        *(inputs[name] for name in ("h0", "weight", "bias", "filter")),
        inputs["alpha"],
        inputs["beta"],
        inputs.get("inputs"),
        return_states=inputs["return_states"],
    )


def _torch(function, inputs: dict) -> Run:
    if not inputs["backward"]:
        return torch.no_grad()(lambda: [_call(function, inputs)])
    learned = {name: inputs[name].detach().requires_grad_() for name in LEARNED if name in inputs}
    tracked = inputs | learned

    def run() -> list[Tensor]:
        output = _call(function, tracked)
        return [output, *torch.autograd.grad(output, list(learned.values()), inputs["cotangent"])]

    return run


def _step(function, inputs: dict) -> Run:
    """A training step. Its first results are the output and gradients that :func:`_expected` computes."""
    learned = {name: inputs[name].clone().requires_grad_() for name in LEARNED if name in inputs}
    tracked = inputs | learned
    # The rate is so small that the net stays as it was drawn.
    optimizer = torch.optim.Adam(learned.values(), lr=1e-9, fused=True)

    def run() -> list[Tensor]:
        optimizer.zero_grad()
        output = _call(function, tracked)
        output.backward(inputs["cotangent"])
        optimizer.step()
        return [output, *(each.grad for each in learned.values())]

    return run


def _step_in_backward(function, inputs: dict) -> Run:
    """A training step of an optimizer that steps during backward."""
    learned = {name: inputs[name].clone().requires_grad_() for name in LEARNED if name in inputs}
    options = {"lr": 1e-9, "weight_decay": 0.0, "fused": True, "gradient_activation": None}
    optimizer = optim.AdamW(learned.values(), in_backward=True, **options)

    def run() -> list[Tensor]:
        output = _call(function, inputs | learned)
        output.backward(inputs["cotangent"])
        optimizer.step()
        return [output]

    return run


def _expected(inputs: dict) -> list[Tensor]:
    exact = {name: value.double() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return [result.detach() for result in _torch(reference, exact)()]


def _compiled_step(inputs: dict) -> Run:
    # torch.compile makes eight variants of a function. After that it silently runs the uncompiled function.
    torch.compiler.reset()

    @torch.compile(dynamic=False)
    def step(state, weight, bias, filter, alpha: float, beta: float):
        return alpha * (state @ filter.mT) + beta * torch.tanh(state @ weight.mT + bias)

    def recurrence(h0, weight, bias, filter, alpha, beta, inputs=None, return_states=False) -> Tensor:
        biases = (bias if inputs is None else bias + inputs).unbind()
        weights = weight.unbind() if weight.dim() == 3 else [weight] * len(biases)
        states = [h0]
        for weight_l, bias_l in zip(weights, biases, strict=True):
            states.append(step(states[-1], weight_l, bias_l, filter, alpha, beta))
        return torch.stack(states) if return_states else states[-1]

    return _torch(recurrence, inputs)


def _cuda_graph(inputs: dict) -> Run:
    eager = _torch(reference, inputs)
    eager()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = eager()

    def run() -> list[Tensor]:
        graph.replay()
        return results

    return run


def _rnn(inputs: dict) -> Run:
    """A plain tanh RNN of the same width and length on one feature. It returns all states, as ours does over time."""
    steps, rows, width = inputs["inputs"].shape
    device = inputs["h0"].device
    network = nn.RNN(1, width, device=device)
    sequence = torch.randn(steps, rows, 1, device=device)
    if not inputs["backward"]:
        return torch.no_grad()(lambda: list(network(sequence)))
    parameters = list(network.parameters())

    def run() -> list[Tensor]:
        output, _ = network(sequence)
        return [output, *torch.autograd.grad(output, parameters, inputs["cotangent"][1:])]

    return run


def _jax_missing() -> str | None:
    return None if importlib.util.find_spec("jax") else "jax is not installed (pip install jax)"


def _jax(inputs: dict) -> Run:
    import jax
    import jax.numpy as jnp

    learned = [jnp.from_dlpack(inputs[name]) for name in LEARNED if name in inputs]
    filter, cotangent = (jnp.from_dlpack(inputs[name]) for name in ("filter", "cotangent"))
    alpha, beta = inputs["alpha"], inputs["beta"]

    def recurrence(h0, weight, bias, step_inputs=None):
        def step(state, per_step):
            weight_l, shift = (weight, bias + per_step) if over_time else per_step
            state = alpha * (state @ filter.T) + beta * jnp.tanh(state @ weight_l.T + shift)
            return state, state if over_time else None

        over_time = step_inputs is not None
        last, states = jax.lax.scan(step, h0, step_inputs if over_time else (weight, bias))
        return jnp.concatenate([h0[None], states]) if over_time else last

    def forward(*arguments):
        return [recurrence(*arguments)]

    def forward_backward(cotangent, *arguments):
        output, pullback = jax.vjp(recurrence, *arguments)
        return [output, *pullback(cotangent)]

    # On GPUs JAX would multiply in TF32; the other competitors multiply in float32.
    with jax.default_matmul_precision("highest"):
        if inputs["backward"]:
            compiled = jax.jit(forward_backward).lower(cotangent, *learned).compile()
            return lambda: jax.block_until_ready(compiled(cotangent, *learned))
        compiled = jax.jit(forward).lower(*learned).compile()
        return lambda: jax.block_until_ready(compiled(*learned))
