"""The orthogonal-filter recurrence as a registered op, with its autograd functions.

    h_l = alpha_l O_l h_{l-1} + beta_l act(W_l h_{l-1} + b_l + u_l),   l = 1..L

h_l (M, N) is the state of M samples and N units after step l, O_l the filter, u_l an input. Forward returns the result
and the states at segment boundaries; backward recomputes the states inside each segment. So the memory is
L / segment + segment states, and backward computes every state a second time. Weight, bias, filter, alpha and beta may
each be shared by all steps or have one entry per step.

The arguments travel as a :class:`Recurrence` (tensors) and :class:`Options` (everything else), and are
unpacked only where an op or a Function is called.
"""

import importlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from lcw_ops import _torch
from lcw_ops.ops import backends, library
from lcw_ops.ops.orthogonal_filter.crossover import fastest_kernel
from lcw_ops.reference.orthogonal_filter import (
    ACTIVATIONS,
    DIFFERENTIABLE,
    Recurrence,
    count_steps,
    orthogonal_filter_backward,
    orthogonal_filter_jvp,
)

NAME = "orthogonal_filter"
BACKWARD = "orthogonal_filter_backward"

# The form of the cuda backend for nets too wide for its kernels. It is a separate overload in plain torch, so it needs
# no extension. A request for cuda may select it.
GRAPH = "graph"

BACKENDS = ("cpp", "cuda", "triton", GRAPH)

# GRAPH keeps buffers from call to call. Inside torch.compile's CUDA graphs they would come from a pool whose memory is
# given to other tensors after the call.
UNCAPTURABLE = (GRAPH,)

# Backward keeps L / segment checkpoints and recomputes one segment, so a segment of sqrt(L) takes the least memory. 128
# takes the least for 16,000 layers, and at most 1.2 times the least for 10,000 to 50,000. A constant keeps L symbolic
# under torch.compile.
DEFAULT_SEGMENT = 128

# Given as the segment, this makes forward keep act(W h + b + u) of every step in place of checkpoints.
KEEP_ACTIVATED = -1

_ARGUMENTS = (
    "Tensor weight, Tensor? bias, Tensor filter, Tensor alpha, Tensor beta, Tensor? inputs, "
    "SymInt steps, str activation, SymInt segment"
)


# The number of leading arguments that are the fields of a Recurrence.
COUNT = len(Recurrence._fields)


class Options(NamedTuple):
    """The non-tensor arguments of the op, in the op's order, and the overload that runs the op."""

    steps: int
    activation: str
    segment: int
    return_states: bool
    backend: str


class Needs(NamedTuple):
    """The gradients to compute besides h0's. ``scales`` means alpha and beta."""

    weight: bool
    bias: bool
    scales: bool
    inputs: bool


# ---- The ops ---------------------------------------------------------------------------------------------------------


def _forward_fake(h0, weight, bias, filter, alpha, beta, inputs, steps, activation, segment, return_states):
    checkpoints = steps if segment == KEEP_ACTIVATED else (steps + segment - 1) // segment if segment else 0
    output = h0.new_empty((steps + 1, *h0.shape) if return_states else h0.shape)
    return output, h0.new_empty((checkpoints, *h0.shape))


def _backward_fake(
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
    segment,
    needs_weight,
    needs_bias,
    needs_scales,
    needs_inputs,
    needs_states,
    activated=None,
):
    needs = Needs(needs_weight, needs_bias, needs_scales, needs_inputs)
    state_shape = grad_output.shape[-2:]
    return (
        grad_output.new_empty(state_shape),
        *new_gradients(weight, bias, alpha, beta, inputs, needs),
        grad_output.new_empty((steps + 1, *state_shape) if needs_states else (0,)),
    )


def new_gradients(weight, bias, alpha, beta, inputs, needs: Needs) -> tuple[Tensor, ...]:
    """A tensor like its argument for each gradient that is needed, and an empty one for each that is not."""
    needed = (needs.weight, needs.bias, needs.scales, needs.scales, needs.inputs)
    # With a float32 state, a 16-bit weight's gradient is in the weight's dtype.
    return tuple(
        (weight if argument is None else argument).new_empty(argument.shape if need else (0,))
        for argument, need in zip((weight, bias, alpha, beta, inputs), needed, strict=True)
    )


