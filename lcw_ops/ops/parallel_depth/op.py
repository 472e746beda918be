"""The recurrence solved in parallel over depth, as registered ops with their autograd function.

Sweeps over all layers at once, see lcw_ops/ops/parallel_depth_solver.py; what one sweep is made of is in
lcw_ops/reference/parallel_depth.py. How many sweeps it takes is decided on the host, inside one op.
"""

import importlib
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from lcw_ops.ops import backends, library
from lcw_ops.ops.orthogonal_filter import op as orthogonal_filter
from lcw_ops.ops.parallel_depth import solver
from lcw_ops.ops.parallel_depth.crossover import Call, device_key, largest_c_faster
from lcw_ops.reference import parallel_depth as reference
from lcw_ops.reference.orthogonal_filter import count_steps, orthogonal_filter_backward
from lcw_ops.reference.orthogonal_filter import orthogonal_filter as solve_sequentially

SWEEP, ADJOINT, ACTIVATE = "parallel_depth_sweep_", "parallel_depth_adjoint_", "parallel_depth_activate_"
NAME, BACKWARD = "orthogonal_filter_parallel", "orthogonal_filter_parallel_backward"


class Kernels(NamedTuple):
    """What carries out a sweep: three functions with the signatures of lcw_ops.reference.parallel_depth's."""

    sweep_: object
    adjoint_sweep_: object
    activate_: object


def get_kernels(backend: str) -> Kernels:
    if backend == "reference":
        return Kernels(reference.sweep_, reference.adjoint_sweep_, reference.activate_)
    return Kernels(*(library.get_overload(name, backend) for name in (SWEEP, ADJOINT, ACTIVATE)))


def _change_fake(states, *_):
    return states.new_empty(1, dtype=torch.float64)


library.declare(
    SWEEP,
    "(Tensor(a!) states, Tensor? product, Tensor? bias, Tensor? inputs, Tensor filter, Tensor alpha, Tensor beta, "
    "str activation) -> Tensor",
    backends=("cpp", "triton"),
    fake=_change_fake,
)
library.declare(
    ADJOINT,
    "(Tensor(a!) gradients, Tensor? product, Tensor? outside, Tensor filter, Tensor alpha, Tensor? slope, "
    "Tensor(b!)? scaled) -> Tensor",
    backends=("cpp", "triton"),
    fake=_change_fake,
)
library.declare(
    ACTIVATE,
    "(Tensor(a!) product, Tensor? bias, Tensor? inputs, Tensor beta, str activation, bool derivative) -> ()",
    backends=("cpp", "triton"),
    fake=lambda *_: None,
)


def _implement_in_triton() -> None:
    """By kernels/parallel_depth.py, imported at the first use: lcw_ops must not need Triton."""

    def implement(name, function):
        def launch(*arguments):
            return getattr(importlib.import_module("lcw_ops.kernels.parallel_depth"), function)(*arguments)

        library.implement(name, "triton", launch)

    for name, function in ((SWEEP, "sweep_"), (ADJOINT, "adjoint_sweep_"), (ACTIVATE, "activate_")):
        implement(name, function)


_implement_in_triton()
backends.IMPLEMENTED[SWEEP] = ("cpp", "triton")
# Whole rows in one program: 2048 units of float32.
backends.MAX_ROW_BYTES[SWEEP, "triton"] = 8192


# ---- The solver as an op ---------------------------------------------------------------------------------------------
# window 0: the default one. Checkpoints are what backward starts from: with window 0 every state (none of its own where
# the states are the output), else the first state of every window; nothing without a gradient to come.

_ARGUMENTS = (
    "Tensor weight, Tensor? bias, Tensor filter, Tensor alpha, Tensor beta, Tensor? inputs, "
    "SymInt steps, str activation, float tolerance, SymInt window"
)


def _count_checkpoints(steps, window, return_states: bool, keeps: bool):
    if not keeps or (return_states and not window):
        return 0
    return (steps + window - 1) // window if window else steps + 1


