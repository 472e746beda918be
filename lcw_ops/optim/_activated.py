"""The parts that SGD and AdamW with activated gradients share: options of groups, checks, and the step over all groups.

Groups without activation take torch's own step. Everything in the other groups is checked and gathered before any
parameter changes.
"""

import operator
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, compress, repeat
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

from lcw_ops import _checks as checks
from lcw_ops import _torch
from lcw_ops.ops import backends
from lcw_ops.ops import gradient_activation as ops
from lcw_ops.optim._in_backward import StepsInBackward
from lcw_ops.reference.gradient_activation import KINDS

_LOCAL_TYPES = {Tensor, Parameter}
_STRIDED = {torch.strided}
_FLOATING = set(checks.FLOATING)

# A state must have these in common with its parameter.
_FORM = operator.attrgetter("shape", "device", "layout")

# Each of these reads one property of thousands of tensors, by map: a loop in Python takes twice as long.
_ACTIVATION = operator.itemgetter("gradient_activation")
_DEVICE, _DTYPE, _GRAD, _LAYOUT = map(operator.attrgetter, ("device", "dtype", "grad", "layout"))

# The hooks of lcw_ops.activate_gradients in this process. An optimizer does not know which wrappers hold it.
attached_hooks: weakref.WeakSet = weakref.WeakSet()


class Gathered(NamedTuple):
    """The states of one group's parameters, and how to step them.

    Attributes:
        states: name -> one tensor per parameter; [] for a state that the options do not use. The op takes the lists in
            this order, after parameters and gradients.
        counts: AdamW's counts of steps, the op's last list; empty for an optimizer without them.
        steps: one function per parameter. Parameters with the same function share one call:
            ``step(backend, params, grads, *states, *counts)``.
        afterwards: calls to make after all groups have been stepped.
    """

    states: dict[str, list[Tensor]]
    counts: tuple[list[Tensor], ...]
    steps: Sequence[partial[None]]
    afterwards: tuple[Callable[[], None], ...] = ()


def is_distributed(tensor: object) -> TypeGuard[Any]:
    """Whether the tensor is a DTensor: ``to_local`` gives its local part. Does not import torch.distributed."""
    return type(tensor) not in _LOCAL_TYPES and hasattr(tensor, "to_local")


def split(*keys: Sequence) -> dict[tuple, Callable[[list], list]]:
    """Map each combination of keys to a function that picks the entries with these keys from a list.

    Each of ``keys`` has one key per entry. For an empty list the functions return an empty list.
    """
    if list(map(len, map(set, keys))) == [1] * len(keys):
        return {tuple(map(operator.itemgetter(0), keys)): list}
    places: dict[tuple, list[int]] = {}
    for place, key in enumerate(zip(*keys, strict=True)):
        places.setdefault(key, []).append(place)
    return {key: partial(_take, chosen) for key, chosen in places.items()}


def _take(places: list[int], column: list) -> list:
    return [column[place] for place in places] if column else []


