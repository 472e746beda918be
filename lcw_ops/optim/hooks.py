"""Activated gradients for loops as they are: before the steps of any torch optimizer, or after every backward.

M. Liu, L. Chen, X. Du, L. Jin, M. Shang, "Activated Gradients for Deep Neural Networks", TNNLS 2021, arXiv 2107.04228.
"""

import functools
import inspect
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lcw_ops import _checks as checks
from lcw_ops.ops import backends
from lcw_ops.ops import gradient_activation as ops
from lcw_ops.optim._activated import ActivatedOptimizer, attached_hooks, find_running_steps, is_distributed
from lcw_ops.reference.gradient_activation import KINDS

# In a parameter group: False leaves the group alone, a dict of kind, alpha or beta overrules what is said for all.
GROUP_KEY = "activate_gradients"

_SETTINGS = {"kind", "alpha", "beta"}


def activate_gradients(
    optimizer: torch.optim.Optimizer,
    kind: str = "arctan",
    alpha: float = 0.1,
    beta: float = 20.0,
    params: Iterable[Tensor] | None = None,
) -> "ActivatedGradients":
    """Before every step of ``optimizer``, its gradients are activated in place: f(g) of what all backwards added up to.

    arctan: ``alpha * atan(beta * g)``, tanh: ``alpha * tanh(beta * g)``, log: ``alpha * sign(g) * log1p(beta * |g|)``.
    For SGD and AdamW, :mod:`lcw_ops.optim` does the same inside the step, without a pass of its own.

    A parameter group may say otherwise under the key "activate_gradients": ``False`` leaves it alone,
    ``{"kind": "tanh", "alpha": 1.0}`` (any of kind, alpha, beta) overrules. These are saved by ``state_dict``; a
    checkpoint that has none leaves those of the optimizer as they are.

    - ``optimizer.step(closure)``: the gradients are activated after each call of the closure, which computes them anew
      (LBFGS calls it many times; its line search then sees a slope that is not the loss').
    - ``GradScaler``: unscales and looks for overflow first, and skips the step, with gradients untouched. A fused
      optimizer that would unscale inside its step gets the gradients unscaled here; it then skips the step by itself,
      and the gradients of such a step are of no use. float16 gradients, which GradScaler refuses otherwise, pass with
      a fused optimizer: they are unscaled in float16, where the smallest become 0.
    - Clipping comes before ``step()``, hence before this. Step pre-hooks run in the order of their registration: one
      that clips, or looks at gradients as they were, is to be registered first.
    - DDP and FSDP2: after the reduction, on the local shards.
    - ``.grad`` itself is changed: a second step needs new gradients.
    - Gradients that share memory, with each other or in themselves, get memory of their own.
    - A subclass whose step calls ``super().step()`` is one step: the gradients are activated before the outer one.
      A subclass that changes gradients inside its own step, before it calls its parent's, changes them after the
      activation. Horovod's ``DistributedOptimizer`` averages there: call ``optimizer.synchronize()`` first, and then
      ``optimizer.step()`` inside ``with optimizer.skip_synchronize():``. For other subclasses, derive from an optimizer
      of :mod:`lcw_ops.optim`, which activates inside the parent's step, or call
      :func:`lcw_ops.functional.gradient_activation_` in the subclass where the gradients are ready.
    - If the step of a wrapper runs no hooks (Lightning Fabric's optimizer, Accelerate's, timm's ``Lookahead``), the
      optimizer inside gets the hook. A wrapper that runs hooks itself (``ZeroRedundancyOptimizer``) gets it. Activate
      the wrapper or the optimizer inside, never both.
    - Only ``step`` runs hooks. If another method makes the steps (SAM's ``second_step``), or if an instance has a
      ``step`` attribute that does not call its class' step, activate the optimizer inside that makes them.

    Args:
        optimizer: a ``torch.optim.Optimizer``, or a wrapper that passes for one and holds exactly one.
        kind, alpha, beta: "arctan", "tanh" or "log"; numbers > 0 that are normal in float32.
        params: those of the optimizer's parameters that are meant; default all, of groups added later too. Several
            calls for one optimizer must name different ones.

    Returns:
        A handle; ``handle.remove()`` ends it. Optimizer and handle can be copied by ``copy.deepcopy`` and pickled: the
        copy activates the gradients of its own parameters. (Other hooks are lost then, as torch has it.) After
        ``copy.copy(optimizer)`` both have the same parameters and this one handle, whose ``remove()`` ends it for both;
        copies of that copy have no activation.

    Raises:
        TypeError: an argument that is not an optimizer, a number or a parameter; a wrapper whose step runs no hooks and
            that does not hold exactly one optimizer with the same parameters; at a step, a gradient that is sparse, or
            not float32, float64, bfloat16 or float16.
        ValueError: unknown kind, numbers out of range; params that the optimizer does not have, or that are activated
            already: by another call for this optimizer, for its wrapper or for the optimizer inside it, or by an
            lcw_ops.optim optimizer, which is to have gradient_activation=None; a group with differentiable=True; at a
            step, a gradient that requires a gradient itself, or that is an inference tensor outside of inference mode,
            or an optimizer that steps inside another one's step after that one has activated the same gradients (those
            are changed then, and the parameters are not).
        All groups are checked before any gradient is changed. kind, alpha and beta are checked by this call and by
        ``load_state_dict``, and at a step only in groups whose override is new or has changed.
    """
    name = "activate_gradients"
    optimizer = _find_stepping(name, optimizer)
    _check_function(name, kind, alpha, beta)
    if params is not None:
        params = _check_params(name, optimizer, params)
    if any(other.overlaps(params) for other in _activations(optimizer)):
        raise ValueError(
            f"{name}: these gradients are activated before every step already. Call remove() on the first handle, or "
            "name other params in both calls."
        )
    activation = ActivatedGradients(optimizer, kind, alpha, beta, params)
    for index, group in enumerate(optimizer.param_groups):
        activation.settings(optimizer, index, group)
    around = (handle.optimizer() for handle in list(attached_hooks))
    around = [other for other in around if other is not None and _contains(_held_at_any_depth(other), optimizer)]
    for other in (*_held_at_any_depth(optimizer), *around):
        activation.check_apart(optimizer, other)
    activation.attach()
    return activation


