"""How a function meets what torch does with its call: exporters, tracers and the ``__torch_function__`` protocol.

This file holds every private name of torch that this takes, behind a plain one. It imports nothing that
``import torch`` has not imported already. It is tested on the oldest and the newest torch that the package supports.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import handle_torch_function, has_torch_function_variadic


def is_exporting() -> bool:
    """Whether the call becomes part of a program that must run without this package.

    True in torch.export (torch.onnx.export uses it) and in torch.jit.trace (the TorchScript exporter to ONNX uses it).
    False in torch.compile: its programs run in this process, on the fused ops.
    """
    return torch.compiler.is_exporting() or torch._C._is_tracing() or is_in_onnx_export()


def is_in_onnx_export() -> bool:
    """Whether torch.onnx.export is running: its programs have no gradients."""
    # torch.onnx.is_in_onnx_export() imports the exporters, which takes half a second: call it only if one is loaded.
    exporter_is_there = (
        "torch.onnx._internal.exporter" in sys.modules or "torch.onnx._internal.torchscript_exporter" in sys.modules
    )
    return exporter_is_there and torch.onnx.is_in_onnx_export()


# torch.compile, and torch.export with strict=True, then take the answers as constants instead of tracing the functions.
is_exporting._dynamo_marked_constant = is_in_onnx_export._dynamo_marked_constant = True


def unrecorded(function: Callable, *arguments):
    """Return ``function(*arguments)`` without letting torch.jit.trace record it.

    Checks run in here: sizes are then plain ints, and comparing them raises no TracerWarning.
    """
    state = torch._C._get_tracing_state() if torch.jit.is_tracing() else None
    if state is None:
        return function(*arguments)
    torch._C._set_tracing_state(None)
    try:
        return function(*arguments)
    finally:
        torch._C._set_tracing_state(state)


def has_values(tensor: Tensor) -> bool:
    """Whether its numbers can be looked at: not on the meta device, and in FakeTensorMode all results are fake."""
    return not tensor.is_meta and detect_fake_mode([tensor]) is None


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, without the assertion on the tensor that torch.export records beside ``to``."""
    if tensor.dtype == dtype:
        return tensor
    return torch.ops.aten._to_copy.default(tensor, dtype=dtype) if torch.compiler.is_exporting() else tensor.to(dtype)


def constant(value: float, **options) -> Tensor:
    """The number as a tensor of shape (1,).

    ONNX keeps a float64 tensor exactly, but rounds the number of ``torch.full`` to float32.
    """
    if torch.compiler.is_exporting() and isinstance(value, (int, float)):
        return torch.tensor([value], **options)
    return torch.full((1,), value, **options)


# Before 2.13, scan from a state that requires no gradient drops what later steps pass back to earlier ones: gradients
# are silently wrong (https://github.com/pytorch/pytorch/issues/184528).
_SCAN_DROPS_GRADIENTS = torch.__version__ < (2, 13)


def ready_for_scan(state: Tensor, *arguments) -> Tensor:
    """``state``, requiring a gradient where one of the arguments that are tensors does."""
    if _SCAN_DROPS_GRADIENTS:
        for argument in arguments:
            if isinstance(argument, Tensor):
                # The sum over an empty slice adds nothing, and requires a gradient when the tensor does.
                state = state + torch.atleast_1d(argument).narrow(0, 0, 0).sum()
    return state


def scan(
    step: Callable, state: Tensor, per_step: dict[str, Tensor], shared: dict[str, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Run ``state, outputs = step(state, arguments)`` for every step, as one node of a graph, whatever the length.

    The first state comes from :func:`ready_for_scan`. The arguments of a step are the tensors of ``shared`` and the
    slices of the tensors of ``per_step`` along dim 0; ``per_step`` holds at least one. ``outputs`` is a list of
    tensors, which the result stacks over the steps. ``step`` must not return a tensor twice, nor one of its arguments.
    """
    # Imported late: it takes as long as torch.
    from torch._higher_order_ops.scan import scan, scan_op

    if torch.compiler.is_dynamo_compiling():
        return scan(lambda state, slices: step(state, {**shared, **slices}), state, per_step)
    # scan itself would call torch.compile, which takes a batch as large as the width for the width: scan_op does not.
    names = [*per_step, *shared]

    def flat_step(state, *arguments):
        state, outputs = step(state, dict(zip(names, arguments, strict=True)))
        return [state, *outputs]

    last, *outputs = scan_op(flat_step, [state], list(per_step.values()), tuple(map(_without_data, shared.values())))
    return last, outputs


def _without_data(tensor: Tensor) -> Tensor:
    """``tensor`` as scan needs it: torch.export leaves a plain attribute of a module as it is, with its data."""
    return tensor if isinstance(tensor, FakeTensor) else torch.ops.aten.alias.default(tensor)


def is_overridden(*arguments) -> bool:
    """Whether an argument, or a function mode, takes the call over by torch's ``__torch_function__`` protocol.

    A function asks first of all, and then calls :func:`hand_over`. torch.fx then records one call, and Tensor
    subclasses and function modes see it as they see torch's own functions.

    torch.compile traces into the function and cannot hand a call over: under it, a subclass is not asked. While
    exporting only arguments are asked: torch.export watches through a mode of its own, which is off while it carries
    out a function that it was handed. It would not record that the function switches autocast off.
    """
    if torch.compiler.is_dynamo_compiling() or not has_torch_function_variadic(*arguments):
        return False
    return not torch.compiler.is_exporting() or any(map(_overrides, arguments))


def hand_over(function: Callable, *arguments):
    """Let the argument or mode that takes the call over carry out ``function(*arguments)``."""
    return handle_torch_function(function, arguments, *arguments)


def _overrides(argument) -> bool:
    disabled = torch._C._disabled_torch_function_impl
    return type(argument) is not Tensor and getattr(type(argument), "__torch_function__", disabled) is not disabled


# () -> bool: whether a torch.overrides.TorchFunctionMode is there to see a call.
is_function_mode_active = torch._C._is_torch_function_mode_enabled
