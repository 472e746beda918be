"""Activation functions in a running model, modules or plain calls such as ``torch.relu(x)``, and their flat parts.

An activation function is flat from the end of its range on, as far as its derivative is at most 5 % of the largest. An
entry there passes next to no gradient on: it is saturated. A unit that is there in every sample and position is dead in
this batch.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# The share of the largest derivative up to which a function is flat.
FLAT_SHARE = 0.05

# tanh' = 1 - tanh^2 is FLAT_SHARE at this result. sigmoid(x) = (1 + tanh(x/2)) / 2 is flat at the same share of its
# range, and softsign' = (1 - |softsign|)^2.
TANH_FLAT = math.sqrt(1 - FLAT_SHARE)
SOFTSIGN_FLAT = 1 - math.sqrt(FLAT_SHARE)

# The arguments below which these are flat: the largest ones, found with float64 derivatives at steps of 1e-5. The test
# of this file computes them again.
GELU_FLAT, GELU_TANH_FLAT, SILU_FLAT, MISH_FLAT = -2.27857, -2.28571, -3.92990, -3.98126
# exp(x) is FLAT_SHARE here, and the logistic function, softplus' derivative, there.
EXP_FLAT, LOGISTIC_FLAT = math.log(FLAT_SHARE), math.log(FLAT_SHARE / (1 - FLAT_SHARE))


class Flat(NamedTuple):
    """An activation is flat where its result, or its argument, is at most ``lower`` or at least ``upper``."""

    lower: float
    upper: float | None = None


class Activation(NamedTuple):
    """One call of an activation function. ``values`` are its results or its arguments, to be compared with ``flat``."""

    argument: Tensor
    result: Tensor
    values: Tensor
    flat: Flat

    @property
    def version(self) -> int:
        return 0 if self.values.is_inference() else self.values._version


def _of_result(*limits: float) -> Callable[..., tuple[bool, Flat]]:
    return lambda *_, **__: (False, Flat(*limits))


def _of_argument(limit: float) -> Callable[..., tuple[bool, Flat]]:
    return lambda *_, **__: (True, Flat(limit))


def _hardtanh(input, min_val=-1.0, max_val=1.0, inplace=False) -> tuple[bool, Flat]:
    return False, Flat(min_val, max_val)


def _gelu(input, approximate="none") -> tuple[bool, Flat]:
    return True, Flat(GELU_FLAT if approximate == "none" else GELU_TANH_FLAT)


def _elu(input, alpha=1.0, inplace=False) -> tuple[bool, Flat]:
    """elu' = alpha exp(x) below 0, and 1 above."""
    share = FLAT_SHARE * max(1.0, 1 / abs(alpha)) if alpha else 1.0
    return True, Flat(min(0.0, math.log(share)))


def _celu(input, alpha=1.0, inplace=False) -> tuple[bool, Flat]:
    return True, Flat(alpha * EXP_FLAT)


def _softplus(input, beta=1.0, threshold=20.0) -> tuple[bool, Flat]:
    return True, Flat(LOGISTIC_FLAT / beta)


def _functions() -> dict[Any, Callable[..., tuple[bool, Flat]]]:
    """torch's functions -> a function of the same arguments that says (whether it is about the argument, what is flat).

    Leaky rectifiers are not among them: they are flat nowhere.
    """
    names = {
        "relu": _of_result(0.0),
        "relu6": _of_result(0.0, 6.0),
        "hardtanh": _hardtanh,
        "hardsigmoid": _of_result(0.0, 1.0),
        "tanh": _of_result(-TANH_FLAT, TANH_FLAT),
        "sigmoid": _of_result((1 - TANH_FLAT) / 2, (1 + TANH_FLAT) / 2),
        "softsign": _of_result(-SOFTSIGN_FLAT, SOFTSIGN_FLAT),
        "gelu": _gelu,
        "silu": _of_argument(SILU_FLAT),
        "mish": _of_argument(MISH_FLAT),
        "elu": _elu,
        "celu": _celu,
        "selu": _of_argument(EXP_FLAT),
        "softplus": _softplus,
        "hardswish": _of_argument(-3.0),
    }
    return {
        function: flat
        for name, flat in names.items()
        for place in (torch, Tensor, F)
        for function in (getattr(place, name, None), getattr(place, f"{name}_", None))
        if function is not None
    }


_FUNCTIONS = _functions()


# torch's modules of these functions -> a function of the module with the same result.
MODULES: dict[type[nn.Module], Callable[[Any], tuple[bool, Flat]]] = {
    nn.ReLU: _of_result(0.0),
    nn.ReLU6: _of_result(0.0, 6.0),
    nn.Hardtanh: lambda module: _hardtanh(None, module.min_val, module.max_val),
    nn.Hardsigmoid: _of_result(0.0, 1.0),
    nn.Tanh: _of_result(-TANH_FLAT, TANH_FLAT),
    nn.Sigmoid: _of_result((1 - TANH_FLAT) / 2, (1 + TANH_FLAT) / 2),
    nn.Softsign: _of_result(-SOFTSIGN_FLAT, SOFTSIGN_FLAT),
    nn.GELU: lambda module: _gelu(None, module.approximate),
    nn.SiLU: _of_argument(SILU_FLAT),
    nn.Mish: _of_argument(MISH_FLAT),
    nn.ELU: lambda module: _elu(None, module.alpha),
    nn.CELU: lambda module: _celu(None, module.alpha),
    nn.SELU: _of_argument(EXP_FLAT),
    nn.Softplus: lambda module: _softplus(None, module.beta),
    nn.Hardswish: _of_argument(-3.0),
}

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def has_only_known_activations(module: nn.Module) -> bool:
    """Whether the module itself calls no activation function, or is one of ``MODULES`` that keeps its argument."""
    kind = type(module)
    if kind in _CONTAINERS:
        return True
    if module._modules or not kind.__module__.startswith("torch.nn.modules."):
        return False
    # In place, the argument that decides is gone when the hook runs.
    return kind not in MODULES or not getattr(module, "inplace", False) or not MODULES[kind](module)[0]


class Watching(TorchFunctionMode):
    """Calls ``found(activation)`` after every call of an activation function inside the ``with`` block."""

    def __init__(self, found: Callable[[Activation], None]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        flat_of = _FUNCTIONS.get(func)
        if flat_of is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        argument = args[0] if args else kwargs.get("input")
        try:
            of_argument, flat = flat_of(*args, **kwargs)
        except Exception:
            # The function itself says what is wrong with its arguments.
            return func(*args, **kwargs)
        is_in_place = kwargs.get("inplace") or func.__name__.endswith("_") or any(arg is True for arg in args[1:])
        values = argument.detach().clone() if of_argument and is_in_place else argument
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and isinstance(argument, Tensor):
            self.found(Activation(argument, result, values if of_argument else result, flat))
        return result
