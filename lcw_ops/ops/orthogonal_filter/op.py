"""The orthogonal-filter recurrence as a registered op with its autograd function.

Forward returns the result and the states at segment boundaries; backward recomputes inside each segment. Weight,
bias, filter, alpha and beta may each be shared over all steps or have one entry per step.
"""

import importlib

import torch
from torch import Tensor
from torch.autograd import Function

from lcw_ops.ops import backends, library
from lcw_ops.ops.orthogonal_filter.crossover import fastest_kernel
from lcw_ops.reference.orthogonal_filter import (
    ACTIVATIONS,
    count_steps,
    orthogonal_filter_backward,
    orthogonal_filter_jvp,
)

NAME = "orthogonal_filter"
BACKWARD = "orthogonal_filter_backward"

# The form of the cuda backend for nets too wide for its kernels: an overload of its own, in plain torch, so that it
# needs no extension. A request for cuda means it too.
GRAPH = "graph"

# States kept: L / segment checkpoints and one segment recomputed, so sqrt(L) is best: 128 for 16,000 layers, and
# within 1.2 of the best for 10,000 to 50,000. A constant keeps L symbolic under torch.compile.
DEFAULT_SEGMENT = 128

_ARGUMENTS = (
    "Tensor weight, Tensor? bias, Tensor filter, Tensor alpha, Tensor beta, Tensor? inputs, "
    "SymInt steps, str activation, SymInt segment"
)


def _forward_fake(h0, weight, bias, filter, alpha, beta, inputs, steps, activation, segment, return_states):
    checkpoints = (steps + segment - 1) // segment if segment else 0
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
):
    def when(needed, like):
        # A weight in 16 bits beside a float32 state has a gradient in its own dtype.
        return (weight if like is None else like).new_empty(like.shape if needed else (0,))

    state_shape = grad_output.shape[-2:]
    return (
        grad_output.new_empty(state_shape),
        when(needs_weight, weight),
        when(needs_bias, bias),
        when(needs_scales, alpha),
        when(needs_scales, beta),
        when(needs_inputs, inputs),
        grad_output.new_empty((steps + 1, *state_shape) if needs_states else (0,)),
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
    h0, inputs = arguments[0], arguments[6]
    if all(dim is None for i, dim in enumerate(in_dims) if i not in (0, 6)):
        batch = info.batch_size
        # (B, M, N) -> (B M, N) and (T, B, M, N) -> (T, B M, N)
        h0 = h0.movedim(in_dims[0], 0) if in_dims[0] is not None else h0.expand(batch, *h0.shape)
        if inputs is not None:
            inputs = inputs.movedim(in_dims[6], 1) if in_dims[6] is not None else inputs.unsqueeze(1)
            inputs = inputs.expand(-1, batch, -1, -1).flatten(1, 2)
        results = overload(h0.flatten(0, 1), *arguments[1:6], inputs, *arguments[7:])
        rows = h0.shape[:2]
        return tuple(result.unflatten(-2, rows) for result in results), tuple(result.dim() - 2 for result in results)
    results = [overload(*slice) for slice in slices(arguments, in_dims, info.batch_size)]
    return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0, 0)


def _backward_vmap(overload, info, in_dims, *arguments):
    """Every element of the batch has weight gradients of its own, so this is a loop."""
    results = [overload(*slice) for slice in slices(arguments, in_dims, info.batch_size)]
    return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * 7


library.declare(
    NAME,
    f"(Tensor h0, {_ARGUMENTS}, bool return_states) -> (Tensor output, Tensor checkpoints)",
    backends=("cpp", "cuda", "triton", GRAPH),
    fake=_forward_fake,
    autocast_dtype=torch.float32,
    vmap=forward_vmap,
)
library.declare(
    BACKWARD,
    f"(Tensor grad_output, Tensor checkpoints, {_ARGUMENTS}, bool needs_weight, bool needs_bias, bool needs_scales, "
    "bool needs_inputs, bool needs_states) -> (Tensor grad_h0, Tensor grad_weight, Tensor grad_bias, "
    "Tensor grad_alpha, Tensor grad_beta, Tensor grad_inputs, Tensor grad_states)",
    backends=("cpp", "cuda", "triton", GRAPH),
    fake=_backward_fake,
    autocast_dtype=torch.float32,
    vmap=_backward_vmap,
)