class ActivatedGradients:
    """The hook of one :func:`activate_gradients`, and its handle."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, kind: str, alpha: float, beta: float, params: list[Tensor] | None
    ) -> None:
        self._optimizer: Callable[[], torch.optim.Optimizer | None] = weakref.ref(optimizer)
        self._is_removed = False
        # Maps the index of a group with an override to the settings that were checked last.
        self._checked: dict[int, tuple[str, float, float]] = {}
        self.kind, self.alpha, self.beta, self.params = kind, alpha, beta, params

    def remove(self) -> None:
        """Gradients are left alone from now on. A second call does nothing."""
        # For a copy.copy of the optimizer, which has this hook too.
        self._is_removed = True
        attached_hooks.discard(self)
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._optimizer_step_pre_hooks.pop(self, None) is not None:
            del optimizer._optimizer_load_state_dict_pre_hooks[self]
            if not _activations(optimizer):
                optimizer.__dict__.pop("__getstate__", None)

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
        """ValueError if a step of ``other``, which is around a step of ``optimizer`` or inside it, activates too."""
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

    def attach(self) -> None:
        """As ``register_step_pre_hook`` does, but under a key that no other process numbers its hooks by."""
        attached_hooks.add(self)
        optimizer = self._optimizer()
        attributes = optimizer.__dict__
        attributes.setdefault("_optimizer_step_pre_hooks", OrderedDict())[self] = self
        attributes.setdefault("_optimizer_load_state_dict_pre_hooks", OrderedDict())[self] = _keep_group_settings
        # torch leaves hooks behind when it copies an optimizer or pickles it.
        attributes["__getstate__"] = _StateWithActivation(optimizer)

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
            # The optimizer is being put together itself: its own __setstate__ keeps the hooks that it finds.
            self.attach()

    def __copy__(self) -> "ActivatedGradients":
        return self

    @torch._disable_dynamo
    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before ``optimizer.step(closure)``; ``args`` begins with the optimizer."""
        if self._is_removed:
            return None
        around = find_running_steps()[1:]
        if any(self in getattr(other, "_optimizer_step_pre_hooks", ()) for other in around):
            # The same optimizer is stepping: its class' step calls super().step().
            return None
        # An optimizer of lcw_ops.optim looks around itself, but only after this hook has changed the gradients.
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

    @torch._disable_dynamo
    @torch.no_grad()
    def _activate(self, optimizer: torch.optim.Optimizer) -> None:
        wanted = None if self.params is None else set(map(id, self.params))
        chosen: dict[tuple | None, list[Tensor]] = {}
        for index, group in enumerate(optimizer.param_groups):
            params = group["params"] if wanted is None else [param for param in group["params"] if id(param) in wanted]
            settings = self.settings(optimizer, index, group)
            if settings is not None:
                params = _with_gradient(f"activate_gradients: param_groups[{index}]", params)
            chosen.setdefault(settings, []).extend(params)
        is_plain = wanted is None and None not in chosen and getattr(optimizer, "grad_scale", None) is None
        if is_plain and len(chosen) == 1 and _activate_plain(*next(iter(chosen.items()))):
            return
        chosen.pop(None, None)
        _unshare([param for group in optimizer.param_groups for param in group["params"]])
        calls = []
        for settings, params in chosen.items():
            by_device: dict[torch.device, list[Tensor]] = {}
            for param in params:
                by_device.setdefault(param.grad.device, []).append(_local(param.grad))
            for device, grads in by_device.items():
                calls.append((backends.choose(ops.NAME, device), grads, *settings))
        _unscale(optimizer)
        for call in calls:
            ops.activate_(*call)

    def settings(self, optimizer: torch.optim.Optimizer, index: int, group: dict) -> tuple[str, float, float] | None:
        """kind, alpha and beta for ``param_groups[index]``, checked; None: it is left alone."""
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
        """kind, alpha and beta of ``param_groups[index]``, which overrules some; checked if they are new."""
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
        # By identity: True equals 1, and a tensor that equals a number can change.
        if last is None or kind is not last[0] or alpha is not last[1] or beta is not last[2]:
            _check_function(f"activate_gradients: param_groups[{index}]", kind, alpha, beta)
            last = self._checked[index] = kind, alpha, beta
        return last


