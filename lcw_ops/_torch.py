"""Every private name of torch that this package relies on, behind a plain name.

Most of these say what torch does with a call: exporters, tracers, transforms, modes, the ``__torch_function__``
protocol. Where a plain name is an alias of torch's own function, using it costs no extra call. This file imports only
modules that ``import torch`` has loaded already. tests/test_torch_names.py checks each name; it runs on the oldest and
the newest torch that the package supports.

Some names with an underscore are used directly elsewhere. ``torch._check`` is documented. ``torch._foreach_*`` and
``torch._amp_foreach_*`` are operators in torch's schema list, which torch keeps compatible.
"""

import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from types import FrameType
from typing import Any


# This stands above ``import torch``, because that statement loads the ops, which use the decorator at once.
def constant_when_traced(function: Callable) -> Callable:
    """Let torch.compile take the function's result as a constant instead of tracing the function.

    torch.export with strict=True does so too. ``torch.compiler.assume_constant_result`` does the same, but it imports
    torch's compiler, which takes as long as all of torch.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._guards import detect_fake_mode  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402
from torch.overrides import handle_torch_function, has_torch_function_variadic  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

# () -> bool: whether a transform of torch.func (vmap, grad, jvp, ...) runs the code.
in_functorch = torch._C._are_functorch_transforms_active

# (tensor) -> bool: whether it stands for another tensor inside a transform of torch.func.
is_functorch_wrapped = torch._C._functorch.is_functorch_wrapped_tensor

# () -> bool: whether a torch.overrides.TorchFunctionMode is active.
is_function_mode_active = torch._C._is_torch_function_mode_enabled

# (*arguments) -> bool: whether an argument or a function mode has a __torch_function__, even if is_overridden is False.
may_be_overridden = has_torch_function_variadic

# () -> int: how many modes of __torch_dispatch__ see every operator. Fake tensors and make_fx are such modes.
count_dispatch_modes = torch._C._len_torch_dispatch_stack

# () -> bool: whether autocast is on for any type of device.
is_any_autocast_enabled = torch._C._is_any_autocast_enabled

# (tensor) -> bool: whether it shares the memory of another tensor.
is_view = Tensor._is_view

# (tensor) -> bool: whether it is one of autograd's all-zero tensors, which have no memory.
is_zeros_without_memory = Tensor._is_zerotensor

# (function) -> the same function, which torch.compile runs as it is, with a graph break, instead of tracing it.
never_traced = torch._disable_dynamo

# () -> bool: whether the running backward pass keeps the graph (retain_graph or create_graph).
keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph

# () -> int: a number of the running backward pass, -1 outside of one. No two passes have the same.
current_backward = torch._C._current_graph_task_id

# (node) -> bool: whether the running backward pass runs the node of the graph. Not for a leaf whose gradient
# torch.autograd.grad returns.
will_run_in_backward = torch._C._will_engine_execute_node

# () -> a context in which neither function modes nor tensors of subclasses see calls of torch's functions.
without_function_modes = torch._C.DisableTorchFunction

DispatchKey = torch._C.DispatchKey
OpOverload = torch._ops.OpOverload


class DispatchMode(TorchDispatchMode):
    """A mode whose ``__torch_dispatch__`` sees every operator. Using it does not import torch's compiler."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise the compiler is imported, and every operator passes through a wrapper of it.
        return False


def call_kernel(overload: OpOverload, device_type: str, *arguments, **options):
    """Call an op's kernel for tensors on a device of this type, below the dispatch modes that are active.

    The modes still see the operators that the kernel calls.
    """
    # For a key without a kernel of its own, torch calls a null pointer.
    keys = getattr(DispatchKey, device_type.upper()), DispatchKey.CompositeExplicitAutograd
    key = next((key for key in keys if overload.has_kernel_for_dispatch_key(key)), None)
    return overload(*arguments, **options) if key is None else overload._op_dk(key, *arguments, **options)


def in_forward_mode() -> bool:
    """Whether a forward-mode derivative may be taken: torch.autograd.forward_ad.dual_level or torch.func.jvp is on."""
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether torch.compile, torch.func or forward mode runs the code, so that a call must show its derivatives."""
    return torch.compiler.is_compiling() or in_functorch() or in_forward_mode()


def is_autocast_enabled(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device."""
    # The type of a device is a new string at every reading, which takes as long as a small op. So ask for it last.
    # Autocast does not know the meta device.
    return is_any_autocast_enabled() and not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def is_computed(tensor: Tensor) -> bool:
    """Whether autograd has computed the tensor, and it is not a view of a leaf: writing to it changes no leaf."""
    return tensor.grad_fn is not None and (tensor._base is None or not tensor._base.is_leaf)


