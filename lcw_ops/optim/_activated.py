"""What SGD and AdamW with activated gradients share: options in the parameter groups, checks, and one step over all.

Groups without activation take torch's own step. Of the others everything is checked and gathered before any changes.
"""

import operator
import sys
import weakref
from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch.nn import Parameter

from lcw_ops import _checks as checks
from lcw_ops.ops import gradient_activation as ops
from lcw_ops.reference.gradient_activation import KINDS

_LOCAL_TYPES = {Tensor, Parameter}


# A state must have these in common with its parameter.
_FORM = operator.attrgetter("shape", "device", "layout")

# The code that torch wraps around the step of every optimizer class to run the hooks.
_STEP_WRAPPER = torch.optim.Optimizer.profile_hook_step(lambda *_: None).__code__

# The hooks of lcw_ops.activate_gradients in this process. An optimizer does not know which wrappers hold it.
attached_hooks = weakref.WeakSet()


def find_running_steps() -> list[torch.optim.Optimizer]:
    """The optimizers whose steps are running in this thread, the innermost first.

    A subclass whose step calls ``super().step()`` is there twice: torch runs the hooks around the step of every class
    of which it has made an optimizer. They are read from the stack, because a step that raised leaves the stack too.
    """
    frame, found = sys._getframe(1), []
    while frame is not None:
        code = frame.f_code
        # By name: while torch.compile traces, the code that runs is another.
        if code.co_name == _STEP_WRAPPER.co_name and code.co_filename == _STEP_WRAPPER.co_filename:
            args = frame.f_locals.get("args")
            if args:
                found.append(args[0])
        frame = frame.f_back
    return found


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
    # Reads from a group all options that `_check_options` looks at.
    _watched: operator.itemgetter
    # Whether torch's step does, in its form without fused=True.
    _takes_sparse: bool

    def _add_options(self, **options) -> None:
        """Into the defaults, and into the groups that torch's constructor has made."""
        self.defaults.update(options)
        self._forget_checks()
        for index, group in enumerate(self.param_groups):
            for name, value in options.items():
                group.setdefault(name, value)
            self._check_changed_options(index, group)

    def add_param_group(self, param_group: dict) -> None:
        # torch's constructor calls this before the options are among the defaults: it checks all groups at its end.
        if "gradient_activation" not in self.defaults or not isinstance(param_group, dict):
            super().add_param_group(param_group)
            return
        self._check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._checked_options[len(self.param_groups) - 1] = self._watched(self.param_groups[-1])

    def _forget_checks(self) -> None:
        # Both are by the index of the group: its options, and where its parameters and states lie. Neither is saved.
        self._checked_options: dict[int, tuple] = {}
        self._checked_memory: dict[int, tuple | None] = {}

    def _check_changed_options(self, index: int, group: dict) -> None:
        """Checks options that have changed: users and schedulers write into groups.

        Values are compared by identity: True equals 1.0.
        """
        try:
            values = self._watched(group)
        except KeyError as error:
            raise self._missing_option(index) from error
        checked = self._checked_options.get(index)
        if checked is None or any(map(operator.is_not, values, checked)):
            self._check_options(group)
            self._checked_options[index] = values

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

    def is_activated(self, index: int) -> bool:
        """Whether a step activates the gradients of ``param_groups[index]``."""
        try:
            return self.param_groups[index]["gradient_activation"] is not None
        except KeyError as error:
            raise self._missing_option(index) from error

    def _are_activated(self) -> list[bool]:
        return list(map(self.is_activated, range(len(self.param_groups))))

    def _missing_option(self, index: int) -> ValueError:
        name = next(name for name in self.defaults if name not in self.param_groups[index])
        return ValueError(
            f"{self._name()}: param_groups[{index}] has no {name!r}; expected every option in every group. Put it "
            f"back: the optimizer's default is {self.defaults[name]!r}."
        )

    @classmethod
    def _name(cls) -> str:
        return f"optim.{cls.__name__}"

    def __setstate__(self, state: dict) -> None:
        # load_state_dict comes through here too: a checkpoint of torch's, or an older one, says nothing of activation,
        # so what each group has been given stays.
        self._forget_checks()
        before = self.__dict__.get("param_groups", ())
        defaults = state.get("defaults") or self.defaults
        for index, group in enumerate(state["param_groups"]):
            given = before[index] if index < len(before) else {}
            for name in self._options:
                group.setdefault(name, given.get(name, defaults[name]))
            self._check_options(group)
        super().__setstate__(state)
        # A subclass may have saved these with the rest.
        self._forget_checks()
        self._checked_options = dict(enumerate(map(self._watched, self.param_groups)))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells GradScaler to leave the gradients scaled. An activated step needs them unscaled, and overflow found."""
        return self.__dict__.get("_fused_step_scales", False) and not any(self._are_activated())

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
            TypeError: a gradient that is sparse or complex; a parameter that is not float32, float64, bfloat16 or
                float16; a state that is not a tensor, or whose dtype is not one of these.
            ValueError: options of a group that are missing or out of range; an activated parameter whose elements share
                memory, or that has no memory; a state that is missing, or whose shape, device or layout is not its
                parameter's; a step inside that of an optimizer whose hook has activated the same gradients.
            RuntimeError: a sparse gradient in a group without activation, where torch's step refuses it too.
            On these errors no parameter has been changed. (With no activated group, errors are torch's.)
        """
        if not any(self._are_activated()):
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
        self._check_hooks_around()
        _check_capture(self)
        groups, activated = self.param_groups, self._are_activated()
        plain = [group for group, is_activated in zip(groups, activated, strict=True) if not is_activated]
        self._check_plain(plain)
        calls = [call for index, group in enumerate(groups) if activated[index] for call in self._gather(index, group)]
        if plain:
            self.param_groups = plain
            try:
                self._torch_step()
            finally:
                self.param_groups = groups
        for call in calls:
            call()

    def _check_hooks_around(self) -> None:
        """ValueError if this step runs inside that of an optimizer whose hook has activated the same gradients."""
        if not attached_hooks:
            return
        for other in find_running_steps():
            hooks = () if other is self else getattr(other, "_optimizer_step_pre_hooks", ())
            for hook in attached_hooks.intersection(hooks):
                hook.check_apart(other, self)

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
        self._check_changed_options(index, group)
        params, strided, floating = [], torch.strided, checks.FLOATING
        given = group["params"]
        if len(set(map(id, given))) < len(given):
            # A parameter that a group has twice would be written by two threads at once.
            given = {id(param): param for param in given}.values()
        for param in given:
            gradient = param.grad
            if gradient is None:
                continue
            if gradient.layout is not strided:
                raise TypeError(
                    f"{self._name()}: a gradient in param_groups[{index}] of shape {tuple(gradient.shape)} has layout "
                    f"{gradient.layout}; expected a dense tensor. Make the layer give one (nn.Embedding's "
                    "sparse=False), or put its parameters into a torch.optim.SparseAdam."
                )
            if param.dtype not in floating:
                raise TypeError(
                    f"{self._name()}: a parameter in param_groups[{index}] of shape {tuple(param.shape)} is "
                    f"{param.dtype}; expected float32, float64, bfloat16 or float16. Give its group "
                    "gradient_activation=None, which is torch's step."
                )
            if not param.is_contiguous() and ops.may_overlap(param):
                raise ValueError(
                    f"{self._name()}: a parameter in param_groups[{index}] of shape {tuple(param.shape)} has elements "
                    "that share memory, and cannot be stepped in place. Give a clone, or the tensor that was expanded."
                )
            params.append(param)
        return {**group, "params": params}

    def _check_tensors(
        self, index: int, params: list[Tensor], grads: list[Tensor], states: dict[str, list[Tensor]]
    ) -> None:
        """Raises unless gradients and each name's states can be stepped beside their parameters, element by element."""
        for param, grad in zip(params, grads, strict=True):
            if grad.shape != param.shape:
                raise ValueError(
                    f"{self._name()}: a parameter in param_groups[{index}] has shape {tuple(param.shape)} and its "
                    f"gradient {tuple(grad.shape)}; expected one shape. Compute the gradient anew."
                )
            if param._is_zerotensor():
                raise ValueError(
                    f"{self._name()}: a parameter in param_groups[{index}] of shape {tuple(param.shape)} is zeros "
                    "without memory, and cannot be stepped in place. Give a clone."
                )
        for name, tensors in states.items():
            for param, tensor in zip(params, tensors, strict=True):
                self._check_state(index, param, name, tensor)

    def _check_state(self, index: int, param: Tensor, name: str, state: object) -> None:
        where = self._where(index, param, name)
        if not isinstance(state, Tensor):
            raise TypeError(
                f"{where} is a {type(state).__name__}; expected a tensor of that shape. Put one into optimizer.state, "
                "or delete the parameter's entry there to start with a new state."
            )
        if _FORM(state) != _FORM(param):
            came, expected = (f"shape {tuple(t.shape)}, {t.layout} on {t.device}" for t in (state, param))
            raise ValueError(f"{where} has {came}; expected {expected}. Load the state of the same model.")
        if state._is_zerotensor() or ops.may_overlap(state):
            raise ValueError(
                f"{where} has elements that share memory or have none, and cannot be stepped in place. Put a clone "
                "into optimizer.state."
            )

    def _check_gradients(self, index: int, grads: list[Tensor]) -> None:
        """Refuses complex gradients; called where a gradient and its parameter differ in dtype."""
        for grad in grads:
            if grad.is_complex():
                raise TypeError(
                    f"{self._name()}: a gradient in param_groups[{index}] of shape {tuple(grad.shape)} is "
                    f"{grad.dtype}; expected real numbers. Give the parameter its real part."
                )

    def _where(self, index: int, param: Tensor, name: str) -> str:
        """The beginning of a message about a state."""
        return f"{self._name()}: {name} of a parameter in param_groups[{index}] of shape {tuple(param.shape)}"

    @staticmethod
    def _localize(params: list[Tensor], grads: list[Tensor], *states: list[Tensor]) -> None:
        """Replaces the DTensors in the lists by their local parts."""
        if set(map(type, params)) <= _LOCAL_TYPES:
            return
        for place, param in enumerate(params):
            if is_distributed(param):
                if grads[place].placements != param.placements:
                    grads[place] = grads[place].redistribute(param.device_mesh, param.placements)
                for tensors in (params, grads, *states):
                    tensors[place] = tensors[place].to_local()


