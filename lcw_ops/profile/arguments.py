"""The model and the inputs of a profile: wrappers taken off, arguments bound, and refusals of models without values."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from lcw_ops import _torch
from lcw_ops._checks import describe

# Submodules by which torch.compile, checkpoint_wrapper and FullyShardedDataParallel hold the module that they wrap.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")

_EXPECTED_INPUTS = "a tensor with the samples along its first dimension, or a tuple or dict that contains such a tensor"


class Arguments(NamedTuple):
    """The arguments of one call of the model, (args, kwargs)."""

    args: tuple
    kwargs: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves((*self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def first_tensor(self) -> Tensor:
        """The first tensor with a dimension, whose first dimension is usually the samples."""
        return next(tensor for tensor in self.tensors() if tensor.dim())

    def replaced(self, old: Tensor, new: Tensor) -> "Arguments":
        """The same with ``new`` wherever the tensor object ``old`` was passed."""
        return Arguments(*pytree.tree_map(lambda leaf: new if leaf is old else leaf, tuple(self)))


def check_model(model: nn.Module) -> None:
    """Raise TypeError or ValueError for an object that cannot be profiled."""
    if not isinstance(model, nn.Module):
        raise TypeError(describe("profile", "model", f"is a {type(model).__name__}", "a torch.nn.Module"))
    if isinstance(model, torch.jit.ScriptModule):
        came, expected = "is a ScriptModule, which takes no hooks", "a torch.nn.Module that runs in Python"
        raise TypeError(describe("profile", "model", came, expected, "Profile the module that it was made from."))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not is_lazy(tensor) and not _torch.has_values(tensor):
            came = f"is on {tensor.device} and has no values" if tensor.is_meta else "is a fake tensor without values"
            remedy = "Give the model memory (model.to_empty) and load or initialise its weights."
            raise ValueError(describe("profile", f"the model's {name}", came, "tensors with values", remedy))


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's module inside torch.compile, DistributedDataParallel and DataParallel."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif (inner := model._modules.get("_orig_mod")) is not None:
            model = inner
        else:
            return model


def readable(name: str) -> str:
    """The name of a module without the submodules that only wrap."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile was called on the model or on one of its modules."""
    return any("_orig_mod" in module._modules or _torch.is_compiled_in_place(module) for module in model.modules())


def initialised(model: nn.Module) -> nn.Module:
    """The model itself, or a deep copy if a lazy module of it has no parameters yet: the first pass makes them."""
    if not any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        return model
    # torch copies parameters without values, but not buffers.
    lazy = [buffer for buffer in model.buffers() if is_lazy(buffer)]
    return copy.deepcopy(model, {id(buffer): type(buffer)(False, buffer.device, buffer.dtype) for buffer in lazy})


def bind(model: nn.Module, inputs, kwargs: Mapping[str, Any] | None) -> Arguments:
    """The arguments of the call. A dict is keyword arguments if forward takes those names, else one argument.

    Raises:
        TypeError: no tensor with a dimension among them, or ``kwargs`` is not a mapping.
        ValueError: the first such tensor is empty.
    """
    if kwargs is not None and not isinstance(kwargs, Mapping):
        came = f"is a {type(kwargs).__name__}"
        raise TypeError(describe("profile", "kwargs", came, "a dict of keyword arguments of the model"))
    named = dict(kwargs or {})
    if isinstance(inputs, Mapping):
        # dict(): a tokenizer's result is a mapping, but not a dict.
        inputs = dict(inputs)
        arguments = Arguments((), {**inputs, **named}) if _takes(model, inputs | named) else Arguments((inputs,), named)
    else:
        # A packed sequence is a tuple too, but a single argument.
        several = isinstance(inputs, tuple) and not isinstance(inputs, PackedSequence)
        arguments = Arguments(inputs if several else (inputs,), named)
    tensors = arguments.tensors()
    if not any(tensor.dim() for tensor in tensors):
        parts = [*(inputs.values() if isinstance(inputs, dict) else arguments.args), *named.values()]
        kinds = ("a tensor of 0 dimensions" if isinstance(part, Tensor) else type(part).__name__ for part in parts)
        raise TypeError(describe("profile", "inputs", f"hold {', '.join(kinds) or 'nothing'}", _EXPECTED_INPUTS))
    if arguments.first_tensor().numel() == 0:
        shape = tuple(arguments.first_tensor().shape)
        raise ValueError(describe("profile", "the input", f"has shape {shape}", "at least one sample"))
    return arguments


def _takes(model: nn.Module, named: dict) -> bool:
    if not all(isinstance(name, str) for name in named):
        return False
    try:
        inspect.signature(model.forward).bind(**named)
    except (TypeError, ValueError):
        # A TypeError: other names. A ValueError: a forward in C without a signature.
        return False
    return True