def slices(arguments, in_dims, batch):
    """One list of arguments per element of the batch dimension."""
    for index in range(batch):
        yield [
            argument.select(dim, index) if isinstance(argument, Tensor) and dim is not None else argument
            for argument, dim in zip(arguments, in_dims, strict=True)
        ]


def forward_vmap(overload, info, in_dims, *arguments):
    """Rows are independent: a batch of states or inputs becomes more rows. A batch of weights becomes a loop."""
    recurrence, options, dims = Recurrence(*arguments[:COUNT]), arguments[COUNT:], Recurrence(*in_dims[:COUNT])
    if all(dim is None for dim in dims._replace(h0=None, inputs=None)):
        batch, h0, inputs = info.batch_size, recurrence.h0, recurrence.inputs
        # (B, M, N) -> (B M, N) and (T, B, M, N) -> (T, B M, N)
        h0 = h0.movedim(dims.h0, 0) if dims.h0 is not None else h0.expand(batch, *h0.shape)
        if inputs is not None:
            inputs = inputs.movedim(dims.inputs, 1) if dims.inputs is not None else inputs.unsqueeze(1)
            inputs = inputs.expand(-1, batch, -1, -1).flatten(1, 2)
        results = overload(*recurrence._replace(h0=h0.flatten(0, 1), inputs=inputs), *options)
        rows = h0.shape[:2]
        return tuple(result.unflatten(-2, rows) for result in results), tuple(result.dim() - 2 for result in results)
    return loop_vmap(overload, info, in_dims, *arguments)


def loop_vmap(overload, info, in_dims, *arguments):
    """One call per element of the batch. In a backward pass each element has its own weight gradients."""
    results = [overload(*slice) for slice in slices(arguments, in_dims, info.batch_size)]
    columns = tuple(torch.stack(column) for column in zip(*results, strict=True))
    return columns, (0,) * len(columns)


library.declare(
    NAME,
    f"(Tensor h0, {_ARGUMENTS}, bool return_states) -> (Tensor output, Tensor checkpoints)",
    backends=BACKENDS,
    fake=_forward_fake,
    autocast_dtype=torch.float32,
    vmap=forward_vmap,
    uncapturable=UNCAPTURABLE,
)
library.declare(
    BACKWARD,
    f"(Tensor grad_output, Tensor checkpoints, {_ARGUMENTS}, bool needs_weight, bool needs_bias, bool needs_scales, "
    "bool needs_inputs, bool needs_states, Tensor? activated=None) -> (Tensor grad_h0, Tensor grad_weight, "
    "Tensor grad_bias, Tensor grad_alpha, Tensor grad_beta, Tensor grad_inputs, Tensor grad_states)",
    backends=BACKENDS,
    fake=_backward_fake,
    autocast_dtype=torch.float32,
    vmap=loop_vmap,
    uncapturable=UNCAPTURABLE,
)

_forward = {backend: library.get_overload(NAME, backend) for backend in BACKENDS}
_backward = {backend: library.get_overload(BACKWARD, backend) for backend in BACKENDS}


def choose_kernel(device: torch.device, width: int, itemsize: int) -> str:
    """The overload that runs rows of ``width`` numbers on ``device``: a backend's name, or GRAPH.

    On GPUs the crossover table decides. Raises BackendError if an explicit request cannot be met.
    """
    return backends.choose(NAME, device, width, itemsize, first=fastest_on(device, width, itemsize))


def fastest_on(device: torch.device, width: int, itemsize: int) -> str | None:
    """The kernel that was measured or predicted as the fastest on a GPU. None on other devices."""
    capability = backends.compute_capability(device)
    return None if capability is None else fastest_kernel(width, capability, itemsize)