def _no_optimizer() -> None:
    return None


def _find_stepping(name: str, optimizer: object) -> torch.optim.Optimizer:
    """The optimizer whose step runs its hooks: the given one, or the only one that it holds."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"{name}: optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer. "
            f"{_advice(_held(optimizer))}"
        )
    passed: list[torch.optim.Optimizer] = []
    while not _runs_hooks(optimizer):
        passed.append(optimizer)
        held = {path: other for path, other in _held(optimizer).items() if not _contains(passed, other)}
        if not held and "_optimizer_step_pre_hooks" in vars(optimizer):
            # torch wraps the step of a class when it makes an optimizer; this class was given another step since.
            optimizer._patch_step_function()
            return optimizer
        inner = next(iter(held.values()), None)
        if len(held) != 1 or _param_ids(inner) != _param_ids(optimizer):
            raise TypeError(
                f"{name}: optimizer is a {type(passed[0]).__name__}; the step of a {type(optimizer).__name__} does not "
                f"run hooks, and it does not hold exactly one optimizer with the same parameters. {_advice(held)}"
            )
        optimizer = inner
    return optimizer


def _runs_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether torch has wrapped the step of its class, and the hooks that this step runs are the instance's own."""
    step = getattr(type(optimizer), "step", None)
    return getattr(step, "hooked", False) and "_optimizer_step_pre_hooks" in vars(optimizer)


def _advice(held: dict[str, torch.optim.Optimizer]) -> str:
    if not held:
        return (
            "Give the optimizer whose step() changes the parameters; a class of your own is one if its __init__ calls "
            "torch.optim.Optimizer.__init__."
        )
    each = "" if len(held) == 1 else ", each in a call of its own"
    return f"Give {' and '.join(f'optimizer.{path}' for path in held)}{each}."


