"""``profile(model, inputs)``: a network's signal, gradient, time and memory, layer by layer.

It observes one pass with hooks and times a few more. It replays every orthogonal-filter recurrence, which is a single
op, by chunks of layers, to get a row for each layer. It finds the extreme singular values of the Jacobians of the
recurrences and of the model. The model is left as it was: gradients, buffers, hooks, mode and random state.
"""

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lcw_ops._checks import describe
from lcw_ops.nn import OrthogonalFilterMLP, OrthogonalFilterRNN
from lcw_ops.ops import backends
from lcw_ops.ops.orthogonal_filter import op as orthogonal_filter
from lcw_ops.ops.parallel_depth.solver import Solve, record_solves
from lcw_ops.profile import jacobian as spectra
from lcw_ops.profile import machine
from lcw_ops.profile import orthogonal_filter as replay
from lcw_ops.profile.layers import LayerCall, RecurrenceCall, first_floating, observe
from lcw_ops.profile.result import COLUMNS, Profile, Solves, Timing

# Timed passes stop after this time: by then the machine's noise has been averaged over.
TIMING_SECONDS = 10.0


def profile(
    model: nn.Module,
    inputs: Tensor | tuple,
    targets: Tensor | None = None,
    loss: Callable | None = None,
    *,
    jacobian: bool = True,
    jacobian_method: str = "auto",
    repeats: int = 3,
    matmul_rate: float | None = None,
    name: str | None = None,
) -> Profile:
    """Measure one forward and backward pass of any model.

    Every call of a leaf module is a row: rms of the output, norm of the output's gradient, activation shift (rms over
    units of the output's mean over samples), norm of the weight's gradient. The recurrence of ``OrthogonalFilterMLP``
    or ``OrthogonalFilterRNN`` is a single op; still, each of its layers (or time steps) has its own row, with rigorous
    bounds on the state, on the gradient and on the singular values of the layer's Jacobian. For recurrences that were
    solved in parallel over depth, the profile reports sweeps and convergence.

    Args:
        model: used in its present mode (train or eval), on its device.
        inputs: a tensor, or a tuple of positional arguments; samples along the first dimension.
        targets: second argument of ``loss``.
        loss: ``loss(output, targets)``, or ``loss(output)`` without targets: one number. Default: cross entropy for
            integer targets, mean squared error for others; without targets the product with a fixed random direction of
            unit norm, so that the gradient at the output has norm 1.
        jacobian: also find the extreme singular values of the Jacobians of the recurrences and of the model, at the
            first sample. For a recurrence of width 512 or less, this is the exact Jacobian of its last state h_L with
            respect to its first, h_0; wider recurrences are left out. For the model, it is the Jacobian of the first
            floating-point tensor that it returns with respect to the first tensor that it is given, with the other
            samples held fixed. The model's Jacobian is left out for integer inputs and for ``OrthogonalFilterRNN``,
            where that of h_0 -> h_L matters.
        jacobian_method: for the model's Jacobian: "exact", "lanczos" or "auto", see ``jacobian.function_spectrum``.
        repeats: the largest number of timed passes; after 10 s no further pass begins. The median is reported.
        matmul_rate: this machine's float32 FLOP/s, if it has been measured before (``machine.matmul_rate``).
        name: the model's name in tables and plots; default: its class.

    Raises:
        TypeError: model is not a module, inputs hold no tensor with a dimension, or repeats is not an int.
        ValueError: inputs hold no sample, the loss is not a tensor with one element, nothing requires a gradient, no
            module was called, repeats < 1, inside torch.inference_mode(), or the model cannot be differentiated twice
            and "lanczos" was needed. Errors of the model itself are passed on.
    """
    return profile_by_parts(
        model,
        inputs,
        targets,
        loss,
        jacobian=jacobian,
        jacobian_method=jacobian_method,
        repeats=repeats,
        matmul_rate=matmul_rate,
        name=name,
        begin=lambda part: None,
    )


# The parts of a profile, in their order.
PARTS = ("watched pass", "timed passes", "every layer")


