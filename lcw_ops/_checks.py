"""What the public functions check before they compute: dtype, shape, numbers and names, with one form of message.

"<function>: <argument> is <what came>; expected <what is right>. <What to do.>" Nothing is cast, guessed or left to
fail later. The rule is lcw_ops' own.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lcw_ops._names import SOLVERS

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LEAST_FLOAT32, LARGEST_FLOAT32 = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def accumulation_dtype(function: str, **tensors: Tensor | None) -> torch.dtype:
    """The dtype to compute in: float32 for 16-bit tensors, otherwise the tensors' own. None is skipped after the first.

    Raises TypeError where an argument is no tensor, is not floating point, or differs in dtype from the first.
    """
    first_argument, first = next(iter(tensors.items()))
    for argument, tensor in tensors.items():
        if tensor is None and argument != first_argument:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{function}: {argument} is a {type(tensor).__name__}; expected a torch.Tensor.")
        if tensor.dtype not in FLOATING:
            raise TypeError(
                f"{function}: {argument} is {tensor.dtype}; expected float64, float32, bfloat16 or float16. "
                f"Convert it first, for example {argument}.float()."
            )
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{function}: {argument} is {tensor.dtype}; expected {first.dtype}, as {first_argument} is. "
                f"Convert one of the two, or use torch.autocast."
            )
    return torch.promote_types(first.dtype, torch.float32)


def check_dense(function: str, **tensors: Tensor | None) -> None:
    """TypeError where an argument is sparse or nested. None is skipped."""
    for argument, tensor in tensors.items():
        if tensor is not None and (tensor.layout is not torch.strided or tensor.is_nested):
            kind = "a nested tensor" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            raise TypeError(f"{function}: {argument} is {kind}; expected a dense tensor. Convert it first.")


def check_devices(function: str, **tensors: Tensor | None) -> None:
    """TypeError where an argument is on another device than the first. None is skipped."""
    (first_argument, first), *others = tensors.items()
    for argument, tensor in others:
        if tensor is not None and tensor.device != first.device:
            raise TypeError(
                f"{function}: {argument} is on {tensor.device}; expected {first.device}, as {first_argument} is. "
                f"Move one of the two."
            )


def check_shape(function: str, argument: str, tensor: Tensor, right: bool, expected: str, remedy: str = "") -> None:
    """ValueError with the shape that came and the shape that was expected, unless `right`."""
    if not right:
        message = f"{function}: {argument} has shape {tuple(tensor.shape)}; expected {expected}."
        raise ValueError(f"{message} {remedy}".rstrip())


def check_positive(function: str, argument: str, value: float) -> None:
    """A finite number above 0: TypeError if it is no number, ValueError if it is out of range."""
    _check_number(function, argument, value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{function}: {argument} is {value}; expected a finite number > 0.")


def check_positive_float32(function: str, argument: str, value: float) -> None:
    """A number above 0 that float32 holds with all its digits: otherwise kernels would compute with 0 or infinity."""
    check_positive(function, argument, value)
    if not LEAST_FLOAT32 <= value <= LARGEST_FLOAT32:
        raise ValueError(f"{function}: {argument} is {value}; expected a number from 1.2e-38 to 3.4e38, as in float32.")


def check_non_negative(function: str, argument: str, value: float) -> None:
    """A finite number, 0 allowed: TypeError if it is no number, ValueError if it is out of range."""
    _check_number(function, argument, value)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{function}: {argument} is {value}; expected a finite number >= 0.")


def check_choice(function: str, argument: str, value: object, choices: Iterable[object]) -> None:
    """ValueError that lists the choices, unless `value` is one of them."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{function}: {argument} is {value!r}; expected one of {', '.join(map(repr, choices))}.")


def check_count(owner: str, argument: str, count: int) -> None:
    """An int from 1 to 2^63 - 1: TypeError if it is no int, ValueError if it is out of range."""
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{owner}: {argument} is {count!r}, expected an int, or None for the default")
    if not 1 <= count < 2**63:
        raise ValueError(f"{owner}: {argument} is {count}, expected at least 1, or None for the default")


def check_solver(owner: str, solver: str, tolerance: float | None, window: int | None) -> None:
    """How the recurrence is solved; ValueError for options of the parallel solver without it."""
    check_choice(owner, "solver", solver, SOLVERS)
    for argument, value in (("tolerance", tolerance), ("window", window)):
        if value is not None and solver == "sequential":
            raise ValueError(
                f"{owner}: {argument} is {value}, but the sequential solver is exact, layer by layer; leave it None, "
                'or take solver="parallel"'
            )
    if tolerance is not None:
        check_positive(owner, "tolerance", tolerance)
    if window is not None:
        check_count(owner, "window", window)


def _check_number(function: str, argument: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{function}: {argument} is a {type(value).__name__}; expected a Python number.")
