"""The places of a model's modules: under which names, and in which parents, a replacement has to be put."""

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType, MemberDescriptorType, MethodType, ModuleType

import torch
from torch import Tensor, nn

from lcw_ops._memory import sharing


@dataclass
class Site:
    """A module, and all places that hold it."""

    module: nn.Module
    name: str
    # (parent, key): ``parent._modules[key] is module``. Empty for the root.
    places: list[tuple[nn.Module, str]]


def find_sites(model: nn.Module) -> dict[int, Site]:
    """Every module of the model once, by id, in the order of ``named_modules``, with all its places."""
    sites = {id(module): Site(module, name, []) for name, module in model.named_modules()}
    for parent in [site.module for site in sites.values()]:
        for key, child in parent._modules.items():
            if child is not None:
                sites[id(child)].places.append((parent, key))
    return sites


def ties(sites: dict[int, Site]) -> dict[int, str]:
    """By the id of each parameter that is tied to another one, or overlaps one in memory: a clause that says so."""
    found: dict[int, str] = {}
    for ident, (names, parameters) in _shared(sites).items():
        if len(names) > 1:
            are_one = len(parameters) == 1 or len({(one.data_ptr(), one.shape) for one in parameters}) == 1
            found[ident] = f"{' and '.join(names[:3])} {'are one' if are_one else 'overlap in memory'}"
    return found


def owners_of_parameters(sites: dict[int, Site]) -> dict[int, list[str]]:
    """By the id of each parameter, the names under which it, or a part of its memory, is held."""
    return {ident: names for ident, (names, _) in _shared(sites).items()}


def _shared(sites: dict[int, Site]) -> dict[int, tuple[list[str], list[Tensor]]]:
    """By the id of each parameter, the names and the parameters with which it shares memory, itself included."""
    names: dict[int, list[str]] = {}
    parameters: list[nn.Parameter] = []
    for site in sites.values():
        for key, parameter in site.module._parameters.items():
            if parameter is not None:
                parameters.append(parameter)
                names.setdefault(id(parameter), []).append(f"{site.name}.{key}" if site.name else key)
    order = {name: place for place, name in enumerate(itertools.chain.from_iterable(names.values()))}
    found = {}
    for ident, others in sharing(parameters).items():
        all_names = sorted((name for other in others for name in names[id(other)]), key=order.__getitem__)
        found[ident] = (all_names, others)
    return found


# The attributes in which torch keeps parameters, children and hooks.
_TORCHS = frozenset(vars(nn.Module()))
# Values that hold no layer. An optimizer holds parameters, and ``convert`` deals with it.
_PLAIN = (str, bytes, int, float, complex, type(None), type, ModuleType, torch.optim.Optimizer)


def held_elsewhere(sites: dict[int, Site]) -> dict[int, str]:
    """Modules and parameters that are also reached through a plain attribute, by id, with the attribute's name.

    A list of layers beside the registered ones is an example, or a kept method of a layer, a partial or a dataclass. A
    replacement would not get there, and the old layer would go on.
    """
    found: dict[int, str] = {}
    for site in sites.values():
        for key, value in vars(site.module).items():
            if key in _TORCHS or isinstance(value, _PLAIN):
                continue
            for held in _held_in(value, depth=3):
                found.setdefault(id(held), f"{site.name}.{key}" if site.name else key)
    return found


def _held_in(value: object, depth: int) -> Iterator[object]:
    """The modules and parameters in a container, a method, a function or an object, down to some depth."""
    if isinstance(value, (nn.Module, nn.Parameter)):
        yield value
    elif depth and not isinstance(value, _PLAIN):
        for item in _contents(value):
            yield from _held_in(item, depth - 1)


def _contents(value: object) -> Iterable[object]:
    if isinstance(value, (list, tuple, set, frozenset)):
        return value
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, MethodType):
        return (value.__self__,)
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, FunctionType):
        return (*_cells(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    return (*getattr(value, "__dict__", {}).values(), *_slots(value))


def _slots(value: object) -> Iterator[object]:
    for kind in type(value).__mro__:
        for slot in vars(kind).values():
            if isinstance(slot, MemberDescriptorType):
                with contextlib.suppress(AttributeError):
                    yield slot.__get__(value)


def _cells(function: FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        # A cell is empty until its variable is assigned.
        with contextlib.suppress(ValueError):
            yield cell.cell_contents