def is_fake(tensor: Tensor) -> bool:
    """Whether the tensor has a shape but no memory, as in FakeTensorMode."""
    return isinstance(tensor, FakeTensor)


def is_traced() -> bool:
    """Whether calls are recorded in a program, which cannot depend on a tensor's numbers or on its address."""
    return torch.compiler.is_compiling() or count_dispatch_modes() > 0 or torch.jit.is_tracing()


@constant_when_traced
def is_exporting() -> bool:
    """Whether the call becomes part of a program that must run without this package.

    True in torch.export (torch.onnx.export uses it) and in torch.jit.trace (the TorchScript exporter to ONNX uses it).
    False in torch.compile: its programs run in this process, on the fused ops.
    """
    return torch.compiler.is_exporting() or torch._C._is_tracing() or is_in_onnx_export()


@constant_when_traced
def is_in_onnx_export() -> bool:
    """Whether torch.onnx.export is running: its programs have no gradients."""
    # torch.onnx.is_in_onnx_export() imports the exporters, which takes half a second: call it only if one is loaded.
    exporter_is_there = (
        "torch.onnx._internal.exporter" in sys.modules or "torch.onnx._internal.torchscript_exporter" in sys.modules
    )
    return exporter_is_there and torch.onnx.is_in_onnx_export()


@constant_when_traced
def is_dtensor_loaded() -> bool:
    """Whether torch.distributed.tensor has been imported. If not, no DTensor exists."""
    # An import would take half as long as that of torch. Python sets the attribute when the import ends, so the module
    # is not half loaded.
    return "tensor" in vars(torch.distributed)


def has_dtensor(*arguments) -> bool:
    """Whether an argument is a DTensor, a tensor that is spread over processes."""
    if not is_dtensor_loaded():
        return False
    dtensor = torch.distributed.tensor.DTensor
    return any(isinstance(argument, dtensor) for argument in arguments)


def unrecorded(function: Callable, *arguments):
    """Return ``function(*arguments)`` without letting torch.jit.trace record it.

    Run checks this way: sizes are then plain ints, and comparing them gives no TracerWarning.
    """
    state = torch._C._get_tracing_state() if torch.jit.is_tracing() else None
    if state is None:
        return function(*arguments)
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        return function(*arguments)
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def has_values(tensor: Tensor) -> bool:
    """Whether the tensor's numbers can be read. A meta tensor has none, nor has any result in FakeTensorMode."""
    return not tensor.is_meta and detect_fake_mode([tensor]) is None


def is_swapping_tensors() -> bool:
    """Whether the caller's caller was called by torch.func.functional_call, which puts other tensors into a module.

    It sets attributes that are neither parameters nor buffers by ``setattr``, as a user does.
    """
    frame: Any = None if torch.compiler.is_compiling() else sys._getframe(2)
    return frame is not None and frame.f_globals.get("__name__") == "torch.nn.utils._named_member_accessor"


def check_when_run(condition: Tensor, message: str) -> None:
    """ValueError unless the condition, a boolean scalar, holds. In a traced program the check happens when it runs."""
    if is_traced():
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, without the assertion on the tensor that torch.export records beside ``to``."""
    if tensor.dtype == dtype:
        return tensor
    return torch.ops.aten._to_copy.default(tensor, dtype=dtype) if torch.compiler.is_exporting() else tensor.to(dtype)


def constant(value: float, **options) -> Tensor:
    """The number as a tensor of shape (1,), for a program that torch.export records.

    ONNX keeps a float64 tensor exactly, but rounds the number of ``torch.full`` to float32. Only ``torch.full`` takes a
    number that depends on a dynamic size.
    """
    return torch.tensor([value], **options) if isinstance(value, (int, float)) else torch.full((1,), value, **options)


# Dynamo of torch 2.10 refuses id() of a tensor that was computed in the traced code; that of 2.13 does not.
TRACES_NO_ID = torch.__version__ < (2, 13)  # type: ignore[operator]

# Before torch 2.13, a scan whose first state requires no gradient drops the gradients that later steps pass back. The
# gradients are then silently wrong (https://github.com/pytorch/pytorch/issues/184528).
_SCAN_DROPS_GRADIENTS = torch.__version__ < (2, 13)  # type: ignore[operator]


def ready_for_scan(state: Tensor, *arguments) -> Tensor:
    """``state``, made to require a gradient if one of the tensor arguments does."""
    if _SCAN_DROPS_GRADIENTS:
        for argument in arguments:
            if isinstance(argument, Tensor):
                # The sum over an empty slice adds nothing, and requires a gradient when the tensor does.
                state = state + torch.atleast_1d(argument).narrow(0, 0, 0).sum()
    return state


def scan(
    step: Callable, state: Tensor, per_step: dict[str, Tensor], shared: dict[str, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Run ``state, outputs = step(state, arguments)`` for every step, as one node of a graph for any number of steps.

    The first state comes from :func:`ready_for_scan`. The arguments of a step are the tensors of ``shared`` and the
    slices of the tensors of ``per_step`` along dim 0; ``per_step`` holds at least one. ``outputs`` is a list of
    tensors, which the result stacks over the steps. ``step`` must not return a tensor twice, nor one of its arguments.
    """
    # Imported here, because it takes as long as importing torch.
    from torch._higher_order_ops.scan import scan, scan_op

    if torch.compiler.is_dynamo_compiling():
        return scan(lambda state, slices: step(state, {**shared, **slices}), state, per_step)
    # scan would call torch.compile, which confuses the batch size with the width if they are equal. scan_op does not.
    names = [*per_step, *shared]

    def flat_step(state, *arguments):
        state, outputs = step(state, dict(zip(names, arguments, strict=True)))
        return [state, *outputs]

    last, *outputs = scan_op(flat_step, [state], list(per_step.values()), tuple(map(_without_data, shared.values())))
    return last, outputs