def profile_by_parts(
    model: nn.Module,
    inputs: Tensor | tuple,
    targets: Tensor | None = None,
    loss: Callable | None = None,
    *,
    jacobian: bool = True,
    jacobian_method: str = "auto",
    repeats: int = 3,
    matmul_rate: float | None = None,
    name: str | None = None,
    begin: Callable[[str], None],
    weight_norms: np.ndarray | None = None,
) -> Profile:
    """:func:`profile`, which calls ``begin`` with the name of each of ``PARTS`` before it begins.

    ``weight_norms``: the column weight_norm_bound of the model's only recurrence, if it is known already.
    """
    if torch.is_inference_mode_enabled():
        remedy = "Call profile outside of it."
        raise ValueError(describe("profile", "the mode", "is torch.inference_mode()", "a mode with gradients", remedy))
    if isinstance(repeats, bool) or not isinstance(repeats, int):
        raise TypeError(describe("profile", "repeats", f"is a {type(repeats).__name__}", "an int"))
    if repeats < 1:
        raise ValueError(describe("profile", "repeats", f"is {repeats}", "at least 1"))
    work = _prepared(model, inputs, targets, loss)
    with _left_as_it_was(model, work.device):
        begin("watched pass")
        watched = _watched_pass(work)
        for call in watched.calls:
            if isinstance(call, RecurrenceCall):
                call.recurrence.weight_norms = weight_norms
        begin("timed passes")
        timing = _timed_passes(work, repeats, watched)
        begin("every layer")
        columns, jacobians = _rows(watched, jacobian)
        if jacobian:
            jacobians |= _model_jacobian(work, jacobian_method, jacobians)
    timing.matmul_rate = machine.matmul_rate(work.device) if matmul_rate is None else matmul_rate
    return Profile(
        name=name or type(model).__name__,
        loss=watched.loss,
        samples=work.samples,
        columns=columns,
        jacobians={what: spectrum for what, (spectrum, _, _) in jacobians.items()},
        timing=timing,
        peak_memory_bytes=machine.peak_memory_bytes(work.device),
        backend=_backend(watched.calls, work.device),
        machine=machine.describe(work.device),
        solves=watched.solves,
    )


