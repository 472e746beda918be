"""The orthogonal-filter recurrence as CUDA graphs of matmuls, for nets whose layers are too wide to stay on chip.

    h_l = alpha_l O_l h_{l-1} + beta_l act(W_l h_{l-1} + b_l + u_l)
    P_l = beta_l act'(A_l) * G_l      G_{l-1} = alpha_l G_l O_l + P_l W_l      dW_l = P_l^T h_{l-1}

O_l is the filter, u_l an input, A_l the argument of act. G_l, P_l and dW_l are the gradients of h_l, A_l and W_l. In
the second line, states and their gradients are matrices with one row per sample.

The sequential part of a block of up to MOST_STEPS steps is plain torch on static buffers, captured once and replayed
for every block. A step runs two matmuls and four element-wise kernels forward, and two of each backward, without a
launch from Python. The other parts (slopes, dW, sums) are computed for all steps of a block at once. The buffers hold
the block's weights and eight state-sized arrays per step. They are kept for the next call of the same shape, until
``clear()`` or until memory runs out in a call of these ops. On a CPU, and while the caller captures a graph, the same
code runs directly.

The signatures are those of the op overloads in op.py in this folder.
"""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lcw_ops._checks import describe
from lcw_ops.ops.precision import full_float32

# Steps per graph. Starting a graph costs about as much as one step of a wide net, so longer graphs gain little.
MOST_STEPS = 64
# The most bytes of a block's buffers. Only matrices that change from step to step, and state-sized arrays, count.
MOST_BYTES = 512 << 20
STATES_PER_STEP = 8
# The most steps that the caller may capture. A step is six kernels forward and eleven backward, so that the caller's
# graph has up to 70,000 nodes. The graph's memory, and the time to make it, grow with the number of nodes.
MOST_CAPTURED_STEPS = 4096
# The number of blocks kept with their graphs: enough for forward and backward of two layers of different shapes.
MOST_BLOCKS = 4


@dataclass(frozen=True)
class Kind:
    """The properties on which a captured block depends."""

    steps: int  # the largest number of steps in a block; its last graph may run fewer
    rows: int
    width: int
    dtype: torch.dtype
    device: torch.device
    stream: int  # two streams must not share buffers
    activation: str
    weight_per_step: bool
    filter: str  # "matrix", "per_step" or "permutation"
    shifted: bool  # a bias or inputs are added to the pre-activation
    adds_outer: bool  # every state receives a gradient from outside