def _without_data(tensor: Tensor) -> Tensor:
    """A fake tensor, as scan needs it. torch.export does not replace a tensor that is a module's plain attribute."""
    return tensor if is_fake(tensor) else torch.ops.aten.alias.default(tensor)


def is_overridden(*arguments) -> bool:
    """Whether an argument or a function mode takes the call over by torch's ``__torch_function__`` protocol.

    A public function calls this before anything else, and then :func:`hand_over`. torch.fx then records one call, and
    Tensor subclasses and function modes see the call as they see torch's own functions.

    torch.compile traces into the function and cannot hand a call over, so the answer is then always False. While
    exporting, only arguments are asked, not modes. torch.export's own mode is off while it runs a function that was
    handed over to it, and so it would not record that the function switches autocast off.
    """
    if torch.compiler.is_dynamo_compiling() or not may_be_overridden(*arguments):
        return False
    return not torch.compiler.is_exporting() or any(map(_overrides, arguments))


def hand_over(function: Callable, *arguments):
    """Call ``function(*arguments)`` through the argument or mode that takes it over."""
    return handle_torch_function(function, arguments, *arguments)


def _overrides(argument) -> bool:
    disabled = torch._C._disabled_torch_function_impl
    return type(argument) is not Tensor and getattr(type(argument), "__torch_function__", disabled) is not disabled


def storage_reference(tensor: Tensor) -> Any | None:
    """A weak reference to the tensor's memory, whose ``cdata`` no other memory has while the reference lives.

    None for a tensor without a storage of its own, such as a sparse one.
    """
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return None


def is_reentrant_checkpoint(node: Any) -> bool:
    """Whether a node of autograd's graph is that of ``torch.utils.checkpoint`` with use_reentrant=True."""
    return getattr(type(node), "_forward_cls", None) is torch.utils.checkpoint.CheckpointFunction


# The rest of this file is about optimizers, backward passes and hooks on gradients.

# The code of the function that starts every backward pass.
_BACKWARD = torch.autograd.graph._engine_run_backward.__code__


def is_nested_backward() -> bool:
    """Whether another backward pass of this thread has started the running one, as reentrant checkpoints do."""
    frame: FrameType | None = sys._getframe(1)
    count = 0
    while frame is not None:
        count += frame.f_code is _BACKWARD
        frame = frame.f_back
    return count > 1


def gradient_accumulator(leaf: Tensor) -> Any:
    """The node of the graph that adds to the leaf's ``.grad``."""
    return torch.autograd.graph.get_gradient_edge(leaf).node


def has_gradient_hooks(tensor: Tensor) -> bool:
    """Whether the tensor has hooks of ``register_hook``, which may change its gradient."""
    return bool(tensor._backward_hooks)


def hook_gradient(tensor: Tensor, hook: Callable[[Tensor | None], None]) -> None:
    """``tensor.register_hook(hook)`` for a hook that stays, in 2 us instead of 5: without a handle to remove it."""
    if tensor._backward_hooks is None and tensor.grad_fn is not None:
        # A key that is no number: later hooks of register_hook take numbers.
        tensor._backward_hooks = OrderedDict(kept=hook)
        tensor.grad_fn._register_hook_dict(tensor)
    else:
        tensor.register_hook(hook)