def choose_kernel(device: torch.device, width: int, itemsize: int) -> str:
    """The overload that runs rows of ``width`` numbers on ``device``: the backend's name, or GRAPH.

    On GPUs by the crossover table. BackendError when an explicit request cannot be met.
    """
    capability = backends.compute_capability(device)
    # Measured in float32; a layer in float64 takes the room of one twice as wide.
    fastest = None if capability is None else fastest_kernel(width * itemsize // 4, capability)
    return backends.choose(NAME, device, width, itemsize, first=fastest)


def _implement_in_python(backend: str, module: str) -> None:
    """Both ops by the functions of a module, which is imported at the first use: lcw_ops must not need Triton."""

    def forward(h0, weight, bias, filter, alpha, beta, inputs, steps, activation, segment, return_states):
        if h0.dim() != 2 or segment < 0:
            raise ValueError(
                f"{NAME}: h0 has shape {tuple(h0.shape)} and segment is {segment}; expected (M, N) and >= 0"
            )
        check_arguments(backend, h0, weight, bias, filter, alpha, beta, inputs, steps, activation)
        return importlib.import_module(module).orthogonal_filter(
            h0, weight, bias, filter, alpha, beta, inputs, steps, activation, segment, return_states
        )

    def backward(
        grad_output, checkpoints, weight, bias, filter, alpha, beta, inputs, steps, activation, segment, *needs
    ):
        states = grad_output.dim() == 3 and len(grad_output) == steps + 1
        if segment < 1 or not (states or grad_output.dim() == 2):
            raise ValueError(f"{BACKWARD}: grad_output must be (M, N) or (L + 1, M, N), and segment at least 1")
        expected = (-(-steps // min(segment, max(steps, 1))), *grad_output.shape[-2:])
        _, needs_bias, _, needs_inputs, _ = needs
        if (
            checkpoints.shape != expected
            or (checkpoints.dtype, checkpoints.device) != (grad_output.dtype, grad_output.device)
            or (needs_bias and bias is None)
            or (needs_inputs and inputs is None)
        ):
            raise ValueError(f"{BACKWARD}: checkpoints {tuple(checkpoints.shape)} do not fit, expected {expected}")
        check_arguments(backend, grad_output, weight, bias, filter, alpha, beta, inputs, steps, activation)
        return importlib.import_module(module).orthogonal_filter_backward(
            grad_output, checkpoints, weight, bias, filter, alpha, beta, inputs, steps, activation, segment, *needs
        )

    library.implement(NAME, backend, forward)
    library.implement(BACKWARD, backend, backward)


def check_arguments(backend, state, weight, bias, filter, alpha, beta, inputs, steps, activation) -> None:
    """Whatever calls the op, a kernel never reads out of bounds."""
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
        raise ValueError(f"{NAME}: shapes do not fit each other; call lcw_ops.functional.orthogonal_filter")
    dtype = state.dtype
    weight_dtypes = (torch.float32, torch.bfloat16, torch.float16) if dtype == torch.float32 else (dtype,)
    like_state = [tensor for tensor in (bias, alpha, beta, inputs, None if permutes else filter) if tensor is not None]
    if (
        dtype not in (torch.float32, torch.float64)
        or weight.dtype not in weight_dtypes
        or any(tensor.dtype != dtype for tensor in like_state)
        or any(tensor.device != state.device for tensor in (weight, filter, *like_state))
    ):
        raise ValueError(f"{NAME}: dtypes or devices do not fit; call lcw_ops.functional.orthogonal_filter")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{NAME}: unknown activation {activation}")


_implement_in_python("triton", "lcw_ops.kernels.orthogonal_filter")
_implement_in_python(GRAPH, "lcw_ops.ops.orthogonal_filter.graph")
backends.IMPLEMENTED[NAME] = ("cpp", "cuda", "triton", GRAPH)
# Matrices of 128 x 128 in float32 are what one program can hold.
backends.MAX_ROW_BYTES[NAME, "triton"] = 512


def keeps_all_states(weight: Tensor, return_states: bool, backend: str) -> bool:
    """Whether backward reads the states that forward returned, instead of checkpoints of its own.

    With one weight for all steps, nothing then has to be recomputed step after step.
    """
    return return_states and backend == "cpp" and weight.dim() == 2


class OrthogonalFilter(Function):
    """(h0, weight, bias, filter, alpha, beta, inputs, options) -> (output, checkpoints)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h0, weight, bias, filter, alpha, beta, inputs, steps, activation, segment, return_states, backend):
        forward = library.get_overload(NAME, backend)
        if keeps_all_states(weight, return_states, backend):
            segment = 0
        return forward(h0, weight, bias, filter, alpha, beta, inputs, steps, activation, segment, return_states)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.steps, ctx.activation, ctx.segment, ctx.return_states, ctx.backend = inputs
        states, checkpoints = output
        ctx.mark_non_differentiable(checkpoints)
        ctx.states_known = keeps_all_states(tensors[1], ctx.return_states, ctx.backend)
        if ctx.states_known:
            checkpoints = states
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(checkpoints, *tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, grad_output, _):
        if grad_output is None:
            return (None,) * 12
        checkpoints, *tensors = ctx.saved_tensors
        if ctx.states_known:
            checkpoints = checkpoints[:-1]
        _, weight, bias, _, alpha, beta, inputs = ctx.needs_input_grad[:7]
        needs = (weight, bias, alpha or beta, inputs)
        options = (ctx.steps, ctx.activation, ctx.segment, ctx.return_states, ctx.backend)
        functions = OrthogonalFilterBackward, OrthogonalFilterBackwardForwardMode
        gradients = library.apply(*functions, grad_output, checkpoints, *tensors, *options, *needs)
        grad_h0, grad_weight, grad_bias, grad_alpha, grad_beta, grad_inputs = gradients
        return (
            grad_h0,
            grad_weight if weight else None,
            grad_bias if bias else None,
            None,
            grad_alpha if alpha else None,
            grad_beta if beta else None,
            grad_inputs if inputs else None,
            *(None,) * 5,
        )


class OrthogonalFilterForwardMode(OrthogonalFilter):
    """The same with forward-mode derivatives."""

    @staticmethod
    def jvp(ctx, *tangents):
        output = orthogonal_filter_jvp(ctx.saved_tensors, tangents[:7], ctx.activation, ctx.return_states)
        return output, None


class OrthogonalFilterBackward(Function):
    """The gradients, as a function that can be differentiated again: second order runs the reference's formulas."""

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
    ):
        shared = (weight, bias, filter, alpha, beta, inputs, steps, activation)
        # Without checkpoints the forward pass did not know that a gradient would be asked for (it was hidden inside
        # torch.func).
        if not segment and not keeps_all_states(weight, return_states, backend):
            _, checkpoints = library.get_overload(NAME, backend)(h0, *shared, DEFAULT_SEGMENT, False)
        segment = segment or DEFAULT_SEGMENT
        needs = (needs_weight, needs_bias, needs_scales, needs_inputs, False)
        return library.get_overload(BACKWARD, backend)(grad_output, checkpoints, *shared, segment, *needs)[:6]

    @staticmethod
    def setup_context(ctx, inputs, output):
        OrthogonalFilterBackward.keep(ctx, inputs, activation=10, return_states=12, needs=14)

    @staticmethod
    def keep(ctx, inputs, activation: int, return_states: int, needs: int):
        """What the second order takes: the nine tensors, and the options at these places of the arguments."""
        grad_output, _, *tensors = inputs[:9]
        ctx.activation, ctx.return_states, ctx.needs = inputs[activation], inputs[return_states], inputs[needs:]
        ctx.argument_count = len(inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, *tensors)
        ctx.save_for_forward(grad_output, *tensors)

    @staticmethod
    def backward(ctx, *grad_gradients):
        gradients, primals, slots = _differentiable_gradients(ctx)
        results, pullback = torch.func.vjp(gradients, *primals)
        cotangents = tuple(
            torch.zeros_like(result) if grad_gradients[slot - 1] is None else grad_gradients[slot - 1]
            for result, slot in zip(results, slots[1:], strict=True)
        )
        second = [None] * ctx.argument_count
        for slot, gradient in zip(slots, pullback(cotangents), strict=True):
            second[_ARGUMENT_OF_SLOT[slot]] = gradient
        return tuple(second)


class OrthogonalFilterBackwardForwardMode(OrthogonalFilterBackward):
    """The same with forward-mode derivatives."""

    @staticmethod
    def jvp(ctx, *tangents):
        gradients, primals, slots = _differentiable_gradients(ctx)
        direction = tuple(
            torch.zeros_like(primal) if tangents[_ARGUMENT_OF_SLOT[slot]] is None else tangents[_ARGUMENT_OF_SLOT[slot]]
            for primal, slot in zip(primals, slots, strict=True)
        )
        # J v as the transpose of w -> J^T w: forward mode would have to nest inside the forward mode that called.
        results, pullback = torch.func.vjp(gradients, *primals)
        _, transposed = torch.func.vjp(pullback, tuple(torch.zeros_like(result) for result in results))
        (moved,) = transposed(direction)
        by_slot = dict(zip(slots[1:], moved, strict=True))
        needs_weight, needs_bias, needs_scales, needs_inputs = ctx.needs
        needed = (True, needs_weight, needs_bias, needs_scales, needs_scales, needs_inputs)
        nothing = primals[0].new_empty(0)  # what the op returns for a gradient nobody needs; None fails under vmap
        return tuple(by_slot[slot] if need else nothing for slot, need in enumerate(needed, start=1))


# The differentiable arguments of the backward function, by slot: grad_output, h0, weight, bias, alpha, beta, inputs.
_ARGUMENT_OF_SLOT = (0, 2, 3, 4, 6, 7, 8)


def _differentiable_gradients(ctx):
    """The gradients in plain torch, as a function of the arguments that are there; those arguments; their slots."""
    grad_output, h0, weight, bias, filter, alpha, beta, inputs = ctx.saved_tensors
    arguments = (grad_output, h0, weight, bias, alpha, beta, inputs)
    slots = [slot for slot, argument in enumerate(arguments) if argument is not None]

    def gradients(*primals):
        grad_output, h0, weight, bias, alpha, beta, inputs = (
            primals[slots.index(slot)] if slot in slots else None for slot in range(7)
        )
        *results, _ = orthogonal_filter_backward(
            grad_output, h0, weight, bias, filter, alpha, beta, inputs, ctx.activation, ctx.return_states
        )
        # The formulas compute a 16-bit weight's gradient in the state's dtype; it is rounded once.
        return tuple(
            result.to(like.dtype) for result, like in zip(results, arguments[1:], strict=True) if result is not None
        )

    return gradients, [arguments[slot] for slot in slots], slots


@torch.no_grad()
def state_gradients(grad_output, h0, weight, bias, filter, alpha, beta, inputs, activation, segment, backend):
    """dE/dh_l for every l, (L+1, M, N), with the other gradients: what a profiler plots.

    ``grad_output`` is (M, N), or (L+1, M, N) when every state receives a gradient from outside.

    Returns (grad_h0, grad_weight, grad_bias, grad_alpha, grad_beta, grad_inputs, grad_states); alpha and beta are
    tensors, as :func:`lcw_ops.reference.orthogonal_filter.scale_tensors` makes them.
    """
    shared = (weight, bias, filter, alpha, beta, inputs)
    if backend == "reference":
        return orthogonal_filter_backward(grad_output, h0, *shared, activation, return_states=grad_output.dim() == 3)
    steps = count_steps(*shared)
    _, checkpoints = library.get_overload(NAME, backend)(h0, *shared, steps, activation, segment, False)
    needs = (True, bias is not None, True, inputs is not None, True)
    return library.get_overload(BACKWARD, backend)(
        grad_output, checkpoints, *shared, steps, activation, segment, *needs
    )
