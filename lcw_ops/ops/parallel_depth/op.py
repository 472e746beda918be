"""The recurrence solved in parallel over depth, as registered ops with their autograd functions.

    h_l = alpha_l O h_{l-1} + beta_l act(W_l h_{l-1} + b_l + u_l),   l = 1..L

h_l (M, N) is the state of M samples and N units after layer l, O the filter, u_l an input. Each sweep covers all layers
at once; see solver.py in this folder. lcw_ops/reference/parallel_depth.py has the functions of a sweep. All sweeps run
inside one op, and the host decides when to stop.
"""

import importlib
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from lcw_ops import _torch
from lcw_ops.ops import backends, library
from lcw_ops.ops.orthogonal_filter import op as orthogonal_filter
from lcw_ops.ops.orthogonal_filter.op import COUNT, Needs, new_gradients
from lcw_ops.ops.parallel_depth import solver
from lcw_ops.ops.parallel_depth.crossover import Call, device_key, largest_c_faster
from lcw_ops.ops.parallel_depth.scan import make_scan
from lcw_ops.reference import parallel_depth as reference
from lcw_ops.reference.orthogonal_filter import Recurrence, count_steps, orthogonal_filter_backward
from lcw_ops.reference.orthogonal_filter import orthogonal_filter as solve_sequentially

SWEEP, ADJOINT, ACTIVATE = "parallel_depth_sweep_", "parallel_depth_adjoint_", "parallel_depth_activate_"
NAME, BACKWARD = "orthogonal_filter_parallel", "orthogonal_filter_parallel_backward"


class Kernels(NamedTuple):
    """The three functions of a sweep, with the signatures of those in lcw_ops.reference.parallel_depth."""

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
    """Register kernels/parallel_depth.py. Import it at the first call, so that lcw_ops does not need Triton."""

    def implement(name, function):
        def launch(*arguments):
            return getattr(importlib.import_module("lcw_ops.kernels.parallel_depth"), function)(*arguments)

        library.implement(name, "triton", launch)

    for name, function in ((SWEEP, "sweep_"), (ADJOINT, "adjoint_sweep_"), (ACTIVATE, "activate_")):
        implement(name, function)


_implement_in_triton()
backends.IMPLEMENTED[SWEEP] = ("cpp", "triton")
# One program holds a whole row: at most 2048 units of float32.
backends.MAX_ROW_BYTES[SWEEP, "triton"] = 8192


# ---- The solver as an op ---------------------------------------------------------------------------------------------
# A window of 0 means the default window. Backward starts from the checkpoints. With window 0 these are all states, or
# none if the output already holds all states. With a window above 0 they are the first state of each window. If no
# gradient will be needed, there are no checkpoints.

_ARGUMENTS = (
    "Tensor weight, Tensor? bias, Tensor filter, Tensor alpha, Tensor beta, Tensor? inputs, "
    "SymInt steps, str activation, float tolerance, SymInt window"
)
# The host reads the change of every sweep, so CUDA graphs can capture none of them.
_BACKENDS = ("cpp", "triton", "reference")


class Options(NamedTuple):
    """The non-tensor arguments of the op, in the op's order, and the overload that runs the op.

    ``keeps`` says whether to keep checkpoints for a backward pass.
    """

    steps: int
    activation: str
    tolerance: float
    window: int
    return_states: bool
    keeps: bool
    backend: str


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


def _backward_fake(
    grad_output, checkpoints, weight, bias, filter, alpha, beta, inputs, steps, activation, tolerance, window, *needs
):
    grad_h0 = grad_output.new_empty(grad_output.shape[-2:])
    return (grad_h0, *new_gradients(weight, bias, alpha, beta, inputs, Needs(*needs)))


