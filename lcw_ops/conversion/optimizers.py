"""An optimizer that was made before the conversion: its groups get the new parameters in the old ones' places."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lcw_ops._checks import describe


class Remapping:
    """New parameters for old ones in the groups of an optimizer. State of a parameter that stays is kept.

    Args:
        optimizer: any of torch's kind.
        successors: for each parameter that leaves the model, by id, the named parameters that take its place; for a
            parameter that stays, itself and those that join it. A module stands for its parameters. One that several
            parameters list gives its biases to the last of these, and all else to the first.

    Raises:
        TypeError: not a ``torch.optim.Optimizer``.
        ValueError: it holds none of the model's parameters; it steps in backward; or it keeps state over all parameters
            together.
    """

    def __init__(
        self, function: str, optimizer: object, model: nn.Module, successors: dict[int, list[tuple[str, nn.Parameter]]]
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            came = f"is a {type(optimizer).__name__}"
            raise TypeError(describe(function, "optimizer", came, "a torch.optim.Optimizer, or None"))
        if getattr(optimizer, "in_backward", False):
            came, remedy = (
                "has in_backward=True, and so has hooks on the old parameters",
                "Make it after the conversion.",
            )
            raise ValueError(describe(function, "optimizer", came, "an optimizer without them", remedy))
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not held & {id(parameter) for parameter in model.parameters()}:
            came, remedy = "holds no parameter of the model", "Give the optimizer that trains this model."
            raise ValueError(describe(function, "optimizer", came, "parameters of the model", remedy))
        successors = _expanded(successors)
        self.optimizer, self.successors = optimizer, {key: new for key, new in successors.items() if key in held}
        if self.successors and isinstance(optimizer, torch.optim.LBFGS):
            came = "is an LBFGS, whose state is over all parameters together"
            remedy = "Convert first, and make the optimizer afterwards."
            raise ValueError(describe(function, "optimizer", came, "an optimizer with state per parameter", remedy))

    def lost_states(self) -> int:
        """How many parameters with state leave, so that their successors start without."""
        gone = [
            parameter
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in self.successors and not self._stays(parameter)
        ]
        return sum(parameter in self.optimizer.state for parameter in gone)

    def apply(self) -> Callable[[], None]:
        """Change the groups and the state; the result undoes it."""
        groups = [
            (group, {k: list(group[k]) for k in ("params", "param_names") if k in group})
            for group in self.optimizer.param_groups
        ]
        state = dict(self.optimizer.state)

        def undo() -> None:
            for group, before in groups:
                for key, values in before.items():
                    group[key][:] = values
            self.optimizer.state.clear()
            self.optimizer.state.update(state)

        placed: set[nn.Parameter] = set()
        for group, before in groups:
            names = before.get("param_names", [""] * len(before["params"]))
            pairs = []
            for name, parameter in zip(names, before["params"], strict=True):
                if id(parameter) not in self.successors:
                    pairs.append((name, parameter))
                    continue
                pairs += self.successors[id(parameter)]
                if not self._stays(parameter):
                    self.optimizer.state.pop(parameter, None)
            # In place: an optimizer may have kept the list.
            # A function may have given several new layers one parameter.
            pairs = [pair for pair in {new: (name, new) for name, new in pairs}.values() if pair[1] not in placed]
            placed.update(new for _, new in pairs)
            group["params"][:] = [new for _, new in pairs]
            if "param_names" in before:
                group["param_names"][:] = [name for name, _ in pairs]
        return undo

    def _stays(self, parameter: nn.Parameter) -> bool:
        return any(new is parameter for _, new in self.successors[id(parameter)])


_BIASES = ("bias", "location")


def _expanded(successors: dict[int, list[tuple[str, Any]]]) -> dict[int, list[tuple[str, nn.Parameter]]]:
    """Parameters in place of the modules that stand for them."""
    listed: dict[nn.Module, list[int]] = {}
    expanded: dict[int, list[tuple[str, nn.Parameter]]] = {key: [] for key in successors}
    for key, entries in successors.items():
        for name, entry in entries:
            if isinstance(entry, nn.Module):
                listed.setdefault(entry, []).append(key)
            else:
                expanded[key].append((name, entry))
    prefixes = {entry: name for entries in successors.values() for name, entry in entries}
    for module, keys in listed.items():
        for name, parameter in module.named_parameters():
            of_bias = name.rpartition(".")[2] in _BIASES
            # A parameter of the old layer that stays keeps its place.
            key = id(parameter) if id(parameter) in successors else keys[-1 if of_bias else 0]
            expanded[key].append((f"{prefixes[module]}.{name}", parameter))
    return expanded
