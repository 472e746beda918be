"""Activated gradients for existing training loops: a hook activates them before each step of any torch optimizer.

The hooks of ``lcw_ops/optim/parameter_hooks.py`` activate them after every backward pass instead.

M. Liu, L. Chen, X. Du, L. Jin, M. Shang, "Activated Gradients for Deep Neural Networks", TNNLS 2021, arXiv 2107.04228.
"""

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor

from lcw_ops import _torch
from lcw_ops.ops import backends
from lcw_ops.ops import gradient_activation as ops
from lcw_ops.optim._activated import ActivatedOptimizer, attached_hooks
from lcw_ops.optim._gradients import check_function, gradients_of, local, unscale, unshare, with_gradient
from lcw_ops.optim._wrappers import contains, find_stepping, held_at_any_depth

# Users import these from here, and pickles name them here.
from lcw_ops.optim.parameter_hooks import GradientHooks, _GradientHook, register_gradient_hook  # noqa: F401

# The key of a parameter group's own settings. False leaves the group alone; a dict of kind, alpha or beta overrides
# those of the call.
GROUP_KEY = "activate_gradients"

_SETTINGS = {"kind", "alpha", "beta"}


def activate_gradients(
    optimizer: torch.optim.Optimizer,
    kind: str = "arctan",
    alpha: float = 0.1,
    beta: float = 20.0,
    params: Iterable[Tensor] | None = None,
) -> "ActivatedGradients":
    """Activate the gradients of ``optimizer`` in place before each of its steps: f(g) of the accumulated g.

    arctan: ``alpha * atan(beta * g)``, tanh: ``alpha * tanh(beta * g)``, log: ``alpha * sign(g) * log1p(beta * |g|)``.
    For SGD and AdamW, :mod:`lcw_ops.optim` does the same inside the step, without a pass over the gradients.

    A parameter group may have settings of its own under the key "activate_gradients": ``False`` leaves the group alone,
    ``{"kind": "tanh", "alpha": 1.0}`` (any of kind, alpha, beta) overrides the call's. ``state_dict`` saves these
    settings. If a checkpoint has none, the optimizer keeps its own.

    - ``optimizer.step(closure)``: the gradients are activated after each call of the closure, which computes them.
      (LBFGS calls it many times; its line search then sees a slope that is not the loss'.)
    - ``GradScaler`` first unscales and looks for overflow. After an overflow it skips the step, and the gradients stay
      untouched. For a fused optimizer, which would unscale inside its step, the hook unscales the gradients. After an
      overflow such an optimizer skips the step itself, and the gradients must not be used. float16 gradients, which
      GradScaler otherwise refuses, pass with a fused optimizer. They are unscaled in float16: the smallest become 0.
    - Clipping comes before ``step()``, hence before the activation. Step pre-hooks run in the order of their
      registration: a hook that clips, or reads the gradients as they were, must be registered first.
    - With DDP and FSDP2, the gradients are activated after the reduction, on the local shards.
    - ``.grad`` itself is changed, so a second step needs new gradients.
    - Gradients that share memory, with each other or within themselves, get memory of their own.
    - A step that calls ``super().step()`` counts as one step: the gradients are activated before the outer one.
      A subclass that changes gradients inside its own step, before it calls its parent's, changes them after the
      activation. Horovod's ``DistributedOptimizer`` averages there: call ``optimizer.synchronize()`` first, and then
      ``optimizer.step()`` inside ``with optimizer.skip_synchronize():``. For other subclasses, derive from an optimizer
      of :mod:`lcw_ops.optim`, which activates inside the parent's step, or call
      :func:`lcw_ops.functional.gradient_activation_` in the subclass where the gradients are ready.
    - If the step of a wrapper does not run hooks (Lightning Fabric's optimizer, Accelerate's, timm's ``Lookahead``),
      the optimizer inside gets the hook. A wrapper that runs hooks itself (``ZeroRedundancyOptimizer``) gets it.
      Activate the wrapper or the optimizer inside, never both.
    - Only ``step`` runs hooks. If another method makes the steps (SAM's ``second_step``), or if an instance has a
      ``step`` attribute that does not call its class' step, activate the inner optimizer that makes them.

    Args:
        optimizer: a ``torch.optim.Optimizer``, or a wrapper that acts as one and holds exactly one.
        kind, alpha, beta: "arctan", "tanh" or "log"; numbers > 0 that are normal in float32.
        params: the optimizer's parameters whose gradients are activated; by default all, including those of groups
            added later. Several calls for one optimizer must name different parameters.

    Returns:
        A handle; ``handle.remove()`` ends the activation. Optimizer and handle can be copied by ``copy.deepcopy`` and
        pickled: the copy activates the gradients of its own parameters. (torch drops all other hooks.) After
        ``copy.copy(optimizer)`` both have the same parameters and this one handle, whose ``remove()`` ends it for both;
        copies of that copy have no activation.

    Raises:
        TypeError: an argument that is not an optimizer, a number or a parameter; a wrapper whose step does not run
            hooks and that does not hold exactly one optimizer with the same parameters; at a step, a gradient that is
            sparse, or not float32, float64, bfloat16 or float16.
        ValueError: unknown kind, numbers out of range; params that the optimizer does not have, or that are activated
            already: by another call for this optimizer, for its wrapper or for the optimizer inside it, or by an
            lcw_ops.optim optimizer, which then needs gradient_activation=None; a group with differentiable=True; at a
            step, a gradient that requires a gradient itself, or that is an inference tensor outside of inference mode;
            at a step, an optimizer that steps inside the step of another, which has activated the same gradients (the
            gradients have changed by then, the parameters have not).

    All groups are checked before any gradient changes. This call and ``load_state_dict`` check kind, alpha and beta; a
    step checks them only in groups whose override is new or has changed.

    Source: M. Liu, L. Chen, X. Du, L. Jin, M. Shang, "Activated Gradients for Deep Neural Networks", TNNLS 2021, arXiv
    2107.04228.
    """
    name = "activate_gradients"
    optimizer = find_stepping(name, optimizer)
    check_function(name, kind, alpha, beta)
    if params is not None:
        params = _check_params(name, optimizer, params)
    if any(other.overlaps(params) for other in _activations(optimizer)):
        raise ValueError(
            f"{name}: an earlier call for this optimizer activates some of these gradients already. Call remove() on "
            "its handle, or name different params in the two calls."
        )
    if any(getattr(one, "in_backward", False) for one in (optimizer, *held_at_any_depth(optimizer))):
        raise ValueError(
            f"{name}: the optimizer has in_backward=True, and has no gradients left before its step; expected "
            "in_backward=False. An optimizer of lcw_ops.optim activates by itself: give it gradient_activation."
        )
    activation = ActivatedGradients(optimizer, kind, alpha, beta, params)
    for index, group in enumerate(optimizer.param_groups):
        activation.settings(optimizer, index, group)
    activated = (handle.optimizer() for handle in list(attached_hooks))
    around = [other for other in activated if other is not None and contains(held_at_any_depth(other), optimizer)]
    for other in (*held_at_any_depth(optimizer), *around):
        activation.check_apart(optimizer, other)
    activation.attach(optimizer)
    return activation