def wrap_unscale(wrap: Callable) -> None:
    """Replace ``unscale_`` of every GradScaler, which its ``step`` calls, by ``wrap(unscale_)``."""
    torch.amp.GradScaler.unscale_ = wrap(torch.amp.GradScaler.unscale_)  # type: ignore[method-assign]


# The code that torch wraps around the step of every optimizer class to run the hooks.
_STEP_WRAPPER = torch.optim.Optimizer.profile_hook_step(lambda *_: None).__code__


def running_steps() -> list[torch.optim.Optimizer]:
    """The optimizers whose steps are running in this thread, the innermost first.

    An optimizer whose step calls ``super().step()`` may be listed twice: torch runs the hooks around the step of every
    class that has had an instance. The list is read from the stack, which a step leaves even if it raises.
    """
    frame: FrameType | None = sys._getframe(1)
    found: list[torch.optim.Optimizer] = []
    while frame is not None:
        code = frame.f_code
        # Compare names: while torch.compile traces, another code object runs.
        if code.co_name == _STEP_WRAPPER.co_name and code.co_filename == _STEP_WRAPPER.co_filename:
            args = frame.f_locals.get("args")
            if args:
                found.append(args[0])
        frame = frame.f_back
    return found


def runs_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether torch has wrapped the step of the optimizer's class, and the instance has a place for its own hooks."""
    return getattr(getattr(type(optimizer), "step", None), "hooked", False) and has_step_hooks(optimizer)


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the instance has a place for its own hooks, which torch's constructor makes."""
    return "_optimizer_step_pre_hooks" in vars(optimizer)


def step_hooks(optimizer: torch.optim.Optimizer) -> dict:
    """The hooks that run before the optimizer's step, by key; {} if torch's constructor has made no place for them."""
    return getattr(optimizer, "_optimizer_step_pre_hooks", {})


def wrap_step(optimizer: torch.optim.Optimizer) -> None:
    """Let the step of the optimizer's class run hooks, as torch's constructor does."""
    optimizer._patch_step_function()


def add_optimizer_hooks(optimizer: torch.optim.Optimizer, key, before_step: Callable, before_load: Callable) -> None:
    """As ``register_step_pre_hook`` and ``register_load_state_dict_pre_hook`` do, under the caller's key."""
    vars(optimizer).setdefault("_optimizer_step_pre_hooks", OrderedDict())[key] = before_step
    vars(optimizer).setdefault("_optimizer_load_state_dict_pre_hooks", OrderedDict())[key] = before_load


def remove_optimizer_hooks(optimizer: torch.optim.Optimizer, key) -> bool:
    """Undo :func:`add_optimizer_hooks`, and return whether there were such hooks."""
    if step_hooks(optimizer).pop(key, None) is None:
        return False
    del optimizer._optimizer_load_state_dict_pre_hooks[key]
    return True


def state_of_optimizer_hooks(before_step: dict, before_load: dict) -> dict:
    """The entries of an optimizer's ``__getstate__`` that hold these hooks."""
    return {
        "_optimizer_step_pre_hooks": OrderedDict(before_step),
        "_optimizer_load_state_dict_pre_hooks": OrderedDict(before_load),
    }


# The functions that has_torchs_init_group has found to be torch's, by id, so that a look-up can replace the call.
torchs_init_groups: dict[int, Any] = {}


def has_torchs_init_group(optimizer: torch.optim.Optimizer) -> bool:
    """Whether torch's own ``_init_group`` fills the lists for a step: a subclass or a patch may have replaced it."""
    found: Any = getattr(optimizer._init_group, "__func__", None)  # type: ignore[attr-defined]
    function = found
    # The first call of torch.compile puts a wrapper around torch's own.
    while _directory_of_code(function) == os.path.join(os.path.dirname(torch.__file__), "_dynamo"):
        function = getattr(function, "_torchdynamo_orig_callable", None)
    if _directory_of_code(function) != os.path.dirname(torch.optim.__file__):
        return False
    torchs_init_groups[id(found)] = found
    return True


def _directory_of_code(function: object) -> str | None:
    code = getattr(function, "__code__", None)
    return None if code is None else os.path.dirname(code.co_filename)


def step_without_hooks(optimizer: type[torch.optim.Optimizer]) -> Callable:
    """The step as the class defines it, without the wrapper that torch adds when it makes the first instance."""
    step: Any = optimizer.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step


