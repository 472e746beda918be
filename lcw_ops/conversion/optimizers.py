"""An optimizer that was made before the conversion: its groups get the new parameters in the old ones' places."""

from collections.abc import Callable

import torch
from torch import nn

from lcw_ops._checks import describe


class Remapping:
    """New parameters for old ones in the groups of an optimizer. State of a parameter that stays is kept.

    Args:
        optimizer: any of torch's kind.
        successors: for each parameter that leaves the model, by id, the named parameters that take its place; for a
            parameter that stays, itself and those that join it.

    Raises:
        TypeError: not a ``torch.optim.Optimizer``.
        ValueError: it holds none of the model's parameters; or it keeps state over all parameters together.
    """

    def __init__(
        self, function: str, optimizer: object, model: nn.Module, successors: dict[int, list[tuple[str, nn.Parameter]]]
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            came = f"is a {type(optimizer).__name__}"
            raise TypeError(describe(function, "optimizer", came, "a torch.optim.Optimizer, or None"))
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not held & {id(parameter) for parameter in model.parameters()}:
            came, remedy = "holds no parameter of the model", "Give the optimizer that trains this model."
            raise ValueError(describe(function, "optimizer", came, "parameters of the model", remedy))
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
            group["params"][:] = [new for _, new in pairs]
            if "param_names" in before:
                group["param_names"][:] = [name for name, _ in pairs]
        return undo

    def _stays(self, parameter: nn.Parameter) -> bool:
        return any(new is parameter for _, new in self.successors[id(parameter)])