library.declare(
    NAME,
    f"(Tensor h0, {_ARGUMENTS}, bool return_states, bool keeps) -> (Tensor output, Tensor checkpoints)",
    backends=_BACKENDS,
    fake=_forward_fake,
    autocast_dtype=torch.float32,
    vmap=orthogonal_filter.forward_vmap,
    uncapturable=_BACKENDS,
)
library.declare(
    BACKWARD,
    f"(Tensor grad_output, Tensor checkpoints, {_ARGUMENTS}, bool needs_weight, bool needs_bias, bool needs_scales, "
    "bool needs_inputs) -> (Tensor grad_h0, Tensor grad_weight, Tensor grad_bias, Tensor grad_alpha, Tensor grad_beta, "
    "Tensor grad_inputs)",
    backends=_BACKENDS,
    fake=_backward_fake,
    autocast_dtype=torch.float32,
    vmap=orthogonal_filter.loop_vmap,
    uncapturable=_BACKENDS,
)

_forward = {backend: library.get_overload(NAME, backend) for backend in _BACKENDS}
_backward = {backend: library.get_overload(BACKWARD, backend) for backend in _BACKENDS}


def _implement_solver(backend: str) -> None:
    def solve(*arguments):
        return _solve(Recurrence(*arguments[:COUNT]), Options(*arguments[COUNT:], backend))

    def solve_backward(grad_output, checkpoints, *arguments):
        *tensors, steps, activation, tolerance, window, needs_weight, needs_bias, needs_scales, needs_inputs = arguments
        # The last state's gradient takes the place of the forward pass's h0.
        recurrence = Recurrence(grad_output[-1] if grad_output.dim() == 3 else grad_output, *tensors)
        options = Options(steps, activation, tolerance, window, False, True, backend)
        needs = Needs(needs_weight, needs_bias, needs_scales, needs_inputs)
        return _solve_backward(grad_output, checkpoints, recurrence, options, needs)

    library.implement(NAME, backend, solve)
    library.implement(BACKWARD, backend, solve_backward)


def _solve(recurrence: Recurrence, options: Options) -> tuple[Tensor, Tensor]:
    """(output, checkpoints)."""
    _check(recurrence, options)
    steps, window, return_states, keeps = options.steps, options.window, options.return_states, options.keeps
    h0 = recurrence.h0.contiguous()
    layers = _contiguous_layers(recurrence, options.activation)
    at_once = window or solver.default_window(recurrence.weight, len(h0), steps)
    forward = _make_forward(recurrence, options, at_once)
    checkpoints = h0.new_empty((_count_checkpoints(steps, window, return_states, keeps), *h0.shape))
    if return_states or (keeps and not window):
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


def _solve_backward(
    grad_output: Tensor, checkpoints: Tensor, recurrence: Recurrence, options: Options, needs: Needs
) -> tuple[Tensor, ...]:
    """The gradients of the differentiable arguments; ``recurrence.h0`` is the last state's gradient."""
    _check(recurrence, options)
    gradient, weight, bias, filter, alpha, beta, inputs = recurrence
    steps, window, backend = options.steps, options.window, options.backend
    expected = (_count_checkpoints(steps, window, False, True), *gradient.shape)
    kind = checkpoints.dtype, checkpoints.device
    if checkpoints.shape != expected or kind != (grad_output.dtype, grad_output.device):
        raise orthogonal_filter.refusal(
            BACKWARD, f"checkpoints of shape {tuple(checkpoints.shape)} instead of {expected}"
        )
    layers = _contiguous_layers(recurrence, options.activation)
    at_once = window or solver.default_window(weight, gradient.shape[0], steps)
    forward = _make_forward(recurrence, options, at_once)
    backward = solver.Backward(
        _make_scan(backend, filter),
        forward.tolerance,
        at_once,
        steps,
        get_kernels(backend),
        filter,
        sequential_backward(backend, filter),
    )
    results = new_gradients(weight, bias, alpha, beta, inputs, needs)
    shares = (weight.dim() == 2, bias is not None and bias.dim() == 1, True, True, False)
    for result, is_sum in zip(results, shares, strict=True):
        if is_sum:
            result.zero_()
    shares_weight = shares[0]
    # A shared weight's gradient is a sum over windows, kept in float64 until the end.
    summed = (results[0].double() if shares_weight else results[0], *results[1:])
    wanted = (needs.weight, needs.bias, needs.scales, needs.scales, needs.inputs)
    into = solver.Gradients(*(result if want else None for result, want in zip(summed, wanted, strict=True)))
    outside = grad_output[:-1].contiguous() if grad_output.dim() == 3 else None
    # If all states are known, all layers are one stretch, which the solver cuts into windows.
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
    if shares_weight and needs.weight:
        results = (summed[0].to(weight.dtype), *results[1:])
    return (gradient.clone(), *results)


