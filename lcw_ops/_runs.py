"""Runs of a user's model that leave no trace: fresh copies of its inputs, its buffers and attributes restored."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


class _CopyInGraphs(TorchFunctionMode):
    """Let ``copy.deepcopy`` copy tensors in the middle of a graph too, without the graph."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def fresh_copy(inputs: Any, model: nn.Module) -> Any:
    """A deep copy of a model's arguments. Modules and tensors of the model itself stay the same objects.

    An object that cannot be copied, such as an open file, is passed on as it is, with copies of all else around it.
    """
    own = [*model.modules(), *model.parameters(), *model.buffers()]

    def copied(value: Any) -> Any:
        return copy.deepcopy(value, {id(one): one for one in own})

    def copied_or_itself(leaf: Any) -> Any:
        try:
            return copied(leaf)
        except Exception:
            # Objects refuse a copy in any way they like.
            return leaf

    with _CopyInGraphs():
        try:
            return copied(inputs)
        except Exception:
            # Some part refuses a copy; the others are copied one by one.
            return pytree.tree_map(copied_or_itself, inputs)


@contextmanager
def kept_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore the buffers of these modules afterwards: which tensors they are, and their values."""
    places = [
        (module, key, buffer, buffer.detach().clone())
        for module in modules
        for key, buffer in module._buffers.items()
        if buffer is not None and not is_lazy(buffer)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, key, buffer, values in places:
                module._buffers[key] = buffer
                if not buffer.is_meta and (buffer.layout is not torch.strided or not _same_bits(buffer, values)):
                    buffer.copy_(values)


# The attributes of every module, apart from its mode: parameters, submodules, hooks, and buffers.
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


@contextmanager
def kept_attributes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore the plain attributes of these modules afterwards, such as counters, and remove new ones and new buffers.

    A model whose attributes say that its buffers are long enough fails if the buffers alone are restored. An object
    that the model changes in place, such as a list, stays changed, and so does a lazy module, which its first run makes
    whole.
    """
    kept = [(module, _attributes(module), dict(module._buffers)) for module in modules if not _is_lazy(module)]
    try:
        yield
    finally:
        for module, attributes, buffers in kept:
            for key in _attributes(module).keys() - attributes.keys():
                del vars(module)[key]
            vars(module).update(attributes)
            for key in [key for key, buffer in module._buffers.items() if buffer is not None]:
                if key not in buffers:
                    del module._buffers[key]
                elif buffers[key] is None:
                    module._buffers[key] = None


def _is_lazy(module: nn.Module) -> bool:
    return any(map(is_lazy, (*module._parameters.values(), *module._buffers.values())))


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if key not in _OF_EVERY_MODULE}


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)))