@dataclass
class _Work:
    """One forward and backward pass, to be repeated."""

    model: nn.Module
    inputs: tuple
    criterion: Callable
    differentiated: list[Tensor]

    @property
    def first_input(self) -> Tensor:
        return _first_tensor(self.inputs)

    @property
    def device(self) -> torch.device:
        return self.first_input.device

    @property
    def samples(self) -> int:
        return len(self.first_input)

    def forward(self) -> Tensor:
        """The loss, ready for backward."""
        # torch's FLOP counter raises an error if an input is a leaf that autograd.grad differentiates by, so the model
        # gets a clone of every input that requires a gradient.
        inputs = (
            argument.clone() if isinstance(argument, Tensor) and argument.requires_grad else argument
            for argument in self.inputs
        )
        loss = self.criterion(self.model(*inputs))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            came = f"has shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"is a {type(loss).__name__}"
            remedy = "Return its mean or sum."
            raise ValueError(describe("profile", "the loss", came, "a tensor with one element", remedy))
        if not loss.requires_grad:
            expected = "a result of parameters or inputs that require one"
            raise ValueError(describe("profile", "the loss", "does not require a gradient", expected))
        return loss

    def backward(self, loss: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the parameters. They are returned, not stored: the user's ``.grad`` is left alone."""
        return torch.autograd.grad(loss, self.differentiated, allow_unused=True)


@dataclass
class _Watched:
    """The findings of the watched pass."""

    loss: float
    calls: list[LayerCall | RecurrenceCall]
    weight_gradient_norms: dict[int, float]  # by the id of the parameter
    forward_flops: int
    backward_flops: int
    solves: dict[str, Solves]  # by direction


def _prepared(model, inputs, targets, loss) -> _Work:
    if not isinstance(model, nn.Module):
        raise TypeError(describe("profile", "model", f"is a {type(model).__name__}", "a torch.nn.Module"))
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    first = _first_tensor(inputs)
    if first is None:
        kinds = ("a tensor of 0 dimensions" if isinstance(part, Tensor) else type(part).__name__ for part in inputs)
        came = ", ".join(kinds) or "nothing"
        expected = "a tensor with the samples along its first dimension, or a tuple that contains such a tensor"
        raise TypeError(describe("profile", "inputs", f"hold {came}", expected))
    if first.numel() == 0:
        raise ValueError(describe("profile", "the input", f"has shape {tuple(first.shape)}", "at least one sample"))
    differentiated = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not differentiated:
        inputs = tuple(
            argument.detach().requires_grad_()
            if isinstance(argument, Tensor) and argument.is_floating_point()
            else argument
            for argument in inputs
        )
        differentiated = [argument for argument in inputs if isinstance(argument, Tensor) and argument.requires_grad]
    return _Work(model, inputs, _criterion(targets, loss), differentiated)


def _first_tensor(inputs: tuple) -> Tensor | None:
    """The first tensor with a dimension; its first dimension is the samples."""
    return next((argument for argument in inputs if isinstance(argument, Tensor) and argument.dim()), None)


def _criterion(targets: Tensor | None, loss: Callable | None) -> Callable:
    if loss is not None:
        return loss if targets is None else lambda output: loss(output, targets)
    if targets is None:
        return _fixed_direction
    default = nn.functional.mse_loss if targets.is_floating_point() else nn.functional.cross_entropy
    return lambda output: default(first_floating(output), targets)


def _fixed_direction(output) -> Tensor:
    """The inner product of the output with a random direction of norm 1, which is the same at every call."""
    output = first_floating(output)
    if output is None:
        came, expected = "holds no floating-point tensor", "one to take the gradient of"
        raise ValueError(describe("profile", "the model's output", came, expected, "Pass a loss."))
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(output.shape, generator=generator).to(output)
    return (output * (direction / direction.norm())).sum()


@contextmanager
def _left_as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore random state and buffers (a batch norm's running statistics) at the end, whatever happens inside."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    # A module may also replace a buffer by another tensor, as in self.n = self.n + 1.
    places = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        try:
            yield
        finally:
            for module, name, buffer in places:
                if module._buffers.get(name) is not buffer:
                    setattr(module, name, buffer)
            with torch.no_grad():
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)


def _watched_pass(work: _Work) -> _Watched:
    observation = observe(work.model)
    try:
        with record_solves() as solves, FlopCounterMode(display=False) as counter:
            loss = work.forward()
            in_forward, counted = len(solves), counter.get_total_flops()
            gradients = work.backward(loss)
            backward_flops = counter.get_total_flops() - counted
            forward_flops = counted - observation.own_flops
    finally:
        observation.remove()
    calls = observation.calls
    if not calls:
        expected = "calls of its modules, which are the rows of the result"
        raise ValueError(describe("profile", "the model", "called none of its modules", expected))
    recurrences = [call.recurrence for call in calls if isinstance(call, RecurrenceCall)]
    for recurrence in recurrences:
        if recurrence.grad_states is None:
            recurrence.grad_states = torch.zeros_like(recurrence.h0)
    norms = {
        id(parameter): gradient.double().norm().item()
        for parameter, gradient in zip(work.differentiated, gradients, strict=True)
        # The recurrence's own weight has one norm per layer, from the replay.
        if gradient is not None and gradient.dim() >= 2 and not _is_recurrent(parameter, calls)
    }
    return _Watched(loss.item(), calls, norms, forward_flops, backward_flops, _by_direction(solves, in_forward))


def _by_direction(solves: list[Solve], in_forward: int) -> dict[str, Solves]:
    """Summarise the solves by direction: the first ``in_forward`` of them are the forward pass's.

    The backward pass may have to solve windows (ranges of layers) forward again. Such solves are left out: their result
    is that of the forward pass.
    """
    parts = {
        "forward": solves[:in_forward],
        "backward": [solve for solve in solves[in_forward:] if solve.direction == "backward"],
    }
    return {direction: summary for direction, part in parts.items() if (summary := Solves.of(part)) is not None}


def _is_recurrent(parameter: Tensor, calls) -> bool:
    return any(
        isinstance(call, RecurrenceCall) and call.recurrence.weight.data_ptr() == parameter.data_ptr() for call in calls
    )


def _timed_passes(work: _Work, repeats: int, watched: _Watched) -> Timing:
    forward, backward = [], []
    begin = machine.now(work.device)
    while len(forward) < repeats and (not forward or machine.now(work.device) - begin < TIMING_SECONDS):
        start = machine.now(work.device)
        loss = work.forward()
        middle = machine.now(work.device)
        gradients = work.backward(loss)
        forward.append(middle - start)
        backward.append(machine.now(work.device) - middle)
        # Free these before the next pass allocates its own.
        del loss, gradients
    layers = sum(call.recurrence.steps if isinstance(call, RecurrenceCall) else 1 for call in watched.calls)
    return Timing(
        forward_seconds=statistics.median(forward),
        backward_seconds=statistics.median(backward),
        repeats=len(forward),
        layers=layers,
        forward_flops=watched.forward_flops,
        backward_flops=watched.backward_flops,
    )


def _backend(calls: list[LayerCall | RecurrenceCall], device: torch.device) -> str:
    """The backends that ran the recurrences; for a model without any, the one that would run them."""
    used = {call.recurrence.solved_on for call in calls if isinstance(call, RecurrenceCall)}
    return ", ".join(sorted(used)) if used else backends.choose(orthogonal_filter.NAME, device)


def _rows(watched: _Watched, jacobian: bool) -> tuple[dict[str, np.ndarray], dict]:
    """The profile's columns, one row per layer, and the recurrences' Jacobians, in the form of _model_jacobian."""
    parts, names, jacobians = [], [], {}
    for call in watched.calls:
        if isinstance(call, LayerCall):
            parts.append(_single_row(call, watched.weight_gradient_norms))
            names.append([call.name])
            continue
        columns = replay.layer_columns(call.recurrence)
        parts.append(columns)
        names.append([f"{call.name}[{l}]" for l in range(1, call.recurrence.steps + 1)])
        if jacobian and call.recurrence.h0.shape[1] <= replay.EXACT_WIDTH and len(call.recurrence.h0):
            rows, exponent = replay.state_jacobian(call.recurrence)
            what = "h_0 -> h_L" if call.name == "layer" else f"{call.name}: h_0 -> h_L"
            jacobians[what] = (replay.state_spectrum(columns, rows, exponent), rows, exponent)
        # Free the states at which the chunks of layers begin: the replay of the next recurrence keeps its own.
        call.recurrence.boundaries.clear()
    table = {"name": np.array([name for part in names for name in part])}
    for column in COLUMNS:
        if column != "name":
            lengths = zip(parts, names, strict=True)
            table[column] = np.concatenate([part.get(column, np.full(len(name), math.nan)) for part, name in lengths])
    return table, jacobians


def _single_row(call: LayerCall, weight_gradient_norms: dict[int, float]) -> dict[str, np.ndarray]:
    own = [id(parameter) for parameter in call.module.parameters(recurse=False)]
    squares = [weight_gradient_norms[parameter] ** 2 for parameter in own if parameter in weight_gradient_norms]
    row = {
        "state_rms": call.state_rms,
        "gradient_norm": call.gradient_norm,
        "activation_shift": call.activation_shift,
        "shift_angle": call.shift_angle,
        "weight_gradient_norm": math.sqrt(sum(squares)) if squares else math.nan,
    }
    return {name: np.array([value]) for name, value in row.items()}


def _has_plain_ends(mlp: OrthogonalFilterMLP) -> bool:
    """Whether both linear layers apply the weight they hold: a replacement with adapters may not."""
    return all(type(layer) is nn.Linear for layer in (mlp.input_layer, mlp.output_layer))


def _model_jacobian(work: _Work, method: str, jacobians: dict) -> dict:
    """{what: (spectrum, J' or None, e)} of the map from one input to its output; the Jacobian is J' 2^e."""
    point = work.first_input
    if isinstance(work.model, OrthogonalFilterRNN) or not point.is_floating_point():
        return {}
    if isinstance(work.model, OrthogonalFilterMLP) and "h_0 -> h_L" in jacobians and _has_plain_ends(work.model):
        # Use the chain rule: the Jacobian of h_0 -> h_L, which has been computed, and the two linear layers' weights.
        _, rows, exponent = jacobians["h_0 -> h_L"]
        read_in, read_out = (
            layer.weight.detach().double() for layer in (work.model.input_layer, work.model.output_layer)
        )
        product = read_out @ rows.double() @ read_in
        spectrum = spectra.matrix_spectrum(product, rows.shape[0], exponent, computed_in=rows.dtype)
        return {"input -> output": (spectrum, product, exponent)}
    position = next(i for i, argument in enumerate(work.inputs) if argument is point)

    def first_sample(sample: Tensor) -> Tensor:
        batch = torch.cat([sample, point[1:].detach()])
        return first_floating(work.model(*work.inputs[:position], batch, *work.inputs[position + 1 :]))[0]

    return {"input -> output": (spectra.function_spectrum(first_sample, point[:1], method), None, 0)}
