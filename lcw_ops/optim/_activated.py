"""What SGD and AdamW with activated gradients share: options in the parameter groups, checks, and one step over all.

Groups without activation take torch's own step. Of the others everything is checked and gathered before any changes.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch.nn import Parameter

from lcw_ops.ops import gradient_activation as ops
from lcw_ops.reference import checks
from lcw_ops.reference.gradient_activation import KINDS

_LOCAL_TYPES = {Tensor, Parameter}


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whose part on this process ``to_local`` gives. Without importing torch.distributed."""
    return type(tensor) not in _LOCAL_TYPES and hasattr(tensor, "to_local")


def split(*keys: list[Hashable]) -> dict[tuple, Callable[[list], list]]:
    """By combination of keys, what takes the entries that have it out of a list; and nothing out of an empty list."""
    if all(len(set(of_all)) == 1 for of_all in keys):
        return {tuple(of_all[0] for of_all in keys): list}
    places: dict[tuple, list[int]] = {}
    for place, key in enumerate(zip(*keys, strict=True)):
        places.setdefault(key, []).append(place)
    return {
        key: lambda column, chosen=chosen: [column[place] for place in chosen] if column else []
        for key, chosen in places.items()
    }


class ActivatedOptimizer(torch.optim.Optimizer):
    """Comes before torch's class among the bases. A subclass names its options and gathers the calls of its op."""

    _torch_optimizer: type[torch.optim.Optimizer]
    _options: tuple[str, ...] = ("gradient_activation", "alpha", "beta")
    # Whether torch's step does, in its form without fused=True.
    _takes_sparse: bool

    def _add_options(self, **options) -> None:
        """Into the defaults, and into the groups that torch's constructor has made."""
        self.defaults.update(options)
        for group in self.param_groups:
            for name, value in options.items():
                group.setdefault(name, value)
            self._check_options(group)

    def add_param_group(self, param_group: dict) -> None:
        # torch's constructor calls this before the options are among the defaults: it checks all groups at its end.
        if "gradient_activation" in self.defaults and isinstance(param_group, dict):
            self._check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _check_options(self, group: dict) -> None:
        name = self._name()
        checks.check_choice(name, "gradient_activation", group["gradient_activation"], (*KINDS, None))
        checks.check_positive_float32(name, "alpha", group["alpha"])
        checks.check_positive_float32(name, "beta", group["beta"])
        if group["gradient_activation"] is not None and group.get("differentiable", False):
            raise ValueError(
                f"{name}: differentiable is True and gradient_activation is {group['gradient_activation']!r}; the "
                "activated step is not recorded by autograd. Give gradient_activation=None, and activate the gradients "
                "before step() with lcw_ops.reference.gradient_activation, which is differentiable."
            )

    @classmethod
    def _name(cls) -> str:
        return f"optim.{cls.__name__}"

    def __setstate__(self, state: dict) -> None:
        # load_state_dict comes through here too: a checkpoint of torch's, or an older one, says nothing of activation,
        # so what each group has been given stays.
        before = self.__dict__.get("param_groups", ())
        for index, group in enumerate(state["param_groups"]):
            source = before[index] if index < len(before) else state["defaults"]
            for name in self._options:
                group.setdefault(name, source[name])
            self._check_options(group)
        super().__setstate__(state)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells GradScaler to leave the gradients scaled. An activated step needs them unscaled, and overflow found."""
        return self.__dict__.get("_fused_step_scales", False) and not any(map(_is_activated, self.param_groups))

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self._fused_step_scales = value

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step on the gradients as they are: accumulated, unscaled, clipped.

        Args:
            closure: computes the gradients anew and returns the loss; called once, before.

        Returns:
            The closure's loss, or None.

        Raises:
            TypeError: a gradient that is sparse, or a parameter that is not float32, float64, bfloat16 or float16.
            ValueError: options of a group that are out of range; an activated parameter whose elements share memory.
            RuntimeError: a sparse gradient in a group without activation, where torch's step refuses it too.
            On these errors no parameter has been changed. (With no activated group, errors are torch's.)
        """
        if not any(map(_is_activated, self.param_groups)):
            return self._torch_step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._mixed_step()
        return loss

    # The ops write through pointers that a traced program does not have.
    @torch._disable_dynamo
    @torch.no_grad()
    def _mixed_step(self) -> None:
        _check_capture(self)
        groups = self.param_groups
        plain = [group for group in groups if not _is_activated(group)]
        self._check_plain(plain)
        calls = [
            call for index, group in enumerate(groups) if _is_activated(group) for call in self._gather(index, group)
        ]
        if plain:
            self.param_groups = plain
            try:
                self._torch_step()
            finally:
                self.param_groups = groups
        for call in calls:
            call()

    def _check_plain(self, groups: list[dict]) -> None:
        """Refuses what torch's step would refuse only after it has changed other groups."""
        for group in groups:
            if self._takes_sparse and not group.get("fused", False):
                continue
            if any(param.grad is not None and param.grad.layout is not torch.strided for param in group["params"]):
                raise RuntimeError(
                    f"{self._name()}: a gradient in a group without activation is sparse, which torch's step does not "
                    "take here. Make the layer give a dense one (nn.Embedding's sparse=False), or put its parameters "
                    "into a torch.optim.SparseAdam."
                )

    def _torch_step(self, closure: Callable[[], float] | None = None) -> float | None:
        """torch's step without its hooks, which have run: the first optimizer of torch's class wraps them around it."""
        step = self._torch_optimizer.step
        return (step.__wrapped__ if getattr(step, "hooked", False) else step)(self, closure)

    def _gather(self, index: int, group: dict) -> list[Callable[[], None]]:
        """What is to be done for one group, checked."""
        raise NotImplementedError

    def _checked_group(self, index: int, group: dict) -> dict:
        """The group with those of its parameters that have a gradient, each once."""
        self._check_options(group)
        params = []
        # A parameter that a group has twice would be written by two threads at once.
        for param in {id(param): param for param in group["params"]}.values():
            gradient = param.grad
            if gradient is None:
                continue
            if gradient.layout is not torch.strided:
                raise TypeError(
                    f"{self._name()}: a gradient in param_groups[{index}] of shape {tuple(gradient.shape)} has layout "
                    f"{gradient.layout}; expected a dense tensor. Make the layer give one (nn.Embedding's "
                    "sparse=False), or put its parameters into a torch.optim.SparseAdam."
                )
            if param.dtype not in checks.FLOATING:
                raise TypeError(
                    f"{self._name()}: a parameter in param_groups[{index}] of shape {tuple(param.shape)} is "
                    f"{param.dtype}; expected float32, float64, bfloat16 or float16. Give its group "
                    "gradient_activation=None, which is torch's step."
                )
            if ops.may_overlap(param):
                raise ValueError(
                    f"{self._name()}: a parameter in param_groups[{index}] of shape {tuple(param.shape)} has elements "
                    "that share memory, and cannot be stepped in place. Give a clone, or the tensor that was expanded."
                )
            params.append(param)
        return {**group, "params": params}

    def _localize(self, index: int, params: list[Tensor], grads: list[Tensor], states: list[list[Tensor]]) -> None:
        """In place: the local parts of DTensors, and gradients in their parameter's dtype. States are checked."""
        dtypes = [param.dtype for param in params]
        for state in states:
            if [tensor.dtype for tensor in state] != dtypes:
                raise TypeError(
                    f"{self._name()}: a parameter in param_groups[{index}] and its state differ in dtype. Convert the "
                    "state too: optimizer.load_state_dict(optimizer.state_dict())."
                )
        if [grad.dtype for grad in grads] != dtypes:
            grads[:] = [grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]
        if set(map(type, params)) <= _LOCAL_TYPES:
            return
        for place, param in enumerate(params):
            if is_distributed(param):
                if grads[place].placements != param.placements:
                    grads[place] = grads[place].redistribute(param.device_mesh, param.placements)
                for tensors in (params, grads, *states):
                    tensors[place] = tensors[place].to_local()


def _is_activated(group: dict) -> bool:
    return group["gradient_activation"] is not None


def _check_capture(optimizer: torch.optim.Optimizer) -> None:
    """torch's own: a CUDA graph needs capturable=True, or it would repeat the first step's numbers."""
    if "capturable" in optimizer.defaults:
        # torch 2.10 calls it by its older name.
        check = getattr(optimizer, "_accelerator_graph_capture_health_check", None)
        (check or optimizer._cuda_graph_capture_health_check)()
