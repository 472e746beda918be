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

from lcw_ops.ops import _backends
from lcw_ops.ops import gradient_activation as ops
from lcw_ops.optim._activated import ActivatedOptimizer, is_distributed
from lcw_ops.reference import checks
from lcw_ops.reference.gradient_activation import KINDS

# In a parameter group: False leaves the group alone, a dict of kind, alpha or beta overrules what is said for all.
GROUP_KEY = "activate_gradients"

# The code of what torch wraps around the step of every optimizer class to run the hooks.
_STEP_WRAPPER = torch.optim.Optimizer.profile_hook_step(lambda *_: None).__code__


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

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        kind, alpha, beta: "arctan", "tanh" or "log"; numbers > 0 that are normal in float32.
        params: those of the optimizer's parameters that are meant; default all, of groups added later too. Several
            calls for one optimizer must name different ones.

    Returns:
        A handle; ``handle.remove()`` ends it. Optimizer and handle can be copied by ``copy.deepcopy`` and pickled: the
        copy activates the gradients of its own parameters. (Other hooks are lost then, as torch has it.) After
        ``copy.copy(optimizer)`` both have the same parameters and this one handle, whose ``remove()`` ends it for both;
        copies of that copy have no activation.

    Raises:
        TypeError: no optimizer, no numbers, no parameters; at a step, a gradient that is sparse, or not float32,
            float64, bfloat16 or float16.
        ValueError: unknown kind, numbers out of range; params that the optimizer does not have, or that are activated
            already, by another call or by an lcw_ops.optim optimizer, which is to have gradient_activation=None; a
            group with differentiable=True; at a step, a gradient that requires a gradient itself, or that is an
            inference tensor outside of inference mode.
        All groups are checked before any gradient is changed.
    """
    name = "activate_gradients"
    if not isinstance(optimizer, torch.optim.Optimizer) or not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise TypeError(
            f"{name}: optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer. Give the one that a "
            "wrapper has inside."
        )
    _check_function(name, kind, alpha, beta)
    if params is not None:
        params = _check_params(name, optimizer, params)
    if any(other.overlaps(params) for other in _activations(optimizer)):
        raise ValueError(
            f"{name}: these gradients are activated before every step already. Call remove() on the first handle, or "
            "name other params in both calls."
        )
    activation = ActivatedGradients(optimizer, kind, alpha, beta, params)
    for group in optimizer.param_groups:
        activation.settings(optimizer, group)
    activation.attach()
    return activation


class ActivatedGradients:
    """The hook of one :func:`activate_gradients`, and its handle."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, kind: str, alpha: float, beta: float, params: list[Tensor] | None
    ) -> None:
        self._optimizer: Callable[[], torch.optim.Optimizer | None] = weakref.ref(optimizer)
        self._is_removed = False
        self.kind, self.alpha, self.beta, self.params = kind, alpha, beta, params

    def remove(self) -> None:
        """Gradients are left alone from now on. A second call does nothing."""
        # For a copy.copy of the optimizer, which has this hook too.
        self._is_removed = True
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._optimizer_step_pre_hooks.pop(self, None) is not None:
            del optimizer._optimizer_load_state_dict_pre_hooks[self]
            if not _activations(optimizer):
                optimizer.__dict__.pop("__getstate__", None)

    def overlaps(self, params: list[Tensor] | None) -> bool:
        if self.params is None or params is None:
            return True
        return not set(map(id, self.params)).isdisjoint(map(id, params))

    def attach(self) -> None:
        """As ``register_step_pre_hook`` does, but under a key that no other process numbers its hooks by."""
        optimizer = self._optimizer()
        attributes = optimizer.__dict__
        attributes.setdefault("_optimizer_step_pre_hooks", OrderedDict())[self] = self
        attributes.setdefault("_optimizer_load_state_dict_pre_hooks", OrderedDict())[self] = _keep_group_settings
        # torch leaves hooks behind when it copies an optimizer or pickles it.
        attributes["__getstate__"] = _StateWithActivation(optimizer)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_optimizer": self._optimizer()}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
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
        if self._is_removed or _is_inner_step(optimizer):
            return None
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
            settings = self.settings(optimizer, group)
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
                calls.append((_backends.choose(ops.NAME, device), grads, *settings))
        _unscale(optimizer)
        for call in calls:
            ops.activate_(*call)

    def settings(self, optimizer: torch.optim.Optimizer, group: dict) -> tuple[str, float, float] | None:
        """kind, alpha and beta for one group, checked; None: it is left alone."""
        if isinstance(optimizer, ActivatedOptimizer) and group["gradient_activation"] is not None:
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
        settings = {"kind": self.kind, "alpha": self.alpha, "beta": self.beta}
        if override is not None:
            if not isinstance(override, dict) or not override.keys() <= settings.keys():
                raise ValueError(
                    f"activate_gradients: a parameter group has {GROUP_KEY}={override!r}; expected False, or a dict "
                    "with any of kind, alpha, beta."
                )
            settings |= override
            _check_function("activate_gradients", **settings)
        return settings["kind"], settings["alpha"], settings["beta"]


