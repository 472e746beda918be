"""Steps during the backward pass: each parameter is stepped as soon as its gradient is there, which is then freed.

A hook steps a parameter when autograd has accumulated its gradient. The weights of a recurrence are stepped range by
range inside its backward pass (lcw_ops/ops/orthogonal_filter/in_backward.py). Both go through the step that the
optimizer makes otherwise, with one parameter or one range of layers instead of all parameters.
"""

import functools
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lcw_ops import _torch
from lcw_ops._checks import describe
from lcw_ops.ops.orthogonal_filter.in_backward import check_uses, owners

# An ActivatedOptimizer. Its module imports this one.
_Optimizer = Any


class StepsInBackward:
    """The steps of one optimizer during its backward passes.

    Nothing here keeps the optimizer alive. When it dies, its parameters lose their hooks.
    """

    def __init__(self, optimizer: _Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        # The parameters and the handles of their hooks, by the parameter's id.
        self._hooked: dict[int, tuple[Tensor, Any]] = {}
        # The group and the place in it where a parameter was last found, by its id.
        self._places: dict[int, tuple[int, int]] = {}
        # The backward pass that has stepped parameters since the last call of step().
        self._pass: int | None = None
        self._is_torn = False
        self._knows_processes = False
        # Autograd has one thread per device.
        self._lock = threading.RLock()
        weakref.finalize(optimizer, _release, self._hooked).atexit = False
        _watch_grad_scalers()

    def __reduce__(self) -> tuple:
        # A subclass may save all of its attributes. A copy of the optimizer makes its own hooks.
        return _nothing, ()

    def watch(self) -> None:
        """Hook the optimizer's new parameters. Raises ValueError or TypeError, and hooks none, if one is refused."""
        optimizer = self._living()
        params = [param for group in optimizer.param_groups for param in group["params"]]
        new = {id(param): param for param in params if id(param) not in self._hooked}
        for param in new.values():
            self._check(optimizer, param)
        for key, param in new.items():
            self._hooked[key] = param, _add_hook(param, self._on_gradient)
            owners[key] = self
        self._knows_processes = not new and self._knows_processes

    def _check(self, optimizer: _Optimizer, param: Tensor) -> None:
        came = f"has a parameter of shape {tuple(param.shape)}"
        if hasattr(param, "to_local"):
            remedy = "Its gradient is not reduced when the hook runs: give in_backward=False."
            raise TypeError(_message(optimizer, f"{came} that is a DTensor", "plain tensors", remedy))
        if id(param) in owners:
            remedy = "Delete that optimizer first. A copy.copy of an optimizer has the same parameters."
            raise ValueError(
                _message(optimizer, f"{came} that another optimizer steps during backward", "one optimizer", remedy)
            )
        if param.grad is not None:
            remedy = "Call zero_grad() first."
            raise ValueError(_message(optimizer, f"{came} that has a gradient already", "none", remedy))

    def end_step(self, closure: Callable[[], float] | None) -> float | None:
        """The optimizer's ``step``: the next backward pass may step the parameters again."""
        optimizer, loss = self._living(), None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_whole(optimizer)
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    came = f"has a parameter of shape {tuple(param.shape)} with a gradient, which no hook has taken"
                    remedy = (
                        "Was .grad set by hand, or the parameter put into a group without add_param_group? Call "
                        "zero_grad(), and let backward() compute the gradients."
                    )
                    raise RuntimeError(_message(optimizer, came, "none at step()", remedy))
        self._pass = None
        return loss

    def forgive(self) -> None:
        """A state has been loaded: it replaces the one that an earlier backward pass has left."""
        self._is_torn, self._pass = False, None

    # ---- A parameter whose gradient autograd has accumulated -------------------------------------------------------

    @_torch.never_traced
    @torch.no_grad()
    def _on_gradient(self, param: Tensor) -> None:
        optimizer = self._optimizer()
        # swap_tensors moves autograd's entry to a parameter that never got the hook.
        if optimizer is None or owners.get(id(param)) is not self:
            return
        with self._lock:
            index = self._index_of(optimizer, param)
            if index is None:
                return
            try:
                current = self._check_pass(optimizer)
                self._step(optimizer, index, param)
                self._pass = current
            finally:
                # After an error too: the next pass would add to it.
                param.grad = None

    # ---- The weights of a recurrence: lcw_ops.ops.orthogonal_filter.in_backward.Owner ------------------------------

    def takes_ranges(self, weight: Tensor) -> bool:
        # torch's fused steps go through memory in order, and the gradient of a range is contiguous.
        if not weight.is_contiguous():
            return False
        optimizer = self._living()
        with self._lock:
            index = self._index_of(optimizer, weight)
            return index is not None and optimizer._steps_elementwise(optimizer.param_groups[index], weight)

    @contextmanager
    def stepping(self, weight: Tensor) -> Iterator[Callable[[slice, Tensor], None]]:
        optimizer = self._living()
        with self._lock:
            index = self._index_of(optimizer, weight)
            current = self._check_pass(optimizer)
        if index is None:
            came = f"has lost a weight of shape {tuple(weight.shape)} after the forward pass"
            raise RuntimeError(
                _message(optimizer, came, "the same groups until backward()", "Do the forward pass again.")
            )
        states = _States(optimizer, index, weight)
        has_written = False

        @torch.no_grad()
        def step(steps: slice, gradient: Tensor) -> None:
            nonlocal has_written
            part = weight.detach()[steps]
            part.grad = gradient
            optimizer.state[part] = states.of(steps)
            try:
                with self._lock:
                    self._step(optimizer, index, part)
                    self._pass, has_written = current, True
                states.keep(steps, part, optimizer.state[part])
            finally:
                del optimizer.state[part]

        try:
            yield step
            states.put_back()
        except BaseException:
            self._is_torn = has_written
            raise

    # ---- Both ------------------------------------------------------------------------------------------------------

    def _step(self, optimizer: _Optimizer, index: int, param: Tensor) -> None:
        if optimizer.max_grad_value is not None:
            torch.nn.utils.clip_grad_value_([param], optimizer.max_grad_value)
        optimizer._step_some(index, [param])

    def _check_pass(self, optimizer: _Optimizer) -> int:
        """The number of the running backward pass. Raises RuntimeError, at its first step, if it must not step."""
        current = _torch.current_backward()
        if self._pass == current:
            return current
        self._check_whole(optimizer)
        if _torch.is_nested_backward():
            came = "is to step in a backward pass inside another, as of a reentrant checkpoint"
            remedy = "Give torch.utils.checkpoint use_reentrant=False."
            raise RuntimeError(_message(optimizer, came, "one pass", remedy))
        if self._pass is not None:
            came = "has made this step already, in an earlier backward pass"
            remedy = (
                "Call step() after each backward pass. Gradients cannot be accumulated over several with "
                "in_backward=True. If the earlier pass raised, step() goes on with what it has stepped."
            )
            raise RuntimeError(_message(optimizer, came, "one backward pass for each call of step()", remedy))
        if _torch.keeps_graph():
            came = "is to step in a backward pass that keeps the graph (retain_graph, create_graph)"
            remedy = "A later pass would find other parameters in it. Give in_backward=False for such passes."
            raise RuntimeError(_message(optimizer, came, "a pass that frees it", remedy))
        for param, _ in self._hooked.values():
            if any(hook != self._on_gradient for hook in _torch.gradient_hooks(param).values()):
                came = f"has a parameter of shape {tuple(param.shape)} with another hook of "
                came += "register_post_accumulate_grad_hook, which may find the gradient freed"
                remedy = "Remove that hook, or give in_backward=False. Hooks of Tensor.register_hook are taken."
                raise RuntimeError(_message(optimizer, came, "its own hook only", remedy))
        check_uses()
        if not self._knows_processes:
            self._refuse_data_parallel(optimizer)
        return current

    def _check_whole(self, optimizer: _Optimizer) -> None:
        if self._is_torn:
            came = "was interrupted by an error while it stepped the layers of a weight: some have been stepped"
            remedy = "Load a checkpoint of the model, and then of the optimizer, by load_state_dict."
            raise RuntimeError(_message(optimizer, came, "whole steps", remedy))

    def _refuse_data_parallel(self, optimizer: _Optimizer) -> None:
        """Raise ValueError if a module averages the gradients over processes after the hooks have run."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            kinds: tuple[type[torch.nn.Module], ...] = (torch.nn.parallel.DistributedDataParallel,)
            if (fsdp := sys.modules.get("torch.distributed.fsdp")) is not None:
                kinds += (fsdp.FullyShardedDataParallel,)
            # isinstance() would ask objects for their __class__, and some load themselves then.
            for module in [found for found in gc.get_objects() if issubclass(type(found), kinds)]:
                if not self._hooked.keys().isdisjoint(map(id, module.parameters())):
                    came = f"has parameters of a {type(module).__name__}, which reduces gradients later"
                    remedy = "Give in_backward=False."
                    raise ValueError(_message(optimizer, came, "parameters of one process", remedy))
        self._knows_processes = True

    def _index_of(self, optimizer: _Optimizer, param: Tensor) -> int | None:
        """The index of the parameter's group, or None. Users write into groups, and loading replaces them."""
        groups = optimizer.param_groups
        index, place = self._places.get(id(param), (0, 0))
        if index < len(groups) and place < len(groups[index]["params"]) and groups[index]["params"][place] is param:
            return index
        self._places = {
            id(param): (index, place)
            for index, group in enumerate(groups)
            for place, param in enumerate(group["params"])
        }
        return self._places[id(param)][0] if id(param) in self._places else None

    def _living(self) -> _Optimizer:
        optimizer = self._optimizer()
        if optimizer is None:
            remedy = "Keep the optimizer until the pass is over."
            raise RuntimeError(describe("optim", "the optimizer", "of a weight has died", "it alive", remedy))
        return optimizer


class _States:
    """The state of a weight as the states of its ranges: slices of tensors of its shape, and copies of all else."""

    def __init__(self, optimizer: _Optimizer, index: int, weight: Tensor) -> None:
        self._optimizer, self._weight = optimizer, weight
        self._before = optimizer.state.get(weight, {})
        self._after: dict[str, Any] = {}
        self._given: dict[str, Any] = {}
        for name, value in self._before.items():
            if isinstance(value, Tensor) and value.numel() != 1:
                optimizer._check_state(index, weight, name, value)

    def of(self, steps: slice) -> dict[str, Any]:
        """The state of these layers before their step. A count of steps is a copy for each range."""
        self._given = {}
        for name, value in self._before.items():
            is_tensor = isinstance(value, Tensor)
            self._given[name] = value[steps] if _is_like(value, self._weight) else value.clone() if is_tensor else value
        return dict(self._given)

    def keep(self, steps: slice, part: Tensor, state: dict[str, Any]) -> None:
        """Keep the parts of a range's state that its step has not written into the weight's state."""
        for name, value in state.items():
            if not _is_like(value, part):
                self._after[name] = value
            elif value is not self._given.get(name):
                if name not in self._after:
                    self._after[name] = torch.empty_like(self._weight, dtype=value.dtype)
                self._after[name][steps] = value

    def put_back(self) -> None:
        """Write these parts into the weight's state."""
        for name, value in self._after.items():
            state = self._optimizer.state[self._weight]
            # A CUDA graph may have recorded the address of a count.
            if isinstance(value, Tensor) and _is_like(state.get(name), value):
                state[name].copy_(value)
            else:
                state[name] = value


def _is_like(value: object, tensor: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == tensor.shape


def _add_hook(param: Tensor, hook: Callable[[Tensor], None]) -> Any:
    """Hook a parameter, also a frozen one, which torch would refuse: it may be trained later."""
    requires_grad = param.requires_grad
    handle = param.requires_grad_().register_post_accumulate_grad_hook(hook)
    param.requires_grad_(requires_grad)
    return handle


def _release(hooked: dict[int, tuple[Tensor, Any]]) -> None:
    for key, (_, handle) in hooked.items():
        handle.remove()
        owners.pop(key, None)


def _nothing() -> None:
    return None


def _message(optimizer: _Optimizer, came: str, expected: str, remedy: str) -> str:
    return describe(optimizer._name(), "an optimizer with in_backward=True", came, expected, remedy)


@functools.cache
def _watch_grad_scalers() -> None:
    _torch.wrap_unscale(_unless_in_backward)


def _unless_in_backward(unscale: Callable) -> Callable:
    @functools.wraps(unscale)
    def unscale_(scaler, optimizer):
        if scaler.is_enabled() and getattr(optimizer, "in_backward", False):
            remedy = "Train in bfloat16 or float32, which need no scaler, or give in_backward=False."
            raise RuntimeError(_message(optimizer, "has stepped on scaled gradients", "no GradScaler", remedy))
        return unscale(scaler, optimizer)

    return unscale_