class ActivatedOptimizer(torch.optim.Optimizer):
    """The base class, to be listed before torch's. A subclass names its options, and gathers states and op calls."""

    _torch_optimizer: type[torch.optim.Optimizer]
    # The name of the op that makes the step.
    _op: str
    _options: tuple[str, ...] = ("gradient_activation", "alpha", "beta")
    # Reads from a group all options that `_check_options` checks.
    _watched: operator.itemgetter
    # Whether torch's step takes sparse gradients, unless fused=True.
    _takes_sparse: bool
    # Whether backward makes the steps, and the largest size of a gradient's elements there.
    in_backward: bool = False
    max_grad_value: float | None = None
    _steps_in_backward: StepsInBackward | None = None

    def _add_options(self, in_backward: bool, max_grad_value: float | None, **options) -> None:
        """Add the options to the defaults, and to the groups that torch's constructor has made."""
        if max_grad_value is not None:
            checks.check_positive(self._name(), "max_grad_value", max_grad_value)
            if not in_backward:
                remedy = "Without in_backward, call torch.nn.utils.clip_grad_value_ before step()."
                expected = "None, because in_backward is False"
                came = f"is {max_grad_value}"
                raise ValueError(checks.describe(self._name(), "max_grad_value", came, expected, remedy))
        self.defaults.update(options)
        self._forget_checks()
        for index, group in enumerate(self.param_groups):
            for name, value in options.items():
                group.setdefault(name, value)
            self._check_changed_options(index, group)
        if in_backward:
            self.in_backward, self.max_grad_value = True, max_grad_value
            self._start_in_backward()

    def _start_in_backward(self) -> StepsInBackward:
        for index, group in enumerate(self.param_groups):
            if group.get("differentiable", False):
                came = f"has differentiable=True in param_groups[{index}]"
                expected = "False, because autograd does not record a step during backward"
                raise ValueError(checks.describe(self._name(), "an optimizer with in_backward=True", came, expected))
        if self._steps_in_backward is None:
            self._steps_in_backward = StepsInBackward(self)
        self._steps_in_backward.watch()
        return self._steps_in_backward

    def add_param_group(self, param_group: dict) -> None:
        # torch's constructor calls this before the defaults have the options; `_add_options` then checks all groups.
        if "gradient_activation" not in self.defaults or not isinstance(param_group, dict):
            super().add_param_group(param_group)
            return
        self._check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._checked_options[len(self.param_groups) - 1] = self._watched(self.param_groups[-1])
        if self.in_backward:
            try:
                self._start_in_backward()
            except (ValueError, TypeError):
                self.param_groups.pop()
                raise

    def _forget_checks(self) -> None:
        # These map the index of a group to its options, and to the addresses of its parameters and states, as of the
        # last check. Neither is saved.
        self._checked_options: dict[int, tuple] = {}
        self._checked_memory: dict[int, tuple | None] = {}

    def _check_changed_options(self, index: int, group: dict) -> None:
        """Check options that have changed: users and schedulers write into groups.

        Values are compared by identity, because True equals 1.0 but is not a valid number.
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
        """``is_activated`` of every group."""
        if getattr(self.is_activated, "__func__", None) is not _IS_ACTIVATED:
            # A subclass or the instance has its own is_activated.
            return list(map(self.is_activated, range(len(self.param_groups))))
        try:
            return list(map(operator.is_not, map(_ACTIVATION, self.param_groups), repeat(None)))
        except KeyError as error:
            index = next(index for index, group in enumerate(self.param_groups) if "gradient_activation" not in group)
            raise self._missing_option(index) from error

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
        # load_state_dict calls this too. A checkpoint of torch's optimizer has no activation options, and an older one
        # of ours lacks some. Each group then keeps its own.
        self._forget_checks()
        before = self.__dict__.get("param_groups", ())
        defaults = state.get("defaults") or self.defaults
        for index, group in enumerate(state["param_groups"]):
            given = before[index] if index < len(before) else {}
            for name in self._options:
                group.setdefault(name, given.get(name, defaults[name]))
            self._check_options(group)
        super().__setstate__(state)
        # A subclass may have saved the results of checks with the rest of its state.
        self._forget_checks()
        self._checked_options = dict(enumerate(map(self._watched, self.param_groups)))
        if self.in_backward:
            self._start_in_backward().forgive()

    def __getstate__(self) -> dict:
        state = super().__getstate__()
        if self.in_backward:
            state.update(in_backward=True, max_grad_value=self.max_grad_value)
        return state

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler may leave the gradients scaled. Before an activated step it must unscale them."""
        if self.in_backward:
            # GradScaler then calls its unscale_, which raises.
            return False
        return self.__dict__.get("_fused_step_scales", False) and not any(self._are_activated())

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self._fused_step_scales = value

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step on the gradients as they are: accumulated, unscaled, clipped.

        Args:
            closure: computes the gradients and returns the loss; called once, before the step.

        Returns:
            The closure's loss, or None.

        Raises:
            TypeError: a gradient is sparse or complex; a parameter is not float32, float64, bfloat16 or float16; a
                state is not a tensor, or its dtype is not one of these.
            ValueError: a group's options are missing or out of range; an activated parameter has no memory, or its
                elements share memory; a state is missing, or its shape, device or layout is not its parameter's; the
                step runs inside the step of an optimizer whose hook has activated the same gradients.
            RuntimeError: a sparse gradient in a group without activation, where torch's step refuses it too.
            After these errors no parameter has changed. (Without any activated group, the errors are torch's.)
        """
        if self._steps_in_backward is not None:
            return self._steps_in_backward.end_step(closure)
        if not any(self._are_activated()):
            return self._torch_step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._mixed_step()
        return loss

    # The ops write through pointers that a traced program does not have.
    @_torch.never_traced
    @torch.no_grad()
    def _mixed_step(self) -> None:
        if attached_hooks:
            self._check_hooks_around()
        if "capturable" in self.defaults:
            # Without capturable=True a CUDA graph would repeat the first step's numbers.
            _torch.check_graph_capture(self)
        groups, activated = self.param_groups, self._are_activated()
        plain = list(compress(groups, map(operator.not_, activated)))
        if plain:
            self._check_plain(plain)
        calls: list[Callable[[], None]] = []
        for index, group in enumerate(groups):
            if activated[index]:
                calls += self._prepare(index, group)
        if plain:
            self._torch_step_of(plain)
        for call in calls:
            call()

    def _step_some(self, index: int, params: list[Tensor]) -> None:
        """Step these parameters with the options of a group. Their gradients and states are found as for a step."""
        if "capturable" in self.defaults:
            _torch.check_graph_capture(self)
        group = {**self.param_groups[index], "params": params}
        if not self.is_activated(index):
            self._torch_step_of([group])
            return
        for call in self._prepare(index, group):
            call()

    def _steps_elementwise(self, group: dict, param: Tensor) -> bool:
        """Whether a step of a part of the parameter gives its elements the bits that a step of the whole gives."""
        return True

    def _torch_step_of(self, groups: list[dict]) -> None:
        """torch's step of these groups."""
        own, self.param_groups = self.param_groups, groups
        try:
            self._torch_step()
        finally:
            self.param_groups = own

    def _check_hooks_around(self) -> None:
        """Raise ValueError if this step runs inside another, before which a hook has activated the same gradients."""
        for other in _torch.running_steps():
            hooks = () if other is self else _torch.step_hooks(other)
            for hook in attached_hooks.intersection(hooks):
                hook.check_apart(other, self)

    def _check_plain(self, groups: list[dict]) -> None:
        """Refuse sparse gradients here: torch's step would refuse them only after it has changed other groups."""
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
        """torch's step without hooks. They have run already, because torch has wrapped them around this class' step."""
        return _torch.step_without_hooks(self._torch_optimizer)(self, closure)

    def _prepare(self, index: int, group: dict) -> list[Callable[[], None]]:
        """Check one group completely, and return the calls that step it.

        This runs before every step, over thousands of tensors. One pass in C checks all of them; only if it finds
        something are the tensors checked one by one.
        """
        self._check_changed_options(index, group)
        params, grads = self._params_and_gradients(index, group["params"])
        gathered = self._gather(index, group, params, grads)
        states = [*gathered.states.values()]
        memory = _memory_of(params, *states, *gathered.counts)
        if memory is None or memory != self._checked_memory.get(index):
            self._check_tensors(index, params, grads, gathered)
            self._checked_memory[index] = memory
        steps = self._checked_steps(index, params, gathered)
        dtypes = list(map(_DTYPE, params))
        keys = [list(map(_DEVICE, params)), steps]
        for tensors in (grads, *states):
            if tensors and list(map(_DTYPE, tensors)) != dtypes:
                self._check_dtypes(index, params, grads, gathered.states)
                # A parameter that differs in dtype from its gradient or a state is stepped as a copy.
                keys.append(_are_mixed(dtypes, grads, *states))
                break
        if not set(map(type, params)) <= _LOCAL_TYPES:
            _localize(params, grads, *states)
        calls: list[Callable[[], None]] = []
        for (device, step, *_), take in split(*keys).items():
            lists = map(take, (params, grads, *states, *gathered.counts))
            calls.append(partial(step, backends.choose(self._op, device), *lists))
        return [*calls, *gathered.afterwards]

    def _gather(self, index: int, group: dict, params: list[Tensor], grads: list[Tensor]) -> Gathered:
        """The states of these parameters, and the calls of the op that the group's options ask for.

        An ``_init_group`` that is not torch's decides what is stepped, and may change both lists.
        """
        raise NotImplementedError

    def _call_init_group(self, group: dict, params: list[Tensor], grads: list[Tensor], *states: list) -> dict:
        """Let an ``_init_group`` that is not torch's fill the lists, and return the group with the options to use.

        It is given a copy of the group: the parameters that have gradients, and options that it may change for one
        step.
        """
        given = {**group, "params": list(params)}
        params.clear()
        grads.clear()
        self._init_group(given, params, grads, *states)  # type: ignore[attr-defined]
        return given

    def _checked_steps(self, index: int, params: list[Tensor], gathered: Gathered) -> Sequence[partial[None]]:
        """``gathered.steps``, after checks that read the tensors' values."""
        return gathered.steps

    def _params_and_gradients(self, index: int, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters that have a gradient, each once, and their gradients. Checks both."""
        if len(set(map(id, params))) < len(params):
            # A parameter that is listed twice is stepped once: two threads would write to it at the same time.
            params = list({id(param): param for param in params}.values())
        grads = list(map(_GRAD, params))
        if any(map(operator.is_, grads, repeat(None))):
            params = [param for param, grad in zip(params, grads, strict=True) if grad is not None]
            grads = [grad for grad in grads if grad is not None]
        if not (
            set(map(_LAYOUT, grads)) <= _STRIDED
            and set(map(_DTYPE, params)) <= _FLOATING
            and all(map(Tensor.is_contiguous, params))
        ):
            self._check_each(index, params, grads)
        return list(params), grads

    def _check_each(self, index: int, params: list[Tensor], grads: list[Tensor]) -> None:
        """Raise for a sparse gradient, a parameter that is not floating point, or one whose elements share memory."""
        for param, gradient in zip(params, grads, strict=True):
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
            if not param.is_contiguous() and ops.may_overlap(param):
                raise ValueError(
                    f"{self._name()}: a parameter in param_groups[{index}] of shape {tuple(param.shape)} has elements "
                    "that share memory, and cannot be stepped in place. Give a clone, or the tensor that was expanded."
                )

    def _check_tensors(self, index: int, params: list[Tensor], grads: list[Tensor], gathered: Gathered) -> None:
        """Raise unless gradients and states fit their parameters, so that a step can go element by element."""
        for param, grad in zip(params, grads, strict=True):
            if grad.shape != param.shape:
                raise ValueError(
                    f"{self._name()}: a parameter in param_groups[{index}] has shape {tuple(param.shape)} and its "
                    f"gradient {tuple(grad.shape)}; expected one shape. Compute the gradient again."
                )
            if _torch.is_zeros_without_memory(param):
                raise ValueError(
                    f"{self._name()}: a parameter in param_groups[{index}] of shape {tuple(param.shape)} is zeros "
                    "without memory, and cannot be stepped in place. Give a clone."
                )
        for name, tensors in gathered.states.items():
            for param, tensor in zip(params, tensors, strict=bool(tensors)):
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
        if _torch.is_zeros_without_memory(state) or ops.may_overlap(state):
            raise ValueError(
                f"{where} has elements that share memory or have none, and cannot be stepped in place. Put a clone "
                "into optimizer.state."
            )

    def _check_dtypes(
        self, index: int, params: list[Tensor], grads: list[Tensor], states: dict[str, list[Tensor]]
    ) -> None:
        """Refuse complex gradients; called if a parameter differs in dtype from its gradient or from a state."""
        for grad in grads:
            if grad.is_complex():
                raise TypeError(
                    f"{self._name()}: a gradient in param_groups[{index}] of shape {tuple(grad.shape)} is "
                    f"{grad.dtype}; expected real numbers. Give the parameter its real part."
                )

    def _where(self, index: int, param: Tensor, name: str) -> str:
        """The beginning of a message about a state."""
        return f"{self._name()}: {name} of a parameter in param_groups[{index}] of shape {tuple(param.shape)}"


# The method as it is defined here. `_are_activated` compares with it, so that it notices a patch of the class.
_IS_ACTIVATED = ActivatedOptimizer.is_activated


def _localize(params: list[Tensor], grads: list[Tensor], *states: list[Tensor]) -> None:
    """Replace the DTensors in the lists by their local parts."""
    for place, param in enumerate(params):
        if is_distributed(param):
            lists: list[list[Any]] = [params, grads, *filter(None, states)]
            if lists[1][place].placements != param.placements:
                grads[place] = lists[1][place].redistribute(param.device_mesh, param.placements)
            for tensors in lists:
                tensors[place] = tensors[place].to_local()


def _memory_of(*lists: list[Tensor]) -> tuple | None:
    """The identities and addresses of these tensors; None if one has no memory, or is not a tensor.

    A group with the same memory as at its last step needs no second check; ``tensor.data = ...`` changes the memory.
    The ops themselves check again for anything that could make them read beyond a tensor.
    """
    tensors = list(chain(*lists))
    try:
        return list(map(id, tensors)), list(map(Tensor.data_ptr, tensors))
    except (RuntimeError, TypeError):
        return None


def _are_mixed(dtypes: list[torch.dtype], *lists: list[Tensor]) -> list[bool]:
    """For each parameter, whether its gradient or a state differs from it in dtype."""
    others = [list(map(_DTYPE, tensors)) for tensors in lists if tensors]
    return [any(dtype is not own for dtype in belonging) for own, *belonging in zip(dtypes, *others, strict=True)]