class Block:
    """Buffers for ``kind.steps`` steps, and the sequential part, captured at its first run if ``capture``."""

    # Buffers made in inference mode could not be written to outside of it.
    @torch.inference_mode(False)
    def __init__(self, kind: Kind, capture: bool):
        self.kind = kind
        self.count = kind.steps
        options = {"dtype": kind.dtype, "device": kind.device}
        per_step = (kind.steps, kind.rows, kind.width)
        matrix = (kind.width, kind.width)
        self.weight = torch.empty((kind.steps if kind.weight_per_step else 1, *matrix), **options)
        if kind.filter == "permutation":
            self.permutation, self.inverse = (
                torch.empty(kind.width, dtype=torch.int64, device=kind.device) for _ in range(2)
            )
        else:
            self.filter = torch.empty((kind.steps if kind.filter == "per_step" else 1, *matrix), **options)
        self.alpha, self.beta = (torch.empty(kind.steps, 1, 1, **options) for _ in range(2))
        self.shift = torch.empty(per_step if kind.shifted else (0,), **options)
        self.outer = torch.empty(per_step if kind.adds_outer else (0,), **options)
        self.states, self.gradients = (torch.empty((kind.steps + 1, *per_step[1:]), **options) for _ in range(2))
        # grad_pre holds P; slopes holds beta act'(A).
        self.filtered, self.activated, self.slopes, self.grad_pre = (torch.empty(per_step, **options) for _ in range(4))
        self.graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] | None = {} if capture else None

    def load_shared(self, weight: Tensor, filter: Tensor) -> None:
        """Load the matrices that all steps of a call share. 16-bit weights are widened."""
        if not self.kind.weight_per_step:
            self.weight.copy_(weight)
        if self.kind.filter == "permutation":
            self.permutation.copy_(filter)
            self.inverse.copy_(filter.argsort())
        elif self.kind.filter == "matrix":
            self.filter.copy_(filter)

    def load(self, steps: slice, weight, bias, filter, alpha, beta, inputs) -> None:
        """Load the arguments of these steps, ``kind.steps`` or fewer. 16-bit weights are widened."""
        self.count = count = steps.stop - steps.start
        if self.kind.weight_per_step:
            self.weight[:count] = weight[steps]
        if self.kind.filter == "per_step":
            self.filter[:count] = filter[steps]
        for buffer, scale in ((self.alpha, alpha), (self.beta, beta)):
            buffer[:count] = (scale if scale.numel() == 1 else scale[steps]).reshape(-1, 1, 1)
        if self.kind.shifted:
            shift = self.shift[:count].zero_()
            if bias is not None:
                shift.add_(bias if bias.dim() == 1 else bias[steps].unsqueeze(1))
            if inputs is not None:
                shift.add_(inputs[steps])

    def run(self, direction: str) -> None:
        """Run "forward" from states[0], or "backward" from slopes and gradients[count].

        A block of fewer than ``kind.steps`` steps, the last one, has its own graph on the same buffers.
        """
        function = {"forward": self._forward, "backward": self._backward}[direction]
        if self.graphs is None:
            function()
            return
        key = direction, self.count
        if key not in self.graphs:
            # At their first call, libraries allocate memory and choose algorithms, which must not be captured.
            function()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                function()
            self.graphs[key] = graph
        self.graphs[key].replay()

    def _forward(self) -> None:
        for s in range(self.count):
            state, filtered, activated = self.states[s], self.filtered[s], self.activated[s]
            weight = self.weight[s if self.kind.weight_per_step else 0].mT
            torch.mm(state, weight, out=activated)
            if self.kind.shifted:
                activated.add_(self.shift[s])
            if self.kind.activation != "identity":
                getattr(activated, f"{self.kind.activation}_")()
            if self.kind.filter == "permutation":
                torch.index_select(state, 1, self.permutation, out=filtered)
            else:
                torch.mm(state, self._filter_of(s).mT, out=filtered)
            torch.mul(filtered, self.alpha[s], out=self.states[s + 1])
            self.states[s + 1].addcmul_(activated, self.beta[s])

    def _backward(self) -> None:
        for s in reversed(range(self.count)):
            gradient, before, grad_pre = self.gradients[s + 1], self.gradients[s], self.grad_pre[s]
            torch.mul(gradient, self.slopes[s], out=grad_pre)
            if self.kind.filter == "permutation":
                torch.index_select(gradient, 1, self.inverse, out=before)
            else:
                torch.mm(gradient, self._filter_of(s), out=before)
            before.mul_(self.alpha[s])
            before.addmm_(grad_pre, self.weight[s if self.kind.weight_per_step else 0])
            if self.kind.adds_outer:
                before.add_(self.outer[s])

    def _filter_of(self, s: int) -> Tensor:
        return self.filter[s if self.kind.filter == "per_step" else 0]

    def write_slopes(self, activated: Tensor) -> None:
        """beta act'(A) from act(A). At the kink of ReLU the derivative is 0."""
        slopes = self.slopes[: self.count]
        if self.kind.activation == "tanh":
            torch.mul(activated, activated, out=slopes)
            slopes.neg_().add_(1)
        elif self.kind.activation == "sigmoid":
            torch.mul(activated, 1 - activated, out=slopes)
        elif self.kind.activation == "relu":
            torch.gt(activated, 0, out=slopes)
        else:
            slopes.fill_(1)
        slopes.mul_(self.beta[: self.count])


_cached: OrderedDict[Kind, Block] = OrderedDict()
_lock = threading.Lock()


def _get_block(kind: Kind) -> Block:
    """The cached block, made if necessary; or a new uncached one if it cannot be captured, as on a CPU."""
    if kind.device.type != "cuda" or torch.cuda.is_current_stream_capturing() or kind.rows * kind.width == 0:
        return Block(kind, capture=False)
    if kind not in _cached:
        while len(_cached) >= MOST_BLOCKS:
            _cached.popitem(last=False)
        _cached[kind] = Block(kind, capture=True)
    _cached.move_to_end(kind)
    return _cached[kind]


def clear() -> None:
    """Free the buffers and graphs kept for the next call: at most MOST_BLOCKS of about MOST_BYTES each."""
    with _lock:
        _cached.clear()


def count_cached() -> tuple[int, int]:
    """The number of blocks that are kept, and the bytes of their buffers on all devices together."""
    with _lock:
        buffers = [one for block in _cached.values() for one in vars(block).values() if isinstance(one, Tensor)]
        return len(_cached), sum(buffer.nbytes for buffer in buffers)


