"""Checks of arguments: dtype, shape, numbers and names, with one form of message.

"<function>: <argument> is <what came>; expected <what is right>. <What to do.>"

The public functions check before they compute. Nothing is cast, guessed or left to fail later. None of the checks
reads a tensor's numbers.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lcw_ops._names import SOLVERS

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LEAST_FLOAT32, LARGEST_FLOAT32 = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def describe(function: str, argument: str, came: str, expected: str, remedy: str = "") -> str:
    """The message of every error about an argument. `came` has a verb ("is 0"); `expected` follows "expected"."""
    return f"{function}: {describe_argument(argument, came, expected, remedy)}"


def describe_argument(argument: str, came: str, expected: str, remedy: str = "") -> str:
    """The message without the function: the command line puts the command's name before an error about a flag."""
    return f"{argument} {came}; expected {expected}. {remedy}".rstrip()


def accumulation_dtype(function: str, **tensors: Any) -> torch.dtype:
    """The dtype to compute in: float32 for 16-bit tensors, otherwise the tensors' own.

    The first argument must be a tensor; any other may be None, which is skipped.

    Raises:
        TypeError: an argument is not a tensor, is not floating point, or differs in dtype from the first.
    """
    first_argument, first = next(iter(tensors.items()))
    for argument, tensor in tensors.items():
        if tensor is None and argument != first_argument:
            continue
        if not isinstance(tensor, Tensor):
            came = f"is a {type(tensor).__name__}"
            raise TypeError(describe(function, argument, came, "a torch.Tensor"))
        if tensor.dtype not in FLOATING:
            expected = "float64, float32, bfloat16 or float16"
            remedy = f"Convert it first, for example {argument}.float()."
            raise TypeError(describe(function, argument, f"is {tensor.dtype}", expected, remedy))
        if tensor.dtype != first.dtype:
            expected = f"{first.dtype}, as {first_argument} is"
            remedy = "Convert one of the two, or use torch.autocast."
            raise TypeError(describe(function, argument, f"is {tensor.dtype}", expected, remedy))
    # Not torch.promote_types: torch.export would record it as a call.
    return torch.float64 if first.dtype == torch.float64 else torch.float32


def check_dense(function: str, **tensors: Tensor | None) -> None:
    """Raise TypeError if an argument is sparse or nested. None passes."""
    for argument, tensor in tensors.items():
        if tensor is not None and (tensor.layout is not torch.strided or tensor.is_nested):
            kind = "a nested tensor" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            dense = f"{argument}.to_padded_tensor(0.0)" if tensor.is_nested else f"{argument}.to_dense()"
            remedy = f"Convert it first, for example {dense}."
            raise TypeError(describe(function, argument, f"is {kind}", "a dense tensor", remedy))


def check_devices(function: str, **tensors: Tensor | None) -> None:
    """Raise TypeError if an argument is on another device than the first. None passes."""
    (first_argument, first), *others = tensors.items()
    for argument, tensor in others:
        if tensor is not None and first is not None and tensor.device != first.device:
            expected = f"{first.device}, as {first_argument} is"
            raise TypeError(describe(function, argument, f"is on {tensor.device}", expected, "Move one of the two."))


def check_shape(function: str, argument: str, tensor: Tensor, right: bool, expected: str, remedy: str = "") -> None:
    """Raise a ValueError with the tensor's shape and the expected one, unless `right`.

    torch.compile recompiles for every size in a formatted string. If `expected` contains a size, call this only for a
    wrong shape.
    """
    if not right:
        raise ValueError(describe(function, argument, f"has shape {tuple(tensor.shape)}", expected, remedy))


def check_rows(function: str, argument: str, rows: Tensor, expected: str = "(n, m)", least_fan_in: int = 0) -> None:
    """Raise ValueError unless `rows` is a matrix of one row per unit, with at least `least_fan_in` columns."""
    right = rows.dim() == 2 and rows.shape[1] >= least_fan_in
    if least_fan_in:
        expected += f" with m >= {least_fan_in}"
    check_shape(function, argument, rows, right, expected, "Flatten a convolution's filter to one row first.")


def check_features(function: str, x: Tensor, fan_in: int, which: str) -> None:
    """Raise ValueError unless the last dimension of `x` is `fan_in`; `which` says where that number comes from."""
    if x.dim() < 1 or x.shape[-1] != fan_in:
        check_shape(function, "x", x, False, f"(..., {fan_in}), {which}")


def check_per_unit(function: str, argument: str, values: Tensor, units: int) -> None:
    """Raise ValueError unless `values` has shape (units,)."""
    if values.dim() != 1 or values.shape[0] != units:
        check_shape(function, argument, values, False, f"({units},), one value per unit")


def check_positive(function: str, argument: str, value: float) -> None:
    """Raise TypeError unless `value` is a number, and ValueError unless it is finite and above 0."""
    _check_number(function, argument, value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(describe(function, argument, f"is {value}", "a finite number > 0"))


def check_positive_float32(function: str, argument: str, value: float) -> None:
    """As :func:`check_positive`, and ValueError outside float32's normal range: kernels would see 0 or infinity."""
    check_positive(function, argument, value)
    if not LEAST_FLOAT32 <= value <= LARGEST_FLOAT32:
        expected = "a number from 1.2e-38 to 3.4e38, as in float32"
        raise ValueError(describe(function, argument, f"is {value}", expected))


def check_non_negative(function: str, argument: str, value: float) -> None:
    """Raise TypeError unless `value` is a number, and ValueError unless it is finite and at least 0."""
    _check_number(function, argument, value)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(describe(function, argument, f"is {value}", "a finite number >= 0"))


def check_choice(function: str, argument: str, value: object, choices: Iterable[object]) -> None:
    """Raise a ValueError that lists the choices, unless `value` is one of them."""
    choices = tuple(choices)
    if value not in choices:
        expected = f"one of {', '.join(map(repr, choices))}"
        raise ValueError(describe(function, argument, f"is {value!r}", expected))


def check_count(function: str, argument: str, count: int) -> None:
    """Raise TypeError unless `count` is an int, and ValueError unless it is from 1 to 2^63 - 1."""
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(describe(function, argument, f"is {count!r}", "an int, or None for the default"))
    if not 1 <= count < 2**63:
        raise ValueError(describe(function, argument, f"is {count}", "at least 1, or None for the default"))


def check_solver(function: str, solver: str, tolerance: float | None, window: int | None) -> None:
    """Raise ValueError unless the solver is known and each option is valid and belongs to it."""
    check_choice(function, "solver", solver, SOLVERS)
    for argument, value in (("tolerance", tolerance), ("window", window)):
        if value is not None and solver == "sequential":
            expected = "None, because the sequential solver is exact"
            remedy = "Leave it out, or use solver='parallel'."
            raise ValueError(describe(function, argument, f"is {value}", expected, remedy))
    if tolerance is not None:
        check_positive(function, "tolerance", tolerance)
    if window is not None:
        check_count(function, "window", window)


def _check_number(function: str, argument: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(describe(function, argument, f"is a {type(value).__name__}", "a Python number"))
