"""Put new layers in the places of old ones, with all that belongs to a layer beside its tensors; and take it back."""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcw_ops import _torch
from lcw_ops.conversion.sites import Site
from lcw_ops.nn._refusals import weight_norm_hooks


@dataclass
class Exchange:
    """One old layer and the new one that takes all of its places."""

    site: Site
    new: nn.Module
    note: str = ""
    # Hooks of the old layer that the new layer replaces, by key.
    replaced_hooks: tuple[int, ...] = ()
    # The parameter that the new layer is to have as its bias, and the values to write into it at the end. Until then
    # the new layer has a bias of its own.
    bias: tuple[nn.Parameter, Tensor] | None = None

    @property
    def old(self) -> nn.Module:
        return self.site.module

    @property
    def name(self) -> str:
        return self.site.name

    def parameter_name(self, own: str) -> str:
        """The name in the model of a parameter of the new layer."""
        return f"{self.name}.{own}" if self.name else own


def prepare(exchange: Exchange, own_attributes: frozenset[str] = frozenset()) -> None:
    """Give the new layer the old one's hooks, training flag and extra attributes. The old layer is only read.

    ``own_attributes`` belong to the old layer's class, and mean nothing to the new layer.
    """
    old, new = exchange.old, exchange.new
    if old._forward_pre_hooks:
        exchange.replaced_hooks = tuple(key for key, _ in weight_norm_hooks(old))
    for name, hooks in _torch.hooks_of_module(old).items():
        if isinstance(hooks, dict):
            if not hooks:
                continue
            kept = {key: hook for key, hook in hooks.items() if not _is_replaced(name, key, exchange)}
            vars(new)[name] = type(hooks)(_merge(name, kept, getattr(new, name), new))
        elif hooks is not None:
            vars(new)[name] = hooks
    # train() would visit the children, which a new layer has in the one case of a Sequential.
    for module in new.modules():
        module.training = old.training
    # torch's older weight norm keeps a tensor there, which the new layer computes.
    computed = {hook.name for _, hook in weight_norm_hooks(old)}
    for name, value in vars(old).items():
        is_extra = name not in own_attributes and name not in vars(new) and not hasattr(type(new), name)
        if is_extra and name not in computed:
            vars(new)[name] = value


def place(exchanges: Iterable[Exchange]) -> None:
    for exchange in exchanges:
        for parent, key in exchange.site.places:
            parent._modules[key] = exchange.new


def take_back(exchanges: Iterable[Exchange]) -> None:
    for exchange in exchanges:
        for parent, key in exchange.site.places:
            parent._modules[key] = exchange.old


@contextmanager
def placed(exchanges: list[Exchange]) -> Iterator[None]:
    """The new layers are in their places for a while."""
    try:
        place(exchanges)
        yield
    finally:
        take_back(exchanges)


def commit(exchanges: list[Exchange], *more: Callable[[], Callable[[], None]]) -> None:
    """Replace all layers, or none: if anything fails, everything is as before.

    Args:
        exchanges: prepared ones.
        more: further changes to make. Each returns the function that undoes it.
    """
    undo: list[Callable[[], None]] = [lambda: take_back(exchanges)]
    try:
        for change in more:
            undo.append(change())
        for exchange in exchanges:
            undo.append(_hand_over_hooks(exchange))
            if exchange.bias is not None:
                parameter, value = exchange.bias
                undo.append(_write(parameter, value))
                exchange.new._parameters["bias"] = parameter
        place(exchanges)
    except BaseException:
        for function in reversed(undo):
            function()
        raise


def _write(parameter: nn.Parameter, value: Tensor) -> Callable[[], None]:
    before = parameter.detach().clone()

    @torch.no_grad()
    def write(values: Tensor) -> None:
        parameter.copy_(values)

    write(value)
    return lambda: write(before)


def _hand_over_hooks(exchange: Exchange) -> Callable[[], None]:
    """Give the new layer the very dictionaries of hooks, so that a handle's ``remove()`` goes on working."""
    old, new = exchange.old, exchange.new
    undo: list[Callable[[], None]] = []
    for name, hooks in _torch.hooks_of_module(old).items():
        if not isinstance(hooks, dict) or not hooks:
            continue
        before, merged = hooks.copy(), vars(new)[name].copy()
        _fill(hooks, merged)
        vars(new)[name] = hooks
        undo.append(functools.partial(_fill, hooks, before))

    def take_back_hooks() -> None:
        for function in undo:
            function()

    return take_back_hooks


def _fill(hooks: dict, values: dict) -> None:
    hooks.clear()
    hooks.update(values)


def _is_replaced(name: str, key: int, exchange: Exchange) -> bool:
    if key in exchange.replaced_hooks:
        return True
    # The hook by which torch's newer weight norm reads state dicts of the older one: the new layer does that itself.
    hook = _torch.hooks_of_module(exchange.old)[name][key]
    return getattr(getattr(hook, "hook", hook), "__name__", "") == "_weight_norm_compat_hook"


def _merge(name: str, hooks: dict, own: dict, new: nn.Module) -> dict:
    """The hooks that the new layer registers itself, and then those that were handed over."""
    return {**own, **{key: _torch.bind_hook(hook, new) for key, hook in hooks.items()}}


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy, also of layers in which torch's older weight norm has left a weight that carries gradients."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.requires_grad and not value.is_leaf:
                # torch copies no tensor in the middle of a graph. The hook renews this one in the next call.
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)