def memory_of(*lists: list[Tensor]) -> tuple | None:
    """Which tensors these are, and where they lie; None if one has no memory, or is not a tensor.

    A group whose memory is that of its last step was checked then: ``tensor.data = ...`` moves a tensor too. The ops
    check again whatever could make them read beyond a tensor.
    """
    tensors = [tensor for tensors in lists for tensor in tensors]
    try:
        return list(map(id, tensors)), list(map(Tensor.data_ptr, tensors))
    except (RuntimeError, TypeError):
        return None


def are_mixed(params: list[Tensor], *lists: list[Tensor]) -> list[bool]:
    """For each parameter, whether its gradient or a state differs from it in dtype: it is then stepped as a copy."""
    dtypes = [param.dtype for param in params]
    others = [[tensor.dtype for tensor in tensors] for tensors in lists]
    if all(other == dtypes for other in others):
        return [False] * len(params)
    return [any(dtype is not own for dtype in belonging) for own, *belonging in zip(dtypes, *others, strict=True)]


def _check_capture(optimizer: torch.optim.Optimizer) -> None:
    """torch's own: a CUDA graph needs capturable=True, or it would repeat the first step's numbers."""
    if "capturable" in optimizer.defaults:
        # torch 2.10 calls it by its older name.
        check = getattr(optimizer, "_accelerator_graph_capture_health_check", None)
        (check or optimizer._cuda_graph_capture_health_check)()
