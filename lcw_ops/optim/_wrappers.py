"""Optimizers that hold other optimizers: Lightning Fabric's, Accelerate's, timm's ``Lookahead``, users' own."""

import torch

from lcw_ops import _torch


def find_stepping(name: str, optimizer: object) -> torch.optim.Optimizer:
    """The optimizer whose step runs its hooks: the given one, or the only one that it holds.

    Raises TypeError, on behalf of the function ``name``, if there is none.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"{name}: optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer. "
            f"{_advice(_held(optimizer))}"
        )
    passed: list[torch.optim.Optimizer] = []
    while not _torch.runs_step_hooks(optimizer):
        passed.append(optimizer)
        held = {path: other for path, other in _held(optimizer).items() if not contains(passed, other)}
        if not held and _torch.has_step_hooks(optimizer):
            # torch wraps the step of the class when an optimizer is made. This class was given another step afterwards.
            _torch.wrap_step(optimizer)
            return optimizer
        if len(held) != 1 or _param_ids(*held.values()) != _param_ids(optimizer):
            raise TypeError(
                f"{name}: optimizer is a {type(passed[0]).__name__}; the step of a {type(optimizer).__name__} does not "
                f"run hooks, and it does not hold exactly one optimizer with the same parameters. {_advice(held)}"
            )
        (optimizer,) = held.values()
    return optimizer


def held_at_any_depth(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers that ``optimizer`` holds, those that they hold, and so on; each once."""
    found = [optimizer]
    for holder in found:
        found += [other for other in _held(holder).values() if not contains(found, other)]
    return found[1:]


def contains(optimizers: list[torch.optim.Optimizer], optimizer: torch.optim.Optimizer) -> bool:
    """Whether the list has this very object: ``in`` would compare by ``__eq__``."""
    return any(other is optimizer for other in optimizers)


def _held(holder: object) -> dict[str, torch.optim.Optimizer]:
    """Optimizers that are attributes of ``holder``, or in a list or dict that is an attribute; each once, by name."""
    found: dict[int, tuple[str, torch.optim.Optimizer]] = {}
    for name, value in getattr(holder, "__dict__", {}).items():
        if isinstance(value, torch.optim.Optimizer):
            found.setdefault(id(value), (name, value))
        elif isinstance(value, (dict, list, tuple)):
            for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(entry, torch.optim.Optimizer):
                    found.setdefault(id(entry), (f"{name}[{key!r}]", entry))
    found.pop(id(holder), None)
    return dict(found.values())


def _advice(held: dict[str, torch.optim.Optimizer]) -> str:
    if not held:
        return (
            "Give the optimizer whose step() changes the parameters; a class of your own counts as an "
            "optimizer if its __init__ calls torch.optim.Optimizer.__init__."
        )
    each = "" if len(held) == 1 else ", each in a call of its own"
    return f"Give {' and '.join(f'optimizer.{path}' for path in held)}{each}."


def _param_ids(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(param) for group in getattr(optimizer, "param_groups", ()) for param in group["params"]}
