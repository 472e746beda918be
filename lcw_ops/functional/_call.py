"""The first steps that the functions of several stems share."""

import torch
from torch import Tensor

from lcw_ops import _checks
from lcw_ops.ops import backends

CPU = torch.device("cpu")


def is_plain_call(op, *tensors) -> bool:
    """Whether the CPU's kernel is called and nothing stands between: no autocast, transform, compiler or request."""
    for tensor in tensors:
        if not (isinstance(tensor, Tensor) and tensor.is_cpu):
            return False
    return (
        not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and not torch.compiler.is_compiling()
        and backends.choose(op, CPU) == "cpp"
    )


def check_layer(op: str, **tensors: Tensor) -> bool:
    """Dtypes, layouts and devices; x comes first. Returns whether autocast, which takes any dtypes, is on."""
    x = tensors["x"]
    # Autocast does not know the meta device.
    autocast = isinstance(x, Tensor) and not x.is_meta and torch.is_autocast_enabled(x.device.type)
    for name, tensor in tensors.items():
        _checks.accumulation_dtype(op, **{name: tensor})
    # Autocast leaves float64 as it is.
    if not autocast or any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        _checks.accumulation_dtype(op, **tensors)
    _checks.check_dense(op, **tensors)
    _checks.check_devices(op, **tensors)
    return autocast


def check_rows(op: str, name: str, rows: Tensor, expected: str) -> None:
    _checks.check_shape(op, name, rows, rows.dim() == 2, expected, "Flatten a filter to one row first.")


def check_features(op: str, x: Tensor, fan_in: int, which: str) -> None:
    # A size put into words would compile anew for every size: only a wrong one is.
    if x.dim() < 1 or x.shape[-1] != fan_in:
        _checks.check_shape(op, "x", x, False, f"(..., {fan_in}), {which}")


def check_per_unit(op: str, name: str, values: Tensor, units: int) -> None:
    if values.dim() != 1 or values.shape[0] != units:
        _checks.check_shape(op, name, values, False, f"({units},), one value per unit")