def _forward_fake(
    h0, weight, bias, filter, alpha, beta, inputs, steps, activation, tolerance, window, return_states, keeps
):
    count = _count_checkpoints(steps, window, return_states, keeps)
    output = h0.new_empty((steps + 1, *h0.shape) if return_states else h0.shape)
    return output, h0.new_empty((count, *h0.shape))


def _new_gradients(like, weight, bias, alpha, beta, inputs, needs):
    """A tensor of its argument's shape for each gradient that is asked for, and an empty one for each that is not."""
    needs_weight, needs_bias, needs_scales, needs_inputs = needs
    asked = ((weight, needs_weight), (bias, needs_bias), (alpha, needs_scales), (beta, needs_scales))
    return tuple(
        (weight if tensor is None else tensor).new_empty(0)
        if not needed
        else like.new_empty(tensor.shape, dtype=tensor.dtype)
        for tensor, needed in (*asked, (inputs, needs_inputs))
    )


def _backward_fake(
    grad_output, checkpoints, weight, bias, filter, alpha, beta, inputs, steps, activation, tolerance, window, *needs
):
    grad_h0 = grad_output.new_empty(grad_output.shape[-2:])
    return (grad_h0, *_new_gradients(grad_output, weight, bias, alpha, beta, inputs, needs))


def _backward_vmap(overload, info, in_dims, *arguments):
    """Every element of the batch has weight gradients of its own, so this is a loop."""
    results = [overload(*slice) for slice in orthogonal_filter.slices(arguments, in_dims, info.batch_size)]
    return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * 6


library.declare(
    NAME,
    f"(Tensor h0, {_ARGUMENTS}, bool return_states, bool keeps) -> (Tensor output, Tensor checkpoints)",
    backends=("cpp", "triton", "reference"),
    fake=_forward_fake,
    autocast_dtype=torch.float32,
    vmap=orthogonal_filter.forward_vmap,
)
library.declare(
    BACKWARD,
    f"(Tensor grad_output, Tensor checkpoints, {_ARGUMENTS}, bool needs_weight, bool needs_bias, bool needs_scales, "
    "bool needs_inputs) -> (Tensor grad_h0, Tensor grad_weight, Tensor grad_bias, Tensor grad_alpha, Tensor grad_beta, "
    "Tensor grad_inputs)",
    backends=("cpp", "triton", "reference"),
    fake=_backward_fake,
    autocast_dtype=torch.float32,
    vmap=_backward_vmap,
)


