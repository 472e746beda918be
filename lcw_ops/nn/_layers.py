"""The parts that the GmP and the weight-norm layers share.

None of these layers is a subclass of its namesake in torch.nn: code that finds an ``nn.Linear`` assumes that the layer
applies its ``weight``.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lcw_ops._checks import describe

Layer = TypeVar("Layer", bound=nn.Module)

# A convolution's arguments, and the padding that its forward pass reads.
_ATTRIBUTES = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
    "_reversed_padding_repeated_twice",
)


class Convolution(nn.Module):
    """A convolution with torch's arguments and torch's forward pass, but without its weight."""

    # The classes for 1, 2 and 3 dimensions set these: torch's layer, and its function that pads and convolves.
    _plain: Any
    _conv_forward: Callable[..., Tensor]

    kernel_size: tuple[int, ...]

    def __init__(self, plain: Any) -> None:
        super().__init__()
        for name in _ATTRIBUTES:
            setattr(self, name, getattr(plain, name))
        self._filter_shape = tuple(plain.weight.shape[1:])
        self._arguments = plain.extra_repr()

    @classmethod
    def _arguments_of(cls, layer: nn.Module) -> dict:
        return {name: getattr(layer, name) for name in _ATTRIBUTES if not name.startswith("_")}

    def extra_repr(self) -> str:
        return self._arguments


def are_per_unit(rows: Tensor, *vectors: Tensor) -> bool:
    """Whether each vector has one number per row, in the rows' dtype. torch would broadcast or cast other vectors."""
    return all(vector.shape == rows.shape[:1] and vector.dtype == rows.dtype for vector in vectors)


def check_fan_in(module: nn.Module, fan_in: int) -> None:
    if fan_in < 1:
        expected = "at least 1, because a unit without inputs has no direction"
        raise ValueError(describe(type(module).__name__, "a unit", f"has {fan_in} inputs", expected))


@torch.enable_grad()
def applied_parameters(function: str, layer: nn.Module, kind: type[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """The weight that a plain layer applies, however it is parametrized, and its bias. Both keep requires_grad."""
    if not isinstance(layer, kind):
        raise TypeError(describe(function, "layer", f"is a {type(layer).__name__}", f"a torch.nn.{kind.__name__}"))
    applied: Any = layer
    is_constrained = hasattr(layer, "effective_weight")
    return applied.effective_weight() if is_constrained else applied.weight, applied.bias


def make_empty(kind: type[Layer], *arguments, **options) -> Layer:
    """A layer whose parameters are uninitialised."""
    return cast(Layer, nn.utils.skip_init(kind, *arguments, **options))