def _no_optimizer() -> None:
    return None


def _is_inner_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this step was called by another of the same optimizer: a subclass' ``super().step()``.

    torch runs the hooks around the step of every class of which it has made an optimizer, so around both; found on the
    stack, which forgets a step that raised.
    """
    frame, count = sys._getframe(1), 0
    while frame is not None and count < 2:
        code = frame.f_code
        # By name: while torch.compile traces, the code that runs is another.
        if code.co_name == _STEP_WRAPPER.co_name and code.co_filename == _STEP_WRAPPER.co_filename:
            args = frame.f_locals.get("args")
            count += bool(args) and args[0] is optimizer
        frame = frame.f_back
    return count > 1


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
    hooks = optimizer._optimizer_step_pre_hooks.values()
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
    return _backends.choose(ops.NAME, torch.device("cpu")) == "cpp" and ops.activate_plain_(grads, *settings)


def _unshare(params: list[Tensor]) -> None:
    """Gradients in memory of their own: what two share, or one has twice, would be activated twice."""
    params = [param for param in params if param.grad is not None and param.grad.layout is torch.strided]
    for param in params:
        # A view that only says that it is negated: nothing writes through it.
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

    Args:
        module: its parameters that require a gradient now get the hook, those that are shared once.
        kind, alpha, beta: "arctan", "tanh" or "log"; numbers > 0 that are normal in float32.

    Returns:
        A handle with ``.remove()``. The hooks belong to the parameters: a copy of the module (``copy.deepcopy``,
        pickling, ``torch.save``) has none, as with all of torch's hooks on parameters.

    Raises:
        TypeError: no module; no numbers; during backward, a gradient that is sparse or not floating.
        ValueError: unknown kind, numbers out of range; a module with DistributedDataParallel, without a parameter that
            requires a gradient, or with one that has such a hook already; during backward, a gradient that requires a
            gradient itself, or is an inference tensor outside of inference mode.
    """
    name = "register_gradient_hook"
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: module is a {type(module).__name__}; expected a torch.nn.Module.")
    _check_function(name, kind, alpha, beta)
    if any(isinstance(part, nn.parallel.DistributedDataParallel) for part in module.modules()):
        raise ValueError(
            f"{name}: module has a DistributedDataParallel, which averages gradients after these hooks. Use "
            "lcw_ops.activate_gradients(optimizer)."
        )
    params = [param for param in module.parameters() if param.requires_grad]
    if not params:
        raise ValueError(f"{name}: module has no parameter that requires a gradient. Call requires_grad_() first.")
    if any(_has_hook(param) for param in params):
        raise ValueError(
            f"{name}: a parameter of module has such a hook already, and would be activated twice. Call remove() on "
            "the first handle."
        )
    hook = _GradientHook(kind, alpha, beta)
    return GradientHooks([param.register_post_accumulate_grad_hook(hook) for param in params])


class GradientHooks:
    """The handle of :func:`register_gradient_hook`."""

    def __init__(self, handles: list[torch.utils.hooks.RemovableHandle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Gradients are left alone from now on. A second call does nothing."""
        for handle in self._handles:
            handle.remove()


class _GradientHook:
    def __init__(self, kind: str, alpha: float, beta: float) -> None:
        self._function = kind, alpha, beta

    @torch._disable_dynamo
    @torch.no_grad()
    def __call__(self, param: Tensor) -> None:
        params = _with_gradient("register_gradient_hook", [param])
        _unshare(params)
        for found in params:
            gradient = _local(found.grad)
            ops.activate_(_backends.choose(ops.NAME, gradient.device), [gradient], *self._function)


def _has_hook(param: Tensor) -> bool:
    hooks: dict[int, Callable] = getattr(param, "_post_accumulate_grad_hooks", None) or {}
    return any(isinstance(hook, _GradientHook) for hook in hooks.values())