def _implement_in_python(backend: str, module: str) -> None:
    """Register a module's functions for both ops. Import it at the first call, so that lcw_ops does not need Triton."""

    def run_forward(*arguments):
        *tensors, steps, activation, segment, _ = arguments
        recurrence = Recurrence(*tensors)
        if recurrence.h0.dim() != 2 or segment < 0:
            raise refusal(NAME, f"a state of shape {tuple(recurrence.h0.shape)} and a segment of {segment}")
        check_arguments(backend, *recurrence, steps, activation)
        return importlib.import_module(module).orthogonal_filter(*arguments)

    def run_backward(grad_output, checkpoints, *arguments, activated=None):
        *tensors, steps, activation, segment, _, needs_bias, _, needs_inputs, _ = arguments
        recurrence = Recurrence(grad_output, *tensors)
        has_states = grad_output.dim() == 3 and len(grad_output) == steps + 1
        if segment < 1 or not (has_states or grad_output.dim() == 2):
            raise refusal(BACKWARD, f"a grad_output of shape {tuple(grad_output.shape)} and a segment of {segment}")
        if (
            checkpoints.shape != (-(-steps // min(segment, max(steps, 1))), *grad_output.shape[-2:])
            or (checkpoints.dtype, checkpoints.device) != (grad_output.dtype, grad_output.device)
            or (needs_bias and recurrence.bias is None)
            or (needs_inputs and recurrence.inputs is None)
            or activated is not None
        ):
            raise refusal(BACKWARD, f"checkpoints of shape {tuple(checkpoints.shape)} that do not fit")
        check_arguments(backend, *recurrence, steps, activation)
        return importlib.import_module(module).orthogonal_filter_backward(grad_output, checkpoints, *arguments)

    library.implement(NAME, backend, run_forward)
    library.implement(BACKWARD, backend, run_backward)


def refusal(name: str, came: str) -> ValueError:
    return ValueError(
        f"{name}: the call has {came}; expected the arguments that lcw_ops.functional.orthogonal_filter passes. "
        "Call that function."
    )


def check_arguments(backend, state, weight, bias, filter, alpha, beta, inputs, steps, activation) -> None:
    """Guard kernels that do not check their arguments and could otherwise read out of bounds."""
    rows, width = state.shape[-2:]
    reason = backends.width_reason(NAME, backend, width, state.itemsize)
    if reason is not None:
        raise backends.BackendError(f"{NAME}: {reason}")

    def fits(tensor, *shapes):
        return tensor is None or tuple(tensor.shape) in shapes

    square, scales = (width, width), ((1,), (steps,))
    permutes = filter.dtype == torch.int64
    if not (
        steps >= 0
        and fits(weight, square, (steps, *square))
        and fits(bias, (width,), (steps, width))
        and fits(filter, *([(width,)] if permutes else [square, (steps, *square)]))
        and fits(alpha, *scales)
        and fits(beta, *scales)
        and fits(inputs, (steps, rows, width))
    ):
        raise refusal(NAME, "shapes that do not fit each other")
    dtype = state.dtype
    weight_dtypes = (torch.float32, torch.bfloat16, torch.float16) if dtype == torch.float32 else (dtype,)
    like_state = [tensor for tensor in (bias, alpha, beta, inputs, None if permutes else filter) if tensor is not None]
    if (
        dtype not in (torch.float32, torch.float64)
        or weight.dtype not in weight_dtypes
        or any(tensor.dtype != dtype for tensor in like_state)
        or any(tensor.device != state.device for tensor in (weight, filter, *like_state))
    ):
        raise refusal(NAME, "dtypes or devices that do not fit each other")
    if activation not in ACTIVATIONS:
        raise refusal(NAME, f"the activation {activation!r}")


_implement_in_python("triton", "lcw_ops.kernels.orthogonal_filter")
_implement_in_python(GRAPH, "lcw_ops.ops.orthogonal_filter.graph")
backends.IMPLEMENTED[NAME] = BACKENDS
# One program holds matrices of up to 128 x 128 in float32.
backends.MAX_ROW_BYTES[NAME, "triton"] = 512


# ---- Derivatives -----------------------------------------------------------------------------------------------------


def keeps_all_states(weight: Tensor, backend: str) -> bool:
    """Whether backward reads the states that forward has returned instead of checkpoints, and so recomputes nothing.

    This concerns only calls that return all states. The C++ kernel reads the states if all steps share one weight. If
    a gradient will be needed, and none of alpha and beta, forward keeps the activated pre-activations as well.
    """
    return backend == "cpp" and weight.dim() == 2


# Each ``forward`` names its arguments, because torch.compile binds varargs wrongly.


class OrthogonalFilter(Function):
    """(*Recurrence, *Options) -> (output, checkpoints)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h0, weight, bias, filter, alpha, beta, inputs, steps, activation, segment, return_states, backend):
        if segment and return_states and keeps_all_states(weight, backend):
            # The gradients of alpha and beta need O h as well, and backward computes both again.
            segment = 0 if alpha.requires_grad or beta.requires_grad else KEEP_ACTIVATED
        tensors = (h0, weight, bias, filter, alpha, beta, inputs)
        return _forward[backend](*tensors, steps, activation, segment, return_states)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, options = inputs[:COUNT], Options(*inputs[COUNT:])
        states, checkpoints = output
        ctx.options = options
        ctx.mark_non_differentiable(checkpoints)
        ctx.states_known = options.return_states and keeps_all_states(tensors[1], options.backend)
        ctx.set_materialize_grads(False)
        known = (states, checkpoints if len(checkpoints) else None) if ctx.states_known else (checkpoints, None)
        # Save the same tensors for both modes: vmap remembers the batch dimensions of one list only.
        ctx.save_for_backward(*known, *tensors)
        ctx.save_for_forward(*known, *tensors)

    @staticmethod
    def backward(ctx, grad_output, _):
        checkpoints, activated, *tensors = ctx.saved_tensors
        if ctx.states_known:
            checkpoints = checkpoints[:-1]
        functions = OrthogonalFilterBackward, OrthogonalFilterBackwardForwardMode
        return propagate(ctx, *functions, grad_output, checkpoints, tensors, activated)


def propagate(
    ctx, function: type[Function], twin: type[Function], grad_output, checkpoints, tensors, *others: Tensor | None
) -> tuple:
    """The gradients for the arguments of a forward Function, computed by the backward Function ``function``.

    ``others`` are the last arguments of ``function``.
    """
    if grad_output is None:
        return (None,) * len((*tensors, *ctx.options))
    _, weight, bias, _, alpha, beta, inputs = ctx.needs_input_grad[:COUNT]
    needs = Needs(weight, bias, alpha or beta, inputs)
    arguments = (grad_output, checkpoints, *tensors, *ctx.options, *needs, *others)
    if torch.is_grad_enabled() or _torch.is_transformed():
        gradients = library.apply(function, twin, *arguments)
    else:
        gradients = function.forward(*arguments)
    grad_h0, grad_weight, grad_bias, grad_alpha, grad_beta, grad_inputs = gradients
    return (
        grad_h0,
        grad_weight if weight else None,
        grad_bias if bias else None,
        None,
        grad_alpha if alpha else None,
        grad_beta if beta else None,
        grad_inputs if inputs else None,
        *(None,) * len(ctx.options),
    )


def output_tangent(ctx, *tangents):
    """The ``jvp`` of a forward Function."""
    options, primals = ctx.options, ctx.saved_tensors[-COUNT:]
    return orthogonal_filter_jvp(primals, tangents[:COUNT], options.activation, options.return_states), None


class OrthogonalFilterBackward(Function):
    """(grad_output, checkpoints, *Recurrence, *Options, *Needs, activated) -> gradients of DIFFERENTIABLE arguments.

    ``activated`` are the activated pre-activations (L, M, N), or None. The function can be differentiated again, by the
    reference's formulas.
    """

    generate_vmap_rule = True

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
        segment,
        return_states,
        backend,
        needs_weight,
        needs_bias,
        needs_scales,
        needs_inputs,
        activated,
    ):
        needs = (needs_weight, needs_bias, needs_scales, needs_inputs)
        shared = (weight, bias, filter, alpha, beta, inputs, steps, activation)
        # Forward has kept no checkpoints: under torch.func it could not know that a gradient would be needed.
        if not segment and not (return_states and keeps_all_states(weight, backend)):
            _, checkpoints = _forward[backend](h0, *shared, DEFAULT_SEGMENT, False)
        arguments = (*shared, segment or DEFAULT_SEGMENT, *needs, False, activated)
        return _backward[backend](grad_output, checkpoints, *arguments)[:6]

    @staticmethod
    def setup_context(ctx, inputs, output):
        keep_for_second_order(ctx, inputs, Options)

    @staticmethod
    def backward(ctx, *grad_gradients):
        gradients, primals = _differentiable_gradients(ctx)
        results, pullback = torch.func.vjp(gradients, *primals.values())
        incoming = dict(zip(DIFFERENTIABLE, grad_gradients, strict=True))
        cotangents = {
            name: torch.zeros_like(result) if incoming[name] is None else incoming[name]
            for name, result in results.items()
        }
        second = dict(zip(primals, pullback(cotangents), strict=True))
        others = (None,) * ctx.other_count
        return second["grad_output"], None, *(second.get(name) for name in Recurrence._fields), *others


def keep_for_second_order(ctx, inputs: tuple, options: type) -> None:
    """The ``setup_context`` of a backward Function. ``options`` is the class of its options."""
    grad_output, _, *arguments = inputs
    tensors, end = arguments[:COUNT], COUNT + len(options._fields)
    ctx.options, ctx.needs = options(*arguments[COUNT:end]), Needs(*arguments[end : end + len(Needs._fields)])
    ctx.other_count = len(arguments) - COUNT
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_output, *tensors)
    ctx.save_for_forward(grad_output, *tensors)


def gradients_tangent(ctx, grad_output_tangent, _, *tangents):
    """The ``jvp`` of a backward Function."""
    gradients, primals = _differentiable_gradients(ctx)
    by_name = {"grad_output": grad_output_tangent, **dict(zip(Recurrence._fields, tangents[:COUNT], strict=True))}
    direction = tuple(
        torch.zeros_like(primal) if by_name[name] is None else by_name[name] for name, primal in primals.items()
    )
    # The Jacobian J times v is the transpose of w -> J^T w, taken at v. Forward mode would have to nest in the user's.
    results, pullback = torch.func.vjp(gradients, *primals.values())
    zeros = {name: torch.zeros_like(result) for name, result in results.items()}
    _, transposed = torch.func.vjp(pullback, zeros)
    (moved,) = transposed(direction)
    needs = ctx.needs
    needed = (True, needs.weight, needs.bias, needs.scales, needs.scales, needs.inputs)
    # Like the op, return an empty tensor for a gradient that is not needed. None fails under vmap.
    nothing = next(iter(primals.values())).new_empty(0)
    return tuple(moved[name] if need else nothing for name, need in zip(DIFFERENTIABLE, needed, strict=True))


def _differentiable_gradients(ctx):
    """(function, primals): the gradients by name, in plain torch, as a function of the arguments that are not None."""
    grad_output, *tensors = ctx.saved_tensors
    recurrence, options = Recurrence(*tensors), ctx.options
    arguments = {"grad_output": grad_output, **{name: getattr(recurrence, name) for name in DIFFERENTIABLE}}
    primals = {name: argument for name, argument in arguments.items() if argument is not None}

    def gradients(*values):
        grad_output, *moved = values
        arguments = recurrence._replace(**dict(zip(list(primals)[1:], moved, strict=True)))
        *results, _ = orthogonal_filter_backward(grad_output, *arguments, options.activation, options.return_states)
        # The formulas compute a 16-bit weight's gradient in the state's dtype. It is rounded once.
        return {
            name: result.to(primals[name].dtype)
            for name, result in zip(DIFFERENTIABLE, results, strict=True)
            if result is not None
        }

    return gradients, primals


OrthogonalFilterForwardMode = library.forward_mode_twin(OrthogonalFilter, output_tangent)
OrthogonalFilterBackwardForwardMode = library.forward_mode_twin(OrthogonalFilterBackward, gradients_tangent)


@torch.no_grad()
def state_gradients(grad_output, h0, weight, bias, filter, alpha, beta, inputs, activation, segment, backend):
    """The gradients of the loss with respect to all states, (L+1, M, N), which a profiler plots, and the others.

    ``grad_output`` is (M, N), or (L+1, M, N) if every state receives a gradient from outside. alpha and beta are
    tensors, as :func:`lcw_ops.reference.orthogonal_filter.scale_tensors` makes them.

    Returns:
        (grad_h0, grad_weight, grad_bias, grad_alpha, grad_beta, grad_inputs, grad_states).
    """
    shared = (weight, bias, filter, alpha, beta, inputs)
    if backend == "reference":
        return orthogonal_filter_backward(grad_output, h0, *shared, activation, return_states=grad_output.dim() == 3)
    steps = count_steps(*shared)
    _, checkpoints = _forward[backend](h0, *shared, steps, activation, segment, False)
    needs = Needs(weight=True, bias=bias is not None, scales=True, inputs=inputs is not None)
    return _backward[backend](grad_output, checkpoints, *shared, steps, activation, segment, *needs, True)