def _retry_without_cache(function: Callable) -> Callable:
    """Call ``function`` again without the kept blocks if a GPU has too little memory beside them."""

    @functools.wraps(function)
    def run(*arguments):
        try:
            return function(*arguments)
        except torch.cuda.OutOfMemoryError:
            if not _cached or torch.cuda.is_current_stream_capturing():
                raise
        # Outside of the except clause: inside, the traceback keeps the tensors of the failed call.
        clear()
        return function(*arguments)

    return run


class _Call:
    """One call of an op, with its steps cut into blocks."""

    def __init__(self, like: Tensor, weight, bias, filter, alpha, beta, inputs, steps, activation, adds_outer=False):
        self.arguments = (weight, bias, filter, alpha, beta, inputs)
        rows, width = like.shape[-2:]
        matrices = (weight.dim() == 3) + (filter.dim() == 3)
        step_bytes = max((matrices * width + STATES_PER_STEP * rows) * width * like.element_size(), 1)
        self.kind = Kind(
            steps=max(1, min(MOST_STEPS, MOST_BYTES // step_bytes, steps)),
            rows=rows,
            width=width,
            dtype=like.dtype,
            device=like.device,
            stream=torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0,
            activation=activation,
            weight_per_step=weight.dim() == 3,
            filter={1: "permutation", 2: "matrix", 3: "per_step"}[filter.dim()],
            shifted=bias is not None or inputs is not None,
            adds_outer=adds_outer,
        )
        self._block: Block | None = None
        self._loaded: slice | None = None

    def ranges(self, first: int, end: int) -> list[slice]:
        return [slice(begin, min(begin + self.kind.steps, end)) for begin in range(first, end, self.kind.steps)]

    def block(self, steps: slice) -> Block:
        """The call's only block, loaded with the arguments of these steps."""
        if self._block is None:
            weight, _, filter, *_ = self.arguments
            self._block = _get_block(self.kind)
            self._block.load_shared(weight, filter)
        if self._loaded != steps:
            self._block.load(steps, *self.arguments)
            self._loaded = steps
        return self._block

    def carry_forward(self, state: Tensor, first: int, end: int) -> Iterator[tuple[slice, Block]]:
        """Run the steps block by block. Each block is yielded when it is done; the next run overwrites it."""
        for steps in self.ranges(first, end):
            block = self.block(steps)
            block.states[0].copy_(state)
            block.run("forward")
            yield steps, block
            state = block.states[block.count]


def _refuse_long_capture(steps: int) -> None:
    if steps > MOST_CAPTURED_STEPS and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            describe(
                "orthogonal_filter",
                "the recurrence",
                f"has {steps} steps while a CUDA graph is captured",
                f"at most {MOST_CAPTURED_STEPS}, as every step adds several nodes to the graph",
                "Call it outside of the capture, where it replays graphs of its own",
            )
        )


@contextmanager
def _exclusively(device: torch.device, steps: int) -> Iterator[None]:
    """Run one call at a time, because blocks are shared. Disable gradients, and TF32 on CUDA."""
    with _lock, torch.no_grad():
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device), full_float32(device):
            _refuse_long_capture(steps)
            yield


