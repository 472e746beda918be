"""The places of a model's modules: under which names, and in which parents, a replacement has to be put."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType

from torch import Tensor, nn
from torch.nn.parameter import is_lazy


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


def owners_of_parameters(sites: dict[int, Site]) -> dict[int, list[str]]:
    """The names under which each parameter's memory is held, by its key."""
    owners: dict[int, list[str]] = {}
    for site in sites.values():
        for key, parameter in site.module._parameters.items():
            if parameter is not None:
                name = f"{site.name}.{key}" if site.name else key
                owners.setdefault(key_of_memory(parameter), []).append(name)
    return owners


def key_of_memory(parameter: Tensor) -> int:
    """One key for parameters that are one, be it that they are two objects on the same memory."""
    # Tensors without elements have the address 0, and those without values or of another class may have none.
    has_address = type(parameter) is nn.Parameter and not parameter.is_meta and not is_lazy(parameter)
    return (parameter.data_ptr() if has_address else 0) or id(parameter)


# The attributes in which torch keeps parameters, children and hooks.
_TORCHS = frozenset(vars(nn.Module()))


def held_elsewhere(sites: dict[int, Site]) -> dict[int, str]:
    """Modules and parameters that are also reached through a plain attribute, by id, with the attribute's name.

    A list of layers beside the registered ones is an example, or a kept method of a layer. A replacement would not get
    there, and the old layer would go on.
    """
    found: dict[int, str] = {}
    for site in sites.values():
        for key, value in vars(site.module).items():
            if key in _TORCHS or isinstance(value, (str, int, float, type(None))):
                continue
            for held in _held_in(value, depth=2):
                found.setdefault(id(held), f"{site.name}.{key}" if site.name else key)
    return found


def _held_in(value: object, depth: int) -> Iterator[object]:
    if isinstance(value, (nn.Module, nn.Parameter)):
        yield value
    elif isinstance(value, MethodType):
        yield value.__self__
    elif depth and isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _held_in(item, depth - 1)
    elif depth and isinstance(value, dict):
        for item in value.values():
            yield from _held_in(item, depth - 1)