def _held(holder: object) -> dict[str, torch.optim.Optimizer]:
    """The optimizers that are attributes of ``holder``, or in a list or dict that is one, by name; each once."""
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


def _held_at_any_depth(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    found = [optimizer]
    for holder in found:
        found += [other for other in _held(holder).values() if not _contains(found, other)]
    return found[1:]


def _contains(optimizers: list[torch.optim.Optimizer], optimizer: torch.optim.Optimizer) -> bool:
    return any(other is optimizer for other in optimizers)


def _param_ids(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(param) for group in getattr(optimizer, "param_groups", ()) for param in group["params"]}


@functools.lru_cache(maxsize=64)
def _place_of_closure(step: Callable) -> int:
    """Among the positional arguments of a class' step, self included; torch has it at 1."""
    parameters = list(inspect.signature(step).parameters.values())
    for place, parameter in enumerate(parameters):
        if parameter.name == "closure":
            return sys.maxsize if parameter.kind is parameter.KEYWORD_ONLY else place
    return 1


class _StateWithActivation:
    """An optimizer's ``__getstate__``: its class' own, and its activations."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)

    def __call__(self) -> dict:
        optimizer = self._optimizer()
        activations = _activations(optimizer)
        return {
            **type(optimizer).__getstate__(optimizer),
            "_optimizer_step_pre_hooks": OrderedDict((hook, hook) for hook in activations),
            "_optimizer_load_state_dict_pre_hooks": OrderedDict((hook, _keep_group_settings) for hook in activations),
        }


def _activations(optimizer: torch.optim.Optimizer) -> list[ActivatedGradients]:
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
    return [hook for hook in hooks if isinstance(hook, ActivatedGradients) and not hook._is_removed]


def _keep_group_settings(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict | None:
    """Before ``load_state_dict``, which puts the checkpoint's groups in the place of the optimizer's."""
    saved, groups = state_dict["param_groups"], optimizer.param_groups
    if len(saved) != len(groups):
        # torch says what is wrong.
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


def _check_function(name: str, kind: str, alpha: float, beta: float) -> None:
    checks.check_choice(name, "kind", kind, KINDS)
    checks.check_positive_float32(name, "alpha", alpha)
    checks.check_positive_float32(name, "beta", beta)


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


def _with_gradient(where: str, params: Iterable[Tensor]) -> list[Tensor]:
    """Those parameters that have a gradient, each once, their gradients checked."""
    found, inference = [], torch.is_inference_mode_enabled()
    for param in {id(param): param for param in params}.values():
        gradient = param.grad
        if gradient is None:
            continue
        if gradient.layout is not torch.strided:
            raise TypeError(
                f"{where}: the gradient of a parameter of shape {tuple(param.shape)} has layout {gradient.layout}; "
                "expected a dense tensor. Make the layer give one (nn.Embedding's sparse=False), or leave this "
                "parameter out."
            )
        if gradient.dtype not in checks.FLOATING:
            raise TypeError(
                f"{where}: the gradient of a parameter of shape {tuple(param.shape)} is {gradient.dtype}; expected "
                "float32, float64, bfloat16 or float16. Leave this parameter out."
            )
        if gradient.requires_grad:
            raise ValueError(
                f"{where}: the gradient of a parameter of shape {tuple(param.shape)} requires a gradient itself, as "
                "after backward(create_graph=True); the activation in place is not recorded. Use "
                "torch.autograd.grad and lcw_ops.reference.gradient_activation, which is differentiable, or detach "
                "the gradient."
            )
        if not inference and gradient.is_inference():
            raise ValueError(
                f"{where}: the gradient of a parameter of shape {tuple(param.shape)} is an inference tensor, which "
                "cannot be changed outside of torch.inference_mode. Give a clone made outside of it."
            )
        if (
            type(gradient) is not Tensor
            and is_distributed(gradient)
            and any(placement.is_partial() for placement in gradient.placements)
        ):
            raise TypeError(
                f"{where}: the gradient of a parameter of shape {tuple(param.shape)} is a DTensor that is still to be "
                f"summed, {gradient.placements}; expected shards or replicas. Call redistribute on it first."
            )
        found.append(param)
    return found


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if type(tensor) is not Tensor and is_distributed(tensor) else tensor


def _activate_plain(settings: tuple[str, float, float], params: list[Tensor]) -> bool:
    """In one call of the C++ kernel, which looks for itself how memory lies; False: nothing was done."""
    grads = [param.grad for param in params]
    if not all(type(grad) is Tensor and grad.is_cpu and not grad.is_neg() for grad in grads):
        return False
    return backends.choose(ops.NAME, torch.device("cpu")) == "cpp" and ops.activate_plain_(grads, *settings)


def _unshare(params: list[Tensor]) -> None:
    """Gradients in memory of their own: what two share, or one has twice, would be activated twice."""
    params = [param for param in params if param.grad is not None and param.grad.layout is torch.strided]
    for param in params:
        # torch negates this view only when it reads it, so the kernels cannot write through it.
        if param.grad.is_neg():
            param.grad = param.grad.resolve_neg()
    grads = [_local(param.grad) for param in params]
    if any(map(ops.may_overlap, grads)) or ops.find_shared(grads) is not None:
        for param in params:
            param.grad = param.grad.clone()


def _unscale(optimizer: torch.optim.Optimizer) -> None:
    """GradScaler leaves it to fused optimizers to divide by ``grad_scale``: done here, for all of their gradients."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    grads = {
        id(p.grad): _local(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    }
    by_kind: dict[tuple, list[Tensor]] = {}
    for grad in grads.values():
        by_kind.setdefault((grad.device, grad.dtype), []).append(grad)
    # As GradScaler itself does it; what it has found out about overflow stays in optimizer.found_inf.
    inverse = scale.double().reciprocal().float()
    for (device, _), same in by_kind.items():
        found_inf = torch.zeros((), device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(same, found_inf, inverse.to(device))
    optimizer.grad_scale = None


def register_gradient_hook(
    module: nn.Module, kind: str = "arctan", alpha: float = 0.1, beta: float = 20.0
) -> "GradientHooks":
    """After every backward pass, each parameter's gradient is activated in place; for loops without an optimizer.

    Functions as in :func:`activate_gradients`, which is to be preferred wherever a torch optimizer makes the steps:

    - A hook runs whenever a gradient has been added to ``.grad``. With two backward passes before a step that is
      ``f(f(g1) + g2)`` and not ``f(g1 + g2)``: take one pass per step.
    - With GradScaler it would run on scaled gradients, and hide an overflow from it. It comes before clipping.
    - Under DDP each process would activate its own gradient, before the mean: a module that is or has a
      DistributedDataParallel is refused. Not seen, and wrong, are ``ddp.module``, other parts of it, and a module that
      is wrapped afterwards. FSDP2 runs the hooks after the reduction, if they are registered after ``fully_shard``.
    - ``backward(create_graph=True)`` is refused where the gradient has a graph, of which the hook would not be part.
    - New parameters of the module get the hook as well, if they require a gradient when they arrive. They may be
      assigned (``module.weight = ...``, ``module.head = ...``, ``load_state_dict(..., assign=True)``,
      parametrizations), or come from a conversion (``module.double()``, ``to_empty``) under
      ``torch.__future__.set_overwrite_module_params_on_conversion(True)`` or
      ``set_swap_module_params_on_conversion(True)``. torch has no hook for conversions, so the first call of this
      function wraps ``torch.nn.Module._apply`` and ``torch.utils.swap_tensors`` for the whole process.
    - A conversion that replaces a parameter with the hook gives it to the replacement, even if the parameter has been
      frozen since: the hook acts again once the replacement requires a gradient.
    - Code that writes into a module's ``_parameters`` or ``_modules`` directly is not noticed: ``fully_shard``, and
      ``insert`` of nn.ModuleList and nn.Sequential. Register after it. If hooks are registered already, call
      ``remove()`` and register again.

    Args:
        module: its parameters that require a gradient get the hook, those that are shared once.
        kind, alpha, beta: "arctan", "tanh" or "log"; numbers > 0 that are normal in float32.

    Returns:
        A handle with ``.remove()``. The hooks belong to the parameters: a copy of the module (``copy.deepcopy``,
        pickling, ``torch.save``) has none, as with all of torch's hooks on parameters.

    Raises:
        TypeError: no module; no numbers; during backward, a gradient that is sparse or not floating.
        ValueError: unknown kind, numbers out of range; a module with DistributedDataParallel (also when it is assigned
            to a hooked module later), with an uninitialized parameter, without a parameter that requires a gradient,
            or with one that has such a hook already; during backward, a gradient that requires a
            gradient itself, or is an inference tensor outside of inference mode.
    """
    name = "register_gradient_hook"
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: module is a {type(module).__name__}; expected a torch.nn.Module.")
    _check_function(name, kind, alpha, beta)
    _refuse_data_parallel(module)
    params = [param for param in module.parameters() if param.requires_grad]
    if not params:
        raise ValueError(f"{name}: module has no parameter that requires a gradient. Call requires_grad_() first.")
    if any(map(nn.parameter.is_lazy, params)):
        raise ValueError(
            f"{name}: module has an uninitialized parameter, as nn.LazyLinear has. Call the module once before."
        )
    if any(_has_hook(param) for param in params):
        raise ValueError(
            f"{name}: a parameter of module has such a hook already, and would be activated twice. Call remove() on "
            "the first handle."
        )
    _watch_replacements()
    hooks = GradientHooks(_GradientHook(kind, alpha, beta))
    hooks.follow(module)
    return hooks


class GradientHooks:
    """The handle of :func:`register_gradient_hook`."""

    def __init__(self, hook: "_GradientHook") -> None:
        self._hook = hook
        # The hook dictionaries of the parameters, by the key of this hook in each. A dictionary lives as long as its
        # parameter; torch does not swap a parameter to which there is a weak reference.
        self._places: weakref.WeakValueDictionary[int, OrderedDict] = weakref.WeakValueDictionary()

    def __copy__(self) -> "GradientHooks":
        return self

    def __reduce__(self) -> tuple:
        # A copy of the module has no hooks, so a copy of the handle has nothing to remove.
        return GradientHooks, (self._hook,)

    def remove(self) -> None:
        """Gradients are left alone from now on. A second call does nothing."""
        for key, hooks in list(self._places.items()):
            hooks.pop(key, None)
        for followers in list(_followers.values()):
            if self in followers:
                followers.remove(self)

    def follow(self, module: nn.Module) -> None:
        """Hooks the parameters of ``module`` and its parts, those that it has and those that it will get."""
        _refuse_data_parallel(module)
        for part in module.modules():
            if id(part) not in _followers:
                _followers[id(part)] = []
                weakref.finalize(part, _followers.pop, id(part)).atexit = False
            if self not in _followers[id(part)]:
                _followers[id(part)].append(self)
            self.add_own(part)

    def add_own(self, module: nn.Module) -> None:
        for param in module._parameters.values():
            if param is not None:
                self.add(param)

    def add(self, param: Tensor) -> None:
        """Hooks ``param``, unless it has a hook already, from this handle or another."""
        if param.requires_grad and not _has_hook(param):
            handle = param.register_post_accumulate_grad_hook(self._hook)
            self._places[handle.id] = param._post_accumulate_grad_hooks
            _relink(param)

    def add_frozen(self, param: Tensor) -> None:
        """As `add`, for a parameter that requires no gradient, where torch would refuse the hook."""
        can_require = param.is_floating_point() or param.is_complex()
        if _has_hook(param) or not can_require or param.is_inference():
            return
        requires_grad = param.requires_grad
        self.add(param.requires_grad_())
        param.requires_grad_(requires_grad)

    def names_of_hooked(self, module: nn.Module) -> list[str]:
        """The names of the module's own parameters that have this hook."""
        return [name for name, param in module._parameters.items() if param is not None and self._hook.is_on(param)]


# The handles whose hook the parameters of a module get, by the id of the module.
_followers: dict[int, list[GradientHooks]] = {}


@functools.cache
def _watch_replacements() -> None:
    """torch calls hooks for parameters and modules that are assigned, but none for those that a conversion makes."""
    nn.modules.module.register_module_parameter_registration_hook(_add_to_parameter)
    nn.modules.module.register_module_module_registration_hook(_add_to_submodule)
    nn.Module._apply = _add_after(nn.Module._apply)
    torch.utils.swap_tensors = _relink_after(torch.utils.swap_tensors)


# torch.compile must not trace these four: hooks would be added while it traces, and not at every call.
@torch._disable_dynamo
def _add_to_parameter(module: nn.Module, name: str, param: Tensor) -> None:
    followers = _followers.get(id(module), ())
    if followers and is_distributed(module._parameters.get(name)) and not is_distributed(param):
        # FSDP2 has gathered the parameter for a forward pass: its gradient is not reduced yet.
        return
    for hooks in followers:
        hooks.add(param)


@torch._disable_dynamo
def _add_to_submodule(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    if submodule is not None:
        for hooks in _followers.get(id(module), ()):
            hooks.follow(submodule)


@torch._disable_dynamo
def _find_hooked(module: nn.Module) -> list[tuple[GradientHooks, str]]:
    # Names: torch does not swap a parameter to which there is another reference.
    return [(hooks, name) for hooks in _followers.get(id(module), ()) for name in hooks.names_of_hooked(module)]


@torch._disable_dynamo
def _add_to_own(module: nn.Module, hooked: list[tuple[GradientHooks, str]]) -> None:
    for hooks in _followers.get(id(module), ()):
        hooks.add_own(module)
    # A parameter that was frozen since still has the hook, for when it is trained again: so has its replacement.
    for hooks, name in hooked:
        hooks.add_frozen(module._parameters[name])


def _add_after(apply: Callable) -> Callable:
    @functools.wraps(apply)
    def _apply(module, *args, **kwargs):
        hooked = _find_hooked(module)
        result = apply(module, *args, **kwargs)
        _add_to_own(module, hooked)
        return result

    return _apply


def _relink_after(swap: Callable) -> Callable:
    @functools.wraps(swap)
    def swap_tensors(t1, t2):
        swap(t1, t2)
        for tensor in (t1, t2):
            if _has_hook(tensor):
                _relink(tensor)

    return swap_tensors


def _relink(tensor: Tensor) -> None:
    """swap_tensors leaves the dictionary of hooks in place, but moves the entry by which autograd finds it."""
    tensor._post_accumulate_grad_hooks = tensor._post_accumulate_grad_hooks


def _refuse_data_parallel(module: nn.Module) -> None:
    if any(isinstance(part, nn.parallel.DistributedDataParallel) for part in module.modules()):
        raise ValueError(
            "register_gradient_hook: module has a DistributedDataParallel, which averages gradients after these hooks. "
            "Use lcw_ops.activate_gradients(optimizer)."
        )


class _GradientHook:
    def __init__(self, kind: str, alpha: float, beta: float) -> None:
        self._function = kind, alpha, beta

    def is_on(self, param: Tensor) -> bool:
        return any(hook is self for hook in _hooks_of(param))

    @torch._disable_dynamo
    @torch.no_grad()
    def __call__(self, param: Tensor) -> None:
        if not self.is_on(param):
            # swap_tensors has taken autograd's entry to a parameter that never got the hook.
            return
        params = _with_gradient("register_gradient_hook", [param])
        _unshare(params)
        for found in params:
            gradient = _local(found.grad)
            ops.activate_(backends.choose(ops.NAME, gradient.device), [gradient], *self._function)


def _has_hook(param: Tensor) -> bool:
    return any(isinstance(hook, _GradientHook) for hook in _hooks_of(param))


def _hooks_of(param: Tensor) -> Iterable[Callable]:
    hooks: dict[int, Callable] = getattr(param, "_post_accumulate_grad_hooks", None) or {}
    return hooks.values()