@_retry_without_cache
def orthogonal_filter(h0, weight, bias, filter, alpha, beta, inputs, steps, activation, segment, return_states):
    """The op ``orthogonal_filter``: (output, checkpoints)."""
    output = h0.new_empty((steps + 1, *h0.shape)) if return_states else h0.clone()
    checkpoints = h0.new_empty(((steps + segment - 1) // segment if segment else 0, *h0.shape))
    if return_states:
        output[0] = h0
    with _exclusively(h0.device, steps):
        call = _Call(h0, weight, bias, filter, alpha, beta, inputs, steps, activation)
        for done, block in call.carry_forward(h0, 0, steps):
            if return_states:
                output[done.start + 1 : done.stop + 1] = block.states[1 : block.count + 1]
            elif done.stop == steps:
                output.copy_(block.states[block.count])
            if segment:
                kept = range(-done.start % segment, done.stop - done.start, segment)
                for step in kept:
                    checkpoints[(done.start + step) // segment] = block.states[step]
    return output, checkpoints


@_retry_without_cache
def orthogonal_filter_backward(
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
    """The op ``orthogonal_filter_backward``: gradients of h0, weight, bias, alpha, beta, inputs and all states."""
    return_states = grad_output.dim() == 3
    gradient = (grad_output[-1] if return_states else grad_output).clone()
    needs = (needs_weight, needs_bias, needs_scales, needs_inputs, needs_states)
    sums = _Gradients(gradient, weight, bias, alpha, beta, inputs, steps, needs)
    if needs_states:
        sums.states[steps] = gradient
    with _exclusively(grad_output.device, steps):
        arguments = (weight, bias, filter, alpha, beta, inputs)
        call = _Call(gradient, *arguments, min(steps, segment), activation, adds_outer=return_states)
        for first in reversed(range(0, steps, segment)):
            done = call.carry_forward(checkpoints[first // segment], first, min(first + segment, steps))
            # Copy the recomputed states, act(A) and O h of the segment: the next block overwrites the buffers.
            kept = [
                (range_, *(buffer[: block.count].clone() for buffer in (block.states, block.activated, block.filtered)))
                for range_, block in done
            ]
            for range_, states, activated, filtered in reversed(kept):
                block = call.block(range_)
                block.write_slopes(activated)
                block.gradients[block.count].copy_(gradient)
                if return_states:
                    block.outer[: block.count] = grad_output[range_]
                block.run("backward")
                gradient.copy_(block.gradients[0])
                sums.add(range_, block, states, activated, filtered)
    return (gradient, *sums.rounded())


class _Gradients:
    """Gradients computed from G and P. Each is written once per step, or summed in float64 for a shared argument."""

    def __init__(self, like, weight, bias, alpha, beta, inputs, steps, needs):
        def sums(needed, argument, shared_dim):
            shared = argument is not None and argument.dim() == shared_dim
            if not needed:
                return shared, like.new_empty(0)
            return shared, torch.zeros_like(argument, dtype=torch.float64) if shared else torch.empty_like(argument)

        def when(needed, *shape, dtype=like.dtype):
            return like.new_empty(shape if needed else (0,), dtype=dtype)

        self.needs = needs_weight, needs_bias, needs_scales, needs_inputs, needs_states = needs
        self.weight_shared, self.weight = sums(needs_weight, weight, 2)
        self.bias_shared, self.bias = sums(needs_bias, bias, 1)
        self.alpha, self.beta = (when(needs_scales, steps, dtype=torch.float64) for _ in range(2))
        self.scales_shared = alpha.numel() == 1, beta.numel() == 1
        self.inputs = when(needs_inputs, steps, *like.shape)
        self.states = when(needs_states, steps + 1, *like.shape)
        arguments = (weight, bias, alpha, beta, inputs)
        self.dtypes = [(weight if argument is None else argument).dtype for argument in arguments]

    def add(self, steps: slice, block: Block, states: Tensor, activated: Tensor, filtered: Tensor) -> None:
        needs_weight, needs_bias, needs_scales, needs_inputs, needs_states = self.needs
        grad_pre, gradients = block.grad_pre[: block.count], block.gradients[: block.count + 1]
        if needs_weight and self.weight_shared:
            self.weight += grad_pre.flatten(0, 1).mT @ states.flatten(0, 1)
        elif needs_weight:
            self.weight[steps] = torch.bmm(grad_pre.mT, states).to(self.weight.dtype)
        if needs_bias and self.bias_shared:
            self.bias += grad_pre.sum((0, 1), dtype=torch.float64)
        elif needs_bias:
            self.bias[steps] = grad_pre.sum(1)
        if needs_scales:
            self.alpha[steps] = (gradients[1:] * filtered).sum((1, 2), dtype=torch.float64)
            self.beta[steps] = (gradients[1:] * activated).sum((1, 2), dtype=torch.float64)
        if needs_inputs:
            self.inputs[steps] = grad_pre
        if needs_states:
            self.states[steps] = gradients[:-1]

    def rounded(self) -> tuple[Tensor, ...]:
        """The gradients in the arguments' dtypes. The gradient of an argument that is None gets the weight's dtype."""
        _, _, needs_scales, _, _ = self.needs
        scales = [
            sums.sum().reshape(1) if needs_scales and shared else sums
            for sums, shared in zip((self.alpha, self.beta), self.scales_shared, strict=True)
        ]
        gradients = (self.weight, self.bias, *scales, self.inputs)
        return *(gradient.to(dtype) for gradient, dtype in zip(gradients, self.dtypes, strict=True)), self.states
