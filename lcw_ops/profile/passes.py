"""Forward and backward passes of the profiled model: each with fresh inputs, and with the gradients handed back."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lcw_ops import _torch
from lcw_ops._checks import describe
from lcw_ops._runs import fresh_copy
from lcw_ops.profile.arguments import Arguments
from lcw_ops.profile.figures import failed
from lcw_ops.profile.layers import first_floating


class ModelError(Exception):
    """The model's forward pass raised; the cause is the model's own error."""


class Refused(Exception):
    """autograd.grad refused the graph; passes that begin now use ``loss.backward()``."""


@dataclass
class Work:
    """One forward and backward pass, to be repeated."""

    model: nn.Module
    arguments: Arguments
    targets: Tensor | None
    loss: Callable | None
    # Whether the gradients come from loss.backward(): autograd.grad returns none for sharded parameters.
    accumulates: bool = False

    @property
    def device(self) -> torch.device:
        return self.arguments.first_tensor().device

    def start(self) -> "Pass":
        """A pass with its own copies of the inputs: a model may write to them."""
        arguments = Arguments(*fresh_copy(tuple(self.arguments), self.model))
        differentiated = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not differentiated:
            differentiated = [tensor for tensor in arguments.tensors() if tensor.is_floating_point() and tensor.is_leaf]
            for tensor in differentiated:
                # The model gets a copy: autograd forbids writing to a leaf, as an in-place activation does.
                arguments = arguments.replaced(tensor, tensor.requires_grad_().clone())
        return Pass(self, arguments, differentiated)


@dataclass
class Pass:
    work: Work
    arguments: Arguments
    differentiated: list[Tensor]

    def forward(self, model: nn.Module | None = None) -> Tensor:
        """The loss; ``model`` runs in place of the work's if it is given. Raises ModelError for the model's errors."""
        try:
            output = (model or self.work.model)(*self.arguments.args, **self.arguments.kwargs)
        except Exception as error:
            raise ModelError from error
        loss = _criterion(self.work.targets, self.work.loss)(output)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            came = f"has shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"is a {type(loss).__name__}"
            remedy = "Return its mean or sum."
            raise ValueError(describe("profile", "the loss", came, "a tensor with one element", remedy))
        if not loss.requires_grad and self.work.loss is not None:
            expected = "a result of parameters or inputs that require one"
            raise ValueError(describe("profile", "the loss", "does not require a gradient", expected))
        return loss

    def backward(self, loss: Tensor) -> list[Tensor | None]:
        """The gradients of ``differentiated``. They are returned, not stored: the user's ``.grad`` is left alone.

        Raises Refused for a graph with reentrant checkpoints, the first time.
        """
        if not loss.requires_grad:
            return [None] * len(self.differentiated)
        if self.work.accumulates:
            return _accumulated(loss, [*self.work.model.parameters()], self.differentiated)
        try:
            return list(torch.autograd.grad(loss, self.differentiated, allow_unused=True))
        except RuntimeError as error:
            if not _is_reentrant(loss):
                raise
            self.work.accumulates = True
            raise Refused from error


def fully_sharded(model: nn.Module) -> list:
    """The modules whose parameters torch.distributed.fsdp.fully_shard has sharded."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def _is_reentrant(loss: Tensor) -> bool:
    """Whether a part of the graph is checkpointed with use_reentrant=True, which autograd.grad refuses."""
    seen, waiting = {None, loss.grad_fn}, [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if _torch.is_reentrant_checkpoint(node):
            return True
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return False


def _accumulated(loss: Tensor, parameters: list[Tensor], differentiated: list[Tensor]) -> list[Tensor | None]:
    """The gradients by ``loss.backward()``. Hooks on accumulated gradients, which may step an optimizer, do not run."""
    leaves = list({id(tensor): tensor for tensor in (*parameters, *differentiated)}.values())
    kept = [(leaf, leaf.grad, dict(hooks), hooks) for leaf in leaves for hooks in [_torch.gradient_hooks(leaf)]]
    for leaf, _, _, hooks in kept:
        leaf.grad = None
        hooks.clear()
    try:
        loss.backward()
        return [leaf.grad for leaf in differentiated]
    finally:
        for leaf, gradient, entries, hooks in kept:
            leaf.grad = gradient
            hooks.update(entries)


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
    if output.dim() == 0:
        # A model that returns its loss.
        return output.real
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(output.shape, generator=generator, dtype=_drawn_in(output)).to(output)
    return (output * (direction / direction.norm()).conj()).sum().real


def _drawn_in(output: Tensor) -> torch.dtype:
    return torch.complex64 if output.is_complex() else torch.float32


def place_of(error: BaseException, model: nn.Module, names: dict[int, str]) -> str:
    """The name of the innermost module in whose forward the error was raised, and the error in one line."""
    name, trace = "", error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and id(module) in names:
            name = names[id(module)]
        trace = trace.tb_next
    return f"{failed(error)} (in {name or type(model).__name__})"
