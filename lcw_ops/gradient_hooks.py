"""Activated gradients for loops as they are: before the steps of any torch optimizer, or after every backward.

M. Liu, L. Chen, X. Du, L. Jin, M. Shang, "Activated Gradients for Deep Neural Networks", TNNLS 2021, arXiv 2107.04228.
"""

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
      and the gradients of such a step are of no use. Clipping comes before ``step()``, hence before this.
    - DDP and FSDP2: after the reduction, on the local shards.
    - ``.grad`` itself is changed: a second step needs new gradients.
    - Gradients that share memory, with each other or in themselves, get memory of their own.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        kind, alpha, beta: "arctan", "tanh" or "log"; finite numbers > 0.
        params: those of the optimizer's parameters that are meant; default all, of groups added later too. Several
            calls for one optimizer must name different ones.

    Returns:
        A handle; ``handle.remove()`` ends it. Optimizer and handle can be copied by ``copy.deepcopy`` and pickled: the
        copy activates the gradients of its own parameters. (Other hooks are lost then, as torch has it.)

    Raises:
        TypeError: no optimizer, no numbers, no parameters; at a step, a gradient that is sparse, or not float32,
            float64, bfloat16 or float16. No gradient has been changed then.
        ValueError: unknown kind, numbers out of range; params that the optimizer does not have, or that are activated
            already, by another call or by an lcw_ops.optim optimizer, which is to have gradient_activation=None.
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
        self._optimizer = weakref.ref(optimizer)
        self.kind, self.alpha, self.beta, self.params = kind, alpha, beta, params

    def remove(self) -> None:
        """Gradients are left alone from now on. A second call does nothing."""
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._optimizer_step_pre_hooks.pop(self, None) is not None:
            del optimizer._optimizer_load_state_dict_pre_hooks[self]

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
        self._optimizer = weakref.ref(optimizer)
        # The optimizer is being put together itself: its own __setstate__ keeps the hooks that it finds.
        self.attach()

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before ``optimizer.step(closure)``; ``args`` begins with the optimizer."""
        if kwargs.get("grad_scaler") is not None:
            raise RuntimeError(
                f"activate_gradients: {type(optimizer).__name__}.step takes grad_scaler and unscales the gradients "
                "itself, after they would have been activated. Use an optimizer without that argument."
            )
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._activate(optimizer)
            return None

        def closure_and_activation():
            loss = closure()
            self._activate(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_and_activation}
        return (args[0], closure_and_activation, *args[2:]), kwargs

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
    return [hook for hook in optimizer._optimizer_step_pre_hooks.values() if isinstance(hook, ActivatedGradients)]


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
    checks.check_positive(name, "alpha", alpha)
    checks.check_positive(name, "beta", beta)


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
    found = []
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
    if not all(type(grad) is Tensor and grad.is_cpu for grad in grads):
        return False
    return _backends.choose(ops.NAME, torch.device("cpu")) == "cpp" and ops.activate_plain_(grads, *settings)


def _unshare(params: list[Tensor]) -> None:
    """Gradients in memory of their own: what two share, or one has twice, would be activated twice."""
    params = [param for param in params if param.grad is not None and param.grad.layout is torch.strided]
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
    - Under DDP each process would activate its own gradient, before the mean: such a module is refused. FSDP2 runs the
      hooks after the reduction, if they are registered after ``fully_shard``.

    Args:
        module: its parameters that require a gradient now get the hook, those that are shared once.
        kind, alpha, beta: "arctan", "tanh" or "log"; finite numbers > 0.

    Returns:
        A handle with ``.remove()``. The hooks belong to the parameters: a copy of the module (``copy.deepcopy``,
        pickling, ``torch.save``) has none, as with all of torch's hooks on parameters.

    Raises:
        TypeError: no module; no numbers; during backward, a gradient that is sparse or not floating.
        ValueError: unknown kind, numbers out of range; a module in DistributedDataParallel, without a parameter that
            requires a gradient, or with one that has such a hook already.
    """
    name = "register_gradient_hook"
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: module is a {type(module).__name__}; expected a torch.nn.Module.")
    _check_function(name, kind, alpha, beta)
    if isinstance(module, nn.parallel.DistributedDataParallel):
        raise ValueError(
            f"{name}: module is in DistributedDataParallel, which averages gradients after these hooks. Use "
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
