"""Activated gradients for loops without an optimizer: hooks on the parameters, which run after every backward pass."""

import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lcw_ops import _torch
from lcw_ops.ops import backends
from lcw_ops.ops import gradient_activation as ops
from lcw_ops.optim._activated import is_distributed
from lcw_ops.optim._gradients import check_function, gradients_of, local, unshare, with_gradient


def register_gradient_hook(
    module: nn.Module, kind: str = "arctan", alpha: float = 0.1, beta: float = 20.0
) -> "GradientHooks":
    """Activate each parameter's gradient in place after every backward pass; for loops without an optimizer.

    The activation functions are those of :func:`lcw_ops.activate_gradients`. Prefer that call wherever a torch
    optimizer makes the steps, for these reasons:

    - A hook runs whenever a gradient has been added to ``.grad``. Two backward passes before a step give
      ``f(f(g1) + g2)`` and not ``f(g1 + g2)``: make one pass per step.
    - With GradScaler the hook would run on scaled gradients, and hide an overflow from it. It runs before clipping.
    - Under DDP each process would activate its own gradient before the mean, so a module that is or has a
      DistributedDataParallel is refused. ``ddp.module``, its other parts and a module that is wrapped afterwards are
      not noticed, and give wrong results. FSDP2 runs the hooks after the reduction if they are registered after
      ``fully_shard``.
    - ``backward(create_graph=True)`` is refused where the gradient has a graph, because the hook would not be part of
      the graph.
    - New parameters of the module get the hook as well, if they require a gradient when they arrive. They may be
      assigned (``module.weight = ...``, ``module.head = ...``, ``load_state_dict(..., assign=True)``,
      parametrizations), or come from a conversion (``module.double()``, ``to_empty``) under
      ``torch.__future__.set_overwrite_module_params_on_conversion(True)`` or
      ``set_swap_module_params_on_conversion(True)``. torch has no hook for conversions, so the first call of this
      function wraps the method that converts modules and ``torch.utils.swap_tensors`` for the whole process.
    - A conversion that replaces a parameter with the hook gives it to the replacement, even if the parameter has been
      frozen since: the hook acts again once the replacement requires a gradient.
    - Code that writes directly into a module's ``_parameters`` or ``_modules`` is not noticed: ``fully_shard``, and
      ``insert`` of nn.ModuleList and nn.Sequential. Register after such code. If hooks are registered already, call
      ``remove()`` and register again.

    Args:
        module: each of its parameters that requires a gradient gets the hook; a shared parameter gets it once.
        kind, alpha, beta: "arctan", "tanh" or "log"; numbers > 0 that are normal in float32.

    Returns:
        A handle with ``.remove()``. The hooks belong to the parameters: a copy of the module (``copy.deepcopy``,
        pickling, ``torch.save``) has none, as with all of torch's hooks on parameters.

    Raises:
        TypeError: module is not a module; alpha or beta is not a number; during backward, a gradient that is sparse or
            not floating point.
        ValueError: unknown kind, numbers out of range; a module with DistributedDataParallel (also if it is assigned to
            a hooked module later), with an uninitialized parameter, without a parameter that requires a gradient, or
            with a parameter that has such a hook already; during backward, a gradient that requires a gradient itself,
            or is an inference tensor outside of inference mode.

    Source: M. Liu, L. Chen, X. Du, L. Jin, M. Shang, "Activated Gradients for Deep Neural Networks", TNNLS 2021, arXiv
    2107.04228.
    """
    name = "register_gradient_hook"
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: module is a {type(module).__name__}; expected a torch.nn.Module.")
    check_function(name, kind, alpha, beta)
    _refuse_data_parallel(module)
    params = [param for param in module.parameters() if param.requires_grad]
    if not params:
        raise ValueError(f"{name}: module has no parameter that requires a gradient. Call requires_grad_() first.")
    if any(map(nn.parameter.is_lazy, params)):
        raise ValueError(
            f"{name}: module has an uninitialized parameter, as nn.LazyLinear has. Call the module once first."
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
    """The handle of :func:`register_gradient_hook`: ``remove()`` ends the activation."""

    def __init__(self, hook: "_GradientHook") -> None:
        self._hook = hook
        # Maps the key of this hook on a parameter to the dictionary of the parameter's hooks. The dictionary lives as
        # long as its parameter; a weak reference to the parameter itself would keep torch from swapping it.
        self._places: weakref.WeakValueDictionary[int, OrderedDict] = weakref.WeakValueDictionary()

    def __copy__(self) -> "GradientHooks":
        return self

    def __reduce__(self) -> tuple:
        # A copy of the module has no hooks, so a copy of the handle has none to remove.
        return GradientHooks, (self._hook,)

    def remove(self) -> None:
        """Leave the gradients alone from now on. A second call does nothing."""
        for key, hooks in list(self._places.items()):
            hooks.pop(key, None)
        for followers in list(_followers.values()):
            if self in followers:
                followers.remove(self)

    def follow(self, module: nn.Module) -> None:
        """Hook the parameters of ``module`` and its submodules: those that they have and those that they will get."""
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
        """Hook ``param``, unless it already has a hook from this handle or another."""
        if param.requires_grad and not _has_hook(param):
            handle = param.register_post_accumulate_grad_hook(self._hook)
            self._places[handle.id] = _torch.gradient_hooks(param)
            _torch.relink_gradient_hooks(param)

    def add_frozen(self, param: Tensor) -> None:
        """Hook a parameter that does not require a gradient. `add` cannot: torch would refuse the hook."""
        can_require = param.is_floating_point() or param.is_complex()
        if _has_hook(param) or not can_require or param.is_inference():
            return
        requires_grad = param.requires_grad
        self.add(param.requires_grad_())
        param.requires_grad_(requires_grad)

    def names_of_hooked(self, module: nn.Module) -> list[str]:
        """The names of the module's own parameters that have this hook."""
        return [name for name, param in module._parameters.items() if param is not None and self._hook.is_on(param)]


# Maps the id of a module to the handles whose hooks its new parameters get.
_followers: dict[int, list[GradientHooks]] = {}


@functools.cache
def _watch_replacements() -> None:
    """Watch for new parameters. torch runs hooks when one is assigned; conversions, which run none, are wrapped."""
    nn.modules.module.register_module_parameter_registration_hook(_add_to_parameter)
    nn.modules.module.register_module_module_registration_hook(_add_to_submodule)
    _torch.wrap_conversions(_add_after)
    torch.utils.swap_tensors = _relink_after(torch.utils.swap_tensors)


# torch.compile must not trace these four: they would add hooks while it traces, and not at every call.
@_torch.never_traced
def _add_to_parameter(module: nn.Module, name: str, param: Tensor) -> None:
    followers = _followers.get(id(module), ())
    if followers and is_distributed(module._parameters.get(name)) and not is_distributed(param):
        # FSDP2 has gathered the parameter for a forward pass: its gradient is not reduced yet.
        return
    for hooks in followers:
        hooks.add(param)


@_torch.never_traced
def _add_to_submodule(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    if submodule is not None:
        for hooks in _followers.get(id(module), ()):
            hooks.follow(submodule)


@_torch.never_traced
def _find_hooked(module: nn.Module) -> list[tuple[GradientHooks, str]]:
    # Return names, not parameters: torch does not swap a parameter that something else refers to.
    return [(hooks, name) for hooks in _followers.get(id(module), ()) for name in hooks.names_of_hooked(module)]


@_torch.never_traced
def _add_to_own(module: nn.Module, hooked: list[tuple[GradientHooks, str]]) -> None:
    for hooks in _followers.get(id(module), ()):
        hooks.add_own(module)
    # A hooked parameter keeps the hook when it is frozen, in case it is trained again. Its replacement gets it too.
    for hooks, name in hooked:
        if (param := module._parameters[name]) is not None:
            hooks.add_frozen(param)


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
                _torch.relink_gradient_hooks(tensor)

    return swap_tensors


def _refuse_data_parallel(module: nn.Module) -> None:
    if any(isinstance(part, nn.parallel.DistributedDataParallel) for part in module.modules()):
        raise ValueError(
            "register_gradient_hook: module has a DistributedDataParallel, which averages gradients after these hooks. "
            "Use lcw_ops.activate_gradients(optimizer)."
        )


class _GradientHook:
    """The function that the parameters of one handle share as their hook."""

    def __init__(self, kind: str, alpha: float, beta: float) -> None:
        self._function = kind, alpha, beta

    def is_on(self, param: Tensor) -> bool:
        return any(hook is self for hook in _torch.gradient_hooks(param).values())

    @_torch.never_traced
    @torch.no_grad()
    def __call__(self, param: Tensor) -> None:
        if not self.is_on(param):
            # swap_tensors has moved autograd's entry to a parameter that never got the hook.
            return
        params = with_gradient("register_gradient_hook", [param])
        unshare(params)
        for gradient in map(local, gradients_of(params)):
            ops.activate_(backends.choose(ops.NAME, gradient.device), [gradient], *self._function)


def _has_hook(param: Tensor) -> bool:
    return any(isinstance(hook, _GradientHook) for hook in _torch.gradient_hooks(param).values())