def _check(recurrence: Recurrence, options: Options) -> None:
    """Guard against calls that do not come from the public function.

    The width limits of the sequential op's kernels do not apply here.
    """
    state, filter, tolerance, window = recurrence.h0, recurrence.filter, options.tolerance, options.window
    if state.dim() != 2 or filter.dim() == 3:
        raise orthogonal_filter.refusal(NAME, "a state that is not (samples, units), or one filter per layer")
    if not (0 <= tolerance < math.inf and window >= 0):
        raise orthogonal_filter.refusal(NAME, f"a tolerance of {tolerance} or a window of {window} out of range")
    orthogonal_filter.check_arguments("reference", *recurrence, options.steps, options.activation)


def _contiguous_layers(recurrence: Recurrence, activation: str) -> solver.Layers:
    """The layers in the layout that kernels read. The weight keeps its strides, because matmuls take any."""
    _, weight, bias, _, alpha, beta, inputs = recurrence
    bias, alpha, beta, inputs = (
        tensor if tensor is None else tensor.contiguous() for tensor in (bias, alpha, beta, inputs)
    )
    return solver.Layers(weight, bias, alpha, beta, inputs, activation)


def _make_scan(backend: str, filter: Tensor):
    fused = importlib.import_module("lcw_ops.kernels.parallel_depth_fused") if backend == "triton" else None
    return make_scan(get_kernels(backend), get_kernels("reference"), filter, fused)


def _make_forward(recurrence: Recurrence, options: Options, window: int) -> solver.Forward:
    filter, backend = recurrence.filter, options.backend
    tolerance = options.tolerance or solver.default_tolerance(recurrence.h0.dtype, options.steps)
    sequential = sequential_forward(backend, filter)
    return solver.Forward(_make_scan(backend, filter), tolerance, window, options.steps, sequential)


def _sequential_kernel(backend: str, like: Tensor) -> str:
    """The layer-by-layer kernel that goes with sweeps on ``backend``; "reference" if no kernel takes this width."""
    # These two take any width. A backward pass uses the backend of its forward pass, even inside another request.
    if backend in ("cpp", "reference"):
        return backend
    try:
        return orthogonal_filter.choose_kernel(like.device, like.shape[-1], like.itemsize)
    except backends.BackendError:
        return "reference"


def sequential_forward(backend: str, filter: Tensor) -> solver.SequentialForward:
    def run(h0: Tensor, layers: solver.Layers, steps: int) -> Tensor:
        shared = (layers.weight, layers.bias, filter, layers.alpha, layers.beta)
        kernel = _sequential_kernel(backend, h0)
        if kernel == "reference":
            inputs = _count_by_inputs(h0, layers, steps)
            return solve_sequentially(h0, *shared, inputs, layers.activation, return_states=True)
        overload = library.get_overload(orthogonal_filter.NAME, kernel)
        return overload(h0, *shared, layers.inputs, steps, layers.activation, 0, True)[0]

    return run


def _count_by_inputs(h0: Tensor, layers: solver.Layers, steps: int) -> Tensor:
    """The inputs, or zeros, which tell the reference the number of steps. It does not count scales of length 1."""
    return h0.new_zeros((steps, *h0.shape)) if layers.inputs is None else layers.inputs


