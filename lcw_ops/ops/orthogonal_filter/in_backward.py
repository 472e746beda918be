"""The recurrence over weights that their optimizer, ``optim.AdamW(..., in_backward=True)``, steps during backward.

    h_l = alpha_l O_l h_{l-1} + beta_l act(W_l h_{l-1} + b_l + u_l),   l = 1..L

Backward goes through ranges of layers, from the last to the first. It computes the gradient of a range's weights and
lets the optimizer step them. The next range's gradient takes the memory. So the gradient of all weights, L N^2 numbers,
never exists. Both the recurrence and the step go element by element or layer by layer, so a step has the bits that
backward() and step() give.

The weight is not an argument of the autograd Function. There is no edge from the recurrence to the weight, and so a
backward pass that reaches the weight has found another use of it, of which no gradient would be stepped. The Function
has an argument of its own, the trigger, which shows whether a pass accumulates gradients or computes some of them only,
as torch.autograd.grad does.
"""

import math
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from lcw_ops import _torch
from lcw_ops._checks import describe
from lcw_ops.ops import library
from lcw_ops.ops.memory_pool import LEAST_BYTES
from lcw_ops.ops.orthogonal_filter.op import BACKWARD, NAME, Needs, Options, new_gradients
from lcw_ops.reference.orthogonal_filter import Recurrence

# The least bytes of a range's gradient. The memory pool then serves all ranges with one block. Smaller ranges were
# slower: 50,000 layers of 64 units with 64 samples took 1.02 s for backward and AdamW in ranges of 32 MB, 1.29 s in
# ranges of 16 MB, and 1.20 to 1.75 s in ranges of 4 MB. Their memory came from malloc (Zen 4, 2 cores).
RANGE_BYTES = LEAST_BYTES
# Ranges begin at multiples of so many elements. torch's fused steps compute the last elements of a tensor, fewer than a
# vector has, by other instructions, which may round differently.
ALIGNED_ELEMENTS = 64


class Owner(Protocol):
    """The optimizer of a weight, as the recurrence sees it."""

    def takes_ranges(self, weight: Tensor) -> bool:
        """Whether the weight can be stepped range by range."""

    def stepping(self, weight: Tensor) -> AbstractContextManager[Callable[[slice, Tensor], None]]:
        """Step the weight: the context gives a function of a range of layers and its gradient.

        Raises RuntimeError, and writes nothing, if this backward pass must not step it.
        """


# Maps the id of a parameter to its optimizer, which keeps the parameter alive as long as the entry.
owners: dict[int, Owner] = {}

# The uses that may still have a backward pass.
_uses: weakref.WeakSet["Use"] = weakref.WeakSet()
# A set must not grow while another thread goes through it.
_uses_lock = threading.Lock()


class Use:
    """One use of a weight by the recurrence, from its forward pass to its backward pass."""

    def __init__(self, weight: Tensor, owner: Owner, like: Tensor) -> None:
        self.weight, self.owner = weight, owner
        self.trigger = like.new_empty(0).requires_grad_()
        self._version = weight._version
        self._trigger_node = _torch.gradient_accumulator(self.trigger)
        with _uses_lock:
            _uses.add(self)

    def is_reached(self) -> bool:
        """Whether this backward pass accumulates the gradient of the trigger, and so would that of the weight."""
        return self.weight.requires_grad and _torch.will_run_in_backward(self._trigger_node)

    def check(self) -> None:
        """Raise RuntimeError if the gradients would not be those of the forward pass, or would need to be recorded."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            came = "belongs to an optimizer with in_backward=True, whose steps autograd and compilers cannot record"
            remedy = "For second derivatives (create_graph=True) or compiled autograd, give in_backward=False."
            raise _refusal(came, "an ordinary backward pass", remedy)
        if self.weight._version != self._version:
            remedy = "Do the forward pass again after the change."
            raise _refusal("was changed in place after the forward pass", "no change until backward()", remedy)

    def check_alone(self) -> None:
        """Raise RuntimeError if this backward pass reaches the weight in another way too."""
        others = [use for use in _living_uses() if use is not self and use.weight is self.weight]
        accumulates = _torch.will_run_in_backward(_torch.gradient_accumulator(self.weight))
        if accumulates or any(use.is_reached() for use in others):
            came = "is used more than once, and its optimizer, with in_backward=True, steps it at the first use"
            remedy = "Use it once per backward pass (a penalty is a second use), or give in_backward=False."
            raise _refusal(came, "one use", remedy)
        if _torch.has_gradient_hooks(self.weight):
            came = "got a hook of register_hook after the forward pass, which found none"
            raise _refusal(came, "hooks from the forward pass on", "Do the forward pass again.")
        if self.weight.grad is not None:
            came = "has a gradient, and its optimizer, with in_backward=True, cannot add to it"
            raise _refusal(came, "none before backward()", "Call zero_grad() first.")


def _living_uses() -> list[Use]:
    with _uses_lock:
        return list(_uses)


def check_uses() -> None:
    """Raise RuntimeError if this backward pass must not step a weight that it will reach."""
    for use in _living_uses():
        if use.is_reached():
            use.check()
            use.check_alone()


def _refusal(came: str, expected: str, remedy: str) -> RuntimeError:
    return RuntimeError(describe(NAME, "weight", came, expected, remedy))


def find_use(recurrence: Recurrence) -> Use | None:
    """A use of the weight to be stepped range by range; None if autograd has to compute its gradient as usual.

    A weight with hooks on its gradient, one that all steps share and one that is computed from a parameter get their
    gradient as usual. So do all weights in torch.compile, in torch.func and in forward mode.
    """
    weight = recurrence.weight
    owner = owners.get(id(weight))
    if owner is None or weight.dim() != 3 or not (weight.requires_grad and torch.is_grad_enabled()):
        return None
    if _torch.is_transformed() or _torch.has_gradient_hooks(weight) or not owner.takes_ranges(weight):
        return None
    return Use(weight, owner, recurrence.h0)


def orthogonal_filter(use: Use, recurrence: Recurrence, options: Options) -> Tensor:
    """The op's output. The weight will be stepped during the backward pass."""
    function = OrthogonalFilterInBackward
    return library.apply(function, function, use, use.trigger, *recurrence._replace(weight=None), options)


