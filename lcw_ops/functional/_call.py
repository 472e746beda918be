"""The first steps in a call of a layer's function: ``lcw_linear``, ``gmp_linear`` and ``weight_norm_linear``."""

from collections.abc import Callable

import torch
from torch import Tensor

from lcw_ops import _checks, _torch
from lcw_ops.ops import backends

# The types that need no look at whether DTensors exist, which would cost a small layer a tenth of its time.
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def try_kernel_then_explain(
    op: str, kernel: Callable[..., Tensor], check: Callable, tensors: tuple, arguments: tuple
) -> Tensor | None:
    """Call the C++ kernel at once, and check the arguments only if it refuses them.

    For a small layer the checks would take as long as the kernel. The kernel's own guards suffice for memory safety.

    Args:
        op: the name by which the backend is chosen.
        kernel: takes the arguments and the backend's name.
        check: takes the arguments, and raises an error that says what is wrong with them.
        tensors: the arguments that must be tensors.
        arguments: all arguments.

    Returns:
        The kernel's result. Or None, without calling the kernel, if something else has to handle the call: a DTensor or
        another tensor subclass, a function mode, torch.compile, an export, a torch.func transform, autocast, another
        device or another backend.
    """
    if torch.compiler.is_compiling() or _torch.is_exporting():
        return None
    if _torch.may_be_overridden(*arguments) or _torch.in_functorch():
        return None
    for tensor in tensors:
        if not (isinstance(tensor, Tensor) and tensor.is_cpu):
            return None
        if type(tensor) not in _PLAIN_TYPES and _torch.has_dtensor(tensor):
            return None
    if _torch.is_any_autocast_enabled() or not backends.is_cpp_chosen(op):
        return None
    try:
        return kernel(*arguments, "cpp")
    except (RuntimeError, TypeError, AttributeError, IndexError):
        check(*arguments)
        raise


def choose_backend(op: str, like: Tensor, width: int) -> str:
    """The backend that runs the op on rows of ``width`` numbers of ``like``'s dtype, on its device.

    An exported program gets the reference, unless a backend was asked for. The reference consists of torch's own
    operators, so the program runs in a process without this package.
    """
    if _torch.is_exporting() and backends.requested() is None:
        return "reference"
    return backends.choose(op, like.device, width, like.dtype.itemsize)


def check_layer(function: str, **tensors: Tensor) -> bool:
    """Check dtypes, layouts and devices of a layer's arguments. An argument that is None is refused.

    Pass x as the first argument: the checks compare the others with the first.

    Returns whether autocast is on. Under autocast the floating dtypes may differ.
    """
    x = tensors["x"]
    autocast = isinstance(x, Tensor) and _torch.is_autocast_enabled(x)
    for name, tensor in tensors.items():
        if autocast or tensor is None:
            _checks.accumulation_dtype(function, **{name: tensor})
    if not autocast:
        _checks.accumulation_dtype(function, **tensors)
    _checks.check_dense(function, **tensors)
    _checks.check_devices(function, **tensors)
    return autocast


def check_float64_alone(function: str, **tensors: Tensor) -> None:
    """For a call under autocast: TypeError if some arguments are float64 and others are not.

    Autocast does not cast float64, so the layer's matrix product would fail.
    """
    if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        _checks.accumulation_dtype(function, **tensors)


def without_none(**tensors: Tensor | None) -> dict[str, Tensor]:
    """The arguments that are not None."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