def sequential_backward(backend: str, filter: Tensor) -> solver.SequentialBackward:
    def run(gradient, h0, layers, outside, gradients, steps) -> Tensor:
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
            _, checkpoints = library.get_overload(orthogonal_filter.NAME, kernel)(h0, *arguments, False)
            needs = Needs(
                weight=gradients.weight is not None,
                bias=gradients.bias is not None,
                scales=gradients.alpha is not None,
                inputs=gradients.inputs is not None,
            )
            grad_h0, *found, _ = library.get_overload(orthogonal_filter.BACKWARD, kernel)(
                grad_output, checkpoints, *arguments, *needs, False
            )
        shares = (layers.weight.dim() == 2, layers.bias is not None and layers.bias.dim() == 1, True, True, False)
        for into, added, is_sum in zip(gradients, found, shares, strict=True):
            if into is not None:
                (into.add_ if is_sum else into.copy_)(added)
        return grad_h0

    return run


for _backend in _BACKENDS:
    _implement_solver(_backend)


# ---- Derivatives -----------------------------------------------------------------------------------------------------


class ParallelOrthogonalFilter(Function):
    """(*Recurrence, *Options) -> (output, checkpoints)."""

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
        return _forward[backend](*tensors, steps, activation, tolerance, window, return_states, keeps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, options = inputs[:COUNT], Options(*inputs[COUNT:])
        states, checkpoints = output
        ctx.options = options
        ctx.mark_non_differentiable(checkpoints)
        ctx.set_materialize_grads(False)
        states_known = options.return_states and options.keeps and not options.window
        saved = (states if states_known else checkpoints, *tensors)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx, grad_output, _):
        checkpoints, *tensors = ctx.saved_tensors
        functions = _ParallelBackward, _ParallelBackwardForwardMode
        return orthogonal_filter.propagate(ctx, *functions, grad_output, checkpoints, tensors)


class _ParallelBackward(orthogonal_filter.OrthogonalFilterBackward):
    """Computes the gradients by sweeps, and second derivatives by the sequential formulas."""

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
        arguments = (weight, bias, filter, alpha, beta, inputs, steps, activation, tolerance, window)
        # Under torch.func the forward pass could not know that a gradient would be needed, and kept no states.
        if not keeps:
            _, checkpoints = _forward[backend](h0, *arguments, False, True)
        return _backward[backend](grad_output, checkpoints, *arguments, *needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        orthogonal_filter.keep_for_second_order(ctx, inputs, Options)


ParallelOrthogonalFilterForwardMode = library.forward_mode_twin(
    ParallelOrthogonalFilter, orthogonal_filter.output_tangent
)
_ParallelBackwardForwardMode = library.forward_mode_twin(_ParallelBackward, orthogonal_filter.gradients_tangent)


def choose_solver(h0, weight, bias, filter, alpha, beta, inputs) -> str:
    """ "parallel" where that was measured to be faster, else "sequential". The arguments have been checked."""
    if filter.dim() == 3 or h0.is_meta:
        return "sequential"
    steps = count_steps(weight, bias, filter, alpha, beta, inputs)
    permutes, shares_weight = reference.is_permutation(filter), weight.dim() == 2
    call = Call(device_key(h0.device), permutes, shares_weight, steps, *h0.shape)
    largest_c = largest_c_faster(call)
    if largest_c is None:
        return "sequential"
    # Read beta only here, where the choice depends on it: reading it from a GPU makes the host wait.
    if isinstance(beta, Tensor):
        # A traced tensor has no values to read.
        if torch.compiler.is_compiling() or _torch.is_functorch_wrapped(beta):
            return "sequential"
        beta = beta.detach().abs().max().item() if beta.numel() else 0.0
    return "parallel" if beta is None or 0 <= beta * steps <= largest_c else "sequential"