class OrthogonalFilterInBackward(Function):
    """(use, trigger, *Recurrence without the weight, Options) -> output."""

    @staticmethod
    def forward(ctx, use, trigger, h0, _, bias, filter, alpha, beta, inputs, options):
        tensors = bias, filter, alpha, beta, inputs
        output, checkpoints = library.get_overload(NAME, options.backend)(h0, use.weight, *tensors, *options[:-1])
        ctx.use, ctx.options = use, options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(checkpoints, *tensors)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        use, options = ctx.use, ctx.options
        checkpoints, *tensors = ctx.saved_tensors
        use.check()
        if grad_output is None:
            return (None,) * 10
        _, _, _, _, bias, _, alpha, beta, inputs, _ = ctx.needs_input_grad
        needs = Needs(use.is_reached(), bias, alpha or beta, inputs)
        arguments = Recurrence(grad_output, use.weight, *tensors), checkpoints, options, needs
        if needs.weight:
            with use.owner.stepping(use.weight) as step:
                # The first step of another optimizer in this pass must not find the weight changed.
                with _uses_lock:
                    _uses.discard(use)
                gradients = _backward_by_ranges(step, *arguments)
        else:
            gradients = _backward(*arguments)
        grad_h0, _, grad_bias, grad_alpha, grad_beta, grad_inputs = gradients
        return (
            None,
            None,
            grad_h0,
            None,
            grad_bias if bias else None,
            None,
            grad_alpha if alpha else None,
            grad_beta if beta else None,
            grad_inputs if inputs else None,
            None,
        )


def _backward(recurrence: Recurrence, checkpoints: Tensor, options: Options, needs: Needs) -> list[Tensor]:
    """The op's gradients without those of the states. ``recurrence`` has grad_output in place of h0."""
    grad_output, *tensors = recurrence
    arguments = *tensors, options.steps, options.activation, options.segment, *needs, False
    return library.get_overload(BACKWARD, options.backend)(grad_output, checkpoints, *arguments)[:6]


def _backward_by_ranges(
    step: Callable[[slice, Tensor], None], recurrence: Recurrence, checkpoints: Tensor, options: Options, needs: Needs
) -> list[Tensor]:
    """The gradients that ``_backward`` gives, with the weights stepped instead of a gradient of theirs."""
    grad_output, weight, bias, _, alpha, beta, inputs = recurrence
    ranges = _cut(weight, options)
    complete = None
    is_sum = (needs.bias and bias.dim() == 1) or (needs.scales and 1 in (alpha.numel(), beta.numel()))
    if is_sum and len(ranges) > 1:
        # A gradient that is summed over all steps is rounded once. A pass without the weights computes it.
        complete = _backward(recurrence, checkpoints, options, needs._replace(weight=False))
        needs = Needs(weight=True, bias=False, scales=False, inputs=False)
    gradient = grad_output[-1] if options.return_states else grad_output
    # Keep no small tensor of a range: each would take a bite of the memory that the next range's gradient needs.
    _, *others = new_gradients(weight, bias, alpha, beta, inputs, needs._replace(weight=False))
    for steps in reversed(ranges):
        outer = gradient
        if options.return_states:
            outer = torch.cat([grad_output[steps], gradient.unsqueeze(0)])
        kept = checkpoints[steps.start // options.segment : -(-steps.stop // options.segment)]
        here = options._replace(steps=steps.stop - steps.start)
        gradient, grad_weight, *parts = _backward(_part(recurrence, outer, steps), kept, here, needs)
        step(steps, grad_weight)
        for other, part in zip(others, parts, strict=True):
            target = other if is_sum else other[steps]
            target.copy_(part)
        del grad_weight, parts, part
    return complete or [gradient, weight, *others]


def _cut(weight: Tensor, options: Options) -> list[slice]:
    """Ranges of whole segments, of RANGE_BYTES or a little more, in the order of the layers; of no layers if L is 0."""
    elements = max(1, options.segment * weight.shape[1] * weight.shape[2])
    together = ALIGNED_ELEMENTS // math.gcd(ALIGNED_ELEMENTS, elements)
    count = math.ceil(RANGE_BYTES / (elements * together * weight.element_size()))
    length = options.segment * together * count
    return [slice(first, min(first + length, options.steps)) for first in range(0, max(options.steps, 1), length)]


def _part(recurrence: Recurrence, grad_output: Tensor, steps: slice) -> Recurrence:
    """The arguments of some steps: slices of those with one entry per step."""
    _, weight, bias, filter, alpha, beta, inputs = recurrence
    return Recurrence(
        grad_output,
        weight[steps],
        bias if bias is None or bias.dim() == 1 else bias[steps],
        filter[steps] if filter.dim() == 3 else filter,
        alpha if alpha.numel() == 1 else alpha[steps],
        beta if beta.numel() == 1 else beta[steps],
        None if inputs is None else inputs[steps],
    )