class ActivatedGradients:
    """The hook of one call of :func:`activate_gradients`, and its handle."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, kind: str, alpha: float, beta: float, params: list[Tensor] | None
    ) -> None:
        self._optimizer: Callable[[], torch.optim.Optimizer | None] = weakref.ref(optimizer)
        self._is_removed = False
        # Maps the index of a group with an override to the settings of its last check.
        self._checked: dict[int, tuple[str, float, float]] = {}
        self.kind, self.alpha, self.beta, self.params = kind, alpha, beta, params

    def remove(self) -> None:
        """Leave the gradients alone from now on. A second call does nothing."""
        # A copy.copy of the optimizer keeps this hook; the flag switches it off there.
        self._is_removed = True
        attached_hooks.discard(self)
        optimizer = self._optimizer()
        if optimizer is None or not _torch.remove_optimizer_hooks(optimizer, self):
            return
        if not _activations(optimizer):
            vars(optimizer).pop("__getstate__", None)

    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer, or None if it no longer exists."""
        return self._optimizer()

    def overlaps(self, params: list[Tensor] | None) -> bool:
        if self.params is None or params is None:
            return True
        return not set(map(id, self.params)).isdisjoint(map(id, params))

    def acts_on(self, optimizer: torch.optim.Optimizer) -> set[int]:
        """The ids of the parameters whose gradients are activated before a step of ``optimizer``."""
        groups = [group for group in optimizer.param_groups if group.get(GROUP_KEY) is not False]
        ids = {id(param) for group in groups for param in group["params"]}
        return ids if self.params is None else ids.intersection(map(id, self.params))

    def check_apart(self, optimizer: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
        """Raise ValueError if ``other``, which steps around or inside ``optimizer``, activates the same gradients."""
        activated = {param for hook in _activations(other) if hook is not self for param in hook.acts_on(other)}
        if isinstance(other, ActivatedOptimizer):
            groups = [group for index, group in enumerate(other.param_groups) if other.is_activated(index)]
            activated.update(id(param) for group in groups for param in group["params"])
        if not self.acts_on(optimizer).isdisjoint(activated):
            raise ValueError(
                f"activate_gradients: a {type(optimizer).__name__} and a {type(other).__name__}, one of which steps "
                "inside the other, would both activate the gradients of the same parameters. Activate one of the two: "
                "call remove() on the handle of the other, or give it gradient_activation=None if it is one of "
                "lcw_ops.optim."
            )

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the hooks to the optimizer, under a key that another process cannot give to a hook of its own."""
        attached_hooks.add(self)
        _torch.add_optimizer_hooks(optimizer, self, before_step=self, before_load=_keep_group_settings)
        # torch leaves hooks behind when it copies an optimizer or pickles it.
        vars(optimizer)["__getstate__"] = _StateWithActivation(optimizer)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_optimizer": self._optimizer(), "_checked": {}}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update({"_checked": {}, **state})
        optimizer = state["_optimizer"]
        if optimizer is None:
            self._optimizer = _no_optimizer
            return
        self._optimizer = weakref.ref(optimizer)
        if not self._is_removed:
            # The optimizer may be only half unpickled. Its own __setstate__ keeps the hooks that it finds.
            self.attach(optimizer)

    def __copy__(self) -> "ActivatedGradients":
        return self

    @_torch.never_traced
    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Run before ``optimizer.step(closure)``; ``args`` begins with the optimizer."""
        if self._is_removed:
            return None
        around = _torch.running_steps()[1:]
        if any(self in _torch.step_hooks(other) for other in around):
            # The same optimizer is stepping already: its class' step calls super().step().
            return None
        # An optimizer of lcw_ops.optim makes this check itself, but only after this hook has changed the gradients.
        inside = [held for held in vars(optimizer).values() if isinstance(held, ActivatedOptimizer)]
        for other in (*around, *inside):
            self.check_apart(optimizer, other)
        if kwargs.get("grad_scaler") is not None:
            raise RuntimeError(
                f"activate_gradients: {type(optimizer).__name__}.step takes grad_scaler and unscales the gradients "
                "itself, after they would have been activated. Use an optimizer without that argument."
            )
        by_name = "closure" in kwargs
        place = _place_of_closure(type(optimizer).step)
        closure = kwargs["closure"] if by_name else args[place] if place < len(args) else None
        if not callable(closure):
            self._activate(optimizer)
            return None

        def closure_and_activation():
            loss = closure()
            self._activate(optimizer)
            return loss

        if by_name:
            return args, {**kwargs, "closure": closure_and_activation}
        return (*args[:place], closure_and_activation, *args[place + 1 :]), kwargs

    @_torch.never_traced
    @torch.no_grad()
    def _activate(self, optimizer: torch.optim.Optimizer) -> None:
        wanted = None if self.params is None else set(map(id, self.params))
        chosen: dict[tuple[str, float, float], list[Tensor]] = {}
        # Whether all gradients have the same settings, so that one kernel call can take them.
        is_plain = wanted is None and getattr(optimizer, "grad_scale", None) is None
        for index, group in enumerate(optimizer.param_groups):
            params = group["params"] if wanted is None else [param for param in group["params"] if id(param) in wanted]
            settings = self.settings(optimizer, index, group)
            if settings is None:
                is_plain = False
                continue
            params = with_gradient(f"activate_gradients: param_groups[{index}]", params)
            chosen.setdefault(settings, []).extend(params)
        if is_plain and len(chosen) == 1 and _activate_plain(*next(iter(chosen.items()))):
            return
        unshare([param for group in optimizer.param_groups for param in group["params"]])
        calls = []
        for settings, params in chosen.items():
            by_device: dict[torch.device, list[Tensor]] = {}
            for grad in gradients_of(params):
                by_device.setdefault(grad.device, []).append(local(grad))
            for device, grads in by_device.items():
                calls.append((backends.choose(ops.NAME, device), grads, *settings))
        unscale(optimizer)
        for call in calls:
            ops.activate_(*call)

    def settings(self, optimizer: torch.optim.Optimizer, index: int, group: dict) -> tuple[str, float, float] | None:
        """kind, alpha and beta for ``param_groups[index]``, checked; None if the group is left alone."""
        if isinstance(optimizer, ActivatedOptimizer) and optimizer.is_activated(index):
            raise ValueError(
                f"activate_gradients: {type(optimizer).__name__} has gradient_activation="
                f"{group['gradient_activation']!r}, and would activate a second time. Give it "
                "gradient_activation=None, or leave activate_gradients out."
            )
        override = group.get(GROUP_KEY)
        if override is False:
            return None
        if group.get("differentiable", False):
            raise ValueError(
                "activate_gradients: a parameter group has differentiable=True; the activation in place is not "
                "recorded by autograd. Activate with lcw_ops.reference.gradient_activation, which is differentiable, "
                "and leave activate_gradients out."
            )
        if override is None:
            return self.kind, self.alpha, self.beta
        return self.override(index, override)

    def override(self, index: int, override: object) -> tuple[str, float, float]:
        """kind, alpha and beta of ``param_groups[index]``, which overrides some. Checks them if they are new."""
        if not isinstance(override, dict) or not override.keys() <= _SETTINGS:
            raise ValueError(
                f"activate_gradients: param_groups[{index}] has {GROUP_KEY}={override!r}; expected False, or a dict "
                "with any of kind, alpha, beta."
            )
        kind, alpha, beta = (
            override.get("kind", self.kind),
            override.get("alpha", self.alpha),
            override.get("beta", self.beta),
        )
        last = self._checked.get(index)
        # Compare by identity: True equals 1, and a tensor that equals a number can change.
        if last is None or kind is not last[0] or alpha is not last[1] or beta is not last[2]:
            check_function(f"activate_gradients: param_groups[{index}]", kind, alpha, beta)
            last = self._checked[index] = kind, alpha, beta
        return last


def _no_optimizer() -> None:
    return None


@functools.lru_cache(maxsize=64)
def _place_of_closure(step: Callable) -> int:
    """The place of the closure among the positional arguments of a class' step, self included; torch has it at 1."""
    parameters = list(inspect.signature(step).parameters.values())
    for place, parameter in enumerate(parameters):
        if parameter.name == "closure":
            return sys.maxsize if parameter.kind is parameter.KEYWORD_ONLY else place
    return 1


class _StateWithActivation:
    """An optimizer's ``__getstate__``: the state that its class gives, and its activations."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)

    def __call__(self) -> dict:
        optimizer = cast(torch.optim.Optimizer, self._optimizer())
        activations = _activations(optimizer)
        return {
            **type(optimizer).__getstate__(optimizer),
            **_torch.state_of_optimizer_hooks(
                before_step={hook: hook for hook in activations},
                before_load=dict.fromkeys(activations, _keep_group_settings),
            ),
        }


def _activations(optimizer: torch.optim.Optimizer) -> list[ActivatedGradients]:
    hooks = _torch.step_hooks(optimizer).values()
    return [hook for hook in hooks if isinstance(hook, ActivatedGradients) and not hook._is_removed]


def _keep_group_settings(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict | None:
    """Run before ``load_state_dict``, which replaces the optimizer's groups by the checkpoint's."""
    saved, groups = state_dict["param_groups"], optimizer.param_groups
    if len(saved) != len(groups):
        # torch raises, and its message says what is wrong.
        return None
    kept = [
        {GROUP_KEY: group[GROUP_KEY], **loaded} if GROUP_KEY in group else loaded
        for loaded, group in zip(saved, groups, strict=True)
    ]
    for index, group in enumerate(kept):
        override = group.get(GROUP_KEY)
        if override is not None and override is not False:
            for activation in _activations(optimizer):
                activation.override(index, override)
    return {**state_dict, "param_groups": kept}


def _check_params(name: str, optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(params, (Tensor, str, dict)) or not isinstance(params, Iterable):
        raise TypeError(f"{name}: params is a {type(params).__name__}; expected a list of parameters.")
    params = list(params)
    if not params:
        raise ValueError(f"{name}: params is empty; expected parameters of the optimizer, or None for all of them.")
    owned = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for index, param in enumerate(params):
        if not isinstance(param, Tensor):
            raise TypeError(f"{name}: params[{index}] is a {type(param).__name__}; expected a parameter.")
        if id(param) not in owned:
            raise ValueError(
                f"{name}: params[{index}] of shape {tuple(param.shape)} is in no parameter group of the optimizer. "
                "Take the tensors that the optimizer was given."
            )
    return params


def _activate_plain(settings: tuple[str, float, float], params: list[Tensor]) -> bool:
    """Activate in one call of the C++ kernel, which checks the layouts itself. Returns False if it wrote nothing."""
    grads = gradients_of(params)
    if not all(type(grad) is Tensor and grad.is_cpu and not grad.is_neg() for grad in grads):
        return False
    return backends.choose(ops.NAME, torch.device("cpu")) == "cpp" and ops.activate_plain_(grads, *settings)
