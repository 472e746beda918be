"""The places of a model's modules: under which names, and in which parents, a replacement has to be put."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType

from torch import Tensor, nn


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
    """The names under which each parameter is held, by the parameter's id."""
    owners: dict[int, list[str]] = {}
    for site in sites.values():
        for key, parameter in site.module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{site.name}.{key}" if site.name else key)
    return owners


# The attributes in which torch keeps parameters, children and hooks.
_TORCHS = frozenset(vars(nn.Module()))


def held_elsewhere(sites: dict[int, Site]) -> dict[int, str]:
    """Modules that are also reached through a plain attribute, by id, with the attribute's name.

    A list of layers beside the registered ones is an example, or a kept method of a layer. A replacement would not get
    there, and the old layer would go on.
    """
    found: dict[int, str] = {}
    for site in sites.values():
        for key, value in vars(site.module).items():
            if key in _TORCHS or isinstance(value, (str, int, float, Tensor, type(None))):
                continue
            for module in _modules_in(value, depth=2):
                if id(module) in sites:
                    found.setdefault(id(module), f"{site.name}.{key}" if site.name else key)
    return found


def _modules_in(value: object, depth: int) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, MethodType):
        yield from _modules_in(value.__self__, 0)
    elif depth and isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _modules_in(item, depth - 1)
    elif depth and isinstance(value, dict):
        for item in value.values():
            yield from _modules_in(item, depth - 1)