def _implement_solver(backend: str) -> None:
    def forward(
        h0, weight, bias, filter, alpha, beta, inputs, steps, activation, tolerance, window, return_states, keeps
    ):
        _check(h0, weight, bias, filter, alpha, beta, inputs, steps, activation, tolerance, window)
        h0 = h0.contiguous()
        layers = _contiguous_layers(weight, bias, alpha, beta, inputs, activation)
        tolerance = tolerance or solver.default_tolerance(h0.dtype, steps)
        at_once = window or solver.default_window(weight, len(h0), steps)
        forward = _make_forward(backend, filter, tolerance, at_once, steps)
        keeps_all = return_states or (keeps and not window)
        checkpoints = h0.new_empty((_count_checkpoints(steps, window, return_states, keeps), *h0.shape))
        if keeps_all:
            states = h0.new_empty((steps + 1, *h0.shape)) if return_states else checkpoints
            states[0] = h0
            forward.run(states, layers)
            if keeps and window:
                checkpoints.copy_(states[: -1 : min(window, max(steps, 1))])
            last = states[-1]
        else:
            last = h0.clone()
            states = h0.new_empty((min(at_once, steps) + 1, *h0.shape))
            for start in range(0, steps, at_once):
                stop = min(start + at_once, steps)
                if keeps:
                    checkpoints[start // at_once] = last
                states[0] = last
                forward.run(states[: stop - start + 1], layers.part(start, stop))
                last.copy_(states[stop - start])
        solver.warn_of_given_up(forward)
        return (states if return_states else last.clone()), checkpoints

    def backward(
        grad_output,
        checkpoints,
        weight,
        bias,
        filter,
        alpha,
        beta,
        inputs,
        steps,
        activation,
        tolerance,
        window,
        *needs,
    ):
        everywhere = grad_output.dim() == 3
        gradient = grad_output[-1] if everywhere else grad_output
        _check(gradient, weight, bias, filter, alpha, beta, inputs, steps, activation, tolerance, window)
        expected = (_count_checkpoints(steps, window, False, True), *gradient.shape)
        kind = checkpoints.dtype, checkpoints.device
        if checkpoints.shape != expected or kind != (grad_output.dtype, grad_output.device):
            raise ValueError(
                f"{BACKWARD}: checkpoints {tuple(checkpoints.shape)} do not fit, expected {expected}; "
                "call lcw_ops.functional.orthogonal_filter"
            )
        kernels = get_kernels(backend)
        layers = _contiguous_layers(weight, bias, alpha, beta, inputs, activation)
        tolerance = tolerance or solver.default_tolerance(grad_output.dtype, steps)
        at_once = window or solver.default_window(weight, gradient.shape[0], steps)
        forward = _make_forward(backend, filter, tolerance, at_once, steps)
        sequential = sequential_backward(backend, filter)
        backward = solver.Backward(_make_scan(backend, filter), tolerance, at_once, steps, kernels, filter, sequential)
        results = _new_gradients(grad_output, weight, bias, alpha, beta, inputs, needs)
        shares = (weight.dim() == 2, bias is not None and bias.dim() == 1, True, True, False)
        for result, is_sum in zip(results, shares, strict=True):
            if is_sum:
                result.zero_()
        shares_weight = shares[0]
        # A shared weight's gradient is a sum over windows, kept in float64 until the end.
        summed = (results[0].double() if shares_weight else results[0], *results[1:])
        needs_weight, needs_bias, needs_scales, needs_inputs = needs
        wanted = (needs_weight, needs_bias, needs_scales, needs_scales, needs_inputs)
        into = solver.Gradients(*(result if want else None for result, want in zip(summed, wanted, strict=True)))
        outside = grad_output[:-1].contiguous() if everywhere else None
        # With every state at hand, all layers are one stretch, which the solver cuts into its windows.
        stretch = at_once if window else max(steps, 1)
        checkpoints = checkpoints.contiguous()
        for start in reversed(range(0, steps, stretch)):
            stop = min(start + stretch, steps)
            part = layers.part(start, stop)
            if window:
                states = checkpoints.new_empty((stop - start + 1, *gradient.shape))
                states[0] = checkpoints[start // stretch]
                forward.run(states, part)
            else:
                states = checkpoints
            reaching = None if outside is None else outside[start:stop]
            gradient = backward.run(gradient, states, part, reaching, into.part(start, stop, layers))
        solver.warn_of_given_up(backward, forward)
        if shares_weight and needs_weight:
            results = (summed[0].to(weight.dtype), *results[1:])
        return (gradient.clone(), *results)

    library.implement(NAME, backend, forward)
    library.implement(BACKWARD, backend, backward)


def _check(state, weight, bias, filter, alpha, beta, inputs, steps, activation, tolerance, window) -> None:
    """Whatever calls the op, shapes fit; the widths of kernels for the sequential op do not matter here."""
    if state.dim() != 2 or filter.dim() == 3:
        raise ValueError(f"{NAME}: a state (M, N) and a shared filter; call lcw_ops.functional.orthogonal_filter")
    if not (0 <= tolerance < math.inf and window >= 0):
        raise ValueError(
            f"{NAME}: tolerance is {tolerance}, window {window}; call lcw_ops.functional.orthogonal_filter"
        )
    orthogonal_filter.check_arguments("reference", state, weight, bias, filter, alpha, beta, inputs, steps, activation)


def _contiguous_layers(weight, bias, alpha, beta, inputs, activation) -> solver.Layers:
    """As kernels read them; the weight goes into matmuls, which take any strides."""
    bias, alpha, beta, inputs = (
        tensor if tensor is None else tensor.contiguous() for tensor in (bias, alpha, beta, inputs)
    )
    return solver.Layers(weight, bias, alpha, beta, inputs, activation)


def _make_scan(backend: str, filter: Tensor):
    return solver.make_scan(get_kernels(backend), get_kernels("reference"), filter)


def _make_forward(backend: str, filter: Tensor, tolerance: float, window: int, steps: int) -> solver.Forward:
    return solver.Forward(_make_scan(backend, filter), tolerance, window, steps, sequential_forward(backend, filter))


def _sequential_kernel(backend: str, like: Tensor) -> str:
    """Of the recurrence, beside kernels of sweeps on ``backend``; plain torch where that takes no such width."""
    if backend == "reference":
        return "reference"
    try:
        return orthogonal_filter.choose_kernel(like.device, like.shape[-1], like.itemsize)
    except backends.BackendError:
        return "reference"


def sequential_forward(backend: str, filter: Tensor) -> solver.SequentialForward:
    def forward(h0: Tensor, layers: solver.Layers, steps: int) -> Tensor:
        shared = (layers.weight, layers.bias, filter, layers.alpha, layers.beta)
        kernel = _sequential_kernel(backend, h0)
        if kernel == "reference":
            inputs = _count_by_inputs(h0, layers, steps)
            return solve_sequentially(h0, *shared, inputs, layers.activation, return_states=True)
        overload = library.get_overload(orthogonal_filter.NAME, kernel)
        return overload(h0.contiguous(), *shared, layers.inputs, steps, layers.activation, 0, True)[0]

    return forward


def _count_by_inputs(h0: Tensor, layers: solver.Layers, steps: int) -> Tensor:
    """Of one layer, the reference could not tell one scale per layer from a shared one."""
    return h0.new_zeros((steps, *h0.shape)) if layers.inputs is None else layers.inputs


def sequential_backward(backend: str, filter: Tensor) -> solver.SequentialBackward:
    def backward(gradient, h0, layers, outside, gradients, steps) -> Tensor:
        if layers.weight.dim() == 2:
            layers = layers.to_dtype(h0.dtype)
        grad_output = gradient if outside is None else torch.cat((outside, gradient.unsqueeze(0)))
        shared = (layers.weight, layers.bias, filter, layers.alpha, layers.beta)
        kernel = _sequential_kernel(backend, h0)
        if kernel == "reference":
            grad_h0, *found, _ = orthogonal_filter_backward(
                grad_output,
                h0,
                *shared,
                _count_by_inputs(h0, layers, steps),
                layers.activation,
                return_states=outside is not None,
            )
        else:
            arguments = (*shared, layers.inputs, steps, layers.activation, orthogonal_filter.DEFAULT_SEGMENT)
            _, checkpoints = library.get_overload(orthogonal_filter.NAME, kernel)(h0.contiguous(), *arguments, False)
            needs_scales = gradients.alpha is not None
            needs = (gradients.weight is not None, gradients.bias is not None, needs_scales)
            grad_h0, *found, _ = library.get_overload(orthogonal_filter.BACKWARD, kernel)(
                grad_output.contiguous(), checkpoints, *arguments, *needs, gradients.inputs is not None, False
            )
        shares = (layers.weight.dim() == 2, layers.bias is not None and layers.bias.dim() == 1, True, True, False)
        for into, gradient, is_sum in zip(gradients, found, shares, strict=True):
            if into is not None:
                (into.add_ if is_sum else into.copy_)(gradient)
        return grad_h0

    return backward


for _backend in ("cpp", "triton", "reference"):
    _implement_solver(_backend)


class ParallelOrthogonalFilter(Function):
    """(h0, weight, bias, filter, alpha, beta, inputs, options) -> (output, checkpoints)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        h0,
        weight,
        bias,
        filter,
        alpha,
        beta,
        inputs,
        steps,
        activation,
        tolerance,
        window,
        return_states,
        keeps,
        backend,
    ):
        tensors = (h0, weight, bias, filter, alpha, beta, inputs)
        forward = library.get_overload(NAME, backend)
        return forward(*tensors, steps, activation, tolerance, window, return_states, keeps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, steps, ctx.activation, tolerance, window, ctx.return_states, keeps, backend = inputs
        states, checkpoints = output
        ctx.mark_non_differentiable(checkpoints)
        ctx.options = (steps, ctx.activation, tolerance, window, ctx.return_states, keeps, backend)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(states if ctx.return_states and keeps and not window else checkpoints, *tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, grad_output, _):
        if grad_output is None:
            return (None,) * 14
        checkpoints, *tensors = ctx.saved_tensors
        _, weight, bias, _, alpha, beta, inputs = ctx.needs_input_grad[:7]
        needs = (weight, bias, alpha or beta, inputs)
        functions = _ParallelBackward, _ParallelBackwardForwardMode
        gradients = library.apply(*functions, grad_output, checkpoints, *tensors, *ctx.options, *needs)
        grad_h0, grad_weight, grad_bias, grad_alpha, grad_beta, grad_inputs = gradients
        return (
            grad_h0,
            grad_weight if weight else None,
            grad_bias if bias else None,
            None,
            grad_alpha if alpha else None,
            grad_beta if beta else None,
            grad_inputs if inputs else None,
            *(None,) * 7,
        )


class ParallelOrthogonalFilterForwardMode(ParallelOrthogonalFilter):
    """The same with forward-mode derivatives."""

    jvp = staticmethod(orthogonal_filter.OrthogonalFilterForwardMode.jvp)


class _ParallelBackward(orthogonal_filter.OrthogonalFilterBackward):
    """The gradients by sweeps; differentiated again, they are the sequential formulas."""

    @staticmethod
    def forward(
        grad_output,
        checkpoints,
        h0,
        weight,
        bias,
        filter,
        alpha,
        beta,
        inputs,
        steps,
        activation,
        tolerance,
        window,
        return_states,
        keeps,
        backend,
        needs_weight,
        needs_bias,
        needs_scales,
        needs_inputs,
    ):
        needs = (needs_weight, needs_bias, needs_scales, needs_inputs)
        options = (weight, bias, filter, alpha, beta, inputs, steps, activation, tolerance, window)
        # The forward pass did not know that a gradient would be asked for: it was hidden inside torch.func.
        if not keeps:
            _, checkpoints = library.get_overload(NAME, backend)(h0, *options, False, True)
        return library.get_overload(BACKWARD, backend)(grad_output, checkpoints, *options, *needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        orthogonal_filter.OrthogonalFilterBackward.keep(ctx, inputs, activation=10, return_states=13, needs=16)


class _ParallelBackwardForwardMode(_ParallelBackward):
    """The same with forward-mode derivatives."""

    jvp = staticmethod(orthogonal_filter.OrthogonalFilterBackwardForwardMode.jvp)


def choose_solver(h0, weight, bias, filter, alpha, beta, inputs) -> str:
    """ "parallel" where that was measured to be faster, else "sequential"; checked arguments of the public function."""
    if filter.dim() == 3 or h0.is_meta:
        return "sequential"
    steps = count_steps(weight, bias, filter, alpha, beta, inputs)
    permutes, shares_weight = reference.is_permutation(filter), weight.dim() == 2
    call = Call(device_key(h0.device), permutes, shares_weight, steps, *h0.shape)
    largest_c = largest_c_faster(call)
    if largest_c is None:
        return "sequential"
    # A tensor is only looked at where it counts: on a GPU the host waits for its value.
    if isinstance(beta, Tensor):
        # Values of traced tensors are not there to look at.
        if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(beta):
            return "sequential"
        beta = beta.detach().abs().max().item() if beta.numel() else 0.0
    return "parallel" if beta is None or 0 <= beta * steps <= largest_c else "sequential"