def check_graph_capture(optimizer: torch.optim.Optimizer) -> None:
    """Raise RuntimeError in a CUDA graph capture without capturable=True: replays would repeat one step's numbers."""
    # torch 2.10 has only the older name.
    check = getattr(optimizer, "_accelerator_graph_capture_health_check", None)
    (check or optimizer._cuda_graph_capture_health_check)()


def divide_by_scale_(grads: list[Tensor], inverse_scale: Tensor) -> None:
    """Multiply gradients of one device and dtype by GradScaler's inverse scale, in place and as GradScaler does."""
    found_inf = torch.zeros((), device=inverse_scale.device)
    torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inverse_scale)


def gradient_hooks(param: Tensor) -> OrderedDict[int, Callable]:
    """The hooks of ``register_post_accumulate_grad_hook`` on a parameter, by the id of their handles."""
    return getattr(param, "_post_accumulate_grad_hooks", None) or OrderedDict()


def relink_gradient_hooks(param: Tensor) -> None:
    """Let autograd find the hooks again after swap_tensors, which moves autograd's entry but not their dictionary."""
    param._post_accumulate_grad_hooks = param._post_accumulate_grad_hooks


def wrap_conversions(wrap: Callable) -> None:
    """Replace ``apply``, which converts every module (``.to``, ``.half``, ``.to_empty``), by ``wrap(apply)``."""
    torch.nn.Module._apply = wrap(torch.nn.Module._apply)  # type: ignore[method-assign]


# The rest of this file is about modules.

# The parametrization of torch.nn.utils.parametrizations.weight_norm. Its ``dim`` is -1 for a norm over all entries.
WeightNormParametrization = torch.nn.utils.parametrizations._WeightNorm

# The base class of the convolutions, and that of the transposed ones.
Convolution = torch.nn.modules.conv._ConvNd
ConvTranspose = torch.nn.modules.conv._ConvTransposeNd

# The base class of batch and instance normalization.
BatchNormalization = torch.nn.modules.batchnorm._NormBase


def is_compiled_in_place(module: torch.nn.Module) -> bool:
    """Whether ``module.compile()`` was called: its calls then run compiled."""
    return module._compiled_call_impl is not None


_HOOKS_OF_MODULES = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def hooks_of_module(module: torch.nn.Module) -> dict[str, Any]:
    """The dictionaries of the module's hooks by attribute, and the flag that says of which kind backward hooks are."""
    attributes = vars(module)
    return {name: attributes[name] for name in _HOOKS_OF_MODULES}


def bind_hook(hook: Callable, module: torch.nn.Module) -> Callable:
    """The hook, bound to another module if it is bound to one, as ``register_load_state_dict_pre_hook`` binds it."""
    if isinstance(hook, torch.nn.modules.module._WrappedHook) and hook.with_module:
        return torch.nn.modules.module._WrappedHook(hook.hook, module)
    return hook


# The rest of this file is about torch.nn.utils.parametrize, which gives a parametrized module a class of its own.


def give_own_class(module: torch.nn.Module) -> None:
    """Let no other module have the class of this parametrized module, nor will a deep copy of it.

    torch's deep copies have the class of the module that they are a copy of. A parametrization that is added to one of
    them or removed from one then breaks the others, and within ``parametrize.cached()`` they read each other's tensors.
    torch also cannot copy an ``nn.LSTM`` or its kind once it has computed a parametrized tensor, because it keeps the
    tensor in a list. If the module's original class says how it is copied, torch's way of copying stays.
    """
    plain = type(module).__bases__[0]
    module.__class__ = plain
    parametrize._inject_new_class(module)
    for name in module.parametrizations:  # type: ignore[union-attr]
        parametrize._inject_property(module, name)
    torchs_deepcopy = vars(type(module)).get("__deepcopy__")
    if torchs_deepcopy is not None:
        type(module).__deepcopy__ = _deepcopy_with_own_class(torchs_deepcopy)  # type: ignore[attr-defined]


def _deepcopy_with_own_class(torchs_deepcopy: Callable) -> Callable:
    def deepcopy(module: Any, memo: dict) -> torch.nn.Module:
        if isinstance(module, torch.nn.RNNBase):
            memo[id(module._flat_weights)] = []
        copied = torchs_deepcopy(module, memo)
        give_own_class(copied)
        refresh_recurrent_weights(copied)
        return copied

    return deepcopy


def refresh_recurrent_weights(module: torch.nn.Module) -> None:
    """Let an ``nn.LSTM`` or its kind list its tensors again, so that ``flatten_parameters`` takes the right ones."""
    if isinstance(module, torch.nn.RNNBase):
        module._init_flat_weights()
